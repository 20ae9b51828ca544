"""The forms in which mini-ImageNet is found, recognised by their file names."""

import csv
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from lightning_maml.datamodules.images.files import CachedImageFiles, OnCorrupt
from lightning_maml.datamodules.images.folders import list_class_folders
from lightning_maml.datamodules.messages import first_five
from lightning_maml.datamodules.mini_imagenet.array_files import (
    Split,
    open_cache_pickle,
    open_category_pickle,
    open_hdf5,
)
from lightning_maml.errors import UserFileNotFoundError, UserValueError

_Places = dict[str, Path]
"""The file or folder of each split."""

_COLUMNS = (("filename", "label"), ("image_name", "class_name"))
"""Columns of the file and of its class, in the lists of Ravi & Larochelle and of easyfsl."""


class Layout(NamedTuple):
    """A copy of mini-ImageNet on disk.

    Attributes:
        name: Name of the form, for messages.
        folder: Folder of its files.
        splits: The splits ``"train"``, ``"val"`` and ``"test"``.
        files: The image files, to be decoded before any split is read; None if the copy consists of
            arrays.
    """

    name: str
    folder: Path
    splits: dict[str, Split]
    files: CachedImageFiles | None


class _Form(NamedTuple):
    """A form of mini-ImageNet.

    Attributes:
        names: Possible names of the file or folder of each split; the first ones are preferred.
        source: Whose form it is, and where to get it.
        open: Opens a copy of this form.
    """

    names: dict[str, tuple[str, ...]]
    source: str
    open: Callable[[str, _Places, int, OnCorrupt], Layout]


def find_layout(root: Path, size: int, on_corrupt: OnCorrupt) -> Layout:
    """Open the mini-ImageNet in ``root``, or else in one of its folders.

    Args:
        root: Where to look.
        size: Height and width that images must have or are resized to, in pixels.
        on_corrupt: What to do about an image file that cannot be read, ``"raise"`` or ``"skip"``.

    Raises:
        FileNotFoundError: If there is none; the message names each form and where to get it.
        ValueError: If several folders look like mini-ImageNet, or its files are not what they seem;
            the message says what they are.
    """
    incomplete: list[str] = []
    whole = _matches(root, incomplete)
    if not whole and root.is_dir():
        whole = _matches_below(root, incomplete)
    if whole:
        name, places = whole[0]
        for place in places.values():
            _refuse_web_page(place)
        return _FORMS[name].open(name, places, size, on_corrupt)
    forms = "".join(
        f"\n- {name}: {form.names['train'][0]}, ...; {form.source}" for name, form in _FORMS.items()
    )
    raise UserFileNotFoundError(
        f"Expected mini-ImageNet in {root} or in a folder of it but found "
        f"{'; '.join(incomplete) or 'nothing of it'}; put it there in one of these forms:{forms}"
    )


def _matches_below(root: Path, incomplete: list[str]) -> list[tuple[str, _Places]]:
    """Return the forms that are complete in the only folder of ``root`` that has any.

    Raises:
        ValueError: If there are several such folders.
    """
    found = []
    for folder in sorted(root.iterdir()):
        readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
        if readable and not folder.name.startswith("."):
            matches = _matches(folder, incomplete)
            if matches:
                found.append(matches)
    if len(found) > 1:
        names = first_five([places["train"].parent for (_, places), *_ in found])
        raise UserValueError(
            f"Expected one folder in {root} to look like mini-ImageNet but got {names}; give one "
            "of them as `root`."
        )
    return found[0] if found else []


def _matches(folder: Path, incomplete: list[str]) -> list[tuple[str, _Places]]:
    """Return the forms that are complete in a folder.

    Args:
        folder: Where to look.
        incomplete: What is missing of forms that are there in part is added here, for messages.
    """
    whole = []
    for form_name, form in _FORMS.items():
        exists = Path.is_dir if form.open is _open_folders else Path.is_file
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


def _open_arrays(
    open_split: Callable[[Path, int], Split],
    name: str,
    places: _Places,
    size: int,
    on_corrupt: OnCorrupt,
) -> Layout:
    # arrays are read as they are, so no file of an image can be corrupt
    splits = {split: open_split(place, size) for split, place in places.items()}
    return Layout(name, places["train"].parent, splits, files=None)


def _open_folders(name: str, places: _Places, size: int, on_corrupt: OnCorrupt) -> Layout:
    classes = {split: list_class_folders(place) for split, place in places.items()}
    return _open_files(classes, name, places, size, on_corrupt)


def _open_lists(name: str, places: _Places, size: int, on_corrupt: OnCorrupt) -> Layout:
    classes = {split: _list_files(place, split) for split, place in places.items()}
    return _open_files(classes, name, places, size, on_corrupt)


