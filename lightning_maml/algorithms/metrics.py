"""Figures of each task, and means over tasks with their confidence intervals."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_maml.batches.episodes import AnyEpisodes


class Estimate(NamedTuple):
    """A mean over tasks.

    Attributes:
        mean: ``[...]``.
        ci95: Half-width of its 95 % confidence interval, 1.96 standard errors; nan for a single
            task.
        tasks: How many tasks it is over.
    """

    mean: Tensor
    ci95: Tensor
    tasks: int


class TaskMean(Metric):
    """Mean and 95 % confidence interval of any per-task figure over all tasks of all processes."""

    is_differentiable = False
    full_state_update = False
    per_task: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("per_task", default=[], dist_reduce_fx="cat")

    def update(self, per_task: Tensor) -> None:
        """Add the figures of some tasks, ``[T, ...]``."""
        self.per_task.append(per_task.detach())

    def compute(self) -> Estimate:
        """Return the estimate over all tasks seen, shaped ``[...]``."""
        given = dim_zero_cat(self.per_task)
        values = given.cpu().double()  # not every device has float64
        tasks = len(values)
        mean = values.mean(0)
        error = (
            values.std(0, correction=1) / tasks**0.5
            if tasks > 1
            else torch.full_like(mean, torch.nan)
        )
        dtype = torch.promote_types(given.dtype, torch.float32)
        return Estimate(mean.to(dtype), (1.96 * error).to(dtype), tasks)


def with_accuracy(
    loss: Tensor, outputs: Tensor, episodes: AnyEpisodes, ignored: int | None
) -> dict[str, Tensor]:
    """Return the query losses and, except for regression, the accuracy of each task.

    Args:
        loss: Query losses ``[T, ...]``.
        outputs: Query outputs ``[T, ..., Q, ways]``; with a label for each position, the positions
            come last, ``[T, ..., Q, ways, H, W]`` for instance.
        episodes: The tasks.
        ignored: The label of queries or positions that the loss leaves out, which accuracy leaves
            out too; None if there is none.

    Returns:
        ``loss`` and ``accuracy``, the share of correct query labels, each ``[T, ...]``.
    """
    labels = episodes.query_y
    if labels.is_floating_point():
        return {"loss": loss}
    positions = labels.ndim - 2
    predicted = outputs.argmax(-1 - positions).flatten(-1 - positions)  # [T, ..., Q positions]
    labels = labels.reshape(len(labels), *[1] * (predicted.ndim - 2), -1)
    dtype = torch.promote_types(loss.dtype, torch.float32)
    correct = (predicted == labels).to(dtype)
    if ignored is None:
        return {"loss": loss, "accuracy": correct.mean(-1)}
    counts = (labels != ignored).to(dtype)
    return {"loss": loss, "accuracy": (correct * counts).sum(-1) / counts.sum(-1)}
