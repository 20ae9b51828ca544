"""Files that hold the images of a split of tiered-ImageNet: pickles of PNGs, and npz archives."""

import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lightning_maml.datamodules.imagenet.array_files import Split
from lightning_maml.datamodules.imagenet.forms import Opened, Places, cache_name
from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache
from lightning_maml.datamodules.images.files import OnCorrupt, pixels, rows_of_classes
from lightning_maml.datamodules.images.pickles import (
    check_is_dictionary,
    read_pickle,
    whole_numbers,
)
from lightning_maml.datamodules.messages import first_five
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserFileNotFoundError, UserOSError, UserValueError

Unpack = Callable[[Path, int], Iterator[np.ndarray]]
"""Yields the images of a file, uint8 ``[n, size, size, 3]``, RGB, some at a time."""

_CHUNK = 1024  # images
_RULES = "2: RGB, whatever the order of channels in the file; classes by their names"
"""Version of how files become pixels. Caches of another version are made anew."""


def open_packed(
    unpack: Unpack, dataset: str, places: Places, size: int, on_corrupt: OnCorrupt
) -> Opened:
    """Open files that hold all images of a split, with their labels in a file beside them.

    Args:
        unpack: Yields the images of a file.
        dataset: Name of the dataset, for the cache and the progress bar.
        places: The file of the images of each split, ``{split}_images...``.
        size: Height and width that the images must have, in pixels.
        on_corrupt: Has no effect, as a file that is damaged is to be downloaded again.

    Raises:
        FileNotFoundError: If there are no labels.
        ValueError: If they are not what they should be.
    """
    splits = {
        split: PackedSplit(place, unpack, f"{dataset} {split}", size)
        for split, place in places.items()
    }

    def prepare() -> None:
        for split in splits.values():
            split.prepare()

    return Opened({split: Split(each.sizes, each.read) for split, each in splits.items()}, prepare)


