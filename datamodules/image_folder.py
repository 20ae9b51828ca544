"""The user's own images, in a folder per class."""

from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from lightning_maml.datamodules.base import EpisodicDataModule, Regime
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
from lightning_maml.datamodules.sampler import ClassImages, Rotations, SmallClasses, check_seed
from lightning_maml.datamodules.transforms import EpisodeTransforms


class ImageFolderDataModule(EpisodicDataModule):
    """Few-shot episodes of the images in a tree of folders, RGB, of one size.

    The tree is ``root/{train,val,test}/CLASS/*``, or ``root/CLASS/*``, whose classes are then
    divided among the three splits at random. Usual other names of the splits will do: ``training``,
    ``valid``, ``validation``, ``testing``, ``base``, ``novel``, in any case; and the whole may lie
    some folders deeper. A class's images may lie at any depth below its folder; linked folders are
    followed. There may be any number of images, but at least as many as an episode takes. Hidden
    files, folders that programs make (``@eaDir``, ``__MACOSX``), files with other extensions and
    folders without images are left out; the log counts them in one line.

    Transparent images are put on white, and photographs are turned upright as their EXIF data say;
    see :func:`load_images`. They are decoded once, into ``root/images_SIZE.pt``, and again when a
    file is added, removed or changed.

    Args:
        root: Folder of the data.
        ways: Classes per training episode.
        shots: Support images per class.
        queries: Query images per class.
        test_ways: Classes per validation and test episode; by default as in training.
        test_shots: Support images per class there; by default as in training.
        test_queries: Query images per class there; by default as in training.
        meta_batch_size: Tasks per optimizer step and process.
        image_size: Height and width that images are resized to, whatever their aspect ratio, in
            pixels.
        shares: Fractions of the classes for training, validation and testing, in a tree without
            splits.
        split_seed: Seed of that split.
        train_batches: Meta-batches per epoch and process.
        val_tasks: Validation tasks over all processes together; the same ones each time.
        test_tasks: Test tasks over all processes together; the same ones each time.
        rotations: ``"classes"``, ``"augment"`` or ``"none"``, see :class:`EpisodicDataModule`.
        regime: ``"finite_sum"`` or ``"resampling"``, see :class:`EpisodicDataModule`.
        train_steps: N, the inner steps that ``"resampling"`` draws batches for: the model's
            ``train_steps``.
        hessian_shots: Images per class of the Hessian batches of ``"resampling"``; by default as
            many as ``shots``.
        transforms: Transforms of the images of whole episodes, on the device; by default none.
        small_classes: ``"raise"`` on classes with fewer images than an episode takes, or ``"drop"``
            them with a warning.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning.
        seed: Seed of the episodes.
        num_workers: Loader processes.
        class_level: How many levels below ``root``, or below the folder of its split, the folder of
            a class lies: 1, or 2 for ``SUPERCLASS/CLASS/*``, and so on. By default 1; but it must
            be given where a folder holds no images of its own but several folders of images.

    Raises:
        ValueError: If an argument is out of range, splits share classes, or a split cannot serve
            the episodes.
        FileNotFoundError: If there is no such tree.
        OSError: If an image cannot be read, or the cache cannot be written.
    """

    def __init__(
        self,
        root: str = "data",
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        test_ways: int | None = None,
        test_shots: int | None = None,
        test_queries: int | None = None,
        meta_batch_size: int = 4,
        image_size: int = 84,
        shares: Shares = (0.64, 0.16, 0.2),
        split_seed: int = 0,
        train_batches: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        rotations: Rotations = "none",
        regime: Regime = "finite_sum",
        train_steps: int = 1,
        hessian_shots: int | None = None,
        transforms: EpisodeTransforms | None = None,
        small_classes: SmallClasses = "raise",
        on_corrupt: OnCorrupt = "raise",
        seed: int = 0,
        num_workers: int = 0,
        class_level: int | None = None,
    ) -> None:
        super().__init__(
            ways=ways,
            shots=shots,
            queries=queries,
            test_ways=test_ways,
            test_shots=test_shots,
            test_queries=test_queries,
            meta_batch_size=meta_batch_size,
            train_batches=train_batches,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            rotations=rotations,
            regime=regime,
            train_steps=train_steps,
            hessian_shots=hessian_shots,
            transforms=transforms,
            small_classes=small_classes,
            seed=seed,
            num_workers=num_workers,
        )
        check_on_corrupt(on_corrupt)
        check_shares(shares)
        check_seed("split_seed", split_seed)
        if image_size < 1:
            raise ValueError(f"Expected `image_size` to be at least 1 but got {image_size}.")
        if class_level is not None and class_level < 1:
            raise ValueError(f"Expected `class_level` to be at least 1 but got {class_level}.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.shares, self.split_seed = shares, split_seed
        self.on_corrupt: OnCorrupt = on_corrupt
        self.class_level = class_level
        self._found: tuple[CachedImageFiles, Tree] | None = None

    @property
    def cache_file(self) -> Path:
        """Where the decoded images are kept."""
        return self.root / f"images_{self.image_size}.pt"

    def prepare_data(self) -> None:
        """Decode the images, unless there is a cache of exactly these files."""
        self._find()[0].prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        _, tree = self._find()
        found = ", ".join(f"{len(names)} {split} classes" for split, names in tree.splits.items())
        left_out = in_words(tree.left_out)
        rank_zero_info(f"Images in {tree.folder}: {found}{left_out and f'; left out: {left_out}'}")
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        files, tree = self._find()
        return files.read(tree.splits[split])

    def _find(self) -> tuple[CachedImageFiles, "Tree"]:
        if self._found is None:
            tree = find_tree(self.root, self.shares, self.split_seed, self.class_level)
            files = CachedImageFiles(
                tree.classes,
                self.cache_file,
                size=self.image_size,
                on_corrupt=self.on_corrupt,
                description=f"Decoding {self.root.name} once",
            )
            self._found = files, tree
        return self._found


class Tree(NamedTuple):
    """What was found in a tree of images.

    Attributes:
        folder: The folder of the classes or of the splits.
        classes: The image files of each class.
        splits: The classes of each split.
        left_out: What was seen but not taken.
    """

    folder: Path
    classes: dict[str, list[Path]]
    splits: dict[str, list[str]]
    left_out: LeftOut


def find_tree(root: Path, shares: Shares, seed: int, class_level: int | None = None) -> Tree:
    """Find the classes in a tree of images, and the splits.

    Args:
        root: Root of the tree.
        shares: Fractions of the classes for each split, if the tree has no splits.
        seed: Seed of that split.
        class_level: How many levels below the root or a split the folder of a class lies; None for
            1, if that is plain.

    Raises:
        FileNotFoundError: If there are no folders of images, or only some of the splits.
        ValueError: If splits share classes or have two folders, or it is not plain what the classes
            are.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"Expected `root` to be a folder of images but there is none at {root}."
        )
    folder, left_out = innermost(root), LeftOut()
    places = _find_splits(folder)
    if places:
        by_split = {
            split: _classes(innermost(place), class_level, left_out)
            for split, place in places.items()
        }
        check_disjoint(by_split, str(folder))
        left_out["folders beside the splits"] += len(subfolders(folder)) - len(places)
        classes = {
            f"{split}/{name}": files
            for split, of_split in by_split.items()
            for name, files in of_split.items()
        }
        return Tree(
            folder,
            classes,
            {split: [f"{split}/{name}" for name in names] for split, names in by_split.items()},
            left_out,
        )
    classes = _classes(folder, class_level, left_out)
    if not classes:
        seen = in_words(left_out)
        raise FileNotFoundError(
            f"Expected a folder of images for each class in {folder}, or train, val and test with "
            f"these, but found none{seen and f', only {seen}'}."
        )
    names = list(classes)
    chosen = split_classes(len(names), shares, seed)
    return Tree(
        folder,
        classes,
        {split: [names[number] for number in numbers] for split, numbers in chosen.items()},
        left_out,
    )


def _classes(folder: Path, class_level: int | None, left_out: LeftOut) -> dict[str, list[Path]]:
    classes = list_class_folders(folder, class_level, left_out)
    left_out["folders without images"] += sum(not files for files in classes.values())
    return {name: files for name, files in classes.items() if files}


def _find_splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split; none if there are none.

    Raises:
        FileNotFoundError: If there are only some of them.
        ValueError: If there are two of one.
    """
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for place in subfolders(folder):
        split = split_of(place)
        if split and subfolders(place):
            found[split].append(place)
    names = ", ".join(place.name for places in found.values() for place in places)
    for split, places in found.items():
        if len(places) > 1:
            raise ValueError(
                f"Expected one folder of each split in {folder} but got {names}; leave one for "
                f"{split}."
            )
    if names and not all(found.values()):
        omniglot = "; for Omniglot take OmniglotDataModule" if "images_background" in names else ""
        raise FileNotFoundError(
            f"Expected train, val and test in {folder} but got {names} only; or put all classes "
            f"in one folder{omniglot}."
        )
    return {split: places[0] for split, places in found.items() if places}
