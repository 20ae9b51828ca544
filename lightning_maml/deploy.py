"""Networks adapted to their tasks, as plain modules for new queries."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml.functional import Params
from lightning_maml.learner import BatchNormPolicy


class AdaptedNetworks(nn.Module):
    """The networks of T tasks, each with its own adapted parameters, called at once.

    Args:
        network: The meta-trained network; it is copied.
        adapted: The parameters that adapted, ``[T, ...]`` each. The others are the network's.
        batch_norm: Which statistics its batch-norm layers use, see :class:`lightning_maml.MAML`.
        support_x: Inputs of the support sets, ``[T, S, ...]``, whose statistics ``"support"`` keeps.
    """

    def __init__(self, network: nn.Module, adapted: Params, batch_norm: BatchNormPolicy, support_x: Tensor) -> None:
        super().__init__()
        self._network = copy.deepcopy(network).eval().requires_grad_(False)
        self._names = list(adapted)
        norms = {name: module for name, module in self._network.named_modules() if isinstance(module, _BatchNorm)}
        if batch_norm != "running":
            for norm in norms.values():
                _forget_running_averages(norm)
        states = list(adapted.values())
        if batch_norm == "support":
            statistics = torch.func.vmap(lambda params, x: _statistics(self._network, norms, params, x))(adapted, support_x)
            for name, norm in norms.items():
                norm.track_running_stats = True
                norm.running_mean, norm.running_var = (tensor[0] for tensor in statistics[name])
                self._names += [f"{name}.running_mean", f"{name}.running_var"]
                states += statistics[name]
        self._states = nn.ParameterList(nn.Parameter(state, requires_grad=False) for state in states)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[T, Q, ...]`` for queries ``[T, Q, ...]``, those of each task by its own network."""
        states = dict(zip(self._names, self._states, strict=True))
        outputs: Tensor = torch.func.vmap(lambda state, x: torch.func.functional_call(self._network, state, (x,)))(states, x)
        return outputs

    def network(self, task: int) -> nn.Module:
        """Return the network of one task, a module of the same class as the meta-trained one, for queries ``[Q, ...]``."""
        network = copy.deepcopy(self._network)
        network.load_state_dict({name: state[task] for name, state in zip(self._names, self._states, strict=True)}, strict=False)
        return network


def _forget_running_averages(norm: _BatchNorm) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def _statistics(network: nn.Module, norms: dict[str, _BatchNorm], params: Params, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance of what enters each batch norm for the inputs ``x`` of one task."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, entering: Tensor) -> None:
        variance, mean = torch.var_mean(entering, [0, *range(2, entering.ndim)], correction=0)
        found[name] = mean, variance

    handles = [norm.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name, norm in norms.items()]
    try:
        torch.func.functional_call(network, params, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return found
