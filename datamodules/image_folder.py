"""Episodes of users' own images, in a folder per class."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.class_splits import (
    Shares,
    check_disjoint,
    check_shares,
    split_classes,
)
from lightning_maml.datamodules.images.files import CachedImageFiles, OnCorrupt, check_on_corrupt
from lightning_maml.datamodules.images.folders import (
    LeftOut,
    in_words,
    innermost,
    list_class_folders,
    split_of,
    subfolders,
)
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages, check_seed
from lightning_maml.errors import UserFileNotFoundError, UserValueError


class ImageFolderDataModule(EpisodicDataModule):
    """Few-shot episodes of the images in a tree of folders, RGB, of one size.

    The tree is ``root/{train,val,test}/CLASS/*``, or ``root/CLASS/*``, whose classes are then
    divided among the three splits at random. The splits may have their other usual names:
    ``training``, ``valid``, ``validation``, ``testing``, ``base``, ``novel``, in any case. The tree
    may begin some folders deeper, and a class's images may lie at any depth below its folder.
    Linked folders are followed. Hidden files, folders that programs make (``@eaDir``,
    ``__MACOSX``), files with other extensions and folders without images are left out; the log
    counts them in one line.

    Transparent images are put on white, and photographs are turned upright according to their EXIF
    data; see :func:`load_images`. Images are decoded once, into ``root/images_SIZE.pt``, and again
    when a file is added, removed or changed.

    Args:
        root: Folder of the data.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        image_size: Height and width that images are resized to, whatever their aspect ratio, in
            pixels.
        shares: Fractions of the classes for training, validation and testing, if the tree has no
            splits.
        split_seed: Seed of that split.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning.
        class_level: How many levels below ``root``, or below the folder of its split, the folder of
            a class lies: 1, or 2 for ``SUPERCLASS/CLASS/*``, and so on. A folder that holds all
            images, in each split if there are any, does not count. By default 1; it must be given
            if a folder holds no images of its own but several folders of images.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, splits share classes, or a split has too few
            classes or images for its episodes.
        FileNotFoundError: If there is no such tree.
        OSError: If an image cannot be read, or the cache cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_maml.datamodules import ImageFolderDataModule
        >>> with TemporaryDirectory() as root:
        ...     for split in ("train", "val", "test"):
        ...         for name in ("a", "b", "c"):
        ...             folder = Path(root, split, f"{split} {name}")
        ...             folder.mkdir(parents=True)
        ...             Image.new("RGB", (50, 30)).save(folder / "0.png")
        ...             Image.new("RGB", (50, 30)).save(folder / "1.png")
        ...     data = ImageFolderDataModule(root, image_size=28, ways=2, queries=1)
        ...     data.prepare_data()
        ...     next(iter(data.train_dataloader())).support_x.shape
        torch.Size([4, 2, 3, 28, 28])
    """

    def __init__(
        self,
        root: str = "data",
        *,
        queries: int = 15,
        meta_batch_size: int = 4,
        image_size: int = 84,
        shares: Shares = (0.64, 0.16, 0.2),
        split_seed: int = 0,
        on_corrupt: OnCorrupt = "raise",
        class_level: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(queries=queries, meta_batch_size=meta_batch_size, **options)
        check_on_corrupt(on_corrupt)
        check_shares(shares)
        check_seed("split_seed", split_seed)
        if image_size < 1:
            raise UserValueError(f"Expected `image_size` to be at least 1 but got {image_size}.")
        if class_level is not None and class_level < 1:
            raise UserValueError(f"Expected `class_level` to be at least 1 but got {class_level}.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.shares, self.split_seed = shares, split_seed
        self.on_corrupt: OnCorrupt = on_corrupt
        self.class_level = class_level
        self._found: Remembered[tuple[CachedImageFiles, Tree]] = Remembered()

    @property
    def cache_file(self) -> Path:
        """Where the decoded images are kept."""
        return self.root / f"images_{self.image_size}.pt"

    def prepare_data(self) -> None:
        """Decode the images, unless there is a cache of exactly these files."""
        with self._found.forgotten_on_error():
            self._find()[0].prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        _, tree = self._find()
        found = ", ".join(f"{len(names)} {split} classes" for split, names in tree.splits.items())
        message = f"Images in {tree.folder}: {found}"
        left_out = in_words(tree.left_out)
        if left_out:
            message += f"; left out: {left_out}"
        rank_zero_info(message)
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        files, tree = self._find()
        return files.read(tree.splits[split])

    @override
    def read_by(self) -> tuple[Any, ...]:
        division = *self.shares, self.split_seed, self.class_level
        return self.root, self.image_size, self.on_corrupt, division

    def _find(self) -> tuple[CachedImageFiles, "Tree"]:
        return self._found(self.read_by(), self._find_now)

    def _find_now(self) -> tuple[CachedImageFiles, "Tree"]:
        tree = find_tree(self.root, self.shares, self.split_seed, self.class_level)
        _check_links(tree.classes)
        files = CachedImageFiles(
            tree.classes,
            self.cache_file,
            size=self.image_size,
            on_corrupt=self.on_corrupt,
            description=f"Decoding {self.root.name} once",
        )
        return files, tree


class Tree(NamedTuple):
    """What was found in a tree of images.

    Attributes:
        folder: The folder of the classes, or of the splits.
        classes: The image files of each class.
        splits: The names of the classes of each split.
        left_out: What was seen but not taken.
    """

    folder: Path
    classes: dict[str, list[Path]]
    splits: dict[str, list[str]]
    left_out: LeftOut


def find_tree(root: Path, shares: Shares, seed: int, class_level: int | None = None) -> Tree:
    """Find the classes in a tree of images, and their splits.

    Args:
        root: Root of the tree.
        shares: Fractions of the classes for each split, if the tree has no splits.
        seed: Seed of the division into splits, if the tree has none.
        class_level: How many levels below the root or a split the folder of a class lies; None for
            1, if that is unambiguous.

    Raises:
        FileNotFoundError: If there are no folders of images, or only some of the splits.
        ValueError: If splits share classes, there are two folders of a split, or it is ambiguous
            which folders are classes.
    """
    if not root.is_dir():
        raise UserFileNotFoundError(
            f"Expected `root` to be a folder of images but there is none at {root}."
        )
    folder = innermost(root)
    places = _find_splits(folder)
    if places:
        return _tree_with_splits(folder, places, class_level)
    left_out = LeftOut()
    classes = _classes(folder, class_level, left_out)
    if not classes and class_level:  # all classes may be of one superclass
        left_out = LeftOut()
        classes = _classes(root, class_level, left_out)
    if not classes:
        seen = in_words(left_out)
        raise UserFileNotFoundError(
            f"Expected a folder of images for each class in {folder}, or train, val and test with "
            f"these, but found none{seen and f', only {seen}'}."
        )
    names = list(classes)
    splits = {
        split: [names[number] for number in numbers]
        for split, numbers in split_classes(len(names), shares, seed).items()
    }
    return Tree(folder, classes, splits, left_out)


def _tree_with_splits(folder: Path, places: dict[str, Path], class_level: int | None) -> Tree:
    """Find the classes in the folders of the splits."""
    left_out = LeftOut()
    by_split = {
        split: _classes(inner, class_level, left_out)
        for split, inner in _alike(places, class_level).items()
    }
    check_disjoint(by_split, str(folder))
    left_out["folders beside the splits"] += len(subfolders(folder)) - len(places)
    classes: dict[str, list[Path]] = {}
    splits: dict[str, list[str]] = {}
    for split, of_split in by_split.items():
        splits[split] = [f"{split}/{name}" for name in of_split]
        classes.update(zip(splits[split], of_split.values(), strict=True))
    return Tree(folder, classes, splits, left_out)


def _check_links(classes: dict[str, list[Path]]) -> None:
    """Check that no two classes have images in one folder, by links.

    Raises:
        ValueError: If two have.
    """
    owners: dict[str, str] = {}
    for name, files in classes.items():
        for folder in map(os.path.realpath, {file.parent for file in files}):
            other = owners.setdefault(folder, name)
            if other != name:
                raise UserValueError(
                    f"Expected each folder of images to be of one class but {folder} is, by a "
                    f"link, of both {other!r} and {name!r}, which may be of two splits; remove one."
                )


def _alike(places: dict[str, Path], class_level: int | None) -> dict[str, Path]:
    """Return the innermost folder of each split, with a level equally deep below all of them.

    A split with one superclass alone has its images in one folder, too, which is to count.
    """
    inner = {split: innermost(place) for split, place in places.items()}
    if class_level is None:
        return inner
    below = {split: inner[split].relative_to(place).parts for split, place in places.items()}
    depth = min(map(len, below.values()))
    return {split: place.joinpath(*below[split][:depth]) for split, place in places.items()}


def _classes(folder: Path, class_level: int | None, left_out: LeftOut) -> dict[str, list[Path]]:
    classes = list_class_folders(folder, class_level, left_out)
    left_out["folders without images"] += sum(not files for files in classes.values())
    return {name: files for name, files in classes.items() if files}


def _find_splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split; an empty dictionary if there are no splits.

    Raises:
        FileNotFoundError: If there are folders of some splits only.
        ValueError: If there are two folders of a split.
    """
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for place in subfolders(folder):
        split = split_of(place)
        if split and subfolders(place):
            found[split].append(place)
    names = ", ".join(place.name for places in found.values() for place in places)
    for split, places in found.items():
        if len(places) > 1:
            raise UserValueError(
                f"Expected one folder of each split in {folder} but got {names}; leave one for "
                f"{split}."
            )
    if names and not all(found.values()):
        omniglot = "; for Omniglot take OmniglotDataModule" if "images_background" in names else ""
        raise UserFileNotFoundError(
            f"Expected train, val and test in {folder} but got {names} only; or put all classes "
            f"in one folder{omniglot}."
        )
    return {split: places[0] for split, places in found.items() if places}
