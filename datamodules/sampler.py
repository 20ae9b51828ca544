"""Seeded drawing of episodes, by number, from the images of classes in memory."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler
from typing_extensions import override

from lightning_maml.batches.episodes import AnyEpisodes, first_task
from lightning_maml.datamodules.drawing import TaskKey, below, distinct, task_words
from lightning_maml.datamodules.gathering import Drawn, as_episodes, gathered
from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

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


def _check_different(rows: np.ndarray, split: str) -> None:
    """Check that no image is there twice: it could be both support and query."""
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise UserValueError(
            f"Expected every image of split {split!r} to belong to one class once, as one that is "
            "there twice could be both support and query, but rows "
            f"{values[counts > 1][:5].tolist()} of `images` are not; give each once."
        )


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


class TaskSizes(NamedTuple):
    """How many of everything a task has.

    Attributes:
        ways: Classes.
        shots: Support examples per class.
        queries: Query examples per class.
        resampling: For ``ResampledEpisodes``, the number of inner steps and the Hessian examples
            per class and step; None for ``Episodes``.
    """

    ways: int
    shots: int
    queries: int
    resampling: Resampling | None


class TaskDataset(Dataset[AnyEpisodes]):
    """Tasks as a function of their epoch and number, for any number of workers and processes."""

    def __getitem__(self, key: TaskKey) -> AnyEpisodes:
        """Return one task, without the leading dimension of a meta-batch.

        It is the same as in a meta-batch, as stored, in the order of its labels.
        """
        return first_task(self.__getitems__([key]))

    def __getitems__(self, keys: list[TaskKey]) -> AnyEpisodes:
        """Return the meta-batch of some tasks, for a loader that does not collate it again.

        Args:
            keys: Keys of the T tasks.

        Returns:
            The meta-batch, ``[T, ...]``, as stored.
        """
        raise NotImplementedError


class EpisodeDataset(TaskDataset):
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
        seed: One or two numbers below 2**64 that distinguish these episodes from those of other
            seeds and splits.
        split: Name of the split, for messages.
        small_classes: What to do about classes with too few images for an episode: ``"raise"`` an
            error, or ``"drop"`` them with a warning.

    Raises:
        ValueError: If the split has too few classes, a class has too few images, an image belongs
            to two classes or twice to one, or images that are not square are to be turned.

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
        members = self._large_enough(data, small_classes, split)
        self._sizes = np.array([len(of_class) for of_class in members])
        self._first_rows = np.cumsum(self._sizes) - self._sizes
        self._rotations = rotations
        self._seed = seed
        self._classes = len(members) * (4 if rotations == "classes" else 1)
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
        _check_different(np.concatenate(data.members), split)
        self._names = {
            of_class[0]: name
            for of_class, name in zip(data.members, data.names, strict=False)
            if len(of_class)
        }
        self._images = data.images
        self._rows = torch.from_numpy(np.concatenate(members))  # of all classes in turn
        self._angles = 1 if rotations == "none" else 4
        self.number_of_images = len(self._rows)
        """M, the number of images of the split."""
        self._labels = self._labels_of_a_task()

    def __getitems__(self, keys: list[TaskKey]) -> AnyEpisodes:
        """Return the meta-batch of some tasks, with images ``[T, ..., C, H, W]`` as stored."""
        return self.gather(self.draw(keys))

    def draw(self, keys: list[TaskKey]) -> Drawn:
        """Draw the images of some tasks, and how they are turned.

        Args:
            keys: Keys of the T tasks.

        Returns:
            The images by their numbers among those of the split, class after class.
        """
        ways, per_class = self._ways, self._images_per_class
        words = task_words(self._seed, keys, ways * (3 + 2 * per_class))
        of_class, class_order, of_turn, of_images = np.split(words, [ways, 2 * ways, 3 * ways], 1)
        classes = distinct(of_class, class_order, self._classes)  # [T, ways]
        # with rotations="classes", the numbers beyond the members are those of turned classes
        turns, classes = np.divmod(classes, len(self._sizes))
        if self._rotations == "augment":
            turns = below(of_turn, 4)
        of_image, image_order = of_images.reshape(len(keys), 2, ways, per_class).swapaxes(0, 1)
        places = distinct(of_image, image_order, self._sizes[classes])  # [T, ways, per_class]
        rows = self._first_rows[classes][..., None] + places
        turns = np.broadcast_to(turns[..., None], rows.shape)
        return Drawn(*(torch.from_numpy(self._in_parts(each)) for each in (rows, turns)))

    def gather(self, drawn: Drawn) -> AnyEpisodes:
        """Return the meta-batch that was drawn.

        Args:
            drawn: What :meth:`draw` returned.
        """
        images = gathered(self._images, drawn._replace(rows=self._rows[drawn.rows]))
        tasks = len(images) // (self._ways * self._images_per_class)
        return as_episodes(images, self.labels(tasks))

    def labels(self, tasks: int) -> list[Tensor]:
        """Return the labels of support, Hessian (if there are any) and query images.

        Args:
            tasks: T, the number of tasks.

        Returns:
            Of each part, ``[T, examples]`` or ``[T, N, examples]``.
        """
        # repeated, not expanded: whoever writes to the labels of a task changes no others
        return [of_part.repeat(tasks, *[1] * of_part.ndim) for of_part in self._labels]

    def images_on(self, device: torch.device) -> Tensor:
        """Copy the images of the split to a device, class after class.

        Args:
            device: The device.

        Returns:
            The images ``[M, ...]``; if images may be turned, ``[4 M, ...]``: first as they are,
            then turned by one, two and three quarter turns.
        """
        shape = self._angles, self.number_of_images, *self._images.shape[1:]
        images = torch.empty(shape, dtype=self._images.dtype, device=device)
        first = 0
        for rows in torch.split(self._rows, self._sizes.tolist()):
            images[0, first : first + len(rows)] = self._images[rows]
            first += len(rows)
        for quarters in range(1, self._angles):
            images[quarters] = torch.rot90(images[0], quarters, (-2, -1))
        return images.flatten(0, 1)

    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each class, and its name.

        It is that of the first image as stored, because names differ between forms of a dataset,
        and equal ones may be those of different datasets. Classes whose first image is blank have
        none.
        """
        found = {}
        for number, row in enumerate(self._rows[self._first_rows].tolist()):
            image = self._images[row].flatten()
            if image.eq(image[0]).all():
                continue
            content = image.view(torch.uint8).numpy().tobytes()
            fingerprint = hashlib.blake2b(content, digest_size=8).hexdigest()
            found[fingerprint] = self._names.get(row, f"class {number}")
        return found

    @property
    def bytes_on_device(self) -> int:
        """The memory that :meth:`images_on` takes."""
        return self._angles * self.number_of_images * self._images[:1].nbytes

    def _in_parts(self, of_images: np.ndarray) -> np.ndarray:
        """Put what belongs to the images of each class in the order of :class:`Drawn`.

        Args:
            of_images: ``[T, ways, images per class]``.

        Returns:
            ``[n]``.
        """
        support, query = np.split(of_images, [self._images_per_class - self._queries], 2)
        parts = [support, query]
        if self._resampling is not None:
            steps, hessian_shots = self._resampling
            tasks, ways, _ = support.shape
            by_step = support.reshape(tasks, ways, steps, self._shots + hessian_shots)
            by_step = by_step.swapaxes(1, 2)  # [T, N, ways, images]
            parts = [by_step[..., : self._shots], by_step[..., self._shots :], query]
        return np.concatenate([part.ravel() for part in parts])

    def _labels_of_a_task(self) -> list[Tensor]:
        def labels(per_class: int) -> Tensor:
            return torch.arange(self._ways).repeat_interleave(per_class)

        if self._resampling is None:
            return [labels(self._shots), labels(self._queries)]
        steps, hessian_shots = self._resampling
        of_steps = [labels(number).repeat(steps, 1) for number in (self._shots, hessian_shots)]
        return [*of_steps, labels(self._queries)]

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
        if self._resampling is not None:
            cure = "; lower `shots`, `hessian_shots`, `queries` or `train_steps`"
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
    and a ``SequentialSampler`` so that Lightning does so with ``overfit_batches`` too. In a loop
    without a trainer, where nobody sets the epoch, each pass after the first has the next one.

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
        self._begun: int | None = None  # the epoch of the last pass, if none was set since
        self._is_set_by_others = False
        self.given = 0
        """Tasks of this process that the next iterator skips, as they were given out before."""

    @override
    def set_epoch(self, epoch: int) -> None:
        """Let the next pass have the tasks of this epoch.

        Args:
            epoch: Its number, from 0.
        """
        self._is_set_by_others = True
        self.begin_with(epoch)

    def begin_with(self, epoch: int) -> None:
        """Do so in a loop without a trainer, too, which sets no epoch later."""
        self.epoch, self._begun = epoch, None

    @property
    def is_announced(self) -> bool:
        """Whether the next pass is that of an epoch that was set, where a trainer sets them."""
        return self._begun is None or not self._is_set_by_others

    def __iter__(self) -> Iterator[TaskKey]:  # type: ignore[override]  # not plain numbers
        """Yield the keys, without those that were given out before.

        Raises:
            ValueError: If there are other processes than the sampler was made for.
        """
        if dist.is_available() and dist.is_initialized():
            processes = dist.get_world_size()
            if processes != self.num_replicas:
                raise UserValueError(
                    f"Expected a loader that was made for {processes} processes but got one for "
                    f"{self.num_replicas}, with which all would take the same tasks; give the "
                    "trainer the datamodule itself."
                )
        if self._begun == self.epoch:
            self.epoch += 1
        self._begun = self.epoch
        epoch = self.epoch if self._fresh else 0
        first = self.rank + self.given * self.num_replicas
        return ((epoch, number) for number in range(first, self._tasks, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self._tasks, self.num_replicas))
