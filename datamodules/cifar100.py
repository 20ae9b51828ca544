"""CIFAR-100 in its two few-shot splits: CIFAR-FS and FC100, 100 classes of 600 images each."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import (
    check_integrity,
    download_and_extract_archive,
    extract_archive,
)
from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.images.pickles import read_entries, whole_numbers
from lightning_maml.datamodules.messages import first_five, say_what_was_found
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserFileNotFoundError, UserValueError, check_truth

CLASSES, IMAGES = 100, 600
"""How many classes, and images of each."""

_FOLDER = CIFAR100.base_folder  # as its archive unpacks
_FILES = ("train", "test", "meta")


class _CIFAR100DataModule(EpisodicDataModule):
    """What both splits share. Subclasses say which classes are for validation and testing."""

    image_size = 32
    held_out: ClassVar[dict[str, str]]
    """Names of the classes of ``"val"`` and ``"test"``, in words."""

    def __init__(
        self,
        root: str = "data",
        *,
        queries: int = 15,
        meta_batch_size: int = 4,
        download: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(queries=queries, meta_batch_size=meta_batch_size, **options)
        self.root = Path(root).expanduser()
        check_truth(download=download)
        self._download = download
        self._read: Remembered[CIFAR100Images] = Remembered()

    def prepare_data(self) -> None:
        """Download or unpack the archive, unless the files are there."""
        if _find_files(self.root) is None:
            if self._download:
                _download(self.root)
            elif (self.root / CIFAR100.filename).is_file():
                _unpack(self.root / CIFAR100.filename)

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        images = self._images()
        sizes = {
            split: [len(images.rows[name]) for name in names]
            for split, names in divided(images.rows, self.held_out).items()
        }
        say_what_was_found(
            "CIFAR-100",
            str(images.folder),
            sizes,
            {split: IMAGES * len(of_split) for split, of_split in sizes.items()},
        )
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        images = self._images()
        names = divided(images.rows, self.held_out)[split]
        return ClassImages(images.pixels, [images.rows[name] for name in names], names)

    def _images(self) -> "CIFAR100Images":
        return self._read(self.root, lambda: read_cifar100(self.root))

    @override
    def read_by(self) -> tuple[Any, ...]:
        return (self.root,)


class CIFARFSDataModule(_CIFAR100DataModule):
    """Few-shot episodes of CIFAR-FS, RGB, 32 x 32 pixels.

    CIFAR-FS (Bertinetto et al. 2019) divides the classes of CIFAR-100 into 64 for training, 16 for
    validation and 20 for testing, at random. All 600 images of a class are used.

    Args:
        root: Folder of the data. CIFAR-100 is looked for in it as ``cifar-100-python``, in the form
            in which its authors' archive unpacks. The files are read without running any code that
            they contain.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        download: Whether to download the archive (169 MB) into ``root`` where the files are
            missing. If it is there, it is unpacked in any case.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, a split has too few images for its episodes, or
            the files are not CIFAR-100's.
        FileNotFoundError: If the files are missing and cannot be downloaded.

    Examples:
        >>> from lightning_maml.datamodules import CIFARFSDataModule
        >>> data = CIFARFSDataModule("data", ways=5, shots=5)  # reads when training starts
        >>> data.queries, data.meta_batch_size
        (15, 4)
    """

    held_out: ClassVar[dict[str, str]] = {
        "val": """beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree
            motorcycle otter sea shark television tractor""",
        "test": """baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose
            snail sweet_pepper table telephone wardrobe whale woman worm""",
    }


class FC100DataModule(_CIFAR100DataModule):
    """Few-shot episodes of FC100, RGB, 32 x 32 pixels.

    FC100 (Oreshkin et al. 2018) divides the classes of CIFAR-100 by its superclasses, 60 for
    training, 20 for validation and 20 for testing, so that the classes of different splits are less
    alike than in CIFAR-FS. All 600 images of a class are used.

    Args:
        root: Folder of the data. CIFAR-100 is looked for in it as ``cifar-100-python``, in the form
            in which its authors' archive unpacks. The files are read without running any code that
            they contain.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        download: Whether to download the archive (169 MB) into ``root`` where the files are
            missing. If it is there, it is unpacked in any case.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, a split has too few images for its episodes, or
            the files are not CIFAR-100's.
        FileNotFoundError: If the files are missing and cannot be downloaded.

    Examples:
        >>> from lightning_maml.datamodules import FC100DataModule
        >>> data = FC100DataModule("data", ways=5, shots=5)  # reads when training starts
        >>> data.queries, data.meta_batch_size
        (15, 4)
    """

    # a line for each superclass
    held_out: ClassVar[dict[str, str]] = {
        "val": """
            bear leopard lion tiger wolf
            camel cattle chimpanzee elephant kangaroo
            crab lobster snail spider worm
            hamster mouse rabbit shrew squirrel
        """,
        "test": """
            beaver dolphin otter seal whale
            bee beetle butterfly caterpillar cockroach
            fox porcupine possum raccoon skunk
            baby boy girl man woman
        """,
    }


class CIFAR100Images(NamedTuple):
    """All images of CIFAR-100.

    Attributes:
        folder: Where they were found.
        pixels: uint8 ``[60000, 3, 32, 32]``, the training images first.
        rows: The rows of the images of each class, by its name, in the order of CIFAR-100's labels.
    """

    folder: Path
    pixels: Tensor
    rows: dict[str, np.ndarray]


def divided(names: Iterable[str], held_out: dict[str, str]) -> dict[str, list[str]]:
    """Return the class names of each split, in the order of ``names``.

    Args:
        names: The names of all classes.
        held_out: Those of ``"val"`` and ``"test"``, in words; all others are for training.

    Raises:
        ValueError: If a name of a class that is held out is not there.
    """
    names = [*names]
    of_split = {split: set(words.split()) for split, words in held_out.items()}
    missing = sorted(set().union(*of_split.values()) - set(names))
    if missing:
        raise UserValueError(
            "Expected the classes of CIFAR-100 but there is none called "
            f"{first_five(missing)}; download its archive for Python again."
        )
    others = set(names) - set().union(*of_split.values())
    return {
        split: [name for name in names if name in chosen]
        for split, chosen in {"train": others, **of_split}.items()
    }


def read_cifar100(root: Path) -> CIFAR100Images:
    """Read CIFAR-100 from its authors' pickles, without running any code that they contain.

    Args:
        root: Where to look for the folder ``cifar-100-python``.

    Raises:
        FileNotFoundError: If it is not there, or not whole.
        ValueError: If its files are not what they should be.
    """
    folder = _find_files(root)
    if folder is None:
        raise _not_found(
            root,
            "",
            ", or set download=True, and call `prepare_data()`",
        )
    [names] = read_entries(folder / "meta", "fine_label_names")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or not len(names) == len(set(names)) == CLASSES:
        raise UserValueError(
            f"Expected {folder / 'meta'} to name {CLASSES} different classes but got "
            f"{_count(names) if are_names else type(names).__name__}; download the archive again."
        )
    parts = [_read_part(folder / part) for part in ("train", "test")]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rows = {name: np.flatnonzero(labels == number) for number, name in enumerate(names)}
    return CIFAR100Images(folder, torch.from_numpy(pixels), rows)


def _count(names: list[str]) -> str:
    return f"{len(names)} names, {len(set(names))} of them different"


def _download(root: Path) -> None:
    try:
        download_and_extract_archive(
            CIFAR100.url, str(root), filename=CIFAR100.filename, md5=CIFAR100.tgz_md5
        )
    except Exception as error:  # torchvision passes on any error of network or archive
        archive = root / CIFAR100.filename
        if archive.is_file() and not check_integrity(str(archive), CIFAR100.tgz_md5):
            raise _damaged(archive, f" (that failed: {error})") from error
        raise _not_found(root, f", and its download failed ({error})", "") from error


def _unpack(archive: Path) -> None:
    if not check_integrity(str(archive), CIFAR100.tgz_md5):
        raise _damaged(archive, "")
    extract_archive(str(archive), str(archive.parent))


def _damaged(archive: Path, why_not: str) -> UserValueError:
    return UserValueError(
        f"Expected {archive} to be the archive of CIFAR-100 for Python but its checksum is "
        f"another; download it again{why_not}."
    )


def _find_files(root: Path) -> Path | None:
    """Return the folder of the pickles, in ``root`` or ``root`` itself; None if not whole."""
    for folder in (root / _FOLDER, root):
        if all((folder / name).is_file() for name in _FILES):
            return folder
    return None


def _not_found(root: Path, why: str, or_else: str) -> UserFileNotFoundError:
    return UserFileNotFoundError(
        f"Expected CIFAR-100 in {root / _FOLDER} (the files {', '.join(_FILES)}) but did not find "
        f"it{why}; put {CIFAR100.filename} of {CIFAR100.url} into {root}{or_else}."
    )


def _read_part(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels ``[n, 3, 32, 32]`` and labels ``[n]`` of a file."""
    pixels, fine_labels = read_entries(file, "data", "fine_labels")
    labels = whole_numbers(f"`fine_labels` of {file}", fine_labels)
    is_array = isinstance(pixels, np.ndarray)
    shape = pixels.shape if is_array else ()
    if shape != (len(labels), 3072) or pixels.dtype != np.uint8:
        got = f"{pixels.dtype} {list(shape)}" if is_array else type(pixels).__name__
        raise UserValueError(
            f"Expected {file} to hold images uint8 [n, 3072] and n whole numbers as labels but "
            f"got {got} and {len(labels)} labels; download the archive again."
        )
    wrong = labels[(labels < 0) | (labels >= CLASSES)]
    if len(wrong):
        raise UserValueError(
            f"Expected the images of {file} to have labels from 0 to {CLASSES - 1} but got "
            f"{wrong[0]}."
        )
    return pixels.reshape(-1, 3, 32, 32), labels
