"""CUB-200-2011: 11,788 photographs of 200 species of birds (Wah et al. 2011)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.images.files import CachedImageFiles, OnCorrupt, check_on_corrupt
from lightning_maml.datamodules.images.folders import list_class_folders
from lightning_maml.datamodules.messages import first_five, say_what_was_found
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserFileNotFoundError, UserValueError

SPECIES = 200
IMAGES = {"train": 5885, "val": 2950, "test": 2953}
"""Photographs in each split, 11,788 in all."""

_FOLDER = "CUB_200_2011"  # as its archive unpacks


class CUBDataModule(EpisodicDataModule):
    """Few-shot episodes of the birds of CUB-200-2011, RGB, of one size.

    The split is that of Chen et al. 2019: of the species in the order of their numbers, every
    second one is for training (100), and of the others, by turns, one is for validation (50) and
    one for testing (50). Images are resized as a whole, whatever their aspect ratio; the bounding
    boxes are not used. They are decoded once, into ``cub_SIZE.pt`` beside them.

    Args:
        root: Folder of the data. ``CUB_200_2011`` is looked for in it, in the form in which its
            authors' archive unpacks.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        image_size: Height and width that images are resized to, in pixels.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, or a split has too few images for its episodes.
        FileNotFoundError: If the images are missing, or some of them.
        OSError: If an image cannot be read, or the cache cannot be written.

    Examples:
        >>> from lightning_maml.datamodules import CUBDataModule
        >>> data = CUBDataModule("data", ways=5, shots=5)  # reads when training starts
        >>> data.queries, data.meta_batch_size
        (15, 4)
    """

    def __init__(
        self,
        root: str = "data",
        *,
        queries: int = 15,
        meta_batch_size: int = 4,
        image_size: int = 84,
        on_corrupt: OnCorrupt = "raise",
        **options: Any,
    ) -> None:
        super().__init__(queries=queries, meta_batch_size=meta_batch_size, **options)
        check_on_corrupt(on_corrupt)
        if image_size < 1:
            raise UserValueError(f"Expected `image_size` to be at least 1 but got {image_size}.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.on_corrupt: OnCorrupt = on_corrupt
        self._found: Remembered[tuple[CachedImageFiles, dict[str, list[Path]]]] = Remembered()

    def prepare_data(self) -> None:
        """Decode the images, unless there is a cache of exactly these files."""
        with self._found.forgotten_on_error():
            self._find()[0].prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        _, species = self._find()
        sizes = {
            split: [len(species[name]) for name in names]
            for split, names in split_species(species).items()
        }
        say_what_was_found("CUB-200-2011", str(find_birds(self.root)), sizes, IMAGES)
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        files, species = self._find()
        return files.read(split_species(species)[split])

    @override
    def read_by(self) -> tuple[Any, ...]:
        return self.root, self.image_size, self.on_corrupt

    def _find(self) -> tuple[CachedImageFiles, dict[str, list[Path]]]:
        return self._found(self.read_by(), self._find_now)

    def _find_now(self) -> tuple[CachedImageFiles, dict[str, list[Path]]]:
        folder = find_birds(self.root)
        species = list_species(folder)
        files = CachedImageFiles(
            species,
            folder / f"cub_{self.image_size}.pt",
            size=self.image_size,
            on_corrupt=self.on_corrupt,
            description="Decoding CUB-200-2011 once",
        )
        return files, species


def split_species(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the species of each split (Chen et al. 2019).

    Args:
        names: The names of all species, ``002.Laysan_Albatross``.
    """
    names = [*names]
    turns = {"train": (1, 3), "val": (2,), "test": (0,)}  # of the species' number, by fours
    return {
        split: [name for name in names if int(name[:3]) % 4 in of_split]
        for split, of_split in turns.items()
    }


def find_birds(root: Path) -> Path:
    """Return the folder that the archive makes, in ``root`` or ``root`` itself.

    Raises:
        FileNotFoundError: If it is not there.
    """
    for folder in (root / _FOLDER, root / _FOLDER / _FOLDER):
        if (folder / "images").is_dir():
            return folder
    if any((root / "images").glob("001.*")):  # other datasets have a folder of this name too
        return root
    raise UserFileNotFoundError(
        f"Expected CUB-200-2011 in {root / _FOLDER} (the folder images) but did not find it; get "
        f"CUB_200_2011.tgz from data.caltech.edu/records/65de6-vp158 and unpack it in {root}."
    )


def list_species(folder: Path) -> dict[str, list[Path]]:
    """List the image files of each species.

    Args:
        folder: The folder that the archive makes. If its ``images.txt`` is there, all images in
            that list must be too.

    Raises:
        FileNotFoundError: If images are missing.
        ValueError: If the folders are not those of the 200 species.
    """
    species = list_class_folders(folder / "images")
    numbers = [name[:3] for name in species if re.match(r"\d{3}\.", name)]
    if [*map(int, numbers)] != [*range(1, SPECIES + 1)] or len(species) > SPECIES:
        raise UserValueError(
            f"Expected {folder / 'images'} to hold folders 001.* .. {SPECIES}.* of species but got "
            f"{len(species)} folders ({first_five(species)}); unpack the archive again."
        )
    listed = folder / "images.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
        names = {line.partition(" ")[2].strip() for line in lines} - {""}
        found = {f"{name}/{file.name}" for name, files in species.items() for file in files}
        missing = sorted(names - found)
        if missing:
            raise UserFileNotFoundError(
                f"Expected all {len(names)} images of {listed} but {len(missing)} are missing: "
                f"{first_five(missing)}; unpack the archive again."
            )
    return species
