"""Made-up images in each of the forms of mini-ImageNet, with their file names and keys."""

import csv
import json
import pickle
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from helpers.python2_pickles import write_python2_pickle

SIZE = 84
CLASSES = {
    "train": [f"n{1532829 + 7919 * number:08d}" for number in range(64)],
    "val": [f"n{2091244 + 7919 * number:08d}" for number in range(16)],
    "test": [f"n{3146219 + 7919 * number:08d}" for number in range(20)],
}
"""Names like those of ImageNet, for as many classes as mini-ImageNet has."""

Encoded = dict[str, dict[str, list[bytes]]]
"""JPEG files by split and class."""


def draw_images(per_class: int, seed: int = 0) -> Encoded:
    """Draw smooth coloured noise, some of it grey, and encode it as JPEG."""
    random = np.random.RandomState(seed)
    return {
        split: {name: [_jpeg(random, number) for number in range(per_class)] for name in names}
        for split, names in CLASSES.items()
    }


def _jpeg(random: np.random.RandomState, number: int) -> bytes:
    image = Image.fromarray(random.randint(0, 256, (6, 6, 3), np.uint8)).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    stream = BytesIO()
    (image.convert("L") if number % 7 == 3 else image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _decoded(images: dict[str, list[bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Return all images of a split, ``[N, 84, 84, 3]``, and their class numbers.

    The classes take turns.
    """
    by_turn = [
        (label, of_class[turn])
        for turn in range(len(next(iter(images.values()))))
        for label, of_class in enumerate(images.values())
    ]
    pixels = np.stack(
        [np.asarray(Image.open(BytesIO(image)).convert("RGB")) for _, image in by_turn]
    )
    return pixels, np.array([label for label, _ in by_turn])


def _files(images: dict[str, list[bytes]]) -> Iterator[tuple[str, int, bytes]]:
    return (
        (name, number, image)
        for name, of_class in images.items()
        for number, image in enumerate(of_class)
    )


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _write_csv(file: Path, header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    """Write rows in random order."""
    np.random.RandomState(0).shuffle(rows)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def write_ravi(root: Path, images: Encoded) -> None:
    """Write CSV lists with ``filename,label`` like Ravi & Larochelle's, and ``images/``."""
    for split, of_split in images.items():
        for name, number, image in _files(of_split):
            _write(root / "images" / f"{name}{number:08d}.jpg", image)
        _write_csv(
            root / f"{split}.csv",
            ("filename", "label"),
            [(f"{name}{number:08d}.jpg", name) for name, number, _ in _files(of_split)],
        )


def write_easyfsl(root: Path, images: Encoded) -> None:
    """Write CSV lists with ``class_name,image_name`` like easyfsl's, and a folder per class.

    The image files have ImageNet's names.
    """
    for split, of_split in images.items():
        for name, number, image in _files(of_split):
            _write(root / "images" / name / f"{name}_{number:05d}.JPEG", image)
        rows = [(name, f"{name}_{number:05d}.JPEG") for name, number, _ in _files(of_split)]
        _write_csv(root / f"{split}.csv", ("class_name", "image_name"), rows)


def write_folders(root: Path, images: Encoded) -> None:
    """Write ``train | val | test`` with a folder per class."""
    for split, of_split in images.items():
        for name, number, image in _files(of_split):
            _write(root / split / name / f"{name}{number:08d}.jpg", image)


def write_cache_pickles(root: Path, images: Encoded) -> None:
    """Write the pickles of Ren et al., with learn2learn's name for the validation classes."""
    root.mkdir(parents=True, exist_ok=True)
    for split, of_split in images.items():
        pixels, labels = _decoded(of_split)
        numbers = {
            name: np.flatnonzero(labels == label).tolist() for label, name in enumerate(of_split)
        }
        content = {"image_data": pixels, "class_dict": dict(reversed(numbers.items()))}
        name = "validation" if split == "val" else split
        with (root / f"mini-imagenet-cache-{name}.pkl").open("wb") as stream:
            pickle.dump(content, stream, protocol=4)


def write_category_pickles(root: Path, images: Encoded) -> None:
    """Write the pickles of Gidaris & Komodakis, as Python 2 does.

    The classes of all splits are numbered together.
    """
    root.mkdir(parents=True, exist_ok=True)
    first = 0
    for split, of_split in images.items():
        pixels, labels = _decoded(of_split)
        phase = "train_phase_train" if split == "train" else split
        write_python2_pickle(
            root / f"miniImageNet_category_split_{phase}.pickle",
            {"data": pixels, "labels": (first + labels).tolist()},
        )
        first += len(of_split)


def write_hdf5(root: Path, images: Encoded) -> None:
    """Write torchmeta's HDF5 files and lists of labels, in its folder ``miniimagenet``."""
    folder = root / "miniimagenet"
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in images.items():
        with h5py.File(folder / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for name, of_class in reversed(of_split.items()):
                group.create_dataset(name, data=_decoded({name: of_class})[0])
        (folder / f"{split}_labels.json").write_text(json.dumps(sorted(of_split)))


LAYOUTS: dict[str, Callable[[Path, Encoded], None]] = {
    "CSV lists of Ravi & Larochelle": write_ravi,
    "CSV lists of easyfsl": write_easyfsl,
    "class folders": write_folders,
    "cache pickles": write_cache_pickles,
    "category-split pickles": write_category_pickles,
    "HDF5 files": write_hdf5,
}
