"""Seeded drawing of episodes, by index, from images that lie in memory class by class."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.datamodules.messages import first_five

TaskKey = tuple[int, ...]
"""Epoch and number of a task, and in extra streams a number that sets them apart: with the seed,
all that an episode depends on."""

Rotations = Literal["none", "classes", "augment"]
SmallClasses = Literal["raise", "drop"]


class Resampling(NamedTuple):
    """How many batches a task draws afresh in the resampling case (Ji et al. 2022, Algorithm 1).

    Attributes:
        steps: N, the number of inner steps, each with a support batch and a Hessian batch.
        hessian_shots: Images per class of a Hessian batch.
    """

    steps: int
    hessian_shots: int


def check_seed(name: str, seed: int) -> None:
    """Check that an argument is a seed that numpy accepts.

    Raises:
        ValueError: If it is not; the message names the argument.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"Expected `{name}` to be from 0 to 2**32 - 1 but got {seed}.")


class ClassImages(NamedTuple):
    """All images of one split.

    Attributes:
        images: ``[M, C, H, W]``, uint8 with 255 standing for 1; or floats, which are taken as they
            are, ``[M, ...]``.
        members: For each class the rows of ``images`` that belong to it.
        names: Names of the classes, for messages.
    """

    images: Tensor
    members: list[np.ndarray]
    names: Sequence[str] = ()


class EpisodeDataset(Dataset[AnyEpisodes]):
    """Episodes as a function of (epoch, number): the same for any number of workers and processes.

    A task's classes are drawn without replacement and labelled ``0 .. ways - 1`` in the order
    drawn, so labels are permuted in each episode. Within a class, all images of an episode are
    different: its support and query images are disjoint. If there is a support batch and a Hessian
    batch per inner step, these are disjoint too, and hence independent samples of the class.

    Args:
        data: The images of one split.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        resampling: None for ``Episodes``; for ``ResampledEpisodes`` the number of inner steps and
            the Hessian images per class and step.
        rotations: ``"classes"``: each class, turned by 0, 90, 180 and 270 degrees, makes four
            classes; ``"augment"``: each class of an episode is turned by a random multiple of 90
            degrees; ``"none"``.
        seed: Numbers that set this stream of episodes apart from others.
        split: Name of the split, for messages.
        small_classes: ``"raise"`` on classes with too few images for an episode, or ``"drop"`` them
            with a warning.

    Raises:
        ValueError: If the split has too few classes, a class has too few images, or images that are
            not square are to be turned.
    """

    def __init__(
        self,
        data: ClassImages,
        *,
        ways: int,
        shots: int,
        queries: int,
        resampling: Resampling | None = None,
        rotations: Rotations,
        seed: tuple[int, ...],
        split: str,
        small_classes: SmallClasses = "raise",
    ) -> None:
        self._ways, self._shots, self._queries, self._resampling = ways, shots, queries, resampling
        support = (
            shots if resampling is None else resampling.steps * (shots + resampling.hessian_shots)
        )
        self._images_per_class = support + queries
        self._pixels = data.images
        self._members = self._large_enough(data, small_classes, split)
        self._rotations = rotations
        self._seed = seed
        self._classes = len(self._members) * (4 if rotations == "classes" else 1)
        if ways > self._classes:
            raise ValueError(
                f"Expected the ways of split {split!r} to be at most {self._classes}, its "
                f"classes, but got {ways}."
            )
        shape = data.images.shape
        if rotations != "none" and (len(shape) != 4 or shape[2] != shape[3]):
            raise ValueError(
                f"Expected square images [M, C, H, W] in split {split!r} for "
                f"rotations={rotations!r} but got shape {list(shape)}; set rotations='none'."
            )

    def __getitem__(self, key: TaskKey) -> AnyEpisodes:
        """Return one task, without a meta-batch's leading dimension; its images are as stored and in the order of their labels."""
        # a frozen stream: the same episodes whatever numpy's version
        random = np.random.RandomState([*self._seed, *key])
        drawn = [
            self._draw_rows(random, number)
            for number in random.choice(self._classes, self._ways, replace=False)
        ]
        turns = [turn for _, turn in drawn]
        rows = torch.from_numpy(np.stack([rows for rows, _ in drawn]))  # [ways, images]
        support, query = torch.split(
            rows, [self._images_per_class - self._queries, self._queries], 1
        )
        if self._resampling is None:
            return Episodes(*self._labelled(support, turns), *self._labelled(query, turns))
        steps, hessian_shots = self._resampling
        # [N, ways, images]
        per_step = torch.unflatten(support, 1, (steps, self._shots + hessian_shots)).transpose(0, 1)
        descent, hessian = torch.split(per_step, [self._shots, hessian_shots], 2)
        return ResampledEpisodes(
            *self._labelled(descent, turns),
            *self._labelled(hessian, turns),
            *self._labelled(query, turns),
        )

    def _draw_rows(self, random: np.random.RandomState, number: int) -> tuple[np.ndarray, int]:
        members, turns = self._members[number % len(self._members)], number // len(self._members)
        if self._rotations == "augment":
            turns = random.randint(4)
        return random.permutation(members)[: self._images_per_class], int(turns)

    def _labelled(self, rows: Tensor, turns: list[int]) -> tuple[Tensor, Tensor]:
        """Return the images of rows ``[..., ways, per class]``, each class turned, as ``[..., ways * per class, C, H, W]``, and labels."""
        *leading, ways, per_class = rows.shape
        images = torch.unflatten(
            torch.index_select(self._pixels, 0, rows.flatten()), 0, tuple(rows.shape)
        )
        if any(turns):
            by_class = images.unbind(len(leading))
            images = torch.stack(
                [
                    torch.rot90(one, turn, (-2, -1))
                    for one, turn in zip(by_class, turns, strict=True)
                ],
                len(leading),
            )
        labels = torch.arange(ways).repeat_interleave(per_class).expand(*leading, -1)
        return images.flatten(len(leading), len(leading) + 1), labels

    def _large_enough(
        self, data: ClassImages, small_classes: SmallClasses, split: str
    ) -> list[np.ndarray]:
        large = [
            number
            for number, members in enumerate(data.members)
            if len(members) >= self._images_per_class
        ]
        small = sorted(set(range(len(data.members))) - set(large))
        if not small:
            return data.members
        formula = f"shots + queries of split {split!r} ({self._shots} + {self._queries})"
        if self._resampling is not None:
            steps, hessian_shots = self._resampling
            per_class = f"{steps} x ({self._shots} + {hessian_shots}) + {self._queries}"
            formula = (
                f"train_steps x (shots + hessian_shots) + queries of split {split!r} ({per_class})"
            )
        names = [
            f"{data.names[number]} ({len(data.members[number])})" for number in small if data.names
        ]
        found = (
            f"{len(small)} of its {len(data.members)} classes have fewer "
            f"images{f': {first_five(names)}' if names else ''}"
        )
        if small_classes == "drop":
            warnings.warn(
                f"Split {split!r}: {found}; without them {len(large)} classes are left.",
                stacklevel=5,
            )
            return [data.members[number] for number in large]
        fewest = min(map(len, data.members))
        cure = "; leave these out by small_classes='drop'" if data.names and large else ""
        raise ValueError(
            f"Expected {formula} to be at most {fewest}, the images of its smallest class, but "
            f"{found}{cure}."
        )


