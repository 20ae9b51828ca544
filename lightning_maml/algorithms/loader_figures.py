"""What is logged of a validation or test: means over all tasks of each loader."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_maml.algorithms.metrics import Estimate, TaskMean
from lightning_maml.algorithms.query_metrics import MetricsOver, QueryMetrics
from lightning_maml.errors import UserRuntimeError


class LoaderFigures:
    """Loss, accuracy and the user's metrics on the tasks of a validation or test, by loader.

    Args:
        metrics: The user's metrics by name.
        over: See :class:`lightning_maml.algorithms.query_metrics.QueryMetrics`.
    """

    def __init__(self, metrics: Mapping[str, Metric], over: MetricsOver) -> None:
        self._metrics, self._over = metrics, over
        self._of_loaders: list[tuple[TaskMean, QueryMetrics]] = []

    def start(self, loaders: int, device: torch.device) -> None:
        """Forget what an interrupted validation left."""
        self._of_loaders = [
            (TaskMean().to(device), QueryMetrics(self._metrics, self._over, device))
            for _ in range(loaders)
        ]

    def update(self, loader: int, figures: dict[str, Tensor], outputs: Any, labels: Tensor) -> None:
        """Add some tasks.

        Args:
            loader: Number of the loader.
            figures: Loss and accuracy after 0 .. K steps, each ``[T, K + 1]``.
            outputs: Query outputs, ``[T, K + 1, Q, ...]``.
            labels: Labels or targets, ``[T, Q, ...]``.

        Raises:
            RuntimeError: If :meth:`start` was not called.
        """
        if loader >= len(self._of_loaders):
            raise UserRuntimeError(
                "Expected the model's own `on_validation_epoch_start` and `on_test_epoch_start` to "
                "run before the first batch but they did not; let those of your subclass call "
                "super()'s, or do what they do in a callback."
            )
        mean, metrics = self._of_loaders[loader]
        mean.update(torch.stack([*figures.values()], -1))
        metrics.update(outputs, labels)

    def log(self, module: LightningModule, stage: str) -> Estimate | None:
        """Log means and confidence intervals; several loaders are named as Lightning does.

        Returns:
            Accuracy (for regression: loss) of the first loader after 0 .. K steps, ``[K + 1]``.
        """
        adaptations = []
        for loader, (figures, metrics) in enumerate(self._of_loaders):
            # none of these if the loader is empty, or a subclass has steps of its own
            if not figures.update_called:
                continue
            suffix = f"/dataloader_idx_{loader}" if len(self._of_loaders) > 1 else ""
            estimate = figures.compute()
            if not estimate.mean.isfinite().all():
                rank_zero_warn(
                    f"Losses of `{stage}` tasks are not finite, and their accuracies mean nothing; "
                    "where there is an inner loop, lower `inner_lr` or `test_steps`."
                )
            names = ("loss", "accuracy")[: estimate.mean.shape[-1]]
            beside: dict[str, Tensor] = {}
            for number, name in enumerate(names):
                mean, ci95 = estimate.mean[:, number], estimate.ci95[:, number]
                module.log(
                    f"{stage}/{name}{suffix}",
                    mean[-1].to(module.device),
                    prog_bar=stage == "val",
                    sync_dist=True,
                    add_dataloader_idx=False,
                )
                beside |= {f"{name}_ci95": ci95[-1], f"{name}_before": mean[0]}
                if name == names[-1]:
                    adaptations.append(Estimate(mean, ci95, estimate.tasks))
                    # two digits, so that loggers and tables have them in order
                    beside |= {f"{name}_step_{step:02}": value for step, value in enumerate(mean)}
            for name, found in metrics.compute().items():
                beside |= {name: found.after, f"{name}_before": found.before}
                if found.ci95 is not None:
                    beside[f"{name}_ci95"] = found.ci95
            # to the device, because NCCL reduces nothing that is on the CPU
            values = {
                f"{stage}/{name}{suffix}": value.to(module.device) for name, value in beside.items()
            }
            module.log_dict(values, sync_dist=True, add_dataloader_idx=False)
        self._of_loaders = []  # metrics may hold all outputs
        return adaptations[0] if adaptations else None
