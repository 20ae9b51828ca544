"""Lists of image files and their classes, as Ravi & Larochelle and easyfsl publish them."""

import csv
import os
import re
from functools import cache
from pathlib import Path

from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserFileNotFoundError, UserValueError

_COLUMNS = (("filename", "label"), ("image_name", "class_name"))
"""Columns of the file and of its class, in the lists of Ravi & Larochelle and of easyfsl."""


def list_files(path: Path, split: str) -> dict[str, list[Path]]:
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
