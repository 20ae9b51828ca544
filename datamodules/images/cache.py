"""A file of decoded images, which later runs map into memory instead of decoding again."""

import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from lightning_maml.errors import UserOSError
from lightning_maml.io.safe_files import check_archive, whole_file

_VERSION = 1


class DecodedImages(NamedTuple):
    """Decoded images of many classes.

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
    """Write a cache, so that it is either complete or not there.

    Args:
        file: Path of the cache. An old one stays until the new one is complete.
        source: Identifies what the images were decoded from; :func:`read_cache` accepts the cache
            for the same source only.
        content: The images.

    Raises:
        OSError: If the folder cannot be written or the disk is full.
    """
    try:
        # a name of its own for each writer, as processes on several machines may share the folder
        with whole_file(file, writer=uuid4().hex) as stream:
            torch.save({"version": _VERSION, "source": source, **content._asdict()}, stream)
    except (OSError, RuntimeError) as error:  # torch raises either where the disk is full
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserOSError(
            f"Expected to write {content.images.nbytes / 1e6:.0f} MB into {file.parent} but could "
            f"not ({reason}); make room, or choose a writable `root`, with links to the data."
        ) from error


def read_cache(
    file: Path, source: str, shape: tuple[int, ...], *, checksums: bool = False
) -> DecodedImages | None:
    """Map the images of a cache into memory.

    Args:
        file: Path of the cache.
        source: Identifies what the images must have been decoded from.
        shape: Shape that they must have, ``[M, H, W, C]`` or ``[M, H, W]``.
        checksums: Whether to read the whole file and verify its checksums; otherwise a file is
            trusted unless it is cut short.

    Returns:
        The images; None if there is no cache, or, with a warning, if it is damaged or of another
        version or source.
    """
    if not file.exists():
        return None
    try:
        content = _load(file, checksums)
        if (content["version"], content["source"]) != (_VERSION, source):
            raise ValueError("it was made from other files, or by the rules of another version")
        return _checked(DecodedImages(*(content[name] for name in DecodedImages._fields)), shape)
    # zipfile and torch raise some ten kinds of exceptions on damaged files
    except Exception as error:  # noqa: BLE001
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
    form = (images.dtype, images.shape, labels.dtype, labels.shape)
    expected = (torch.uint8, shape, torch.int64, shape[:1])
    if form != expected or int(labels.max()) >= len(cached.names):
        raise ValueError(
            f"{images.dtype} {list(images.shape)} with labels {list(labels.shape)} of "
            f"{len(cached.names)} classes"
        )
    return cached