def _open_files(
    classes: dict[str, dict[str, list[Path]]],
    name: str,
    places: _Places,
    size: int,
    on_corrupt: OnCorrupt,
) -> Layout:
    folder = places["train"].parent
    files: dict[str, list[Path]] = {}
    for split, of_split in classes.items():
        files |= {f"{split}/{label}": of_class for label, of_class in of_split.items()}
    images = CachedImageFiles(
        files,
        folder / f"mini_imagenet_{size}.pt",
        size=size,
        on_corrupt=on_corrupt,
        description="Decoding mini-ImageNet once",
    )
    splits = {}
    for split, of_split in classes.items():
        sizes = {label: len(of_class) for label, of_class in of_split.items()}
        names = [f"{split}/{label}" for label in of_split]
        splits[split] = Split(sizes, partial(images.read, names))
    return Layout(name, folder, splits, images)


def _list_files(path: Path, split: str) -> dict[str, list[Path]]:
    """Find the files of a CSV list.

    Args:
        path: The list.
        split: Its split, which may be the name of a folder of the images.

    Returns:
        The files of each class, in the order of their names.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the header is unknown, or a row names a file outside the folder.
    """
    rows = sorted(_read_csv(path))
    classes: dict[str, list[Path]] = {label: [] for label in sorted({label for _, label in rows})}
    missing = []
    for name, label in rows:
        folders = ("images", f"images/{label}", label, "", f"{split}/{label}")
        places = (os.path.join(path.parent, folder, name) for folder in folders)
        place = next((place for place in places if _exists(place)), None)
        if place is None:
            missing.append(name)
        else:
            classes[label].append(Path(place))
    _names_in.cache_clear()
    if missing:
        raise UserFileNotFoundError(
            f"Expected the {len(rows)} images of {path} in its folder images, in itself, or there "
            f"in a folder per class, but {len(missing)} are missing: {first_five(missing)}."
        )
    return classes


def _exists(place: str) -> bool:
    # to list a folder once is many times as fast as to ask for each of its files
    return os.path.basename(place) in _names_in(os.path.dirname(place))


@cache
def _names_in(folder: str) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def _read_csv(path: Path) -> set[tuple[str, str]]:
    """Return the file name and the class of each row.

    Raises:
        ValueError: If it is no CSV file, its header is unknown, or a row names a file outside the
            folder.
    """
    try:
        # utf-8-sig: programs of Windows begin files with a byte order mark
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or ())
            columns = next((pair for pair in _COLUMNS if set(pair) <= set(header)), None)
            rows = set()
            if columns is not None:
                file_name, label = columns
                rows = {(row[file_name] or "", row[label] or "") for row in reader}
    except csv.Error as error:
        raise UserValueError(
            f"Expected {path} to be a CSV file but it cannot be read ({error})."
        ) from error
    if columns is None:
        got = ",".join(header)[:80]
        raise UserValueError(
            f"Expected the header of {path} to be filename,label or class_name,image_name but got "
            f"{got!r}."
        )
    for part in {part for row in rows for part in row}:
        steps = re.split(r"[/\\]", part)
        if not steps[0] or ".." in steps or re.match("[A-Za-z]:", part):
            raise UserValueError(
                f"Expected {path} to name files inside its folder but got {part!r}."
            )
    return rows


def _names(pattern: str, *val: str) -> dict[str, tuple[str, ...]]:
    """Return the possible names of each split; ``val`` are other words for validation."""
    words = {"train": ("train",), "val": ("val", *val), "test": ("test",)}
    return {
        split: tuple(pattern.format(word) for word in of_split) for split, of_split in words.items()
    }


_FORMS = {
    "cache pickles": _Form(
        _names("mini-imagenet-cache-{}.pkl", "validation"),
        "of Ren et al. 2018, as torchmeta and learn2learn download them: "
        "zenodo.org/record/7978538, or Google Drive 16V_ZlkW4SsnNDtnGmaBRq2OoPmUOc5mY",
        partial(_open_arrays, open_cache_pickle),
    ),
    "category-split pickles": _Form(
        _names("miniImageNet_category_split_{}.pickle")
        | {"train": ("miniImageNet_category_split_train_phase_train.pickle",)},
        "of Gidaris & Komodakis 2018 and MetaOptNet: github.com/kjunelee/MetaOptNet, or Google "
        "Drive 12V7qi-AjrYi6OoJdYcN_k502BM_jcP8D",
        partial(_open_arrays, open_category_pickle),
    ),
    "HDF5 files": _Form(
        _names("{}_data.hdf5"),
        "as torchmeta writes them, in its folder miniimagenet",
        partial(_open_arrays, open_hdf5),
    ),
    "CSV lists": _Form(
        _names("{}.csv"),
        "with filename,label (Ravi & Larochelle 2017: "
        "github.com/twitter-research/meta-learning-lstm) or class_name,image_name (easyfsl: "
        "github.com/sicara/easy-few-shot-learning), and the images, of ILSVRC 2012 or copies of "
        "84 x 84 pixels, in images/",
        _open_lists,
    ),
    "class folders": _Form(
        _names("{}", "validation"),
        "holding a folder of images per class, as most code makes of the above",
        _open_folders,
    ),
}
