"""Image files, class by class, decoded once and in parallel into a cache."""

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache
from lightning_maml.datamodules.images.folders import IMAGE_EXTENSIONS
from lightning_maml.datamodules.messages import first_five
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserFileNotFoundError, UserOSError, UserValueError

OnCorrupt = Literal["raise", "skip"]
Mode = Literal["L", "RGB"]
ClassFiles = Mapping[str, Sequence[Path]]
"""The image files of each class."""

_CHUNK = 64  # files that a worker decodes at a time
# without EPS, for which Pillow starts Ghostscript
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_RULES = "3: transparent images on white, unless that makes them blank; turned as EXIF data say"
"""Version of how files become pixels. Caches of another version are made anew."""


def check_on_corrupt(on_corrupt: str) -> None:
    """Check the argument ``on_corrupt``.

    Raises:
        ValueError: If it is not ``"raise"`` or ``"skip"``.
    """
    if on_corrupt not in ("raise", "skip"):
        raise UserValueError(
            f"Expected `on_corrupt` to be 'raise' or 'skip' but got {on_corrupt!r}."
        )


class CachedImageFiles:
    """Colour images of some classes, decoded once and then read from a cache.

    The cache is rebuilt when a file is added, removed or changed.

    Args:
        classes: Image files of each class, by its name.
        cache: Path of the cache.
        size: Height and width that images are resized to (with the Lanczos filter, whatever their
            aspect ratio), in pixels.
        on_corrupt: What to do about a file that cannot be read: ``"raise"`` an error, or ``"skip"``
            it with a warning.
        description: Text for the progress bar.

    Raises:
        FileNotFoundError: If there are no files.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "cat.png")
        ...     Image.new("RGB", (50, 30)).save(file)
        ...     files = CachedImageFiles(
        ...         {"cat": [file]},
        ...         Path(folder, "cache.pt"),
        ...         size=28,
        ...         on_corrupt="raise",
        ...         description="Decoding",
        ...     )
        ...     files.prepare()
        ...     files.read(["cat"]).images.shape
        torch.Size([1, 3, 28, 28])
    """

    def __init__(
        self,
        classes: ClassFiles,
        cache: Path,
        *,
        size: int,
        on_corrupt: OnCorrupt,
        description: str,
    ) -> None:
        if not any(classes.values()):
            raise UserFileNotFoundError(
                f"Expected images ({', '.join(IMAGE_EXTENSIONS)}) of the classes in "
                f"{cache.parent} but found none."
            )
        self._classes, self._cache, self._size = classes, cache, size
        self._on_corrupt, self._description = on_corrupt, description
        self._source = _fingerprint(classes)

    def prepare(self) -> None:
        """Decode the images, unless there is a cache of exactly these files.

        Raises:
            OSError: If an image cannot be read, or the cache cannot be written.
        """
        if self._read() is None:
            with torch.device("cpu"):
                images = decode(
                    self._classes, self._size, "RGB", self._on_corrupt, self._description
                )
            write_cache(self._cache, self._source, images)

    def read(self, classes: Sequence[str]) -> ClassImages:
        """Map the images of some classes into memory.

        Args:
            classes: Names of the classes, in the wanted order.

        Returns:
            The images of all classes, ``[M, 3, size, size]``, with the rows of these classes.

        Raises:
            FileNotFoundError: If they are not cached yet, or some could not be read and
                ``on_corrupt`` is ``"raise"``.
        """
        cached = self._read()
        if cached is None:
            raise UserFileNotFoundError(
                f"Expected {self._cache} to hold the decoded images but it does not; call "
                "`prepare_data()` first."
            )
        if cached.unreadable:
            rank_zero_warn(
                f"{len(cached.unreadable)} images cannot be read and are left out, until they are "
                f"changed: {first_five(cached.unreadable)}"
            )
        rows = rows_of_classes(cached)
        members = [rows[cached.names.index(name)] for name in classes]
        return ClassImages(cached.images.permute(0, 3, 1, 2), members, classes)

    def _read(self) -> DecodedImages | None:
        files = sum(map(len, self._classes.values()))
        cached = read_cache(self._cache, self._source, (files, self._size, self._size, 3))
        if cached is not None and cached.unreadable and self._on_corrupt == "raise":
            return None  # decoding again raises the error
        return cached


def _fingerprint(classes: ClassFiles) -> str:
    """Return a hash that changes when a file is added, removed or changed."""
    digest = sha256(f"{_RULES}\n".encode())
    for name, files in classes.items():
        for file in files:
            digest.update(f"{name}/{file.name} {_state(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _state(file: Path) -> str:
    if _is_dead_link(file):
        return "dead link"
    stat = os.stat(file)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _is_dead_link(file: Path) -> bool:
    return os.path.islink(file) and not os.path.exists(file)


def rows_of_classes(decoded: DecodedImages) -> list[np.ndarray]:
    """Return the rows of the images of each class, without those that could not be read."""
    labels = decoded.labels.numpy()
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], np.arange(len(decoded.names) + 1))
    # the part before the first start holds the unreadable images, whose label is -1
    return np.split(by_class, starts)[1:-1]


