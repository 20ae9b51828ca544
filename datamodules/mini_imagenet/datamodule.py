"""mini-ImageNet: 100 classes of ImageNet, 600 images each, 84 x 84 pixels (Vinyals et al. 2016), in the split of Ravi & Larochelle 2017."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_maml.datamodules.base import EpisodicDataModule, Regime
from lightning_maml.datamodules.class_splits import check_disjoint
from lightning_maml.datamodules.images.files import OnCorrupt, check_on_corrupt
from lightning_maml.datamodules.mini_imagenet.array_files import Split
from lightning_maml.datamodules.mini_imagenet.layouts import Layout, find_layout
from lightning_maml.datamodules.sampler import ClassImages, Rotations, SmallClasses
from lightning_maml.datamodules.transforms import EpisodeTransforms

CLASSES = {"train": 64, "val": 16, "test": 20}
"""Classes of each split."""


class MiniImageNetDataModule(EpisodicDataModule):
    """Few-shot episodes of mini-ImageNet, RGB, 84 x 84 pixels.

    There is no official download. The form of the data is recognised automatically, in ``root`` or
    in a folder of it: CSV lists of Ravi & Larochelle or of easyfsl beside the images, class folders
    ``train | val | test``, cache pickles of Ren et al., category-split pickles of Gidaris &
    Komodakis, or torchmeta's HDF5 files. Image files are decoded once, into ``mini_imagenet_84.pt``
    beside them; arrays in pickles are mapped into memory as they are. Pickles are read without
    running anything they may contain.

    Args:
        root: Folder of the data.
        ways: Classes per training episode.
        shots: Support images per class.
        queries: Query images per class.
        test_ways: Classes per validation and test episode; by default as in training.
        test_shots: Support images per class there; by default as in training.
        test_queries: Query images per class there; by default as in training.
        meta_batch_size: Tasks per optimizer step and process.
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

    Raises:
        ValueError: If an argument is out of range, a split cannot serve the episodes, or the files
            are not what they seem: a web page in place of a pickle, other classes or arrays than
            mini-ImageNet's, or the same classes in several splits.
        FileNotFoundError: If there is no mini-ImageNet in ``root``, or images of a list are
            missing.
        OSError: If an image cannot be read, or the cache cannot be written.
        ModuleNotFoundError: If the data are HDF5 files and h5py is not installed.
    """

    image_size = 84

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
        self.root = Path(root).expanduser()
        self.on_corrupt: OnCorrupt = on_corrupt
        self._layout: Layout | None = None

    def prepare_data(self) -> None:
        """Decode the image files, unless the data are arrays or a cache is there."""
        if (files := self._found().files) is not None:
            files.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        layout = self._found()
        sizes = (
            f"{split} {len(part.sizes)} classes, {sum(part.sizes.values())} images"
            for split, part in layout.splits.items()
        )
        rank_zero_info(
            f"mini-ImageNet from the {layout.name} in {layout.folder}: {'; '.join(sizes)}"
        )
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        return self._found().splits[split].read()

    def _found(self) -> Layout:
        if self._layout is None:
            layout = find_layout(self.root, self.image_size, self.on_corrupt)
            _check_splits(layout.folder, layout.splits)
            self._layout = layout
        return self._layout


def _check_splits(folder: Path, splits: dict[str, Split]) -> None:
    check_disjoint({split: part.sizes for split, part in splits.items()}, str(folder))
    found = {split: len(part.sizes) for split, part in splits.items()}
    if found != CLASSES:
        expected, got = (
            ", ".join(f"{count} {split}" for split, count in counts.items())
            for counts in (CLASSES, found)
        )
        raise ValueError(
            f"Expected {expected} classes in {folder}, as Ravi & Larochelle 2017 split "
            f"mini-ImageNet, but got {got} classes; for other data take ImageFolderDataModule."
        )