class PackedSplit:
    """The images of a split that lie in one file, decoded once into a cache.

    Args:
        images: The file of the images, ``{split}_images...``; the labels are looked for beside it,
            in ``{split}_labels.pkl``.
        unpack: Yields the images of such a file.
        name: Name of the split, for the cache and the progress bar.
        size: Height and width that the images must have, in pixels.

    Raises:
        FileNotFoundError: If there are no labels.
        ValueError: If they are not what they should be.
    """

    def __init__(self, images: Path, unpack: Unpack, name: str, size: int) -> None:
        self._images, self._unpack, self._name, self._size = images, unpack, name, size
        self._cache = images.parent / cache_name(name, size)
        labels = images.parent / f"{images.name.partition('_images')[0]}_labels.pkl"
        if not labels.is_file():
            raise UserFileNotFoundError(
                f"Expected the labels of {images.name} in {labels} but there is no such file; it "
                "comes in the same archive."
            )
        content = read_pickle(labels)
        of_images = _numbers_in(labels, content)
        numbers, first, self._labels = np.unique(of_images, return_index=True, return_inverse=True)
        # without names, one for each split: the classes of each are numbered from 0
        self._names = _names_in(content, numbers, first) or [f"{name} {n}" for n in numbers]
        stats = [file.stat() for file in (images, labels)]
        states = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        self._source = f"{_RULES}\n{images.name} {states}"

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each class."""
        return dict(zip(self._names, np.bincount(self._labels).tolist(), strict=True))

    def prepare(self) -> None:
        """Decode the images, unless there is a cache of exactly these files.

        Raises:
            ValueError: If the images are not what they should be.
            OSError: If the cache cannot be written.
        """
        if self._read() is not None:
            return
        count, done = len(self._labels), 0
        self._check_room(count * self._size**2 * 3)
        images = torch.empty(count, self._size, self._size, 3, dtype=torch.uint8, device="cpu")
        with tqdm(total=count, desc=f"Decoding {self._name} once", unit="image") as bar:
            for part in self._unpack(self._images, self._size):
                if done + len(part) > count:
                    raise self._other_count("more")
                images[done : done + len(part)] = torch.from_numpy(part)
                done += len(part)
                bar.update(len(part))
        if done < count:
            raise self._other_count(str(done))
        decoded = DecodedImages(images, torch.from_numpy(self._labels), self._names, [])
        write_cache(self._cache, self._source, decoded)

    def read(self) -> ClassImages:
        """Map the images into memory.

        Raises:
            FileNotFoundError: If they are not cached yet.
        """
        cached = self._read()
        if cached is None:
            raise UserFileNotFoundError(
                f"Expected {self._cache} to hold the decoded images but it does not; call "
                "`prepare_data()` first."
            )
        self._warn_of_other_colours(cached.images)
        return ClassImages(cached.images.permute(0, 3, 1, 2), rows_of_classes(cached), cached.names)

    def _read(self) -> DecodedImages | None:
        shape = (len(self._labels), self._size, self._size, 3)
        return read_cache(self._cache, self._source, shape)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self._cache.parent).free
        if free < needed:
            raise UserOSError(
                f"Expected {needed / 1e6:.0f} MB of free disk in {self._cache.parent} for the "
                f"decoded images but got {free / 1e6:.0f} MB; make room, or choose another `root`, "
                "with links to the data."
            )

    def _warn_of_other_colours(self, images: Tensor) -> None:
        red, _, blue = images[:: max(1, len(images) // 1000)].double().mean((0, 1, 2)).tolist()
        if blue > red:
            rank_zero_warn(
                f"The images of {self._images} are more blue than red in the mean, unlike "
                "ImageNet's: their channels may lie in another order. Look at an episode, "
                "EpisodePictures draws one; if its colours are wrong, reverse the last axis of "
                "the images in the file, or use class folders."
            )

    def _other_count(self, got: str) -> ValueError:
        return UserValueError(
            f"Expected {self._images} to hold {len(self._labels)} images, one for each of its "
            f"labels, but got {got}; download both again."
        )


def _numbers_in(file: Path, content: Any) -> np.ndarray:
    """Return the class number of each image: of Ren et al. 2018, or as MetaOptNet has them."""
    check_is_dictionary(str(file), content)
    key = next((key for key in ("label_specific", "labels") if key in content), None)
    if key is None:
        raise UserValueError(
            f"Expected {file} to hold 'label_specific' or 'labels' but it holds "
            f"{first_five([*map(repr, content)]) or 'nothing'}."
        )
    return whole_numbers(f"{key!r} of {file}", content[key])


def _names_in(
    content: Mapping[str, Any], numbers: np.ndarray, first: np.ndarray
) -> list[str] | None:
    """Return the names of classes, with their categories, or None if a file does not have them all.

    Two classes of ImageNet may share a name, a bird and a machine, but not the category too.

    Args:
        content: Labels of Ren et al. 2018.
        numbers: Class numbers.
        first: For each the number of its first image.
    """
    try:
        names, categories = content["label_specific_str"], content["label_general_str"]
        of_images = content["label_general"]
        pairs = [
            (names[number], categories[of_images[image]])
            for number, image in zip(numbers, first, strict=True)
        ]
    except (TypeError, LookupError):
        return None
    # anything else may take for ever to be written out
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        return None
    are_different = len({*pairs}) == len(pairs)
    return [f"{name} ({category})" for name, category in pairs] if are_different else None


def unpack_pngs(file: Path, size: int) -> Iterator[np.ndarray]:
    """Yield the images of a pickled list of PNGs (Ren et al. 2018), some at a time.

    Raises:
        ValueError: If it is no such list.
    """
    encoded = read_pickle(file)
    if not isinstance(encoded, list) or not all(isinstance(png, np.ndarray) for png in encoded):
        raise UserValueError(
            f"Expected {file} to be a list of PNG files as arrays but it is not; download it again."
        )
    decode = partial(_decode_png, file=file, size=size)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(encoded), _CHUNK):
            part = encoded[start : start + _CHUNK]
            yield np.stack([*pool.map(decode, range(start, start + len(part)), part)])


def _decode_png(number: int, encoded: np.ndarray, file: Path, size: int) -> np.ndarray:
    try:
        with Image.open(BytesIO(encoded.tobytes()), formats=("PNG",)) as image:
            if image.size == (size, size):  # before it is decoded, whatever its size
                return pixels(image, "RGB", None)
            problem = f"it has {image.width} x {image.height} pixels"
    except Exception as error:  # noqa: BLE001  Pillow raises many kinds on damaged files
        problem = str(error) or type(error).__name__
    raise UserValueError(
        f"Expected image {number} of {file} to be a PNG of {size} x {size} pixels but {problem}; "
        "download it again."
    )


def unpack_npz(file: Path, size: int) -> Iterator[np.ndarray]:
    """Yield the images of an npz archive, some at a time, in RGB.

    Such archives are made from the pickles of PNGs by OpenCV, with the script of Ren et al. 2018
    (``compress_tiered_imagenet.py``), so their channels are blue, green, red. They are turned
    round, so that both forms give the same images. Nothing is unpickled.

    Raises:
        ValueError: If it holds no such images, or is cut short.
    """
    with _images_in(file) as stream:
        count = _count_of_images(file, stream, size)
        for start in range(0, count, _CHUNK):
            shape = (min(_CHUNK, count - start), size, size, 3)
            content = stream.read(int(np.prod(shape)))
            if len(content) < np.prod(shape):
                raise _damaged(file, "it is cut short")
            yield np.frombuffer(content, np.uint8).reshape(shape)[..., ::-1].copy()


@contextmanager
def _images_in(file: Path) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(file) as archive, archive.open("images.npy") as stream:
            yield stream
    except UserValueError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds on damaged files
        raise _damaged(file, str(error)) from error


def _count_of_images(file: Path, stream: IO[bytes], size: int) -> int:
    """Read the header of an array, check it, and return how many images follow."""
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, in_fortran_order, dtype = read_header(stream)
    if shape[1:] != (size, size, 3) or dtype != np.uint8 or in_fortran_order:
        raise UserValueError(
            f"Expected 'images' of {file} to be uint8 [N, {size}, {size}, 3] but got {dtype} "
            f"{list(shape)}."
        )
    return int(shape[0])


def _damaged(file: Path, why: str) -> ValueError:
    return UserValueError(
        f"Expected {file} to be an npz archive with 'images' but it cannot be read ({why}); "
        "download it again."
    )
