"""The support and the query loss of a model, as functions of parameters and a task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, support_set
from lightning_maml.core.params import Params
from lightning_maml.functional.losses import Loss, QueryLoss
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork


class ModelLosses(NamedTuple):
    """The two losses of a model; both return ``(loss, logits)``.

    Attributes:
        support: ``support(params, x, y)``.
        query: ``query(params, task)``; batch norm may use the statistics of the support set.
    """

    support: Loss
    query: QueryLoss


def model_losses(
    functional: FunctionalNetwork,
    of_outputs: FunctionalLoss,
    logits: Callable[[Any], Any],
    averages: Mapping[str, Tensor] | None = None,
) -> ModelLosses:
    """Return the losses of a network.

    Args:
        functional: The network.
        of_outputs: The loss of its outputs and labels.
        logits: Takes the logits from what it returns.
        averages: Running averages to use in place of the network's.
    """

    def support(params: Params, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        outputs = functional(params, x, averages=averages)
        return of_outputs(params, outputs, y), logits(outputs)

    def query(params: Params, task: AnyEpisodes) -> tuple[Tensor, Any]:
        statistics_of = support_set(task)[0] if functional.uses_support_statistics else None
        outputs = functional(params, task.query_x, statistics_of=statistics_of, averages=averages)
        return of_outputs(params, outputs, task.query_y), logits(outputs)

    return ModelLosses(support, query)
