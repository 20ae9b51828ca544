"""Checks on two tasks whether the tasks of a network and its loss can be stacked."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, support_set
from lightning_maml.batches.trees import detached, map_tensors
from lightning_maml.checks.shared_state import share_state
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.params import Params
from lightning_maml.core.tensors import raise_if_out_of_memory
from lightning_maml.networks.copies import structural_copy
from lightning_maml.networks.facts import facts_of
from lightning_maml.networks.functional_loss import SUPPORT_LOSS_PREFIX, FunctionalLoss
from lightning_maml.networks.functional_network import BatchNormPolicy, FunctionalNetwork
from lightning_maml.networks.stacking_trial import HOOKED, Verdict, compare_losses, two_tasks


class _Functions(NamedTuple):
    """The network as it adapts, and as it answers queries."""

    support: FunctionalNetwork
    query: FunctionalNetwork


class _Losses(NamedTuple):
    """The losses of a task's sets, and the averages with which the network computes them.

    Attributes:
        of_support: The loss of the support set's outputs.
        of_queries: The loss of the queries' outputs.
        averages: Running averages, by the names of the network's buffers.
    """

    of_support: FunctionalLoss
    of_queries: FunctionalLoss
    averages: Mapping[str, Tensor]

    def support(self, functions: _Functions, params: Params, task: AnyEpisodes) -> Tensor:
        x, y = support_set(task)
        outputs = functions.support(params, x, averages=self.averages)
        value: Tensor = self.of_support(params, outputs, y)
        return value

    def queries(self, functions: _Functions, params: Params, task: AnyEpisodes) -> Tensor:
        x = support_set(task)[0] if functions.query.uses_support_statistics else None
        outputs = functions.query(params, task.query_x, statistics_of=x, averages=self.averages)
        value: Tensor = self.of_queries(params, outputs, task.query_y)
        return value

    def both(self, functions: _Functions, params: Params, task: AnyEpisodes) -> Tensor:
        """Return both together, as the network may treat the sets differently."""
        return self.support(functions, params, task) + self.queries(functions, params, task)

    def params(self) -> Params:
        return self.of_support.params | self.of_queries.params


class StackingCheck:
    """Compares losses and derivatives of stacked tasks with those of each task alone.

    Args:
        network: The network.
        loss: The loss of outputs and labels.
        logits: Takes the logits from what the network returns.
        batch_norm: The batch-norm policy.
        averages: With ``batch_norm="per_step"``, the running averages at the parameters before
            adaptation; else empty.
        support_loss: The loss of the support set, if it is another.
        query_in_eval: Whether the network is in evaluation mode for queries.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning_maml import MLP, Episodes
        >>> from lightning_maml.batches.outputs import logits_in
        >>> from lightning_maml.checks.stacking_check import StackingCheck
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> trial = StackingCheck(MLP(4, 3), F.cross_entropy, logits_in, "batch", {})
        >>> trial.compare(Episodes(x, y, x, y), adapts_only=False, exact=True)
        Verdict(wrong='', slow='', no_memory=False)
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Any,
        logits: Callable[[Any], Any],
        batch_norm: BatchNormPolicy,
        averages: Params,
        *,
        support_loss: Any = None,
        query_in_eval: bool = False,
    ) -> None:
        self._network = network
        self._losses = [loss if support_loss is None else support_loss, loss]
        self._logits = logits
        self._batch_norm: BatchNormPolicy = batch_norm
        self._averages = averages
        self._query_in_eval = query_in_eval

    def compare(self, episodes: AnyEpisodes, *, adapts_only: bool, exact: bool) -> Verdict:
        """Compare the first and the last task of a meta-batch.

        Args:
            episodes: The meta-batch.
            adapts_only: Whether the model only adapts, which needs no second derivatives.
            exact: Whether second derivatives are needed. If not, they are still compared where the
                network has them, because any algorithm may be asked for exact gradients later.

        Raises:
            NoSecondDerivativeError: If second derivatives are needed and the network has none.
        """
        if facts_of(self._network).hooks_tensors:
            return Verdict(HOOKED)
        if adapts_only:
            return self._in_double(episodes, curved=False)
        try:
            return self._in_double(episodes, curved=True)
        except NoSecondDerivativeError:
            if exact:
                raise
            return self._in_double(episodes, curved=False)

    def tasks_share_state(self, episodes: AnyEpisodes) -> bool:
        """Return whether the first and last task, in threads, would share what they write to."""
        support, query = self._losses
        # what the end of the support loss does is found only if that is the last thing
        losses = (_Losses.both,) if support is query else (_Losses.both, _Losses.support)

        def evaluated(loss: Callable[..., Tensor], task: AnyEpisodes) -> Callable[[], Tensor]:
            # each has copies of its own, as each thread has
            functions = self._functions(self._network, vectorised=False)
            of_sets = self._losses_with(self._losses, self._averages)
            params = detached(functions.support.params | of_sets.params())  # no graph is needed
            return partial(loss, of_sets, functions, params, task)

        with torch.inference_mode(False):
            first, last = two_tasks(episodes)
            return any(
                share_state(evaluated(loss, first), evaluated(loss, last)) for loss in losses
            )

    def _in_double(self, episodes: AnyEpisodes, *, curved: bool) -> Verdict:
        """Compare in float64, or in the network's own type if it runs or fits in no other."""
        reason = ""
        for dtype in (torch.float64, None):
            try:
                verdict = self._in_mixed(episodes, self._in_type(episodes, dtype, curved), curved)
                if dtype is None or not verdict.no_memory:
                    return verdict
            except NoSecondDerivativeError:
                raise
            except Exception as error:
                # with other parameters than its own a network may raise anything
                if dtype is None:
                    raise_if_out_of_memory(error)
                    if isinstance(error, ValueError):
                        raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
        return Verdict(f"even single ones fail at parameters a little away from these ({reason})")

    def _in_mixed(self, episodes: AnyEpisodes, verdict: Verdict, curved: bool) -> Verdict:
        """Return the verdict, unless stacked tasks do not even run in a mixed precision."""
        if verdict.wrong or not torch.is_autocast_enabled(episodes.support_y.device.type):
            return verdict
        mixed = self._in_type(episodes, None, curved, only_runs=True)
        return mixed if mixed.wrong else verdict

    def _in_type(
        self,
        episodes: AnyEpisodes,
        dtype: torch.dtype | None,
        curved: bool,
        *,
        only_runs: bool = False,
    ) -> Verdict:
        """Compare in ``dtype``; None is the network's own type."""

        def converted(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        network, losses = structural_copy(self._network, dtype), self._losses
        episodes, averages = detached(episodes), self._averages
        if dtype is not None:
            losses = [
                structural_copy(loss, dtype) if isinstance(loss, nn.Module) else loss
                for loss in losses
            ]
            episodes, averages = map_tensors(converted, (episodes, averages))
        of_outputs = self._losses_with(losses, averages)
        single = self._functions(network, vectorised=False)
        stacked = self._functions(network, vectorised=True)
        device = episodes.support_y.device.type
        # autocast would undo float64
        autocast = dtype is None and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=autocast):
            return compare_losses(
                partial(of_outputs.both, single),
                partial(of_outputs.both, stacked),
                single.support.params | of_outputs.params(),
                episodes,
                curved=curved,
                only_runs=only_runs,
            )

    def _functions(self, network: nn.Module, *, vectorised: bool) -> _Functions:
        functional = FunctionalNetwork(network, self._batch_norm, vectorised=vectorised)
        query = functional.in_mode(training=False) if self._query_in_eval else functional
        return _Functions(functional, query)

    def _losses_with(self, losses: list[Any], averages: Params) -> _Losses:
        of_support = FunctionalLoss(losses[0], self._logits, SUPPORT_LOSS_PREFIX)
        return _Losses(of_support, FunctionalLoss(losses[1], self._logits), averages)
