"""The forms in which a part of ImageNet is found on disk, recognised by their file names."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lightning_maml.datamodules.imagenet.array_files import Split
from lightning_maml.datamodules.images.files import CachedImageFiles, OnCorrupt
from lightning_maml.datamodules.images.folders import list_class_folders
from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserFileNotFoundError, UserValueError

Places = dict[str, Path]
"""The file or folder of each split."""

Classes = dict[str, dict[str, list[Path]]]
"""The image files of each class of each split."""


class Opened(NamedTuple):
    """The splits of a copy.

    Attributes:
        splits: The splits ``"train"``, ``"val"`` and ``"test"``.
        prepare: Decodes the images, where that is to be done before any split is read.
    """

    splits: dict[str, Split]
    prepare: Callable[[], None]


class Form(NamedTuple):
    """A form in which the images are passed around.

    Attributes:
        names: Possible names of the file or folder of each split; the first ones are preferred.
        source: Whose form it is, and where to get it.
        open: Opens a copy of this form, of images of a size in pixels.
        in_folders: Whether the names are those of folders.
    """

    names: dict[str, tuple[str, ...]]
    source: str
    open: Callable[[Places, int, OnCorrupt], Opened]
    in_folders: bool = False


class Layout(NamedTuple):
    """A copy on disk.

    Attributes:
        name: Name of its form, for messages.
        folder: Folder of its files.
        opened: Its splits.
    """

    name: str
    folder: Path
    opened: Opened


def find_layout(
    dataset: str, forms: Mapping[str, Form], root: Path, size: int, on_corrupt: OnCorrupt
) -> Layout:
    """Open the dataset in ``root``, or else in one of its folders.

    Args:
        dataset: Name of the dataset, for messages.
        forms: The forms that it may have, by name.
        root: Where to look.
        size: Height and width that images must have or are resized to, in pixels.
        on_corrupt: What to do about an image file that cannot be read, ``"raise"`` or ``"skip"``.

    Raises:
        FileNotFoundError: If there is none; the message names each form and where to get it.
        ValueError: If several folders look like the dataset, or its files are not what they seem;
            the message says what they are.
    """
    incomplete: list[str] = []
    whole = _matches(forms, root, incomplete)
    # any few-shot dataset may have class folders, files have names of their own
    if root.is_dir() and all(forms[name].in_folders for name, _ in whole):
        wanted = {name: form for name, form in forms.items() if not (whole and form.in_folders)}
        whole = _matches_below(dataset, wanted, root, incomplete) or whole
    if whole:
        name, places = whole[0]
        for place in places.values():
            _refuse_web_page(place)
        return Layout(name, places["train"].parent, forms[name].open(places, size, on_corrupt))
    known = "".join(
        f"\n- {name}: {form.names['train'][0]}, ...; {form.source}" for name, form in forms.items()
    )
    raise UserFileNotFoundError(
        f"Expected {dataset} in {root} or in a folder of it but found "
        f"{'; '.join(incomplete) or 'nothing of it'}; put it there in one of these forms:{known}"
    )


def _matches_below(
    dataset: str, forms: Mapping[str, Form], root: Path, incomplete: list[str]
) -> list[tuple[str, Places]]:
    """Return the forms that are complete in the only folder of ``root`` that has any.

    Folders with files of the dataset go before those that only have class folders.

    Raises:
        ValueError: If there are several such folders.
    """
    found = []
    for folder in sorted(root.iterdir()):
        readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
        if readable and not folder.name.startswith("."):
            matches = _matches(forms, folder, incomplete)
            if matches:
                found.append(matches)
    found = [matches for matches in found if not forms[matches[0][0]].in_folders] or found
    if len(found) > 1:
        names = first_five([places["train"].parent for (_, places), *_ in found])
        raise UserValueError(
            f"Expected one folder in {root} to look like {dataset} but got {names}; give one "
            "of them as `root`."
        )
    return found[0] if found else []


def _matches(
    forms: Mapping[str, Form], folder: Path, incomplete: list[str]
) -> list[tuple[str, Places]]:
    """Return the forms that are complete in a folder.

    Args:
        forms: The forms, by name.
        folder: Where to look.
        incomplete: What is missing of forms that are there in part is added here, for messages.
    """
    whole = []
    for form_name, form in forms.items():
        exists = Path.is_dir if form.in_folders else Path.is_file
        places = {}
        for split, names in form.names.items():
            there = [folder / name for name in names if exists(folder / name)]
            if there:
                places[split] = there[0]
        if len(places) == len(form.names):
            whole.append((form_name, places))
        elif places:
            missing = [names[0] for split, names in form.names.items() if split not in places]
            incomplete.append(f"{next(iter(places.values()))} without {' and '.join(missing)}")
    return whole


def _refuse_web_page(place: Path) -> None:
    if place.is_file():
        with place.open("rb") as stream:
            start = stream.read(200)
        if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
            raise UserValueError(
                f"Expected {place} to hold data but it is a web page, as hosts send in place of "
                "large files; download it again, in a browser."
            )


def split_names(pattern: str, *val: str) -> dict[str, tuple[str, ...]]:
    """Return the possible names of each split; ``val`` are other words for validation."""
    words = {"train": ("train",), "val": ("val", *val), "test": ("test",)}
    return {
        split: tuple(pattern.format(word) for word in of_split) for split, of_split in words.items()
    }


def open_arrays(
    open_split: Callable[[Path, int], Split], places: Places, size: int, on_corrupt: OnCorrupt
) -> Opened:
    """Open files of arrays, which are read as they are, so that no image can be corrupt."""
    return Opened({split: open_split(place, size) for split, place in places.items()}, _nothing)


def _nothing() -> None:
    pass


def open_folders(dataset: str, places: Places, size: int, on_corrupt: OnCorrupt) -> Opened:
    """Open folders of classes, for each split.

    Args:
        dataset: Name of the dataset, for messages and the cache.
        places: Folder of each split.
        size: Height and width that images are resized to, in pixels.
        on_corrupt: What to do about an image file that cannot be read.
    """
    classes = {split: list_class_folders(place) for split, place in places.items()}
    folder = next(iter(places.values())).parent
    return open_files(dataset, classes, folder, size, on_corrupt)


def open_files(
    dataset: str, classes: Classes, folder: Path, size: int, on_corrupt: OnCorrupt
) -> Opened:
    """Open image files, which are decoded into one cache in ``folder``; see open_folders."""
    files: dict[str, list[Path]] = {}
    for split, of_split in classes.items():
        files |= {f"{split}/{label}": of_class for label, of_class in of_split.items()}
    images = CachedImageFiles(
        files,
        folder / cache_name(dataset, size),
        size=size,
        on_corrupt=on_corrupt,
        description=f"Decoding {dataset} once",
    )
    splits = {}
    for split, of_split in classes.items():
        sizes = {label: len(of_class) for label, of_class in of_split.items()}
        names = [f"{split}/{label}" for label in of_split]
        splits[split] = Split(sizes, partial(images.read, names))
    return Opened(splits, images.prepare)


def cache_name(dataset: str, size: int) -> str:
    """Return the name of the file of decoded images: ``mini_imagenet_84.pt``."""
    return f"{re.sub('[^a-z]', '_', dataset.lower())}_{size}.pt"
