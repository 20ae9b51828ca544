"""Image files, class by class, decoded once and in parallel into a cache."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from lightning_maml.datamodules.cache import DecodedImages, read_cache, write_cache
from lightning_maml.datamodules.messages import first_five
from lightning_maml.datamodules.sampler import ClassImages

OnCorrupt = Literal["raise", "skip"]
Mode = Literal["L", "RGB"]
ClassFiles = Mapping[str, Sequence[Path]]
"""The image files of each class."""

_CHUNK = 64  # files that a worker decodes at a time
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # not EPS, for which Pillow starts Ghostscript


def check_on_corrupt(on_corrupt: str) -> None:
    """Check the argument ``on_corrupt``.

    Raises:
        ValueError: If its value is unknown.
    """
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"Expected `on_corrupt` to be 'raise' or 'skip' but got {on_corrupt!r}.")


class CachedImageFiles:
    """Colour images of some classes, decoded from their files once and read from a cache afterwards.

    The cache is rebuilt when a file is added, removed or changed.

    Args:
        classes: Files of each class, by its name.
        cache: Path of the cache.
        size: Height and width that images are resized to (with the Lanczos filter, whatever their aspect ratio), in pixels.
        on_corrupt: ``"raise"`` on a file that cannot be read, or ``"skip"`` it with a warning.
        description: Text for the progress bar.

    Raises:
        FileNotFoundError: If there are no files.
    """

    def __init__(self, classes: ClassFiles, cache: Path, *, size: int, on_corrupt: OnCorrupt, description: str) -> None:
        if not any(classes.values()):
            raise FileNotFoundError(f"Expected images ({', '.join(IMG_EXTENSIONS)}) of the classes in {cache.parent} but found none.")
        self._classes, self._cache, self._size = classes, cache, size
        self._on_corrupt, self._description = on_corrupt, description
        self._source = _fingerprint(classes)

    def prepare(self) -> None:
        """Decode the images, unless there is a cache of exactly these files.

        Raises:
            OSError: If an image cannot be read, or the cache cannot be written.
        """
        if self._read() is None:
            write_cache(self._cache, self._source, decode(self._classes, self._size, "RGB", self._on_corrupt, self._description))

    def read(self, classes: Sequence[str]) -> ClassImages:
        """Return the images of some classes, ``[M, 3, size, size]``, mapped into memory.

        Raises:
            FileNotFoundError: If they are not cached yet, or some could not be read and ``on_corrupt`` is ``"raise"``.
        """
        cached = self._read()
        if cached is None:
            raise FileNotFoundError(f"Expected {self._cache} to hold the decoded images but it does not; call `prepare_data()` first.")
        if cached.unreadable:
            rank_zero_warn(
                f"{len(cached.unreadable)} images cannot be read and are left out, until they are changed: {first_five(cached.unreadable)}"
            )
        members = rows_of_classes(cached)
        numbers = [cached.names.index(name) for name in classes]
        return ClassImages(cached.images.permute(0, 3, 1, 2), [members[number] for number in numbers], classes)

    def _read(self) -> DecodedImages | None:
        files = sum(map(len, self._classes.values()))
        cached = read_cache(self._cache, self._source, (files, self._size, self._size, 3))
        return None if cached is not None and cached.unreadable and self._on_corrupt == "raise" else cached


def _fingerprint(classes: ClassFiles) -> str:
    digest = sha256()
    for name, files in classes.items():
        for file in files:
            stat = os.stat(file)
            digest.update(f"{name}/{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def rows_of_classes(decoded: DecodedImages) -> list[np.ndarray]:
    """Return the rows of the images of each class."""
    labels = decoded.labels.numpy()
    by_class = np.argsort(labels, kind="stable")
    return np.split(by_class, np.searchsorted(labels[by_class], np.arange(len(decoded.names) + 1)))[1:-1]


def decode(classes: ClassFiles, size: int, mode: Mode, on_corrupt: OnCorrupt, description: str) -> DecodedImages:
    """Read all images, on all cores.

    Args:
        classes: Files of each class.
        size: Height and width to resize to.
        mode: ``"RGB"``, for ``[M, size, size, 3]``, or ``"L"``, for ``[M, size, size]``.
        on_corrupt: What to do with a file that cannot be read; a skipped one becomes zeros, without a class.
        description: Text for the progress bar.

    Raises:
        OSError: If an image cannot be read; the message names it.
    """
    files = [file for paths in classes.values() for file in paths]
    images = torch.empty(len(files), size, size, *([3] if mode == "RGB" else []), dtype=torch.uint8)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(paths) for paths in classes.values()]))
    unreadable: list[str] = []
    done = 0  # not bar.n, which stands still if progress bars are switched off
    with tqdm(total=len(files), desc=description, unit="image") as bar:
        for part, problems in _in_parallel(_Chunks(files, size, mode)):
            for number, problem in problems.items():
                file = files[done + number]
                if not problem.is_of_the_content:
                    raise OSError(f"Expected to read {file} but {problem.message}; see to that and start again.")
                if on_corrupt == "raise":
                    raise OSError(f"Expected {file} to be an image but it cannot be read ({problem.message}); copy or unpack it again.")
                labels[done + number] = -1
                unreadable.append(f"{file} ({problem.message})")
            images[done : done + len(part)] = torch.from_numpy(part)
            done += len(part)
            bar.update(len(part))
    return DecodedImages(images, labels, list(classes), unreadable)


class _Problem(NamedTuple):
    message: str
    is_of_the_content: bool  # rather than, say, of the disk or of permissions, which may be gone next time


class _Chunks(Dataset[tuple[np.ndarray, dict[int, _Problem]]]):
    def __init__(self, files: list[Path], size: int, mode: Mode) -> None:
        self._files, self._size, self._mode = files, size, mode

    def __len__(self) -> int:
        return math.ceil(len(self._files) / _CHUNK)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[int, _Problem]]:
        """Return a chunk's images, with zeros for those that cannot be read, and what is wrong with those."""
        images, problems = [], {}
        blank = np.zeros((self._size, self._size, *([3] if self._mode == "RGB" else [])), np.uint8)
        for place, file in enumerate(self._files[number * _CHUNK : (number + 1) * _CHUNK]):
            try:
                images.append(read_image(file, self._size, self._mode))
            except Exception as error:  # noqa: BLE001  a damaged file makes Pillow raise OSError, SyntaxError, ValueError and others
                images.append(blank)
                problems[place] = _Problem(
                    str(error) or type(error).__name__, not (isinstance(error, MemoryError) or getattr(error, "errno", None))
                )
        return np.stack(images), problems


