"""Decoded images in one file, which later runs map into memory instead of decoding again."""

import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from lightning_maml.io.safe_files import check_archive, whole_file

_VERSION = 1


class DecodedImages(NamedTuple):
    """Images of many classes.

    Attributes:
        images: uint8, ``[M, H, W, C]`` or ``[M, H, W]``.
        labels: Class of each image, an index into ``names``, or -1 for an image that could not be
            read, ``[M]``.
        names: Names of the classes.
        unreadable: Which images could not be read, and why.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    unreadable: list[str]


def write_cache(file: Path, source: str, content: DecodedImages) -> None:
    """Write ``content`` to a file beside the cache, and move it into place when it is complete.

    Args:
        file: Path of the cache; what is there stays until the new file is complete.
        source: What the images were decoded from; :func:`read_cache` accepts the cache for the same
            source only.
        content: What to store.

    Raises:
        OSError: If the folder cannot be written or the disk is full.
    """
    try:
        # processes on several machines may share the folder
        with whole_file(file, writer=uuid4().hex) as stream:
            torch.save({"version": _VERSION, "source": source, **content._asdict()}, stream)
    except (OSError, RuntimeError) as error:  # torch raises either where the disk is full
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"Expected to write {content.images.nbytes / 1e6:.0f} MB into {file.parent} but could "
            f"not ({reason}); make room, or choose a writable `root`, with links to the data."
        ) from error


def read_cache(
    file: Path, source: str, shape: tuple[int, ...], *, checksums: bool = False
) -> DecodedImages | None:
    """Map the cached images into memory.

    Args:
        file: Path of the cache.
        source: What they must have been decoded from.
        shape: Shape that they must have.
        checksums: Whether to read the whole file and verify its checksums; otherwise a file is
            trusted unless it is cut short.

    Returns:
        What was stored; or None, with a warning if there is a file but it is damaged, or of another
        version or source.
    """
    if not file.exists():
        return None
    try:
        content = _load(file, checksums)
        if (content["version"], content["source"]) != (_VERSION, source):
            raise ValueError("it was made from other files, or by the rules of another version")
        return _checked(DecodedImages(*(content[name] for name in DecodedImages._fields)), shape)
    except Exception as error:  # noqa: BLE001  zipfile and torch raise some ten kinds on damaged files; all mean this, and the warning says which
        warnings.warn(
            f"{file} is damaged or out of date and is not used ({type(error).__name__}: {error}).",
            stacklevel=2,
        )
        return None


def _load(file: Path, checksums: bool) -> dict[str, Any]:
    check_archive(file)
    if checksums:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    content: dict[str, Any] = torch.load(file, mmap=True, weights_only=True)
    return content


def _checked(cached: DecodedImages, shape: tuple[int, ...]) -> DecodedImages:
    images, labels = cached.images, cached.labels
    if not all(isinstance(text, str) for text in (*cached.names, *cached.unreadable)):
        raise TypeError("its names are no strings")
    if (
        labels.dtype != torch.int64
        or (images.dtype, images.shape, labels.shape) != (torch.uint8, shape, shape[:1])
        or int(labels.max()) >= len(cached.names)
    ):
        raise ValueError(
            f"{images.dtype} {list(images.shape)} with labels {list(labels.shape)} of "
            f"{len(cached.names)} classes"
        )
    return cached