def decode(
    classes: ClassFiles, size: int, mode: Mode, on_corrupt: OnCorrupt, description: str
) -> DecodedImages:
    """Read all images, on all cores.

    Args:
        classes: Image files of each class.
        size: Height and width to resize to, in pixels.
        mode: ``"RGB"``, for ``[M, size, size, 3]``, or ``"L"``, for ``[M, size, size]``.
        on_corrupt: What to do about a file that cannot be read. A skipped one becomes zeros and
            has no class.
        description: Text for the progress bar.

    Raises:
        OSError: If an image cannot be read; the message names it.
    """
    files = [file for paths in classes.values() for file in paths]
    channels = [3] if mode == "RGB" else []
    images = torch.empty(len(files), size, size, *channels, dtype=torch.uint8)
    files_per_class = torch.tensor([len(paths) for paths in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(files_per_class)
    unreadable: list[str] = []
    done = 0  # bar.n would stay 0 if progress bars are switched off
    with tqdm(total=len(files), desc=description, unit="image") as bar:
        for part, problems in _in_parallel(_Chunks(files, size, mode)):
            for number, problem in problems.items():
                file = files[done + number]
                if on_corrupt == "raise" or problem.kind == "passing":
                    raise _refusal(file, problem)
                labels[done + number] = -1
                unreadable.append(f"{file} ({problem.message})")
            images[done : done + len(part)] = torch.from_numpy(part)
            done += len(part)
            bar.update(len(part))
    return DecodedImages(images, labels, list(classes), unreadable)


def load_images(files: Iterable[str | Path], image_size: int, mode: Mode = "RGB") -> Tensor:
    """Read images just as :class:`ImageFolderDataModule` does.

    So a network that was trained with it sees the same pixels. Transparent images are put on white,
    photographs are turned upright according to their EXIF data, and all are resized with the
    Lanczos filter, whatever their aspect ratio. Of an animation the first picture is taken. A
    datamodule's ``transforms`` are not applied.

    Args:
        files: The image files.
        image_size: Height and width that the images are resized to, in pixels.
        mode: ``"RGB"``, or ``"L"`` for one gray channel.

    Returns:
        The images in their order, ``[n, 3, image_size, image_size]`` or
        ``[n, 1, image_size, image_size]``, float32 in 0 .. 1.

    Raises:
        ValueError: If there are no files, or an argument is out of range.
        OSError: If an image cannot be read; the message names it.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_maml.datamodules import load_images
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "drawing.png")
        ...     Image.new("RGBA", (50, 30), (0, 0, 0, 0)).save(file)  # all of it is transparent
        ...     images = load_images([file], image_size=28)
        >>> images.shape, images.min().item()
        (torch.Size([1, 3, 28, 28]), 1.0)
    """
    paths = list(map(Path, files))
    if not paths:
        raise UserValueError("Expected `files` to name at least one image but got none.")
    if image_size < 1:
        raise UserValueError(f"Expected `image_size` to be at least 1 but got {image_size}.")
    if mode not in ("RGB", "L"):
        raise UserValueError(f"Expected `mode` to be 'RGB' or 'L' but got {mode!r}.")
    images = np.stack([_read_or_refuse(file, image_size, mode) for file in paths])
    stored = torch.from_numpy(images if mode == "RGB" else images[..., None])
    return stored.permute(0, 3, 1, 2).float() / 255


def _read_or_refuse(file: Path, size: int, mode: Mode) -> np.ndarray:
    try:
        return read_image(file, size, mode)
    except Exception as error:  # Pillow raises many kinds, see _Chunks
        raise _refusal(file, _problem(file, error)) from error


class UnsuitableImage(ValueError):
    """An image that is whole but would lose what it shows; the message says how to repair it."""


class _Problem(NamedTuple):
    """Why a file could not be read.

    Attributes:
        message: What is wrong.
        kind: ``"damage"`` of the file; ``"unsuitable"``, where the message says what to do; or
            ``"passing"``, a problem of the disk or the memory that may be gone next time.
    """

    message: str
    kind: Literal["damage", "unsuitable", "passing"]


def _problem(file: Path, error: Exception) -> _Problem:
    """Say why reading a file raised an error."""
    if _is_dead_link(file):
        return _Problem(
            f"it is a link to {os.readlink(file)}, where there is nothing; mend or remove it",
            "unsuitable",
        )
    message = str(error) or type(error).__name__
    if isinstance(error, UnsuitableImage):
        return _Problem(message, "unsuitable")
    of_the_system = isinstance(error, MemoryError) or getattr(error, "errno", None)
    return _Problem(message, "passing" if of_the_system else "damage")


def _refusal(file: Path, problem: _Problem) -> OSError:
    if problem.kind == "passing":
        return UserOSError(
            f"Expected to read {file} but {problem.message}; see to that and start again."
        )
    if problem.kind == "unsuitable":
        return UserOSError(f"Expected {file} to be an image but {problem.message}.")
    return UserOSError(
        f"Expected {file} to be an image but it cannot be read ({problem.message}); copy or "
        "unpack it again."
    )


class _Chunks(Dataset[tuple[np.ndarray, dict[int, _Problem]]]):
    """The images of some files, decoded many at a time."""

    def __init__(self, files: list[Path], size: int, mode: Mode) -> None:
        self._files, self._size, self._mode = files, size, mode

    def __len__(self) -> int:
        return math.ceil(len(self._files) / _CHUNK)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[int, _Problem]]:
        """Return a chunk's images, with zeros in place of unreadable ones, and what is wrong."""
        images, problems = [], {}
        channels = [3] if self._mode == "RGB" else []
        blank = np.zeros((self._size, self._size, *channels), np.uint8)
        for place, file in enumerate(self._files[number * _CHUNK : (number + 1) * _CHUNK]):
            try:
                images.append(read_image(file, self._size, self._mode))
            # Pillow raises OSError, SyntaxError, ValueError and others on damaged files
            except Exception as error:  # noqa: BLE001
                images.append(blank)
                problems[place] = _problem(file, error)
        return np.stack(images), problems


def _in_parallel(chunks: _Chunks) -> DataLoader[Any]:
    """Return a loader of the chunks.

    It has a worker per core, if processes can be forked safely and there is enough to do.
    """
    workers = min(len(os.sched_getaffinity(0)), len(chunks) // 4) if sys.platform == "linux" else 0
    context = "fork" if workers else None  # a spawned worker would run the user's script again
    # With torch's own generator, the first run would draw other random numbers than later ones,
    # which read the cache.
    own_seeds = torch.Generator()
    return DataLoader(
        chunks,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=context,
        generator=own_seeds,
    )


def _as_it_is(chunk: Any) -> Any:
    # arrays go through a pipe; as tensors they would fill /dev/shm, which is small in containers
    return chunk


def read_image(file: Path, size: int, mode: Mode) -> np.ndarray:
    """Read one image.

    Whatever its name, it is read as one of the formats that ``torchvision`` lists or as GIF, never
    as a format for which Pillow starts another program.

    Args:
        file: The image file.
        size: Height and width to resize to, in pixels.
        mode: ``"RGB"`` or ``"L"``.

    Returns:
        The image, uint8, ``[size, size, 3]`` or ``[size, size]``.

    Raises:
        OSError, SyntaxError, ValueError: If it is in no such format, is damaged, has more than 8
            bits for a colour, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with Image.open(file, formats=_FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than "
                f"PIL.Image.MAX_IMAGE_PIXELS ({most}), which you can set"
            )
        if image.format == "JPEG":
            return pixels(image, mode, size)
        image.verify()  # checks its checksums, which decoding does not; JPEG has none
    # after verify(), an image must be opened again
    with Image.open(file, formats=_FORMATS) as image:
        return pixels(image, mode, size)


def _check_bits(image: Image.Image) -> None:
    """Refuse colours of more than 8 bits, of which Pillow's mode says nothing.

    It says so in what it hands to its decoders: ``"RGB;16B"``, or a largest value above 255. Of an
    image that was loaded before, nothing says so any more.
    """
    if image.mode.startswith(("I", "F")):
        return  # of which :func:`pixels` tells more
    of_decoders = str([tile[3] for tile in getattr(image, "tile", ())])
    numbers = [int(number) for number in re.findall(r"\b\d+\b", of_decoders)]
    # "BGR;16" is that of bitmaps with 5 or 6 bits for a colour
    is_deep = re.search(r"(RGB\w*|LA|CMYK);16", of_decoders) is not None
    if is_deep or (image.format == "PPM" and max(numbers, default=0) > 255):
        raise UnsuitableImage("its colours have more than 8 bits; convert them to 8")


def pixels(image: Image.Image, mode: Mode, size: int | None) -> np.ndarray:
    """Return the pixels of an image as viewers show it on a white page.

    Args:
        image: The image.
        mode: ``"RGB"`` or ``"L"``.
        size: Height and width to resize to, in pixels; None to leave them.

    Returns:
        The pixels, uint8, ``[H, W, 3]`` or ``[H, W]``.

    Raises:
        UnsuitableImage: If they have more than 8 bits, which Pillow would cut off, or if what they
            show would vanish on white.
    """
    if image.mode.startswith(("I", "F")):
        raise UnsuitableImage(
            f"pixels of mode {image.mode} have more than 8 bits; convert them to 8"
        )
    _check_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = _on_white(image)
    image = image.convert(mode)
    return np.array(image if size is None else image.resize((size, size), Image.Resampling.LANCZOS))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if _is_of_one_colour(shown) and not _is_of_one_colour(image):
        raise UnsuitableImage(
            "it would be blank, as transparent images are put on white and what this one shows is "
            "white on a transparent ground, or transparent throughout; save it on a darker "
            "ground, without transparency"
        )
    return shown


def _is_of_one_colour(image: Image.Image) -> bool:
    extrema = [channel.getextrema() for channel in image.split()]
    return all(least == most for least, most in extrema)
