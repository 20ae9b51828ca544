"""Means over tasks with their confidence intervals."""

from typing import NamedTuple

import torch
from lightning import LightningModule
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
        values = dim_zero_cat(self.per_task).cpu().double()  # not every device has float64
        tasks = len(values)
        mean = values.mean(0)
        error = (
            values.std(0, correction=1) / tasks**0.5
            if tasks > 1
            else torch.full_like(mean, torch.nan)
        )
        return Estimate(mean.float(), (1.96 * error).float(), tasks)


class LoaderFigures:
    """Loss and accuracy on the tasks of a validation or test, for each of its loaders."""

    def __init__(self) -> None:
        self._of_loaders: list[TaskMean] = []

    def start(self, loaders: int, device: torch.device) -> None:
        """Forget what an interrupted validation left."""
        self._of_loaders = [TaskMean().to(device) for _ in range(loaders)]

    def update(self, loader: int, figures: dict[str, Tensor]) -> None:
        """Add loss and accuracy after 0 .. K steps, each ``[T, K + 1]``."""
        self._of_loaders[loader].update(torch.stack([*figures.values()], -1))

    def log(self, module: LightningModule, stage: str) -> Estimate | None:
        """Log means and confidence intervals; several loaders are named as Lightning does.

        Returns:
            Accuracy (for regression: loss) of the last loader after 0 .. K steps, ``[K + 1]``.
        """
        last: Estimate | None = None
        for loader, figures in enumerate(self._of_loaders):
            # none of these if the loader is empty, or a subclass has steps of its own
            if not figures.update_called:
                continue
            suffix = f"/dataloader_idx_{loader}" if len(self._of_loaders) > 1 else ""
            estimate = figures.compute()
            names = ("loss", "accuracy")[: estimate.mean.shape[-1]]
            for number, name in enumerate(names):
                mean, ci95 = estimate.mean[:, number], estimate.ci95[:, number]
                last = Estimate(mean, ci95, estimate.tasks)
                module.log(
                    f"{stage}/{name}{suffix}",
                    mean[-1],
                    prog_bar=stage == "val",
                    sync_dist=True,
                    add_dataloader_idx=False,
                )
                beside = {f"{name}_ci95": ci95[-1], f"{name}_before": mean[0]}
                if name == names[-1]:
                    # two digits, so that loggers and tables have them in order
                    beside |= {f"{name}_step_{step:02}": value for step, value in enumerate(mean)}
                values = {f"{stage}/{figure}{suffix}": value for figure, value in beside.items()}
                module.log_dict(values, sync_dist=True, add_dataloader_idx=False)
        return last


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
    correct = (predicted == labels).float()
    if ignored is None:
        return {"loss": loss, "accuracy": correct.mean(-1)}
    counts = (labels != ignored).float()
    return {"loss": loss, "accuracy": (correct * counts).sum(-1) / counts.sum(-1)}
