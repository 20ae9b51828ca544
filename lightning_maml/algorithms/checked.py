"""What is checked before a model adapts: network, losses, labels, inner steps and stacking."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_maml.algorithms.base import EpisodicModule, LossFunction
from lightning_maml.algorithms.losses import OutputLosses
from lightning_maml.batches.episodes import (
    AnyEpisodes,
    ResampledEpisodes,
    first_task,
    queries_to_adapt_on,
    support_set,
)
from lightning_maml.checks.broadcasting import check_broadcasting
from lightning_maml.checks.findings import Kind
from lightning_maml.checks.first_pass import find_kinks, first_outputs
from lightning_maml.checks.inner_steps import check_inner_steps, fails_stacked, steps_share_state
from lightning_maml.checks.label_checks import check_labels, check_targets, ignored_label
from lightning_maml.checks.loss_checks import check_loss_value, find_kinks_of_losses
from lightning_maml.checks.loss_reads import check_loss_reads_no_attributes
from lightning_maml.checks.network_checks import NetworkChecks, NetworkInfo
from lightning_maml.checks.stacking_check import StackingCheck
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.inner_optimizers import InnerOptimizer, check_inner_optimizer
from lightning_maml.core.inner_rates import LearnedRates
from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError
from lightning_maml.execution.compilation import Compiler
from lightning_maml.networks.attributes import NotComparableError, plain_value
from lightning_maml.networks.batch_norm import StepStatistics
from lightning_maml.networks.copies import copy_in_mode
from lightning_maml.networks.facts import writes
from lightning_maml.networks.functional_loss import LOSS_PREFIX, SUPPORT_LOSS_PREFIX, FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.head_body import Part, adapting
from lightning_maml.networks.kinks import weight_normed
from lightning_maml.networks.stacking_trial import Verdict


class CheckedModule(EpisodicModule):
    """A model that refuses a meta-batch, before it adapts, where its numbers would be wrong.

    Network and losses are checked on the first task of each kind of batch, labels in every batch.
    Subclasses set the attributes, and define how the model adapts.

    Attributes:
        adapted_part: Which parameters adapt.
        head: Name of the head; by default the last submodule with parameters of its own.
        support_loss: The loss of the inner steps, if it is not that of the query sets.
        inner_optimizer: What an inner step does with the gradient; by default gradient descent.
        learned_rates: The inner rates, if they are learned.
        step_statistics: The averages of batch norm, if each inner step has its own.
    """

    curvature: ClassVar[CurvatureName] = "exact"
    adapted_part: Part
    head: str | None
    support_loss: LossFunction | None
    inner_optimizer: InnerOptimizer | None
    learned_rates: LearnedRates | None
    step_statistics: StepStatistics | None
    _query_in_eval: bool
    _compiler: Compiler | None
    _warned_of_weight_norm = False

    def _check(
        self, functional: FunctionalNetwork, episodes: AnyEpisodes, kind: Kind
    ) -> NetworkInfo:
        """Refuse what would give wrong numbers, or fail in the loss.

        Labels are checked in every batch; network and loss once for each kind of batch.
        """
        of_outputs = self._loss_of_outputs()

        def check_network() -> NetworkInfo:
            info = NetworkChecks(self.adapted_part, self.head, self.logits)(
                self.network,
                functional,
                episodes,
                of_outputs.each,
                partial(self._check_labels, episodes),
            )
            self._inspect(episodes)
            return info

        def check_losses() -> None:
            first = first_task(episodes)
            support_y, query_y = support_set(first)[1], first.query_y
            if of_outputs.support is of_outputs.query:
                self._check_loss(functional, episodes, of_outputs.query, support_y, query_y)
                return
            self._check_loss(functional, episodes, of_outputs.support, support_y)
            queries = queries_to_adapt_on(episodes)
            self._check_loss(functional, queries, of_outputs.query, query_y)

        if self.inner_optimizer is not None:
            self._once("inner steps", kind, self._check_inner_steps, (self.inner_optimizer,))
        unseen = writes(functional.network) is None
        adapts = self.adapted_part, self.head
        info = self._once("network", kind, check_network, adapts, again=unseen)
        self._check_labels(episodes, info.outputs)
        self._once("loss", kind, check_losses)
        return info

    @override
    def _read_by_checks(self) -> tuple[Any, ...]:
        return self.loss, self.support_loss

    def _check_labels(self, episodes: AnyEpisodes, outputs: torch.Size | None) -> None:
        """Check labels and targets of each set for the loss that it has."""
        sets = episodes._fields[1::2]
        if self.support_loss is None:
            self._check_labels_of(episodes, outputs, self.loss, sets)
        else:
            self._check_labels_of(episodes, outputs, self.support_loss, sets[:-1])
            self._check_labels_of(episodes, outputs, self.loss, sets[-1:])

    def _check_labels_of(
        self, episodes: AnyEpisodes, outputs: torch.Size | None, loss: Any, sets: Sequence[str]
    ) -> None:
        y = getattr(episodes, sets[0])
        if y.is_floating_point():
            of_steps = isinstance(episodes, ResampledEpisodes) and sets[0] == "support_y"
            check_targets(y.flatten(0, 2 if of_steps else 1), loss)
            return
        assert outputs is not None, "with labels there are logits"
        ways = self._ways_of_datamodule()
        if ways is not None and outputs[0] != ways:
            raise UserValueError(
                f"Expected `network` to have {ways} outputs, one per way of the episode, but got "
                f"{outputs[0]}; give its head as many outputs as the datamodule has `ways`, "
                "and leave `test_ways` the same, because a head has one width."
            )
        labels = self.known_labels.of(episodes, sets)
        check_labels(labels, outputs[0], ignored_label(loss), sets)

    def _ways_of_datamodule(self) -> int | None:
        """Return the ways of a running trainer's datamodule, if it has any."""
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        if trainer is None or data is None:
            return None
        if trainer.evaluating or trainer.predicting:
            return getattr(data, "test_ways", None)
        return getattr(data, "ways", None) if trainer.training else None

    def _check_loss(
        self,
        functional: FunctionalNetwork,
        episodes: AnyEpisodes,
        of_outputs: FunctionalLoss,
        *targets: Tensor,
    ) -> None:
        """Check a loss on the first task's support set or, with two targets, on both its sets."""

        def outputs(number: int) -> Any:
            of_queries = number == 1
            return of_outputs.given(first_outputs(functional, episodes, of_queries=of_queries))

        check_loss_reads_no_attributes(of_outputs, self.network, functional, episodes)
        check_broadcasting(of_outputs.loss, outputs, targets)
        check_loss_value(of_outputs, functional, episodes, self.parameters())

    def _loss_of_outputs(self, *, training: bool = True) -> OutputLosses:
        def functional(loss: LossFunction, prefix: str) -> FunctionalLoss:
            if isinstance(loss, nn.Module) and not training:
                loss = copy_in_mode(loss, training=False)
            return FunctionalLoss(loss, self.logits, prefix)

        query = functional(self.loss, LOSS_PREFIX)
        if self.support_loss is None:
            return OutputLosses(query, query)
        return OutputLosses(functional(self.support_loss, SUPPORT_LOSS_PREFIX), query)

    def kinks(self, episodes: AnyEpisodes) -> list[str]:
        """Return what of the network and its losses is not twice differentiable.

        Args:
            episodes: A meta-batch; network and losses run on its first support set.

        Returns:
            The layers with kinks or, where there are none, the operations, by their names in ATen;
            and such operations of the losses.
        """
        functional = FunctionalNetwork(self.network, self.batch_norm)
        return [
            *find_kinks(functional, episodes),
            *find_kinks_of_losses(functional, episodes, self._loss_of_outputs().each),
        ]

    def _inspect(self, episodes: AnyEpisodes) -> None:
        """Look at the network, once for each kind of batch."""
        if self.curvature != "exact" or self._warned_of_weight_norm:
            return
        if layers := weight_normed(self.network):
            rank_zero_warn(
                "Torch's second derivative of weight norm is wrong, and so is the exact "
                f"meta-gradient through {layers}; train with HFMAML, which takes first "
                "derivatives only, or write the norm out: g * v / v.norm(dim=1, keepdim=True)."
            )
            self._warned_of_weight_norm = True

    def _check_inner_steps(self) -> None:
        check_inner_optimizer(self.inner_optimizer)
        optimizer: Any = self.inner_optimizer
        params = self._adapting_parameters().values()
        curved = self.curvature != "none" or self.learned_rates is not None
        smallest = min(params, key=Tensor.numel, default=None)
        if smallest is None:
            return
        before = None if self._compiler is None else self._settings_of_inner_steps()
        check_inner_steps(optimizer, smallest, 0.1, curved=curved)
        if before is not None and self._settings_of_inner_steps() != before:
            raise UserValueError(
                "Expected an inner optimizer that leaves its attributes as they are with "
                f"`compiled=True` but {type(optimizer).__name__} writes to them; keep what a step "
                "computes in local variables, or leave it uncompiled."
            )

    def _settings_of_inner_steps(self) -> Any:
        """Return what tells the inner optimizer, as it is now, from another."""
        try:
            return plain_value(self.inner_optimizer, self.device, "inner_optimizer")
        except NotComparableError as error:
            raise UserValueError(
                "Expected an inner optimizer whose attributes are numbers, strings, tensors or "
                f"containers of these with `compiled=True` but {error}; leave it uncompiled."
            ) from None

    def _verdict(
        self, episodes: AnyEpisodes, network: nn.Module, kind: Kind, *, adapts_only: bool = False
    ) -> Verdict:
        """Return whether tasks of a checked batch can be stacked, for the network or a copy."""

        def compare() -> Verdict:
            verdict = self._stacking_check(network).compare(
                episodes, adapts_only=adapts_only, exact=self.curvature == "exact"
            )
            if verdict.wrong or self.inner_optimizer is None:
                return verdict
            w = next(iter(self._adapting_parameters().values()))
            return verdict._replace(wrong=fails_stacked(self.inner_optimizer, w, 0.1))

        return self._stacking_verdict((*kind, adapts_only), compare, (self.inner_optimizer,))

    def _tasks_share_state(self, episodes: AnyEpisodes, network: nn.Module, kind: Kind) -> bool:
        """Return whether tasks in threads would write to the same thing."""
        if len(episodes.query_y) == 1:  # which does not run in threads
            return False
        *but_shapes, _ = kind  # which decide nothing here, and may differ in each batch

        def find() -> bool:
            smallest = min(self._adapting_parameters().values(), key=Tensor.numel)
            optimizer = self.inner_optimizer
            if optimizer is not None and steps_share_state(optimizer, smallest, 0.1):
                return True
            return self._stacking_check(network).tasks_share_state(episodes)

        return self._once("threads", tuple(but_shapes), find, (self.inner_optimizer,))

    def _stacking_check(self, network: nn.Module) -> StackingCheck:
        """Return the check that compares tasks run together with tasks run alone."""
        return StackingCheck(
            network,
            self.loss,
            self.logits,
            self.batch_norm,
            self._averages(0),
            support_loss=self.support_loss,
            query_in_eval=self._query_in_eval,
        )

    def _averages(self, step: int) -> dict[str, Tensor]:
        """Return the running averages at ``w_step``, where each step has its own."""
        return {} if self.step_statistics is None else self.step_statistics(step)

    def _adapting_parameters(self) -> Params:
        return adapting(self.network, self.adapted_part, self.head)
