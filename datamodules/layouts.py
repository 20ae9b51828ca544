"""The forms in which people hold mini-ImageNet, recognised by the names of their files."""

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from lightning_maml.datamodules.array_files import Split, open_cache_pickle, open_category_pickle, open_hdf5
from lightning_maml.datamodules.image_files import CachedImageFiles, OnCorrupt, list_class_folders


class Layout(NamedTuple):
    """What was found, and where.

    Attributes:
        name: For messages.
        folder: Where its files lie.
        splits: ``"train"``, ``"val"`` and ``"test"``.
        files: The images to be decoded before any split is read; None where there are arrays.
    """

    name: str
    folder: Path
    splits: dict[str, Split]
    files: CachedImageFiles | None


class _Form(NamedTuple):
    """How to recognise a layout: the name of what each split lies in, or names of which one; how to read it; where people get it."""

    names: dict[str, tuple[str, ...]]
    source: str
    open_array: Callable[[Path, int], Split] | None = None
    list_files: Callable[[Path, str], dict[str, list[Path]]] | None = None


def find_layout(root: Path, size: int, on_corrupt: OnCorrupt) -> Layout:
    """Return the first layout of mini-ImageNet that lies whole in ``root`` or in one of its folders.

    Args:
        root: Where to look.
        size: Height and width that images have or get, in pixels.
        on_corrupt: What to do with an image file that cannot be read.

    Raises:
        FileNotFoundError: If there is none; the message names each form and where people get it.
        ValueError: If its files are not what they seem; the message says what they are.
    """
    incomplete = []
    folders = sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith(".")) if root.is_dir() else []
    for place in (root, *folders):
        for name, form in _FORMS.items():
            paths = {split: place / path for split, paths in form.names.items() for path in reversed(paths) if (place / path).exists()}
            if len(paths) == len(form.names):
                return _open(name, form, paths, size, on_corrupt)
            missing = [names[0] for split, names in form.names.items() if split not in paths]
            incomplete += [f"{path} without {' and '.join(missing)}" for path in list(paths.values())[:1]]
    forms = "".join(f"\n- {name}: {form.names['train'][0]}, ...; {form.source}" for name, form in _FORMS.items())
    raise FileNotFoundError(
        f"Expected mini-ImageNet in {root} or in a folder of it but found {'; '.join(incomplete) or 'nothing of it'}; "
        f"put it there in one of these forms:{forms}"
    )


def _open(name: str, form: _Form, paths: dict[str, Path], size: int, on_corrupt: OnCorrupt) -> Layout:
    for path in paths.values():
        _refuse_web_page(path)
    folder = paths["train"].parent
    if form.open_array is not None:
        return Layout(name, folder, {split: form.open_array(path, size) for split, path in paths.items()}, None)
    assert form.list_files is not None
    classes = {split: form.list_files(path, split) for split, path in paths.items()}
    images = CachedImageFiles(
        {f"{split}/{label}": files for split, of_split in classes.items() for label, files in of_split.items()},
        folder / f"mini_imagenet_{size}.pt",
        size=size,
        on_corrupt=on_corrupt,
        description="Decoding mini-ImageNet once",
    )
    splits = {
        split: Split(
            {label: len(files) for label, files in of_split.items()}, partial(images.read, [f"{split}/{label}" for label in of_split])
        )
        for split, of_split in classes.items()
    }
    return Layout(name, folder, splits, images)


def _refuse_web_page(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(200)
        if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
            raise ValueError(
                f"Expected {path} to hold data but it is a web page, as hosts send in place of large files; download it again, in a browser."
            )


def _list_class_folders(folder: Path, _: str) -> dict[str, list[Path]]:
    return list_class_folders(folder)


def _list_csv(path: Path, split: str) -> dict[str, list[Path]]:
    """Return the files of each class of a CSV list, in the order of their names.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the header is unknown, or a row names a file outside the folder.
    """
    rows = _read_csv(path)
    folders = ("images", "images/{label}", "{label}", ".", f"{split}/{{label}}")
    classes: dict[str, list[Path]] = {label: [] for _, label in sorted(rows, key=lambda row: row[1])}
    missing = []
    for name, label in sorted(rows):
        places = (path.parent / folder.format(label=label) / name for folder in folders)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            missing.append(name)
        else:
            classes[label].append(file)
    if missing:
        raise FileNotFoundError(
            f"Expected the {len(rows)} images of {path} in its folder images, in itself, or there in a folder per class, but {len(missing)} "
            f"are missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}."
        )
    return classes


def _read_csv(path: Path) -> set[tuple[str, str]]:
    """Return the file name and the class of each row."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.DictReader(stream)
        columns = [pair for pair in (("filename", "label"), ("image_name", "class_name")) if set(pair) <= set(reader.fieldnames or ())]
        if not columns:
            header = ",".join(reader.fieldnames or ())[:80]
            raise ValueError(f"Expected the header of {path} to be filename,label or class_name,image_name but got {header!r}.")
        rows = {(row[columns[0][0]] or "", row[columns[0][1]] or "") for row in reader}
    for part in (part for row in rows for part in row):
        if not part or any(kind(part).is_absolute() or ".." in kind(part).parts for kind in (PurePosixPath, PureWindowsPath)):
            raise ValueError(f"Expected {path} to name files inside its folder but got {part!r}.")
    return rows


def _names(pattern: str, *val: str) -> dict[str, tuple[str, ...]]:
    return {
        split: tuple(pattern.format(word) for word in ((split, *val) if split == "val" else (split,))) for split in ("train", "val", "test")
    }


_FORMS = {
    "cache pickles": _Form(
        _names("mini-imagenet-cache-{}.pkl", "validation"),
        "of Ren et al. 2018, as torchmeta and learn2learn download them: zenodo.org/record/7978538, or Google Drive "
        "16V_ZlkW4SsnNDtnGmaBRq2OoPmUOc5mY",
        open_array=open_cache_pickle,
    ),
    "category-split pickles": _Form(
        _names("miniImageNet_category_split_{}.pickle") | {"train": ("miniImageNet_category_split_train_phase_train.pickle",)},
        "of Gidaris & Komodakis 2018 and MetaOptNet: github.com/kjunelee/MetaOptNet, or Google Drive 12V7qi-AjrYi6OoJdYcN_k502BM_jcP8D",
        open_array=open_category_pickle,
    ),
    "HDF5 files": _Form(_names("{}_data.hdf5"), "as torchmeta writes them, in its folder miniimagenet", open_array=open_hdf5),
    "CSV lists": _Form(
        _names("{}.csv"),
        "with filename,label (Ravi & Larochelle 2017: github.com/twitter-research/meta-learning-lstm) or class_name,image_name (easyfsl: "
        "github.com/sicara/easy-few-shot-learning), and the images, of ILSVRC 2012 or copies of 84 x 84 pixels, in images/",
        list_files=_list_csv,
    ),
    "class folders": _Form(
        _names("{}", "validation"), "holding a folder of images per class, as most code makes of the above", list_files=_list_class_folders
    ),
}
