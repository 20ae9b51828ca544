"""Seeded drawing of episodes by index from images that lie in memory, class by class."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_maml.episodes import AnyEpisodes, Episodes, ResampledEpisodes

TaskKey = tuple[int, ...]
"""Epoch and number of a task, and a word that sets streams beside training apart: with the seed, all that an episode depends on."""

Rotations = Literal["none", "classes", "augment"]


class Resampling(NamedTuple):
    """How many batches a task draws afresh in the resampling case (Ji et al. 2022, Algorithm 1).

    Attributes:
        steps: N, the inner steps, with a support batch and a Hessian batch each.
        hessian_shots: Images per class of a Hessian batch.
    """

    steps: int
    hessian_shots: int


class ClassImages(NamedTuple):
    """All images of one split.

    Attributes:
        images: ``[M, C, H, W]``, uint8.
        members: For each class the rows of ``images`` that belong to it.
    """

    images: Tensor
    members: list[np.ndarray]


class EpisodeDataset(Dataset[AnyEpisodes]):
    """Episodes as a function of (epoch, number): the same for any number of workers and processes.

    A task's classes are drawn without replacement and labelled ``0 .. ways - 1`` in the order drawn, so labels are permuted per
    episode; within a class all images of an episode are different ones: its support and query images are disjoint and, where there is a
    support batch and a Hessian batch per inner step, these are disjoint too, hence independent samples of the class.

    Args:
        data: The images of one split.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        resampling: None for ``Episodes``; for ``ResampledEpisodes`` the number of inner steps and the Hessian images per class and step.
        rotations: ``"classes"``: each class turned by 0, 90, 180 and 270 degrees makes four; ``"augment"``: each class of an episode is
            turned by a random multiple of 90 degrees; ``"none"``.
        seed: Words that set this stream of episodes apart from others.
        split: Its name, for messages.

    Raises:
        ValueError: If the split has too few classes, or a class too few images.
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
    ) -> None:
        self._data = data
        self._ways, self._shots, self._queries, self._resampling = ways, shots, queries, resampling
        self._images = shots + queries if resampling is None else resampling.steps * (shots + resampling.hessian_shots) + queries
        self._rotations = rotations
        self._seed = seed
        self._classes = len(data.members) * (4 if rotations == "classes" else 1)
        if ways > self._classes:
            raise ValueError(f"Expected the ways of split {split!r} to be at most {self._classes}, its classes, but got {ways}.")
        fewest = min(map(len, data.members))
        if self._images > fewest:
            formula = "shots + queries" if resampling is None else "train_steps x (shots + hessian_shots) + queries"
            got = (
                f"{shots} + {queries}" if resampling is None else f"{resampling.steps} x ({shots} + {resampling.hessian_shots}) + {queries}"
            )
            raise ValueError(
                f"Expected {formula} of split {split!r} to be at most {fewest}, the images of the smallest of its "
                f"{self._classes} classes, but got {got}."
            )

    def __getitem__(self, key: TaskKey) -> AnyEpisodes:
        """Return one task, its images uint8 and in the order of their labels, without the leading dimension of a meta-batch."""
        random = np.random.RandomState([*self._seed, *key])  # a frozen stream: the same episodes whatever numpy's version
        classes = [self._draw_images(random, number) for number in random.choice(self._classes, self._ways, replace=False)]
        support, query = torch.split(torch.stack(classes), [self._images - self._queries, self._queries], 1)
        if self._resampling is None:
            return Episodes(*_labelled(support), *_labelled(query))
        steps, hessian_shots = self._resampling
        per_step = torch.unflatten(support, 1, (steps, self._shots + hessian_shots)).transpose(0, 1)  # [N, ways, images, C, H, W]
        descent, hessian = torch.split(per_step, [self._shots, hessian_shots], 2)
        return ResampledEpisodes(*_labelled(descent), *_labelled(hessian), *_labelled(query))

    def _draw_images(self, random: np.random.RandomState, number: int) -> Tensor:
        members, turns = self._data.members[number % len(self._data.members)], number // len(self._data.members)
        if self._rotations == "augment":
            turns = random.randint(4)
        rows = random.permutation(members)[: self._images]
        return torch.rot90(self._data.images[rows], int(turns), (2, 3))


def _labelled(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images ``[..., ways, per class, C, H, W]`` as ``[..., ways * per class, C, H, W]``, and their labels."""
    *leading, ways, per_class = images.shape[:-3]
    return images.flatten(-5, -4), torch.arange(ways).repeat_interleave(per_class).expand(*leading, -1)


class TaskSampler(DistributedSampler[TaskKey]):
    """Yields the keys of an epoch's tasks that fall to this process: every R-th of them, so that none is drawn twice.

    With R processes of T tasks each, a step sees the same tasks as one process with R T. It is a ``DistributedSampler`` so that
    Lightning sets its epoch and leaves it in place.

    Args:
        tasks: Tasks per epoch over all processes.
        fresh: Draw other tasks in every epoch (training) rather than the same ones (evaluation).
        num_replicas: R, how many processes there are.
        rank: Which of them this is.
    """

    def __init__(self, tasks: int, *, fresh: bool, num_replicas: int = 1, rank: int = 0) -> None:
        self._tasks, self._fresh = tasks, fresh
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0

    def __iter__(self) -> Iterator[TaskKey]:
        epoch = self.epoch if self._fresh else 0
        return ((epoch, number) for number in range(self.rank, self._tasks, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self._tasks, self.num_replicas))
