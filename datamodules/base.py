"""The base of all few-shot datamodules: the shape of episodes, their loaders and transforms."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.datamodules.on_device import ImagesOnDevice
from lightning_maml.datamodules.prefetch import PrefetchingLoader, as_it_is
from lightning_maml.datamodules.sampler import (
    ClassImages,
    EpisodeDataset,
    Resampling,
    Rotations,
    SmallClasses,
    TaskDataset,
    TaskSampler,
    TaskSizes,
    check_seed,
)
from lightning_maml.datamodules.transforms import EpisodeTransforms
from lightning_maml.errors import UserValueError
from lightning_maml.execution.graphs import free_bytes

Regime = Literal["finite_sum", "resampling"]
Purpose = Literal["stepsize", "stationarity", "measure", "fidelity"]

# Part of the seed of each split's episodes, so that splits draw independently of each other.
_STREAMS = {"train": 0, "val": 1, "test": 2}
# Part of the key of training tasks that are drawn for another purpose than training.
_PURPOSES: dict[Purpose, int] = {"stepsize": 1, "stationarity": 2, "measure": 3, "fidelity": 4}

_LEAST = {
    "ways": 2,
    "shots": 1,
    "queries": 1,
    "test_ways": 2,
    "test_shots": 1,
    "test_queries": 1,
    "meta_batch_size": 1,
    "train_batches": 1,
    "val_tasks": 1,
    "test_tasks": 1,
    "train_steps": 1,
    "hessian_shots": 0,
    "num_workers": 0,
}
"""Smallest value of each number among the arguments."""


def splits_of(stage: str | None) -> Sequence[str]:
    """Return the splits that a stage of the trainer needs: all of them for None."""
    stages = {
        "fit": ("train", "val"),
        "validate": ("val",),
        "test": ("test",),
        "predict": ("test",),
    }
    return stages.get(stage or "", tuple(_STREAMS))


class EpisodicDataModule(LightningDataModule):
    """Base class of the few-shot datamodules, which makes episodes of the images of classes.

    A subclass defines :meth:`class_images` and, if it reads files, ``prepare_data``; and
    :meth:`read_by`, if it has attributes that decide what these return. It takes the arguments
    below as ``**options`` and hands them to ``super().__init__(**options)``; then the command
    ``lightning-maml`` knows them too.

    With a trainer, batches are :class:`lightning_maml.Episodes` with float images
    ``[T, S, C, H, W]``: bytes are scaled to 0 .. 1, and then the images are transformed. Loaders
    alone give the images as stored; in a loop of your own, :meth:`prepared` does the rest. In
    training with ``regime="resampling"``, batches are :class:`lightning_maml.ResampledEpisodes`,
    with images ``[T, N, S, C, H, W]``. Episodes depend only on the seed, the epoch and their
    number, not on the number of workers or processes.

    While a trainer runs on CUDA, the images of a split are kept on the device if they take at most
    a quarter of its free memory (with rotations, all four of them), so that only the numbers of the
    images and the labels are sent there for each batch. Batches come from the CPU, as they do
    without a trainer, if there are loader processes or ``on_before_batch_transfer`` is overridden.

    Args:
        ways: Classes per training episode.
        shots: Support images per class.
        queries: Query images per class.
        test_ways: Classes per validation and test episode; by default as in training.
        test_shots: Support images per class in validation and test; by default as in training.
        test_queries: Query images per class in validation and test; by default as in training.
        meta_batch_size: Tasks per optimizer step and process.
        train_batches: Meta-batches per epoch and process.
        val_tasks: Validation tasks, over all processes together; the same ones each time.
        test_tasks: Test tasks, over all processes together; the same ones each time.
        rotations: ``"none"``; ``"classes"``: each class becomes four classes, turned by 0, 90, 180
            and 270 degrees; ``"augment"``: each class of an episode is turned at random by one of
            these angles.
        regime: ``"finite_sum"``: a training task owns one support set and one query set (Ji et al.
            2022, Algorithm 2); ``"resampling"``: it draws a fresh support batch and an independent
            Hessian batch for each inner step (Algorithm 1). Validation and test tasks always own
            one support set and one query set.
        train_steps: N, the number of inner steps that training draws batches for with
            ``regime="resampling"``. It must be the model's ``train_steps``.
        hessian_shots: Images per class of a Hessian batch with ``regime="resampling"``; by default
            as many as ``shots``. For FO-MAML, 0 is enough.
        transforms: Transforms of the images of whole episodes, on the device; by default none.
        small_classes: What to do about classes with fewer images than an episode takes:
            ``"raise"`` an error, or ``"drop"`` them with a warning.
        seed: Seed of the episodes.
        num_workers: Loader processes. With 0, which is usually best, a thread draws the next
            meta-batch while the current one is in use.

    Raises:
        ValueError: If an argument is out of range; in ``setup``, if a split has too few classes or
            images for its episodes.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from lightning_maml.datamodules import ClassImages, EpisodicDataModule
        >>> class Noise(EpisodicDataModule):
        ...     def class_images(self, split):
        ...         images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
        ...         return ClassImages(images, members=np.split(np.arange(40), 4))
        >>> data = Noise(ways=3, shots=2, queries=5, meta_batch_size=4)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.support_x.shape
        torch.Size([4, 6, 3, 8, 8])
        >>> batch.query_x.shape
        torch.Size([4, 15, 3, 8, 8])
    """

    # Subclasses declare `**options: Any` and pass them literally to `super().__init__`, because
    # jsonargparse reads that call and takes the names, types and defaults from this signature.
    # From an unpacked TypedDict it would learn no defaults.
    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        test_ways: int | None = None,
        test_shots: int | None = None,
        test_queries: int | None = None,
        meta_batch_size: int = 32,
        train_batches: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        rotations: Rotations = "none",
        regime: Regime = "finite_sum",
        train_steps: int = 1,
        hessian_shots: int | None = None,
        transforms: EpisodeTransforms | None = None,
        small_classes: SmallClasses = "raise",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.ways, self.shots, self.queries = ways, shots, queries
        self.test_ways = ways if test_ways is None else test_ways
        self.test_shots = shots if test_shots is None else test_shots
        self.test_queries = queries if test_queries is None else test_queries
        self.meta_batch_size = meta_batch_size
        self.train_batches, self.val_tasks, self.test_tasks = train_batches, val_tasks, test_tasks
        self.rotations: Rotations = rotations
        self.regime: Regime = regime
        self.train_steps = train_steps
        self.hessian_shots = shots if hessian_shots is None else hessian_shots
        self.transforms = EpisodeTransforms() if transforms is None else transforms
        self.small_classes: SmallClasses = small_classes
        self.seed = seed
        self.num_workers = num_workers
        self._check_arguments()
        self._datasets: dict[str, tuple[Any, TaskDataset]] = {}
        self._on_device: dict[tuple[str, torch.device], tuple[TaskDataset, ImagesOnDevice]] = {}

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split, class by class.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define class_images(split).")

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that a stage needs, and check that they have enough classes and images.

        Args:
            stage: Stage of the trainer, such as ``"fit"``; None for all splits.
        """
        for split in splits_of(stage):
            self._dataset(split)

    def train_dataloader(self) -> DataLoader[AnyEpisodes]:
        """Return the training episodes.

        They are fresh ones in every epoch; with the trainer's ``overfit_batches`` the same ones. In
        a loop of your own, make the loader once: each time it is gone through it gives fresh tasks,
        while a new loader begins with the first epoch's. Images are as stored; :meth:`prepared`
        makes of them what the model takes.
        """
        overfit = False
        if self.trainer is not None:
            overfit = bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        processes, _ = self._replicas()
        tasks = self.train_batches * self.meta_batch_size * processes
        return self._loader("train", tasks, fresh=not overfit)

    def val_dataloader(self) -> DataLoader[AnyEpisodes]:
        """Return the validation episodes."""
        return self._loader("val", self.val_tasks)

    def test_dataloader(self) -> DataLoader[AnyEpisodes]:
        """Return the test episodes."""
        return self._loader("test", self.test_tasks)

    def predict_dataloader(self) -> DataLoader[AnyEpisodes]:
        """Return the test episodes."""
        return self.test_dataloader()

    def independent_episodes(self, purpose: Purpose, draw: int, tasks: int) -> AnyEpisodes:
        """Draw tasks of the training split for another purpose than training.

        They are independent of the tasks that are trained on and of those for other purposes.
        Their images are as stored, on the CPU; :meth:`prepared` makes of them what the model takes.

        Args:
            purpose: What they are for: ``"stepsize"``, ``"stationarity"``, ``"measure"`` or
                ``"fidelity"``.
            draw: Number of the draw; each number gives other tasks.
            tasks: How many tasks to draw for this process; other processes get other ones.

        Returns:
            A meta-batch of ``tasks`` tasks.

        Raises:
            ValueError: If ``purpose`` is none of those.
        """
        if purpose not in _PURPOSES:
            raise UserValueError(
                f"Expected `purpose` to be one of {', '.join(map(repr, _PURPOSES))} but got "
                f"{purpose!r}."
            )
        processes, rank = self._replicas()
        dataset = self._dataset("train")
        numbers = range(rank, tasks * processes, processes)
        return dataset.__getitems__([(draw, number, _PURPOSES[purpose]) for number in numbers])

    def class_fingerprints(self, split: str) -> dict[str, str]:
        """Return the names of the classes of a split by fingerprints of their first images.

        A model remembers those that it was trained on, to warn where it is tested on one of them.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``; it has none if it was not set up.
        """
        _, dataset = self._datasets.get(split, (None, None))
        return dataset.fingerprints() if isinstance(dataset, EpisodeDataset) else {}

    def read_by(self) -> tuple[Any, ...]:
        """Return the attributes that decide what :meth:`class_images` returns.

        Where they change between two runs, the images are read again. A subclass with such
        attributes returns them, ``(*super().read_by(), self.fold)``.
        """
        return ()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, and let the model remember its labels, which it reads on the CPU."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        known_labels = getattr(self.trainer and self.trainer.lightning_module, "known_labels", None)
        if known_labels is not None:
            known_labels.note(batch, moved)
        return moved

    def on_after_batch_transfer(self, batch: AnyEpisodes, dataloader_idx: int) -> AnyEpisodes:
        """Prepare a batch on the device, in the trainer's precision."""
        batch = self.prepared(batch, self.trainer is not None and self.trainer.training)
        if self.trainer is not None:
            batch = self.trainer.precision_plugin.convert_input(batch)
        return batch

    def prepared(self, batch: AnyEpisodes, training: bool) -> AnyEpisodes:
        """Return a batch of a loader as a trainer would give it to the model.

        It is for loops of your own.

        Args:
            batch: Tasks with images as stored, on any device.
            training: Whether to transform the images as for training, or as for test.

        Returns:
            The tasks with bytes scaled to floats in 0 .. 1, and the images transformed.
        """
        images = {}
        for name in batch._fields[::2]:  # images and labels take turns
            stored = getattr(batch, name)
            images[name] = stored.float() / 255 if stored.dtype == torch.uint8 else stored
        return self.transforms(batch._replace(**images), training=training)

    def teardown(self, stage: str) -> None:
        """Free the memory of images that were kept on the device.

        Args:
            stage: Stage of the trainer that ended.
        """
        self._free_device()

    def on_exception(self, exception: BaseException) -> None:
        """Free that memory where training ends early, for which there is no teardown.

        Args:
            exception: What ended it.
        """
        self._free_device()

    def _free_device(self) -> None:
        for _, images in self._on_device.values():
            images.release()
        self._on_device.clear()

    def _source(self, split: str) -> TaskDataset | ImagesOnDevice:
        """Return what a loader takes the episodes of a split from."""
        episodes = self._dataset(split)
        # after a run, models are on the CPU again, and so are batches
        if self.trainer is None or self.trainer.state.status != TrainerStatus.RUNNING:
            return episodes
        device = self.trainer.strategy.root_device
        kept_of, kept = self._on_device.get((split, device), (None, None))
        if kept is not None and kept_of is episodes:
            return kept
        if kept is not None:
            kept.release()
            del self._on_device[split, device]
        if not isinstance(episodes, EpisodeDataset) or not self._fits_on_device(episodes, device):
            return episodes
        size = f"{episodes.bytes_on_device / 2**20:.3g} MB"
        rank_zero_info(f"The images of split {split!r} are kept on {device} ({size}).")
        kept = ImagesOnDevice(episodes, device)
        self._on_device[split, device] = episodes, kept
        return kept

    def _fits_on_device(self, episodes: EpisodeDataset, device: torch.device) -> bool:
        """Return whether the images of a split are to be kept on the device.

        They are on CUDA if they take at most a quarter of the free memory there. Loader processes
        cannot gather there, and a hook before the transfer is to get batches on the CPU.
        """
        if device.type != "cuda" or self.num_workers > 0:
            return False
        owners = self, self.trainer and self.trainer.lightning_module
        if any(is_overridden("on_before_batch_transfer", owner) for owner in owners):
            return False
        free = free_bytes(device)
        return free is not None and episodes.bytes_on_device <= free / 4

    def _dataset(self, split: str) -> TaskDataset:
        # attributes may be set between two runs
        sizes = self._task_sizes(split)
        setting = sizes, self.rotations, self.seed, self.small_classes, self.read_by()
        made_for, dataset = self._datasets.get(split, (None, None))
        if dataset is None or made_for != setting:
            # images are read and drawn on the CPU, whatever torch's default device
            with torch.device("cpu"):
                dataset = self._task_dataset(split, sizes)
            self._datasets[split] = setting, dataset
        return dataset

    def _task_sizes(self, split: str) -> TaskSizes:
        if split != "train":
            return TaskSizes(self.test_ways, self.test_shots, self.test_queries, None)
        resampling = None
        if self.regime == "resampling":
            resampling = Resampling(self.train_steps, self.hessian_shots)
        return TaskSizes(self.ways, self.shots, self.queries, resampling)

    def _task_dataset(self, split: str, sizes: TaskSizes) -> TaskDataset:
        """Return the tasks of a split, each as a function of its number."""
        return EpisodeDataset(
            self.class_images(split),
            **sizes._asdict(),
            rotations=self.rotations,
            seed=self._task_seed(split),
            split=split,
            small_classes=self.small_classes,
        )

    def _task_seed(self, split: str) -> tuple[int, ...]:
        return self.seed, _STREAMS[split]

    def _loader(self, split: str, tasks: int, fresh: bool = False) -> DataLoader[AnyEpisodes]:
        processes, rank = self._replicas()
        if tasks < processes:
            raise UserValueError(
                f"Expected `{split}_tasks` to be at least {processes}, one for each process, but "
                f"got {tasks}."
            )
        sampler: Any = TaskSampler(tasks, fresh=fresh, num_replicas=processes, rank=rank)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return PrefetchingLoader(
            self._source(split),
            batch_size=self.meta_batch_size,
            sampler=sampler,
            collate_fn=as_it_is,
            # Each iterator draws a number from the loader's generator, and a resumed run makes more
            # iterators: with torch's own generator, it would go on with other random numbers.
            generator=torch.Generator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
        )

    def _replicas(self) -> tuple[int, int]:
        """Return the number of processes and the rank of this one."""
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _check_arguments(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise UserValueError(f"Expected `{name}` to be at least {least} but got {value}.")
        check_seed("seed", self.seed)
        if self.rotations not in ("none", "classes", "augment"):
            raise UserValueError(
                "Expected `rotations` to be 'none', 'classes' or 'augment' but got "
                f"{self.rotations!r}."
            )
        if self.small_classes not in ("raise", "drop"):
            raise UserValueError(
                f"Expected `small_classes` to be 'raise' or 'drop' but got {self.small_classes!r}."
            )
        if self.regime not in ("finite_sum", "resampling"):
            raise UserValueError(
                f"Expected `regime` to be 'finite_sum' or 'resampling' but got {self.regime!r}."
            )
