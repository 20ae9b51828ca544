"""Trees of image files: which folders are classes or splits, and what is left out."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jfif",
    ".jpe",
    ".pbm",
    ".pnm",
    ".apng",
    ".mpo",
)
"""Ends of the names of image files, in lower case."""

SPLIT_NAMES = {
    "train": ("train", "training", "meta_train", "metatrain", "base", "images_background"),
    "val": ("val", "validation", "valid", "meta_val", "metaval"),
    "test": ("test", "testing", "meta_test", "metatest", "novel", "images_evaluation"),
}
"""Names of the folder of each split, in lower case and with ``_`` in place of ``-``."""

_OF_PROGRAMS = (
    "@eadir",
    "@recycle",
    "#recycle",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "__pycache__",
)
_FILES_OF_PROGRAMS = ("thumbs.db", "desktop.ini", "ehthumbs.db")

LeftOut = Counter[str]
"""How many things of each kind were found in a tree but are no images of a class."""


def in_words(left_out: LeftOut) -> str:
    """Return what was left out, the most frequent first, in one line; empty if nothing was."""
    kinds = [f"{count} {kind}" for kind, count in left_out.most_common() if count]
    return ", ".join(kinds[:8]) + (", ..." if len(kinds) > 8 else "")


def subfolders(folder: Path) -> list[Path]:
    """Return the folders and linked folders in a folder, sorted.

    Hidden folders and those that programs make are left out.
    """
    return [
        place
        for place in sorted(folder.iterdir())
        if place.is_dir() and not _is_of_programs(place.name)
    ]


def innermost(root: Path) -> Path:
    """Return the folder in which the classes or splits lie.

    It is ``root``, unless all images lie in a single folder of it that is neither a split nor a
    class. Then that folder is searched in the same way.
    """
    while True:
        with_images = (place for place in subfolders(root) if _holds_images(place))
        first_two = list(islice(with_images, 2))
        if len(first_two) != 1:
            return root
        [only] = first_two
        is_class = _images_in(only) or not subfolders(only)
        if split_of(only) or is_class:
            return root
        root = only


def split_of(folder: Path) -> str | None:
    """Return the split that a folder's name stands for, or None."""
    name = folder.name.lower().replace("-", "_").removesuffix("set").removesuffix("_")
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def list_class_folders(
    folder: Path, level: int | None = 1, left_out: LeftOut | None = None
) -> dict[str, list[Path]]:
    """List the image files of each class, at any depth below the class's folder.

    Args:
        folder: Folder of the classes.
        level: How many levels below ``folder`` the folder of a class lies. None for 1, with an
            error if folders below those may be the classes.
        left_out: Counts what is not taken.

    Returns:
        The sorted files of each class, by the path of the class below ``folder``.

    Raises:
        ValueError: If ``level`` is None, and a folder holds no images but several folders of
            images: each of these may be a class.
    """
    left_out = LeftOut() if left_out is None else left_out
    places = _folders_at(folder, level or 1, left_out)
    classes = {
        place.relative_to(folder).as_posix(): _images_below(place, left_out) for place in places
    }
    if level is None:
        for name, files in classes.items():
            _check_is_one_class(folder / name, files)
    return classes


def _folders_at(folder: Path, level: int, left_out: LeftOut) -> Iterator[Path]:
    """Yield the folders some levels below a folder, and count the images that lie above them."""
    left_out["images above the folders of classes"] += _images_in(folder)
    left_out["folders of programs"] += sum(
        place.is_dir() and _is_of_programs(place.name) for place in folder.iterdir()
    )
    for place in subfolders(folder):
        if level > 1:
            yield from _folders_at(place, level - 1, left_out)
        else:
            yield place


def _check_is_one_class(place: Path, files: list[Path]) -> None:
    """Check that a folder is one class: it holds images itself, or in one folder only."""
    parents = sorted({file.parent for file in files})
    if len(parents) < 2 or place in parents:
        return
    level = 1 + max(len(parent.relative_to(place).parts) for parent in parents)
    names = first_five([parent.relative_to(place).as_posix() for parent in parents])
    raise UserValueError(
        f"Expected the images of a class to lie in its folder but {place} holds none, and "
        f"{len(parents)} folders of images ({names}): give class_level={level} if each of these "
        f"is a class, or class_level=1 if {place.name} is one class."
    )


def _images_below(folder: Path, left_out: LeftOut) -> list[Path]:
    files = []
    for place, names in _walk(folder, left_out):
        files += [Path(place, name) for name in names if _is_image(name)]
        left_out.update(_kind(name) for name in names if not _is_image(name))
    return sorted(files)


def _walk(folder: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder at any depth and the names of its files.

    A folder is visited once, even if several links lead there, or links form a circle.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:
            left_out["folders that are linked again"] += 1
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        left_out["folders of programs"] += sum(map(_is_of_programs, folders))
        # os.walk visits the folders that are left in this list, in its order
        folders[:] = sorted(name for name in folders if not _is_of_programs(name))
        yield place, names


def _holds_images(folder: Path) -> bool:
    return any(_is_image(name) for _, names in _walk(folder, LeftOut()) for name in names)


def _images_in(folder: Path) -> int:
    return sum(_is_image(place.name) and not place.is_dir() for place in folder.iterdir())


def _refuse(error: OSError) -> None:
    raise error  # otherwise os.walk leaves out a folder that cannot be read


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _is_of_programs(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_PROGRAMS


def _kind(name: str) -> str:
    if name.startswith(".") or name.lower() in _FILES_OF_PROGRAMS:
        return "hidden files"
    suffix = os.path.splitext(name)[1].lower().encode(errors="replace").decode()
    return f"files {suffix}" if suffix else "files without an extension"
