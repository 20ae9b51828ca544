"""Files that hold mini-ImageNet as arrays: two families of pickles, and HDF5."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_maml.datamodules.images.pickles import (
    check_is_dictionary,
    read_entries,
    whole_numbers,
)
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserModuleNotFoundError, UserValueError

_HDF5_RATIO = 100
"""Largest allowed ratio of the size of the images to that of the HDF5 file: torchmeta does not
compress, and photographs would shrink by half at most."""


class Split(NamedTuple):
    """The images of one split, before they are read.

    Attributes:
        sizes: Number of images of each class, by its name.
        read: Reads the images, with the classes in the same order.
    """

    sizes: dict[str, int]
    read: Callable[[], ClassImages]


def open_cache_pickle(file: Path, size: int) -> Split:
    """Open a cache pickle (Ren et al. 2018).

    It is a dictionary of ``image_data``, uint8 ``[N, size, size, 3]``, and ``class_dict``, the
    numbers of the images of each class.

    Args:
        file: The pickle.
        size: Height and width that its images must have, in pixels.

    Raises:
        ValueError: If it holds anything else.
    """
    images, class_dict = read_entries(file, "image_data", "class_dict")
    _check_images(file, images, size)
    check_is_dictionary(f"'class_dict' of {file}", class_dict)
    # first of all: a small pickle may hold one list of numbers very often
    lengths = [len(numbers) for numbers in class_dict.values() if isinstance(numbers, Sized)]
    if sum(lengths) > len(images):
        raise _not_shared_out(file, images)
    rows = {}
    for name in sorted(class_dict, key=str):
        rows[str(name)] = whole_numbers(f"'class_dict' of {file}", class_dict[name])
    return _split(file, images, rows)


def open_category_pickle(file: Path, size: int) -> Split:
    """Open a category-split pickle (Gidaris & Komodakis 2018).

    It is a dictionary of ``data``, uint8 ``[N, size, size, 3]``, and ``labels``, the class number
    of each image.

    Args:
        file: The pickle.
        size: Height and width that its images must have, in pixels.

    Raises:
        ValueError: If it holds anything else.
    """
    images, labels = read_entries(file, "data", "labels")
    _check_images(file, images, size)
    labels = whole_numbers(f"'labels' of {file}", labels)
    if len(labels) != len(images):
        raise UserValueError(
            f"Expected 'labels' of {file} to be as many as its {len(images)} images but got "
            f"{len(labels)}."
        )
    rows = {str(number): np.flatnonzero(labels == number) for number in np.unique(labels)}
    return _split(file, images, rows)


def _check_images(what: object, images: Any, size: int) -> None:
    got = type(images).__name__
    if hasattr(images, "dtype") and hasattr(images, "shape"):
        if (str(images.dtype), tuple(images.shape[1:])) == ("uint8", (size, size, 3)):
            return
        got = f"{images.dtype} {list(images.shape)}"
    raise UserValueError(
        f"Expected the images of {what} to be uint8 [N, {size}, {size}, 3] but got {got}."
    )


def _split(file: Path, images: np.ndarray, rows: dict[str, np.ndarray]) -> Split:
    together = np.concatenate([np.empty(0, np.int64), *rows.values()])
    twice = len(np.unique(together)) < len(together)
    if twice or not ((together >= 0) & (together < len(images))).all():
        raise _not_shared_out(file, images)
    # torch warns about arrays that cannot be written to
    pixels = torch.from_numpy(np.require(images, requirements="W")).permute(0, 3, 1, 2)
    members = [np.sort(of_class) for of_class in rows.values()]
    sizes = {name: len(of_class) for name, of_class in rows.items()}
    return Split(sizes, partial(ClassImages, pixels, members, list(rows)))


def _not_shared_out(file: Path, images: np.ndarray) -> ValueError:
    return UserValueError(
        f"Expected the classes of {file} to share out the numbers 0 .. {len(images) - 1} of its "
        "images but they do not."
    )


def open_hdf5(file: Path, size: int) -> Split:
    """Open an HDF5 file as torchmeta writes it.

    It has a dataset ``datasets/CLASS``, uint8 ``[N, size, size, 3]``, for each class.

    Args:
        file: The HDF5 file.
        size: Height and width that its images must have, in pixels.

    Raises:
        ModuleNotFoundError: If h5py is not installed.
        ValueError: If the file holds anything else.
    """
    with _hdf5_classes(file) as classes:
        for name, images in classes.items():
            _check_images(f"class {name} of {file}", images, size)
        sizes = {name: len(images) for name, images in classes.items()}
        return Split(sizes, partial(_read_hdf5, file, size))


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
    """Open an HDF5 file, and yield the dataset of each class."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserModuleNotFoundError(
            f"Expected h5py to be installed, for {file}, but it is not: pip install "
            "'lightning_maml[hdf5]'."
        ) from error
    try:
        with h5py.File(file) as content:
            group = content["datasets"]
            links = [group.get(name, getlink=True) for name in group]
            links.append(content.get("datasets", getlink=True))
            classes = dict(sorted(group.items()))
            datasets = [images for images in classes.values() if isinstance(images, h5py.Dataset)]
            links_lead_out = not all(isinstance(link, h5py.HardLink) for link in links)
            if links_lead_out or any(map(_lies_elsewhere, datasets)):
                raise UserValueError(
                    f"Expected {file} to hold its images itself but it refers to other files; it "
                    "is not read."
                )
            if sum(images.nbytes for images in datasets) > _HDF5_RATIO * file.stat().st_size:
                raise UserValueError(
                    f"Expected the images of {file} to be at most {_HDF5_RATIO} times its size "
                    "but they are more; it is not read."
                )
            yield classes
    except ValueError:
        raise
    except Exception as error:  # h5py raises some ten kinds on damaged files
        raise UserValueError(
            f"Expected {file} to be a whole HDF5 file with a group 'datasets' but it is not "
            f"({error})."
        ) from error


def _lies_elsewhere(images: Any) -> bool:
    return images.external is not None or images.is_virtual
