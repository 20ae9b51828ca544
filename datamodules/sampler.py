"""Seeded drawing of episodes, by number, from the images of classes in memory."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

TaskKey = tuple[int, ...]
"""What an episode depends on besides the seed: the epoch, the number of the task, and for tasks
that are not trained on a third number, which says what they are for."""

Rotations = Literal["none", "classes", "augment"]
SmallClasses = Literal["raise", "drop"]


class Resampling(NamedTuple):
    """The batches that a task draws for its inner steps (Ji et al. 2022, Algorithm 1).

    Attributes:
        steps: N, the number of inner steps. Each has a support batch and a Hessian batch.
        hessian_shots: Images per class of a Hessian batch.
    """

    steps: int
    hessian_shots: int


def check_seed(name: str, seed: int) -> None:
    """Check that an argument is a seed that numpy accepts.

    Args:
        name: Name of the argument, for the message.
        seed: Its value.

    Raises:
        ValueError: If the seed is not from 0 to 2**32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise UserValueError(f"Expected `{name}` to be from 0 to 2**32 - 1 but got {seed}.")


class ClassImages(NamedTuple):
    """All images of one split.

    Attributes:
        images: uint8, ``[M, C, H, W]``, where 255 stands for 1; or floats of any shape
            ``[M, ...]``, which are taken as they are.
        members: For each class, the rows of ``images`` that belong to it.
        names: Names of the classes, for messages; may be empty.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from lightning_maml.datamodules import ClassImages
        >>> images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
        >>> data = ClassImages(images, [np.array([0, 2]), np.array([1, 3, 4])], ["cat", "dog"])
        >>> data.images[data.members[1]].shape
        torch.Size([3, 3, 8, 8])
    """

    images: Tensor
    members: list[np.ndarray]
    names: Sequence[str] = ()


