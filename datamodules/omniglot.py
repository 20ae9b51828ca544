"""Omniglot: 1623 characters of 50 alphabets, drawn by 20 people each (Lake et al. 2015)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.images.cache import DecodedImages, read_cache, write_cache
from lightning_maml.datamodules.images.files import decode, rows_of_classes
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages, Rotations, check_seed
from lightning_maml.errors import UserFileNotFoundError, UserValueError, check_truth

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
"""Characters in each of the two official folders."""

DRAWINGS = 20
"""Images per character."""

VINYALS_TEST = (
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
    "Gurmukhi/character42",
    "Gurmukhi/character43",
    "Gurmukhi/character44",
    "Gurmukhi/character45",
)
"""Test alphabets and four single test characters of Vinyals et al. 2016, as published by Snell et
al. 2017."""

VINYALS_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
"""Validation alphabets of Vinyals et al. 2016. All other characters are for training."""

_SOURCE = "the official folders"


class OmniglotDataModule(EpisodicDataModule):
    """Few-shot episodes of Omniglot, 28 x 28, ink = 1 on paper = 0.

    The images are read once from the official folders ``images_background`` and
    ``images_evaluation``, which are looked for in ``root`` and up to three levels below, or are
    downloaded there by torchvision. They are kept as one uint8 array in ``root/omniglot_28.pt``; as
    long as that file is intact, nothing else is read.

    Args:
        root: Folder of the data.
        split: ``"random"``: 1100 / 100 / 423 characters, drawn by ``split_seed`` (the MAML paper's
            sizes); ``"vinyals"``: 1028 / 172 / 423 by alphabet (Vinyals et al. 2016); ``"lake"``:
            tests on the 659 characters of the evaluation set, trains on 864 of the background set
            and validates on its other 100, drawn by ``split_seed``.
        split_seed: Seed of the splits that are drawn.
        rotations: ``"classes"``: each character becomes four classes, turned by 0, 90, 180 and 270
            degrees; ``"augment"``: each class of an episode is turned at random by one of these
            angles; ``"none"``. This applies to all splits.
        download: Whether to download the images into ``root`` if there is no cache and one of the
            folders is missing.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, or a split has too few classes or images for its
            episodes.
        FileNotFoundError: If the data are missing and cannot be downloaded, or are incomplete.
        OSError: If an image cannot be read; the message names it.

    Examples:
        >>> from lightning_maml.datamodules import OmniglotDataModule
        >>> data = OmniglotDataModule("data", ways=20, shots=1, split="vinyals")
        >>> data.cache_file.as_posix()  # is written when training starts
        'data/omniglot_28.pt'
    """

    image_size = 28

    def __init__(
        self,
        root: str = "data",
        *,
        split: Literal["random", "vinyals", "lake"] = "random",
        split_seed: int = 0,
        rotations: Rotations = "classes",
        download: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(rotations=rotations, **options)
        _check_split(split)
        check_seed("split_seed", split_seed)
        self.root = Path(root).expanduser()
        self.split, self.split_seed = split, split_seed
        check_truth(download=download)
        self._download = download
        self._decoded: Remembered[DecodedImages] = Remembered()

    @property
    def cache_file(self) -> Path:
        """Where the decoded images are kept."""
        return self.root / f"omniglot_{self.image_size}.pt"

    def prepare_data(self) -> None:
        """Download and decode the images, unless there is an intact cache."""
        if self._read_cache() is not None:
            return
        tree = find_tree(self.root)
        if len(tree) < len(CHARACTERS) and self._download:
            self._download_tree()
            tree = find_tree(self.root)
        files = list_files(tree, self.root)
        with torch.device("cpu"):
            decoded = decode(files, self.image_size, "L", "raise", "Decoding Omniglot once")
        # the files have white paper; networks see ink = 1 on paper = 0
        write_cache(self.cache_file, _SOURCE, decoded._replace(images=255 - decoded.images))

    def class_images(self, split: str) -> ClassImages:
        """Return the characters of a split."""
        decoded = self._decoded(self.cache_file, self._read_decoded)
        rows = rows_of_classes(decoded)
        classes = split_characters(decoded.names, self.split, self.split_seed)[split]
        return ClassImages(decoded.images.unsqueeze(1), [rows[number] for number in classes])

    @override
    def read_by(self) -> tuple[Any, ...]:
        return self.cache_file, self.split, self.split_seed

    def _read_decoded(self) -> DecodedImages:
        decoded = self._read_cache()
        if decoded is None:
            raise UserFileNotFoundError(
                f"Expected {self.cache_file} to hold the decoded images but found none; call "
                "`prepare_data()` first."
            )
        return decoded

    def _read_cache(self) -> DecodedImages | None:
        shape = (sum(CHARACTERS.values()) * DRAWINGS, self.image_size, self.image_size)
        return read_cache(self.cache_file, _SOURCE, shape, checksums=True)

    def _download_tree(self) -> None:
        try:
            for background in (True, False):
                torchvision.datasets.Omniglot(str(self.root), background=background, download=True)
        except Exception as error:  # torchvision passes on any error of network, server or archive
            raise UserFileNotFoundError(
                f"{_not_found(self.root, find_tree(self.root))} The download failed: {error}"
            ) from error


def split_characters(names: list[str], split: str, seed: int) -> dict[str, list[int]]:
    """Return the class numbers of each split.

    Args:
        names: Names of all classes, ``folder/Alphabet/characterNN``.
        split: ``"random"``, ``"vinyals"`` or ``"lake"``.
        seed: Seed of the splits that are drawn.

    Raises:
        ValueError: If there is no such split.
    """
    _check_split(split)
    order = np.random.RandomState(seed).permutation(len(names)).tolist()
    if split == "random":
        return {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}
    if split == "lake":
        background = [number for number in order if names[number].startswith("images_background/")]
        test = [
            number for number, name in enumerate(names) if name.startswith("images_evaluation/")
        ]
        return {"train": background[100:], "val": background[:100], "test": test}

    def belongs(name: str, part: tuple[str, ...]) -> bool:
        _, alphabet, character = name.split("/")
        return alphabet in part or f"{alphabet}/{character}" in part

    val = [number for number, name in enumerate(names) if belongs(name, VINYALS_VAL)]
    test = [number for number, name in enumerate(names) if belongs(name, VINYALS_TEST)]
    return {"train": sorted({*range(len(names))} - {*val, *test}), "val": val, "test": test}


def _check_split(split: str) -> None:
    if split not in ("random", "vinyals", "lake"):
        raise UserValueError(
            f"Expected `split` to be 'random', 'vinyals' or 'lake' but got {split!r}."
        )


def find_tree(root: Path) -> dict[str, Path]:
    """Find the official folders in ``root`` or up to three levels below it.

    Args:
        root: Where to look.

    Returns:
        Paths of the folders that were found, by name. A complete one is preferred.
    """
    found = {}
    for name, count in CHARACTERS.items():
        places = [
            place
            for levels in range(4)
            for place in sorted(root.glob("*/" * levels + name))
            if "__MACOSX" not in place.parts
        ]
        characters = {place: len(_characters(place)) for place in places}
        whole = [place for place in places if characters[place] == count]
        part = [place for place in places if characters[place]]
        if whole or part:
            found[name] = (whole or part)[0]
    return found


def list_files(tree: dict[str, Path], root: Path) -> dict[str, list[Path]]:
    """List the images of all characters.

    Args:
        tree: Paths of the official folders, by name.
        root: Where they were looked for, for messages.

    Returns:
        The sorted image files of each character ``folder/Alphabet/characterNN``.

    Raises:
        FileNotFoundError: If a folder is missing or holds too few characters or images.
    """
    if len(tree) < len(CHARACTERS):
        raise UserFileNotFoundError(_not_found(root, tree))
    files = {}
    for name, count in CHARACTERS.items():
        characters = _characters(tree[name])
        if len(characters) != count:
            raise UserFileNotFoundError(
                f"Expected {tree[name]} to hold {count} characters but got {len(characters)}; "
                f"{_HALF}"
            )
        for character in characters:
            drawings = sorted(character.glob("[0-9]*.png"))
            if len(drawings) != DRAWINGS:
                raise UserFileNotFoundError(
                    f"Expected {character} to hold {DRAWINGS} images but got {len(drawings)}; "
                    f"{_HALF}"
                )
            files[f"{name}/{character.parent.name}/{character.name}"] = drawings
    return files


def _characters(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/character[0-9]*"))


_CURE = (
    "unpack images_background.zip and images_evaluation.zip, from the folder python/ of "
    "github.com/brendenlake/omniglot, into `root`, or set download=True where the internet can "
    "be reached."
)
_HALF = "it is half extracted: delete it and unpack its archive again."


def _not_found(root: Path, tree: dict[str, Path]) -> str:
    found = ", ".join(map(str, tree.values())) or "neither"
    return (
        f"Expected the folders {' and '.join(CHARACTERS)} in {root} or up to three levels below "
        f"but found {found}; {_CURE}"
    )
