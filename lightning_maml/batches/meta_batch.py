"""Meta-batches made of what loaders give: four tensors, or tasks one by one, of any sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from lightning_maml.batches.episodes import (
    AnyEpisodes,
    Episodes,
    ResampledEpisodes,
    check_episodes,
)
from lightning_maml.batches.trees import tensors
from lightning_maml.errors import UserValueError


class UnevenEpisodes(NamedTuple):
    """A meta-batch of tasks that differ in size; those of one size are together.

    :func:`lightning_maml.datamodules.meta_batch` makes it. A training step takes the mean over all
    tasks.

    Attributes:
        parts: Meta-batches of tasks of one size.
        places: For each part, which tasks of the meta-batch these are.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.datamodules import meta_batch
        >>> def task(shots):
        ...     x, y = torch.zeros(2 * shots, 3), torch.tensor([0, 1] * shots)
        ...     return Episodes(x, y, x, y)
        >>> uneven = meta_batch([task(1), task(5), task(1)])
        >>> uneven.places
        [[0, 2], [1]]
        >>> [list(part.support_x.shape) for part in uneven.parts]
        [[2, 2, 3], [1, 10, 3]]
    """

    parts: list[AnyEpisodes]
    places: list[list[int]]

    def in_order(self, of_parts: Sequence[Sequence[Any]]) -> list[Any]:
        """Return what belongs to each task in the order of the tasks.

        Args:
            of_parts: For each part, something for each of its tasks.
        """
        by_place = {
            place: of_task
            for places, of_tasks in zip(self.places, of_parts, strict=True)
            for place, of_task in zip(places, of_tasks, strict=True)
        }
        return [by_place[place] for place in sorted(by_place)]


MetaBatch = AnyEpisodes | UnevenEpisodes


def meta_batch(tasks: Sequence[Any]) -> MetaBatch:
    """Make a meta-batch of tasks.

    Args:
        tasks: Tasks without a leading dimension: :class:`lightning_maml.Episodes`,
            :class:`lightning_maml.ResampledEpisodes`, or tuples ``(support_x, support_y, query_x,
            query_y)`` of tensors or arrays of numpy.

    Returns:
        ``Episodes`` or ``ResampledEpisodes``, whose leading dimension T is the number of tasks; of
        tasks that differ in size, :class:`lightning_maml.UnevenEpisodes`.

    Raises:
        ValueError: If a task has a leading dimension of 1. (So one sentence with a label for each
            word, and one to query, is refused too; give these in ``Episodes``.)

    Examples:
        >>> import torch
        >>> from lightning_maml.datamodules import meta_batch, task_of_examples
        >>> task = task_of_examples(torch.zeros(6, 3), [0, 1, 0, 1, 0, 1], shots=2)
        >>> meta_batch([task, task]).support_x.shape
        torch.Size([2, 4, 3])
    """
    of_tensors = [_as_episodes(task) for task in tasks]
    for task in of_tensors:
        _refuse_leading_dimension(task)
    by_size: dict[Any, list[int]] = {}
    for place, task in enumerate(of_tensors):
        size = tuple((tensor.dtype, tensor.shape) for tensor in tensors(task))
        by_size.setdefault((type(task), size), []).append(place)
    parts: list[AnyEpisodes] = [
        default_collate([of_tensors[place] for place in places]) for places in by_size.values()
    ]
    return parts[0] if len(parts) == 1 else UnevenEpisodes(parts, [*by_size.values()])


def _refuse_leading_dimension(task: AnyEpisodes) -> None:
    """Refuse meta-batches of one task: their labels ``[1, S]`` would be those of S positions."""
    labels = (task.support_y, task.query_y)
    if isinstance(task, Episodes) and all(
        y.ndim == 2 and len(y) == 1 and not y.is_floating_point() for y in labels
    ):
        raise UserValueError(
            "Expected the tasks of a list without a leading dimension, with labels [examples], but "
            f"got {list(task.support_y.shape)}; give each task without it, y[0]."
        )


def as_meta_batch(batch: Any) -> Any:
    """Return the meta-batch that a loader means.

    Args:
        batch: A meta-batch; its four parts ``(support_x, support_y, query_x, query_y)``, each with
            the tasks in front, as a loader collates tuples; or a list of tasks.

    Returns:
        A meta-batch; ``batch`` itself if it is nothing of these.
    """
    if isinstance(batch, Episodes | ResampledEpisodes | UnevenEpisodes):
        return batch
    if isinstance(batch, list | tuple) and batch and all(map(_is_task, batch)):
        return meta_batch(batch)
    return _as_episodes(batch) if _is_task(batch) else batch


def even_meta_batch(batch: Any) -> AnyEpisodes:
    """Return the meta-batch that a loader means, of tasks of one size.

    Args:
        batch: As for :func:`as_meta_batch`.

    Raises:
        TypeError: If this is no meta-batch.
        ValueError: If its tasks differ in size, or its tensors do not agree.
    """
    found = as_meta_batch(batch)
    if isinstance(found, UnevenEpisodes):
        raise UserValueError(
            f"Expected tasks of one size but got {len(found.parts)} sizes, which only training, "
            "validation, test and prediction take; give those of one size."
        )
    check_episodes(found)
    episodes: AnyEpisodes = found
    return episodes


def parts_of(batch: Any) -> list[Any]:
    """Return the meta-batches of tasks of one size in what a loader gives.

    What is no meta-batch is returned as it is, in a list.
    """
    found = as_meta_batch(batch)
    return found.parts if isinstance(found, UnevenEpisodes) else [found]


def _is_task(value: Any) -> bool:
    """Return whether these are episodes, or the four parts of such."""
    if isinstance(value, Episodes | ResampledEpisodes):
        return True
    are_four = isinstance(value, list | tuple) and len(value) == 4
    return are_four and all(isinstance(labels, Tensor | np.ndarray) for labels in value[1::2])


def _as_episodes(value: Any) -> AnyEpisodes:
    """Return episodes, of tensors also where arrays were given."""
    episodes = value if isinstance(value, Episodes | ResampledEpisodes) else Episodes(*value)
    of_tensors: AnyEpisodes = default_convert(episodes)  # type: ignore[no-untyped-call]
    return of_tensors
