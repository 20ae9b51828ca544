"""Made-up images in each of the forms of tiered-ImageNet, with their file names and keys."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.python2_pickles import write_python2_pickle

CLASSES = {"train": 351, "val": 97, "test": 160}
SIZE = 84

Images = dict[str, tuple[np.ndarray, np.ndarray]]
"""Pixels uint8 ``[n, 84, 84, 3]``, RGB, and labels ``[n]`` of each split."""


def draw_images(per_class: int, seed: int = 0) -> Images:
    """Draw images of 2 x 2 colours, so that they take little space."""
    random = np.random.RandomState(seed)

    def split(classes: int) -> tuple[np.ndarray, np.ndarray]:
        corners = random.randint(0, 256, (classes * per_class, 2, 2, 3), np.uint8)
        pixels = corners.repeat(SIZE // 2, 1).repeat(SIZE // 2, 2)
        return pixels, np.arange(classes, dtype=np.int32).repeat(per_class)

    return {name: split(classes) for name, classes in CLASSES.items()}


def png(pixels: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _write_labels(root: Path, images: Images) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Write the labels of each split, in Python 2, and yield the split."""
    root.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in images.items():
        general = labels // 18
        content = {
            "label_specific": labels,
            "label_general": general.astype(np.int32),
            "label_specific_str": [f"{split} animal {number}" for number in np.unique(labels)],
            "label_general_str": [f"{split} kind {number}" for number in np.unique(general)],
        }
        write_python2_pickle(root / f"{split}_labels.pkl", content)
        yield split, pixels, labels


def write_png_pickles(root: Path, images: Images) -> None:
    """Write the lists of PNGs of Ren et al., each an array of one column, as OpenCV makes them."""
    for split, pixels, _ in _write_labels(root, images):
        encoded = [np.frombuffer(png(image), np.uint8)[:, None] for image in pixels]
        write_python2_pickle(root / f"{split}_images_png.pkl", encoded)


def write_npz(root: Path, images: Images, save: Callable[..., None] = np.savez) -> None:
    """Write the archives that OpenCV makes of those lists: blue, green, red."""
    for split, pixels, _ in _write_labels(root, images):
        save(root / f"{split}_images.npz", images=pixels[..., ::-1])


def write_compressed_npz(root: Path, images: Images) -> None:
    """Write compressed archives."""
    write_npz(root, images, np.savez_compressed)


def write_folders(root: Path, images: Images) -> None:
    """Write ``train | val | test`` with a folder per class."""
    for split, (pixels, labels) in images.items():
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / split / f"n{1000 * [*CLASSES].index(split) + label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:08d}.png").write_bytes(png(image))


LAYOUTS: dict[str, Callable[[Path, Images], None]] = {
    "pickles of PNGs": write_png_pickles,
    "npz archives": write_npz,
    "npz archives, compressed": write_compressed_npz,
    "class folders": write_folders,
}
