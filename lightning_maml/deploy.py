"""Networks adapted to their tasks, as plain modules for new queries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml.batch_statistics import batch_norms, entering_statistics, forget_running_averages
from lightning_maml.functional import Params, holding, places
from lightning_maml.learner import BatchNormPolicy, deep_copy, run_uncompiled, structural_copy
from lightning_maml.stack import Randomness
from lightning_maml.trial import Verdict, compare


class AdaptedNetworks(nn.Module):
    """The networks of T tasks, each with its own adapted parameters, called at once.

    Args:
        network: The meta-trained network; it is copied.
        adapted: The parameters that adapted, and running averages of the tasks, each ``[T, ...]``. All others are the network's.
        batch_norm: Which statistics its batch-norm layers use, see :class:`lightning_maml.MAML`.
        support_x: Inputs of the support sets, ``[T, S, ...]``, whose statistics ``"support"`` keeps.
        stacked: Whether the networks are called as one, by vmap, rather than one after the other.

    Raises:
        ValueError: With ``"support"``, if a batch-norm layer is called more than once.
    """

    def __init__(self, network: nn.Module, adapted: Params, batch_norm: BatchNormPolicy, support_x: Tensor, stacked: bool = True) -> None:
        super().__init__()
        self.stacked = stacked
        self._network = deep_copy(network).eval()
        for p in self._network.parameters():
            p.requires_grad = False  # modules of TorchScript lack the method
        run_uncompiled(self._network)
        self._names = list(adapted)
        norms = batch_norms(self._network)
        if batch_norm in ("batch", "support"):
            for norm in norms.values():
                forget_running_averages(norm)
        states = list(adapted.values())
        if batch_norm == "support":
            tasks = range(len(support_x))
            each = [entering_statistics(self._network, {name: p[t] for name, p in adapted.items()}, support_x[t]) for t in tasks]
            for name in each[0]:
                norms[name].track_running_stats = True
                norms[name].running_mean, norms[name].running_var = (tensor.clone() for tensor in each[0][name])
                self._names += [f"{name}.running_mean", f"{name}.running_var"]
                states += [torch.stack(tensors) for tensors in zip(*(found[name] for found in each), strict=True)]
        self._states = nn.ParameterList(nn.Parameter(state, requires_grad=False) for state in states)

    def forward(self, x: Tensor) -> Any:
        """Return the outputs ``[T, Q, ...]`` for queries ``[T, Q, ...]``, where each task's come from its own network.

        Raises:
            ValueError: If there are queries of more or fewer tasks than were adapted to.
        """
        states = dict(zip(self._names, self._states, strict=True))
        tasks = len(self._states[0])
        if len(x) != tasks:
            raise ValueError(f"Expected queries [T, Q, ...] of the {tasks} tasks that were adapted to but got shape {list(x.shape)}.")
        call = self._caller()
        return torch.func.vmap(call)(states, x) if self.stacked else _one_by_one(call, states, x)

    def compare_stacked(self, x: Tensor) -> Verdict:
        """Compare the outputs of two of the networks called as one with those of each alone.

        Args:
            x: Inputs ``[T, Q, ...]``.
        """
        last = len(x) - 1
        states = {name: state[[0, last]] for name, state in zip(self._names, self._states, strict=True)}
        inputs = x[[0, last]]

        def outputs(found: Any) -> dict[str, Tensor]:
            return {f"output {number}": leaf for number, leaf in enumerate(tree_leaves(found))}

        def alone(_: int) -> dict[str, Tensor]:
            return outputs(_one_by_one(self._caller(), states, inputs))

        def together(_: int, randomness: Randomness) -> dict[str, Tensor]:
            return outputs(torch.func.vmap(self._caller(), randomness=randomness)(states, inputs))

        return compare(alone, together, x.device)

    def _caller(self) -> Callable[[Params, Tensor], Any]:
        # a copy, because what the network keeps of a call must not be kept: under vmap it is of no use later
        network = structural_copy(self._network)
        where = places(network)

        def call(state: Params, x: Tensor) -> Any:
            with holding(where, state):
                return network(x)

        return call

    def network(self, task: int) -> nn.Module:
        """Return the network of one task, a module of the same class as the meta-trained one, for queries ``[Q, ...]``."""
        network = deep_copy(self._network)
        run_uncompiled(network)
        network.load_state_dict({name: state[task] for name, state in zip(self._names, self._states, strict=True)}, strict=False)
        return network


def _one_by_one(call: Callable[[Params, Tensor], Any], states: Params, x: Tensor) -> Any:
    each = [call({name: state[task] for name, state in states.items()}, x[task]) for task in range(len(x))]
    return tree_map(lambda *outputs: torch.stack(outputs), *each)