class TaskSampler(DistributedSampler[TaskKey], SequentialSampler):
    """The keys of an epoch's tasks that fall to this process: every R-th of them, so that none is drawn twice.

    With R processes of T tasks each, a step sees the same tasks as one process with R T tasks. It
    is a ``DistributedSampler`` so that Lightning sets its epoch and leaves it in place, and a
    ``SequentialSampler`` so that Lightning also does so with ``overfit_batches``.

    Args:
        tasks: Tasks per epoch over all processes.
        fresh: Draw other tasks in every epoch (training) rather than the same ones (evaluation).
        num_replicas: R, the number of processes.
        rank: Which of them this is.
    """

    def __init__(self, tasks: int, *, fresh: bool, num_replicas: int = 1, rank: int = 0) -> None:
        self._tasks, self._fresh = tasks, fresh
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0
        self.given = 0
        """How many of this process's tasks the next iterator leaves out, because they were given
        out before."""

    def __iter__(self) -> Iterator[TaskKey]:  # type: ignore[override]  # of a SequentialSampler it is the numbers
        epoch = self.epoch if self._fresh else 0
        return (
            (epoch, number)
            for number in range(
                self.rank + self.given * self.num_replicas, self._tasks, self.num_replicas
            )
        )

    def __len__(self) -> int:
        return len(range(self.rank, self._tasks, self.num_replicas))
