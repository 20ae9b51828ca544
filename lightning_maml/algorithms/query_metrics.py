"""Metrics of the user's own, of torchmetrics, on the query sets after adaptation and before."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_maml.algorithms.metrics import TaskMean
from lightning_maml.batches.trees import map_tensors, unstacked
from lightning_maml.errors import UserTypeError, UserValueError

Metrics = Metric | MetricCollection | Mapping[str, Metric]
"""Each is updated with outputs ``[Q, ...]`` and labels or targets ``[Q, ...]``."""

MetricsOver = Literal["tasks", "queries"]


class BeforeAndAfter(NamedTuple):
    """A metric on the query sets.

    Attributes:
        before: Its value before adaptation.
        after: Its value after adaptation.
        ci95: Half-width of the 95 % confidence interval of ``after``, where it is a mean over
            tasks; else None.
    """

    before: Tensor
    after: Tensor
    ci95: Tensor | None


def named_metrics(metrics: Metrics | None, over: MetricsOver) -> dict[str, Metric]:
    """Return metrics by the names under which they are logged.

    Args:
        metrics: A metric, which is named for its class, a collection or a dict of metrics; None
            for none.
        over: What a value is of: ``"tasks"`` or ``"queries"``.

    Raises:
        TypeError: If these are no metrics.
        ValueError: If ``over`` is none of the two, or a metric has a name that is taken.
    """
    if over not in get_args(MetricsOver):
        raise UserValueError(
            f"Expected `metrics_over` to be 'tasks' or 'queries' but got {over!r}."
        )
    if metrics is None:
        return {}
    if isinstance(metrics, Metric):
        metrics = {type(metrics).__name__: metrics}
    is_mapping = isinstance(metrics, MetricCollection | Mapping)
    if not is_mapping or not all(isinstance(metric, Metric) for metric in metrics.values()):
        raise UserTypeError(
            "Expected `metrics` to be metrics of torchmetrics, one, a MetricCollection or a dict, "
            f"but got {metrics!r}; wrap a function in a torchmetrics.Metric."
        )
    named = {str(name): metric for name, metric in metrics.items()}
    suffixes = ("", "_before", "_ci95")
    logged = [f"{name}{suffix}" for name in ("loss", "accuracy", *named) for suffix in suffixes]
    of_steps = ("loss_step_", "accuracy_step_")
    if taken := [name for name in named if logged.count(name) > 1 or name.startswith(of_steps)]:
        raise UserValueError(
            f"Expected names for `metrics` that are not logged anyway but got {taken}; call them "
            "otherwise, in a dict."
        )
    return named


class QueryMetrics:
    """Metrics on the query sets of the tasks of a loader.

    Args:
        metrics: The metrics by name; they themselves stay as they are.
        over: ``"tasks"``: each is computed on the queries of every task, and the mean over the
            tasks is logged; ``"queries"``: it is computed once, on the queries of all tasks.
        device: Where outputs and labels are.

    Examples:
        >>> import torch
        >>> from torchmetrics import MeanAbsoluteError
        >>> from lightning_maml.algorithms.query_metrics import QueryMetrics
        >>> metrics = QueryMetrics({"error": MeanAbsoluteError()}, "tasks", torch.device("cpu"))
        >>> outputs = torch.zeros(2, 4, 5, 1)  # two tasks, after 0 .. 3 steps, five queries
        >>> metrics.update(outputs, torch.ones(2, 5, 1))
        >>> metrics.compute()["error"].after
        tensor(1.)
    """

    def __init__(
        self, metrics: Mapping[str, Metric], over: MetricsOver, device: torch.device
    ) -> None:
        self._over: MetricsOver = over
        self._before, self._after = (
            {name: metric.clone().to(device) for name, metric in metrics.items()} for _ in range(2)
        )
        self._means = {name: TaskMean().to(device) for name in metrics}

    def update(self, outputs: Any, labels: Tensor) -> None:
        """Add some tasks.

        Args:
            outputs: Query outputs after 0 .. K steps, ``[T, K + 1, Q, ...]``.
            labels: Labels or targets, ``[T, Q, ...]``.

        Raises:
            ValueError: If a metric of a task is not one number.
        """
        before = map_tensors(lambda tensor: tensor[:, 0], outputs)
        after = map_tensors(lambda tensor: tensor[:, -1], outputs)
        if self._over == "queries":
            for metrics, of_queries in ((self._before, before), (self._after, after)):
                pooled = map_tensors(lambda tensor: tensor.flatten(0, 1), of_queries)
                for metric in metrics.values():
                    metric.update(pooled, labels.flatten(0, 1))
            return
        for name, mean in self._means.items():
            metric = self._after[name]
            values = [
                [_of_one_task(name, metric, outputs, y) for outputs in (first, last)]
                for first, last, y in zip(unstacked(before), unstacked(after), labels, strict=True)
            ]
            mean.update(torch.tensor(values, device=labels.device))

    def compute(self) -> dict[str, BeforeAndAfter]:
        """Return the metrics on all tasks, of all processes."""
        if self._over == "queries":
            return {
                name: BeforeAndAfter(
                    _one_number(name, self._before[name].compute()),
                    _one_number(name, metric.compute()),
                    None,
                )
                for name, metric in self._after.items()
            }
        found = {}
        for name, mean in self._means.items():
            estimate = mean.compute()
            before, after = estimate.mean
            found[name] = BeforeAndAfter(before, after, estimate.ci95[1])
        return found


def _of_one_task(name: str, metric: Metric, outputs: Any, labels: Tensor) -> Tensor:
    metric.reset()
    # a call, unlike `compute`, is of this process alone; the mean over the tasks is then of all
    return _one_number(name, metric(outputs, labels))


def _one_number(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserValueError(
            f"Expected metric {name!r} to be one number but got {got}; let it average (average="
            "'macro'), or log it in a callback, which gets the outputs of each step."
        )
    return value.reshape(()).float()