class EpisodeDataset(Dataset[AnyEpisodes]):
    """Episodes as a function of their epoch and number, for any number of workers and processes.

    A task's classes are drawn without replacement and labelled ``0 .. ways - 1`` in the order they
    are drawn, so the label of a class varies between episodes. All images of a class in an episode
    are different: its support and query images are disjoint. With a support batch and a Hessian
    batch for each inner step, these are disjoint too, and hence independent samples of the class.

    Args:
        data: The images of one split.
        ways: Classes per episode.
        shots: Support images per class.
        queries: Query images per class.
        resampling: For ``ResampledEpisodes``, the number of inner steps and the Hessian images per
            class and step; None for ``Episodes``.
        rotations: ``"none"``; ``"classes"``: each class becomes four classes, turned by 0, 90, 180
            and 270 degrees; ``"augment"``: each class of an episode is turned at random by one of
            these angles.
        seed: Numbers that distinguish these episodes from those of other seeds and splits.
        split: Name of the split, for messages.
        small_classes: What to do about classes with too few images for an episode: ``"raise"`` an
            error, or ``"drop"`` them with a warning.

    Raises:
        ValueError: If the split has too few classes, a class has too few images, or images that are
            not square are to be turned.

    Examples:
        >>> images = ClassImages(torch.zeros(12, 1, 8, 8), np.split(np.arange(12), 3))
        >>> shape = {"ways": 2, "shots": 1, "queries": 3}
        >>> data = EpisodeDataset(images, **shape, rotations="none", seed=(0,), split="train")
        >>> data[5, 2].query_x.shape  # task 2 of epoch 5
        torch.Size([6, 1, 8, 8])
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
        support = shots
        if resampling is not None:
            support = resampling.steps * (shots + resampling.hessian_shots)
        self._images_per_class = support + queries
        self._pixels = data.images
        self._members = self._large_enough(data, small_classes, split)
        self._rotations = rotations
        self._seed = seed
        self._classes = len(self._members) * (4 if rotations == "classes" else 1)
        if ways > self._classes:
            raise UserValueError(
                f"Expected the ways of split {split!r} to be at most {self._classes}, its "
                f"classes, but got {ways}."
            )
        shape = data.images.shape
        if rotations != "none" and (len(shape) != 4 or shape[2] != shape[3]):
            raise UserValueError(
                f"Expected square images [M, C, H, W] in split {split!r} for "
                f"rotations={rotations!r} but got shape {list(shape)}; set rotations='none'."
            )

    def __getitem__(self, key: TaskKey) -> AnyEpisodes:
        """Return one task, without the leading dimension of a meta-batch.

        Its images are as stored, in the order of their labels.
        """
        # RandomState's stream is frozen: the same episodes whatever numpy's version
        random = np.random.RandomState([*self._seed, *key])
        classes = random.choice(self._classes, self._ways, replace=False)
        drawn = [self._draw_rows(random, number) for number in classes]
        turns = [turn for _, turn in drawn]
        rows = torch.from_numpy(np.stack([rows for rows, _ in drawn]))  # [ways, images]
        support_size = self._images_per_class - self._queries
        support, query = torch.split(rows, [support_size, self._queries], 1)
        if self._resampling is None:
            return Episodes(*self._labelled(support, turns), *self._labelled(query, turns))
        steps, hessian_shots = self._resampling
        by_step = torch.unflatten(support, 1, (steps, self._shots + hessian_shots))
        by_step = by_step.transpose(0, 1)  # [N, ways, images]
        descent, hessian = torch.split(by_step, [self._shots, hessian_shots], 2)
        return ResampledEpisodes(
            *self._labelled(descent, turns),
            *self._labelled(hessian, turns),
            *self._labelled(query, turns),
        )

    def _draw_rows(self, random: np.random.RandomState, number: int) -> tuple[np.ndarray, int]:
        """Draw the images of a class, and its rotation in quarter turns."""
        # with rotations="classes", the numbers beyond the members are those of turned classes
        members, turns = self._members[number % len(self._members)], number // len(self._members)
        if self._rotations == "augment":
            turns = random.randint(4)
        return random.permutation(members)[: self._images_per_class], int(turns)

    def _labelled(self, rows: Tensor, turns: list[int]) -> tuple[Tensor, Tensor]:
        """Return images with the classes turned, and their labels.

        Args:
            rows: Rows of the images, ``[..., ways, per class]``.
            turns: Quarter turns of each class.

        Returns:
            The images, ``[..., ways * per class, C, H, W]``, and labels,
            ``[..., ways * per class]``.
        """
        *leading, ways, per_class = rows.shape
        class_axis = len(leading)
        images = torch.index_select(self._pixels, 0, rows.flatten())
        images = torch.unflatten(images, 0, tuple(rows.shape))
        if any(turns):
            turned = [
                torch.rot90(of_class, turn, (-2, -1))
                for of_class, turn in zip(images.unbind(class_axis), turns, strict=True)
            ]
            images = torch.stack(turned, class_axis)
        labels = torch.arange(ways).repeat_interleave(per_class).expand(*leading, -1)
        return images.flatten(class_axis, class_axis + 1), labels

    def _large_enough(
        self, data: ClassImages, small_classes: SmallClasses, split: str
    ) -> list[np.ndarray]:
        sizes = [len(members) for members in data.members]
        large = [number for number, size in enumerate(sizes) if size >= self._images_per_class]
        small = [number for number, size in enumerate(sizes) if size < self._images_per_class]
        if not small:
            return data.members
        found = (
            f"{len(small)} of its {len(sizes)} classes have fewer images than the "
            f"{self._images_per_class} that an episode takes"
        )
        if data.names:
            names = [f"{data.names[number]} ({sizes[number]})" for number in small]
            found += f": {first_five(names)}"
        if small_classes == "drop":
            warnings.warn(
                f"Split {split!r}: {found}; without them {len(large)} classes are left.",
                stacklevel=5,  # the caller of `setup`
            )
            return [data.members[number] for number in large]
        cure = "; lower `shots` or `queries`"
        if data.names and large:
            cure += ", or leave these out by small_classes='drop'"
        raise UserValueError(
            f"Expected {self._formula(split)} to be at most {min(sizes)}, the images of its "
            f"smallest class, but {found}{cure}."
        )

    def _formula(self, split: str) -> str:
        """Say how many images of a class an episode takes."""
        if self._resampling is None:
            return f"shots + queries of split {split!r} ({self._shots} + {self._queries})"
        steps, hessian_shots = self._resampling
        per_class = f"{steps} x ({self._shots} + {hessian_shots}) + {self._queries}"
        return f"train_steps x (shots + hessian_shots) + queries of split {split!r} ({per_class})"


class TaskSampler(DistributedSampler[TaskKey], SequentialSampler):
    """The keys of the tasks of an epoch that fall to this process: every R-th one.

    With R processes of T tasks each, a step sees the same tasks as one process with R T tasks. The
    sampler is a ``DistributedSampler`` so that Lightning sets its epoch and does not replace it,
    and a ``SequentialSampler`` so that Lightning does so with ``overfit_batches`` too.

    Args:
        tasks: Tasks per epoch over all processes.
        fresh: Whether each epoch has other tasks, as in training, or the same ones.
        num_replicas: R, the number of processes.
        rank: Rank of this process.

    Examples:
        >>> sampler = TaskSampler(tasks=5, fresh=True, num_replicas=2, rank=1)
        >>> sampler.set_epoch(3)
        >>> list(sampler)  # epoch and number of each task
        [(3, 1), (3, 3)]
    """

    def __init__(self, tasks: int, *, fresh: bool, num_replicas: int = 1, rank: int = 0) -> None:
        self._tasks, self._fresh = tasks, fresh
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0
        self.given = 0
        """Tasks of this process that the next iterator skips, as they were given out before."""

    def __iter__(self) -> Iterator[TaskKey]:  # type: ignore[override]  # not plain numbers
        """Yield the keys, without those that were given out before."""
        epoch = self.epoch if self._fresh else 0
        first = self.rank + self.given * self.num_replicas
        return ((epoch, number) for number in range(first, self._tasks, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self._tasks, self.num_replicas))
