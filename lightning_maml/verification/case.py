"""A copy of a model with some tasks, and its gradients as the library has them and by autograd."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.algorithms.maml import MAML
from lightning_maml.algorithms.variants import MAMLPlusPlus
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import map_tensors
from lightning_maml.checks.findings import Findings
from lightning_maml.checks.network_checks import NetworkInfo
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.inner_rates import rates_of_steps
from lightning_maml.core.params import Params
from lightning_maml.core.rng import set_generator_states
from lightning_maml.execution.auto import Execution, Executor
from lightning_maml.networks.copies import deep_copy
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.stacking_trial import Verdict as StackingVerdict
from lightning_maml.verification.unrolled import unrolled_gradient, unrolled_way_back

TASKS = 3
"""How many tasks gradients are compared on."""


WAYS = {
    "loop": Execution("loop", None),
    "vmap": Execution("vmap", None),
    "chunks of 2": Execution("loop", 2),
    "threads": Execution("threads", None),  # the last, as it ends CUDA graphs
}


def copied_model(model: MAML) -> MAML:
    """Return a copy of the model that has seen nothing yet."""
    copied: Any = deep_copy(model)
    # which Lightning leaves out; it knows the epoch and the datamodule's ways
    copied._trainer = model._trainer
    copied._findings, copied._compiler = Findings(), None
    copied.zero_grad()
    if isinstance(copied, MAMLPlusPlus) and copied._trainer is None:
        copied.multi_step_epochs = copied.first_order_epochs = 0
    return copied  # type: ignore[no-any-return]


class Case:
    """A copy of a model and some tasks in one precision.

    Args:
        model: The copy.
        episodes: The tasks.
        states: Of the random generators, from which every gradient starts.
    """

    def __init__(self, model: MAML, episodes: AnyEpisodes, states: dict[str, Any]) -> None:
        self.model, self.episodes, self.states = model, episodes, states
        self.dtype = next(model.network.parameters()).dtype
        self.channels_last = False
        """Whether the plain network's convolutions leave channels last in memory, as the library's
        do: dropout draws in that order."""

    def few(self, count: int = TASKS) -> "Case":
        """Return the same with few tasks, on which gradients are compared."""
        return Case(
            self.model, map_tensors(lambda tensor: tensor[:count], self.episodes), self.states
        )

    def double(self) -> "Case":
        """Return a copy in float64."""
        model = copied_model(self.model).double()
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    setattr(module, name, value.double())
        episodes = map_tensors(
            lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, self.episodes
        )
        return Case(model, episodes, self.states)

    def network_info(self) -> NetworkInfo:
        """Return what the model's checks of such a batch find; they may refuse it."""
        model = self.model
        functional = model._functional(self.episodes)
        return model._check(
            functional, self.episodes, model._kind(functional.network, self.episodes)
        )

    def stacking(self) -> StackingVerdict:
        """Return whether the tasks can be stacked."""
        self.network_info()
        network = self.model._functional(self.episodes).network
        return self.model._verdict(self.episodes, network, self.model._kind(network, self.episodes))

    def tasks_share_state(self) -> bool:
        """Return whether tasks in threads would write to the same thing."""
        network = self.model._functional(self.episodes).network
        kind = self.model._kind(network, self.episodes)
        return self.model._tasks_share_state(self.episodes, network, kind)

    def gradient(
        self, curvature: CurvatureName | None = None, way: Execution = WAYS["loop"]
    ) -> Params:
        """Return the library's meta-gradient of the network's parameters.

        By default it is that of the model's own algorithm.
        """
        self.start(way)
        with self.precision():
            gradient: Params = self.model.meta_gradient(self.episodes, curvature)
        return {f"network.{name}": g for name, g in gradient.items()}

    def optimizer_gradients(self, *, as_asked: bool = False) -> Params:
        """Return the gradients that a training step gives the optimizer.

        Those of the loss and of the inner rates are included.

        Tasks are run in a loop, or before the first gradient as the model was asked to run them.
        """
        asked = self.model._executor
        self.start()
        model = copied_model(self.model)  # whose buffers the step may change
        model._executor = asked if as_asked else self.model._executor
        with self.precision():
            model.meta_loss(self.episodes).backward()  # type: ignore[no-untyped-call]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()
        }

    def exact(self) -> Params:
        """Return the exact meta-gradient.

        It covers everything that is trained if the model trains by it, else the network alone.
        """
        model = self.model
        trained_so = (
            model.curvature == "exact" and type(model)._gradient_function is MAML._gradient_function
        )
        return self.optimizer_gradients() if trained_so else self.gradient("exact")

    def unrolled(self, *, curved: bool = True) -> Params:
        """Return the gradient by autograd, those of the loss and of the inner rates included."""
        besides: Params = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith("network.")
        }
        _, query_loss = self.plain_losses()
        return self._by_autograd(
            partial(unrolled_gradient, curved=curved, query_loss=query_loss, besides=besides)
        )

    def way_back(self) -> Params:
        """Return the inner path from its end to its start."""
        return self._by_autograd(unrolled_way_back)

    def _by_autograd(self, function: Callable[..., Params]) -> Params:
        self.start()
        model = self.model
        rates = rates_of_steps(model._rates(), model._adapting_parameters(), model.train_steps)
        with self.precision():
            found = function(
                self.plain_network(),
                self.plain_losses()[0],
                self.episodes,
                rates,
                optimizer=model.inner_optimizer,
                batch_norm=model.batch_norm,
                query_in_eval=model._query_in_eval,
            )
        own = {name for name, _ in model.network.named_parameters()}
        return {f"network.{name}" if name in own else name: g for name, g in found.items()}

    def plain_losses(self) -> list[Callable[[Any, Tensor], Tensor]]:
        """Return the support and the query loss of what the network returned."""

        def of_returned(loss: FunctionalLoss, outputs: Any, y: Tensor) -> Tensor:
            value: Tensor = loss.loss(loss.given(outputs), y)
            return value

        return [partial(of_returned, loss) for loss in self.model._loss_of_outputs()]

    def plain_network(self) -> nn.Module:
        """Return a copy of the network, to be called as it is."""
        network = deep_copy(self.model.network)
        if self.channels_last:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(
                        lambda _, __, x: x.contiguous(memory_format=torch.channels_last)
                    )
        return network

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 is not rounded by a mixed precision."""
        return (
            torch.autocast(self.model.device.type, enabled=False)
            if self.dtype == torch.float64
            else nullcontext()
        )

    def name(self) -> str:
        """Return the precision in words."""
        device, name = self.model.device.type, str(self.dtype).removeprefix("torch.")
        mixed = torch.is_autocast_enabled(device) and self.dtype != torch.float64
        return (
            f"mixed {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
            if mixed
            else name
        )

    def start(self, way: Execution = WAYS["loop"]) -> None:
        """Set the random generators back, and choose how tasks are run."""
        set_generator_states(self.states, self.model.device)
        self.model._executor = Executor(*way, compiled=False)


def tasks_in_words(episodes: AnyEpisodes) -> str:
    """Return the number of tasks in words."""
    number = len(episodes.query_y)
    return f"{number} task{'s' if number > 1 else ''}"
