"""Files that hold mini-ImageNet as arrays: two families of pickles, and HDF5."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_maml.datamodules.pickles import read_pickle
from lightning_maml.datamodules.sampler import ClassImages


class Split(NamedTuple):
    """The images of one split, before they are read.

    Attributes:
        sizes: Images of each class, by its name.
        read: Gives them, with the classes in that order.
    """

    sizes: dict[str, int]
    read: Callable[[], ClassImages]


def open_cache_pickle(file: Path, size: int) -> Split:
    """Open a pickle of ``image_data``, an array, and ``class_dict``, the numbers of each class's images (Ren et al. 2018).

    Args:
        file: The pickle.
        size: Height and width that its images must have.

    Raises:
        ValueError: If it holds anything else; so for all formats here.
    """
    images, class_dict = _entries(file, read_pickle(file), "image_data", "class_dict")
    _check_dictionary(f"'class_dict' of {file}", class_dict)
    return _split(file, images, size, {name: np.asarray(class_dict[name]) for name in sorted(class_dict)})


def open_category_pickle(file: Path, size: int) -> Split:
    """Open a pickle of ``data``, an array, and ``labels``, the class number of each image (Gidaris & Komodakis 2018)."""
    images, labels = _entries(file, read_pickle(file), "data", "labels")
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"Expected 'labels' of {file} to be one whole number for each image but got {_kind(labels)}.")
    if len(labels) != len(images):
        raise ValueError(f"Expected 'labels' of {file} to be as many as its {len(images)} images but got {len(labels)}.")
    return _split(file, images, size, {str(number): np.flatnonzero(labels == number) for number in np.unique(labels)})


def _entries(file: Path, content: Any, *names: str) -> list[Any]:
    _check_dictionary(str(file), content)
    if not set(names) <= set(content):
        raise ValueError(
            f"Expected {file} to hold {' and '.join(map(repr, names))} but it holds {', '.join(map(repr, content)) or 'nothing'}."
        )
    return [content[name] for name in names]


def _check_dictionary(what: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"Expected {what} to be a dictionary but got {_kind(value)}.")  # noqa: TRY004  it is the file that is wrong


def _split(file: Path, images: Any, size: int, rows: dict[str, np.ndarray]) -> Split:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"Expected the images of {file} to be uint8 [N, {size}, {size}, 3] but got {_kind(images)}.")
    together = np.concatenate([np.empty(0, int), *rows.values()])
    if together.dtype.kind != "i" or len(np.unique(together)) < len(together) or not _in_range(together, len(images)):
        raise ValueError(f"Expected the classes of {file} to share out the numbers 0 .. {len(images) - 1} of its images but they do not.")
    pixels = torch.from_numpy(np.require(images, requirements="W")).permute(0, 3, 1, 2)
    opened = ClassImages(pixels, [np.sort(members) for members in rows.values()], list(rows))
    return Split({name: len(members) for name, members in rows.items()}, partial(_already_open, opened))


def _in_range(numbers: np.ndarray, count: int) -> bool:
    return bool(((numbers >= 0) & (numbers < count)).all())


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _already_open(images: ClassImages) -> ClassImages:
    return images


def open_hdf5(file: Path, size: int) -> Split:
    """Open an HDF5 file with one dataset ``datasets/CLASS`` of images for each class, as torchmeta writes it.

    Raises:
        ModuleNotFoundError: If h5py is not installed.
        ValueError: If the file holds anything else.
    """
    with _hdf5_classes(file) as classes:
        for name, images in classes.items():
            if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
                raise ValueError(
                    f"Expected the images of class {name} of {file} to be uint8 [N, {size}, {size}, 3] but got {images.dtype} "
                    f"{list(images.shape)}."
                )
        return Split({name: len(images) for name, images in classes.items()}, partial(_read_hdf5, file, size))


def _read_hdf5(file: Path, size: int) -> ClassImages:
    with _hdf5_classes(file) as classes:
        ends = np.cumsum([len(images) for images in classes.values()])
        pixels = np.empty((int(ends[-1]), size, size, 3), np.uint8)
        for end, images in zip(ends, classes.values(), strict=True):
            images.read_direct(pixels[end - len(images) : end])
        members = np.split(np.arange(len(pixels)), ends[:-1])
        return ClassImages(torch.from_numpy(pixels).permute(0, 3, 1, 2), members, list(classes))


@contextmanager
def _hdf5_classes(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Expected h5py to be installed, for {file}, but it is not: pip install 'lightning_maml[hdf5]'."
        ) from error
    try:
        with h5py.File(file) as content:
            yield {name: content["datasets"][name] for name in sorted(content["datasets"])}
    except (OSError, KeyError) as error:  # h5py raises these on damaged files and on missing names
        raise ValueError(f"Expected {file} to be a whole HDF5 file with a group 'datasets' but it is not ({error}).") from error