def _in_parallel(chunks: _Chunks) -> DataLoader[Any]:
    """Return a loader of the chunks, with a worker per core if processes can be forked safely and there is enough to do."""
    workers = min(len(os.sched_getaffinity(0)), len(chunks) // 4) if sys.platform == "linux" else 0
    context = "fork" if workers else None  # a spawned worker would run the user's script again
    own_seeds = torch.Generator()  # without it, the first start would draw other random numbers than later ones
    return DataLoader(
        chunks, batch_size=None, collate_fn=_as_it_is, num_workers=workers, multiprocessing_context=context, generator=own_seeds
    )


def _as_it_is(chunk: Any) -> Any:
    return chunk  # arrays go through a pipe; as tensors they would fill /dev/shm, which is small in containers


def read_image(file: Path, size: int, mode: Mode) -> np.ndarray:
    """Return an image ``[size, size, 3]`` (RGB) or ``[size, size]`` (L), uint8.

    Whatever its name, it is read as one of the formats that `torchvision` lists or as GIF, never as one for which Pillow starts a program.

    Raises:
        OSError, SyntaxError, ValueError: If it is in no such format, is damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with Image.open(file, formats=_FORMATS) as image:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}), which you "
                "can set"
            )
        if image.format == "JPEG":
            return pixels(image, mode, size)
        image.verify()  # looks at its checksums, as decoding alone does not; JPEG has none
    with Image.open(file, formats=_FORMATS) as image:
        return pixels(image, mode, size)


def pixels(image: Image.Image, mode: Mode, size: int | None) -> np.ndarray:
    """Return the pixels of an image, resized unless ``size`` is None.

    Raises:
        ValueError: If they have more than 8 bits, which Pillow would cut off.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode} have more than 8 bits; convert them to 8")
    image = image.convert(mode)
    return np.array(image if size is None else image.resize((size, size), Image.Resampling.LANCZOS))


def list_class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the sorted image files, at any depth, of each folder in ``folder``; each is a class. Hidden names are skipped."""
    return {place.name: _images_below(place) for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")}


def _images_below(folder: Path) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
    return sorted(files)
