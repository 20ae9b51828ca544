"""Seeded drawing of episodes by index from images that lie in memory, class by class."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_maml.episodes import Episodes

TaskKey = tuple[int, int]
"""Epoch and number of a task: with the seed, all that an episode depends on."""

Rotations = Literal["none", "classes", "augment"]


class ClassImages(NamedTuple):
    """All images of one split.

    Attributes:
        images: ``[M, C, H, W]``, uint8.
        members: For each class the rows of ``images`` that belong to it.
    """

    images: Tensor
    members: list[np.ndarray]


class EpisodeDataset(Dataset[Episodes]):
    """Episodes as a function of (epoch, number): the same for any number of workers and processes.

    A task's classes are drawn without replacement and labelled ``0 .. ways - 1`` in the order drawn, so labels are permuted per
    episode; within a class the support and query images are disjoint.

    Args:
        data: The images of one split.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        rotations: ``"classes"``: each class turned by 0, 90, 180 and 270 degrees makes four; ``"augment"``: each class of an episode is
            turned by a random multiple of 90 degrees; ``"none"``.
        seed: Words that set this stream of episodes apart from others.
        split: Its name, for messages.

    Raises:
        ValueError: If the split has too few classes, or a class too few images.
    """

    def __init__(
        self, data: ClassImages, *, ways: int, shots: int, queries: int, rotations: Rotations, seed: tuple[int, ...], split: str
    ) -> None:
        self._data = data
        self._ways, self._shots, self._queries = ways, shots, queries
        self._rotations = rotations
        self._seed = seed
        self._classes = len(data.members) * (4 if rotations == "classes" else 1)
        if ways > self._classes:
            raise ValueError(f"Expected the ways of split {split!r} to be at most {self._classes}, its classes, but got {ways}.")
        fewest = min(map(len, data.members))
        if shots + queries > fewest:
            raise ValueError(
                f"Expected shots + queries of split {split!r} to be at most {fewest}, the images of the smallest of its "
                f"{self._classes} classes, but got {shots} + {queries}."
            )

    def __getitem__(self, key: TaskKey) -> Episodes:
        """Return one task: ``[ways * shots, C, H, W]`` support images and ``[ways * queries, C, H, W]`` query images, uint8."""
        random = np.random.RandomState([*self._seed, *key])  # a frozen stream: the same episodes whatever numpy's version
        support, query = [], []
        for number in random.choice(self._classes, self._ways, replace=False):
            members, turns = self._data.members[number % len(self._data.members)], number // len(self._data.members)
            if self._rotations == "augment":
                turns = random.randint(4)
            rows = random.permutation(members)[: self._shots + self._queries]
            images = torch.rot90(self._data.images[rows], int(turns), (2, 3))
            support.append(images[: self._shots])
            query.append(images[self._shots :])
        labels = torch.arange(self._ways)
        return Episodes(
            torch.cat(support), labels.repeat_interleave(self._shots), torch.cat(query), labels.repeat_interleave(self._queries)
        )


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
