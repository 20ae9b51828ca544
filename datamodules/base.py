"""What every few-shot datamodule shares: the shape of an episode, the loaders, and normalisation on the device."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.datamodules.prefetch import PrefetchingLoader
from lightning_maml.datamodules.sampler import (
    ClassImages,
    EpisodeDataset,
    Resampling,
    Rotations,
    SmallClasses,
    TaskSampler,
    check_seed,
)
from lightning_maml.datamodules.transforms import EpisodeTransforms

Regime = Literal["finite_sum", "resampling"]
Purpose = Literal["stepsize", "stationarity", "measure", "fidelity"]

_STREAMS = {"train": 0, "val": 1, "test": 2}
_PURPOSES: dict[Purpose, int] = {"stepsize": 1, "stationarity": 2, "measure": 3, "fidelity": 4}


def splits_of(stage: str | None) -> Sequence[str]:
    """Return the splits that a stage of the trainer needs; all of them for None."""
    stages = {
        "fit": ("train", "val"),
        "validate": ("val",),
        "test": ("test",),
        "predict": ("test",),
    }
    return stages.get(stage or "", tuple(_STREAMS))


class EpisodicDataModule(LightningDataModule):
    """Base of the few-shot datamodules; a subclass defines :meth:`class_images` and, if it reads files, ``prepare_data``.

    Batches are :class:`lightning_maml.Episodes` with float images ``[T, S, C, H, W]``, bytes scaled
    to 0 .. 1, then transformed; in training with ``regime="resampling"`` they are
    :class:`lightning_maml.ResampledEpisodes`, with images ``[T, N, S, C, H, W]``. Episodes depend
    only on the seed, the epoch and their number: not on the number of workers or of processes that
    share them.

    Args:
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
        rotations: ``"classes"``: each class, turned by 0, 90, 180 and 270 degrees, makes four
            classes; ``"augment"``: each class of an episode is turned at random; ``"none"``.
        regime: ``"finite_sum"``: a training task owns one support set and one query set (Ji et al.
            2022, Algorithm 2); ``"resampling"``: it draws a fresh support batch and an independent
            Hessian batch for each inner step (Algorithm 1). Validation and test tasks always own
            one support set and one query set.
        train_steps: N, the inner steps that training draws batches for with
            ``regime="resampling"``: the model's ``train_steps``.
        hessian_shots: Images per class of a Hessian batch with that regime; by default as many as
            ``shots``. For FO-MAML, 0 is enough.
        transforms: Transforms of the images of whole episodes, on the device; by default none.
        small_classes: ``"raise"`` on classes with fewer images than an episode takes, or ``"drop"``
            them with a warning.
        seed: Seed of the episodes.
        num_workers: Loader processes; with 0, which is usually right, a thread draws the next
            meta-batch while the current one is in use.

    Raises:
        ValueError: If an argument is out of range; in ``setup``, if a split cannot serve the
            episodes asked for.
    """

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
        self._datasets: dict[str, EpisodeDataset] = {}

    def class_images(self, split: str) -> ClassImages:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``."""
        raise NotImplementedError(f"{type(self).__name__} must define class_images(split).")

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that ``stage`` needs (all of them for None), and check that they can serve its episodes."""
        for split in splits_of(stage):
            self._dataset(split)

    def train_dataloader(self) -> DataLoader[AnyEpisodes]:
        """Return the training episodes: fresh ones in every epoch, or with ``overfit_batches`` the same ones."""
        fresh = self.trainer is None or not self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._loader(
            "train", self.train_batches * self.meta_batch_size * self._replicas()[0], fresh
        )

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
        """Draw tasks of the training split for another purpose than training, as stored, on the CPU.

        They are independent of the tasks that are trained on and of those for other purposes.

        Args:
            purpose: What they are for: ``"stepsize"``, ``"stationarity"``, ``"measure"`` or
                ``"fidelity"``.
            draw: Number of the draw; each number gives other tasks.
            tasks: How many tasks to draw for this process; other processes get other ones.

        Raises:
            ValueError: If ``purpose`` is none of those.
        """
        if purpose not in _PURPOSES:
            raise ValueError(
                f"Expected `purpose` to be one of {', '.join(map(repr, _PURPOSES))} but got "
                f"{purpose!r}."
            )
        replicas, rank = self._replicas()
        dataset = self._dataset("train")
        episodes: AnyEpisodes = default_collate(
            [
                dataset[draw, number, _PURPOSES[purpose]]
                for number in range(rank, tasks * replicas, replicas)
            ]
        )
        return episodes

    def on_after_batch_transfer(self, batch: AnyEpisodes, dataloader_idx: int) -> AnyEpisodes:
        """Turn uint8 images into floats in 0 .. 1, apply the transforms on the device, and convert to the trainer's precision."""
        stored = {name: getattr(batch, name) for name in batch._fields[::2]}
        images = {
            name: tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor
            for name, tensor in stored.items()
        }
        batch = self.transforms(
            batch._replace(**images), training=self.trainer is not None and self.trainer.training
        )
        if self.trainer is not None:
            batch = self.trainer.precision_plugin.convert_input(batch)
        return batch

    def _dataset(self, split: str) -> EpisodeDataset:
        if split not in self._datasets:
            train = split == "train"
            self._datasets[split] = EpisodeDataset(
                self.class_images(split),
                ways=self.ways if train else self.test_ways,
                shots=self.shots if train else self.test_shots,
                queries=self.queries if train else self.test_queries,
                resampling=Resampling(self.train_steps, self.hessian_shots)
                if train and self.regime == "resampling"
                else None,
                rotations=self.rotations,
                seed=(self.seed, _STREAMS[split]),
                split=split,
                small_classes=self.small_classes,
            )
        return self._datasets[split]

    def _loader(self, split: str, tasks: int, fresh: bool = False) -> DataLoader[AnyEpisodes]:
        replicas, rank = self._replicas()
        if tasks < replicas:
            raise ValueError(
                f"Expected `{split}_tasks` to be at least {replicas}, one for each process, but "
                f"got {tasks}."
            )
        sampler: Any = TaskSampler(tasks, fresh=fresh, num_replicas=replicas, rank=rank)
        return PrefetchingLoader(
            self._dataset(split),
            batch_size=self.meta_batch_size,
            sampler=sampler,
            # its own: each iterator draws a number, and a resumed run makes more iterators
            generator=torch.Generator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
        )

    def _replicas(self) -> tuple[int, int]:
        return (
            (self.trainer.world_size, self.trainer.global_rank)
            if self.trainer is not None
            else (1, 0)
        )

    def _check_arguments(self) -> None:
        least = dict.fromkeys(("shots", "queries", "test_shots", "test_queries"), 1)
        least |= dict.fromkeys(
            ("meta_batch_size", "train_batches", "val_tasks", "test_tasks", "train_steps"), 1
        )
        least |= {"ways": 2, "test_ways": 2, "hessian_shots": 0, "num_workers": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(
                    f"Expected `{name}` to be at least {bound} but got {getattr(self, name)}."
                )
        check_seed("seed", self.seed)
        if self.rotations not in ("none", "classes", "augment"):
            raise ValueError(
                "Expected `rotations` to be 'none', 'classes' or 'augment' but got "
                f"{self.rotations!r}."
            )
        if self.small_classes not in ("raise", "drop"):
            raise ValueError(
                f"Expected `small_classes` to be 'raise' or 'drop' but got {self.small_classes!r}."
            )
        if self.regime not in ("finite_sum", "resampling"):
            raise ValueError(
                f"Expected `regime` to be 'finite_sum' or 'resampling' but got {self.regime!r}."
            )
