"""The user's own images, in a folder per class."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_maml.datamodules.class_splits import Shares, check_disjoint, check_shares, split_classes
from lightning_maml.datamodules.episodic import EpisodicDataModule, Regime
from lightning_maml.datamodules.image_files import CachedImageFiles, OnCorrupt, check_on_corrupt, list_class_folders
from lightning_maml.datamodules.sampler import ClassImages, Rotations, SmallClasses, check_seed
from lightning_maml.datamodules.transforms import EpisodeTransforms

_SPLITS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


class ImageFolderDataModule(EpisodicDataModule):
    """Few-shot episodes of the images in a tree of folders, RGB, of one size.

    The tree is ``root/{train,val,test}/CLASS/*``, or ``root/CLASS/*``, whose classes are then divided among the three splits at random.
    A class's images may lie at any depth below its folder. There may be any number of them, but at least as many as an episode takes.
    They are decoded once, into ``root/images_SIZE.pt``, and again when a file is added, removed or changed.

    Args:
        root: Folder of the data.
        ways: Classes per training episode.
        shots: Support images per class.
        queries: Query images per class.
        test_ways: Classes per validation and test episode; by default as in training.
        test_shots: Support images per class there; by default as in training.
        test_queries: Query images per class there; by default as in training.
        meta_batch_size: Tasks per optimizer step and process.
        image_size: Height and width that images are resized to, whatever their aspect ratio, in pixels.
        shares: Fractions of the classes for training, validation and testing, in a tree without splits.
        split_seed: Seed of that split.
        train_batches: Meta-batches per epoch and process.
        val_tasks: Validation tasks over all processes together; the same ones each time.
        test_tasks: Test tasks over all processes together; the same ones each time.
        rotations: ``"classes"``, ``"augment"`` or ``"none"``, see :class:`EpisodicDataModule`.
        regime: ``"finite_sum"`` or ``"resampling"``, see :class:`EpisodicDataModule`.
        train_steps: N, the inner steps that ``"resampling"`` draws batches for: the model's ``train_steps``.
        hessian_shots: Images per class of the Hessian batches of ``"resampling"``; by default as many as ``shots``.
        transforms: Transforms of the images of whole episodes, on the device; by default none.
        small_classes: ``"raise"`` on classes with fewer images than an episode takes, or ``"drop"`` them with a warning.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a warning.
        seed: Seed of the episodes.
        num_workers: Loader processes.

    Raises:
        ValueError: If an argument is out of range, splits share classes, or a split cannot serve the episodes.
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
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.shares, self.split_seed = shares, split_seed
        self.on_corrupt: OnCorrupt = on_corrupt
        self._found: tuple[CachedImageFiles, dict[str, list[str]]] | None = None

    @property
    def cache_file(self) -> Path:
        """Where the decoded images are kept."""
        return self.root / f"images_{self.image_size}.pt"

    def prepare_data(self) -> None:
        """Decode the images, unless there is a cache of exactly these files."""
        self._find()[0].prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        _, splits = self._find()
        rank_zero_info(f"Images in {self.root}: {', '.join(f'{len(names)} {split} classes' for split, names in splits.items())}")
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        files, splits = self._find()
        return files.read(splits[split])

    def _find(self) -> tuple[CachedImageFiles, dict[str, list[str]]]:
        if self._found is None:
            classes, splits = find_classes(self.root, self.shares, self.split_seed)
            description = f"Decoding {self.root.name} once"
            self._found = (
                CachedImageFiles(classes, self.cache_file, size=self.image_size, on_corrupt=self.on_corrupt, description=description),
                splits,
            )
        return self._found


def find_classes(root: Path, shares: Shares, seed: int) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """Return the image files of each class in a tree, and the classes of each split.

    Args:
        root: Root of the tree.
        shares: Fractions of the classes for each split, if the tree has no splits.
        seed: Seed of that split.

    Raises:
        FileNotFoundError: If there are no folders of images, or only some of the splits.
        ValueError: If splits share classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"Expected `root` to be a folder of images but there is none at {root}.")
    places = {split: root / name for split, names in _SPLITS.items() for name in reversed(names) if _holds_folders(root / name)}
    if not places:
        classes = list_class_folders(root)
        if not any(classes.values()):
            raise FileNotFoundError(
                f"Expected a folder of images for each class in {root}, or train, val and test with these, but found none."
            )
        names = list(classes)
        chosen = split_classes(len(names), shares, seed)
        return classes, {split: [names[number] for number in numbers] for split, numbers in chosen.items()}
    if len(places) < len(_SPLITS):
        raise FileNotFoundError(
            f"Expected train, val and test in {root} but got {', '.join(places)} only; or put all classes in one folder."
        )
    by_split = {split: list_class_folders(place) for split, place in places.items()}
    check_disjoint(by_split, str(root))
    classes = {f"{split}/{name}": files for split, of_split in by_split.items() for name, files in of_split.items()}
    return classes, {split: [f"{split}/{name}" for name in of_split] for split, of_split in by_split.items()}


def _holds_folders(place: Path) -> bool:
    return place.is_dir() and any(below.is_dir() for below in place.iterdir())
