"""The support and the query loss of a model, as functions of parameters and a task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, support_set
from lightning_maml.core.params import Params
from lightning_maml.functional.losses import Loss, QueryLoss
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork


class OutputLosses(NamedTuple):
    """The losses of outputs and labels; one object twice, if they are the same.

    Attributes:
        support: That of the inner steps.
        query: That of the query sets.
    """

    support: FunctionalLoss
    query: FunctionalLoss

    @property
    def each(self) -> list[FunctionalLoss]:
        """The losses that differ."""
        return [self.support] if self.support is self.query else [self.support, self.query]

    @property
    def params(self) -> Params:
        """The trainable parameters of both."""
        return self.support.params | self.query.params

    @property
    def trained(self) -> list[str]:
        """The names of these in their losses."""
        return [name.removeprefix(loss.prefix) for loss in self.each for name in loss.params]


class ModelLosses(NamedTuple):
    """The two losses of a model; both return ``(loss, logits)``.

    Attributes:
        support: ``support(params, x, y)``.
        query: ``query(params, task)``; batch norm may use the statistics of the support set.
    """

    support: Loss
    query: QueryLoss


def model_losses(
    for_support: FunctionalNetwork,
    for_queries: FunctionalNetwork,
    of_outputs: OutputLosses,
    logits: Callable[[Any], Any],
    averages: Mapping[str, Tensor] | None = None,
) -> ModelLosses:
    """Return the losses of a network.

    Args:
        for_support: The network as it adapts.
        for_queries: The network as it answers queries, the same in most cases.
        of_outputs: The losses of its outputs and labels.
        logits: Takes the logits from what it returns.
        averages: Running averages to use in place of the network's.
    """

    def support(params: Params, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        outputs = for_support(params, x, averages=averages)
        return of_outputs.support(params, outputs, y), logits(outputs)

    def query(params: Params, task: AnyEpisodes) -> tuple[Tensor, Any]:
        statistics_of = support_set(task)[0] if for_queries.uses_support_statistics else None
        outputs = for_queries(params, task.query_x, statistics_of=statistics_of, averages=averages)
        return of_outputs.query(params, outputs, task.query_y), logits(outputs)

    return ModelLosses(support, query)
