"""Networks adapted to their tasks, as plain modules for new queries."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import Inputs, call, count, map_tensors, tensors
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import Randomness
from lightning_maml.networks.batch_norm import (
    batch_norms,
    entering_statistics,
    forget_running_averages,
)
from lightning_maml.networks.functional_network import (
    BatchNormPolicy,
    Kept,
    deep_copy,
    run_uncompiled,
    structural_copy,
)
from lightning_maml.networks.places import holding, places
from lightning_maml.networks.stacking_trial import Verdict, compare


class AdaptedNetworks(nn.Module):
    """The networks of T tasks, each with its own adapted parameters, called at once.

    Args:
        network: The meta-trained network; it is copied.
        adapted: The parameters that adapted, and running averages of the tasks, each ``[T, ...]``.
            All others are the network's.
        batch_norm: Which statistics its batch-norm layers use, see :class:`lightning_maml.MAML`.
        support_x: Inputs of the support sets, ``[T, S, ...]``, whose statistics ``"support"``
            keeps.
        stacked: Whether the networks are called as one, by vmap, rather than one after the other.

    Raises:
        ValueError: With ``"support"``, if a batch-norm layer is called more than once.
    """

    def __init__(
        self,
        network: nn.Module,
        adapted: Params,
        batch_norm: BatchNormPolicy,
        support_x: Inputs,
        stacked: bool = True,
    ) -> None:
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
            tasks = [
                map_tensors(lambda tensor, t=t: tensor[t], (adapted, support_x))
                for t in range(count(support_x))
            ]
            each = [
                entering_statistics(structural_copy(self._network), params, x)
                for params, x in tasks
            ]
            for name in each[0]:
                norms[name].track_running_stats = True
                norms[name].running_mean, norms[name].running_var = (
                    tensor.clone() for tensor in each[0][name]
                )
                self._names += [f"{name}.running_mean", f"{name}.running_var"]
                states += [
                    torch.stack(tensors)
                    for tensors in zip(*(found[name] for found in each), strict=True)
                ]
        self._states = nn.ParameterList(
            nn.Parameter(state, requires_grad=False) for state in states
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the outputs ``[T, Q, ...]`` for queries ``[T, Q, ...]``, where each task's come from its own network.

        Networks of several inputs may be called as each of them is,
        ``networks(ids=..., mask=...)``, or with ``query_x`` as it is in episodes, a dict, tuple or
        list.

        Raises:
            ValueError: If there are queries of more or fewer tasks than were adapted to.
        """
        x = named or (inputs[0] if len(inputs) == 1 else inputs)
        states = dict(zip(self._names, self._states, strict=True))
        tasks = len(self._states[0])
        if any(len(tensor) != tasks for tensor in tensors(x)):
            raise ValueError(
                f"Expected queries [T, Q, ...] of the {tasks} tasks that were adapted to but got "
                f"shape {list(tensors(x)[0].shape)}."
            )
        of_state = self._caller()
        return _as_one(of_state, states, x) if self.stacked else _one_by_one(of_state, states, x)

    def compare_stacked(self, x: Inputs) -> Verdict:
        """Compare the outputs of two of the networks called as one with those of each alone.

        Args:
            x: Inputs ``[T, Q, ...]``.
        """
        last = count(x) - 1
        states = {
            name: state[[0, last]] for name, state in zip(self._names, self._states, strict=True)
        }
        inputs = map_tensors(lambda tensor: tensor[[0, last]], x)

        def outputs(found: Any) -> dict[str, Tensor]:
            return {f"output {number}": leaf for number, leaf in enumerate(tensors_in(found))}

        def alone(_: int) -> dict[str, Tensor]:
            return outputs(_one_by_one(self._caller(), states, inputs))

        def together(_: int, randomness: Randomness) -> dict[str, Tensor]:
            return outputs(_as_one(self._caller(), states, inputs, randomness))

        return compare(alone, together, self._states[0].device)

    def _caller(self) -> Callable[[Params, Any], Any]:
        # a copy, because what the network keeps of a call must not be kept: under vmap it is of no
        # use later, and else it is of one task
        network = structural_copy(self._network)
        where, kept = places(network), Kept(network)

        def of_state(state: Params, x: Any) -> Any:
            with holding(where, state):
                outputs = call(network, x)
            kept.put_back()
            return outputs

        return of_state

    def network(self, task: int) -> nn.Module:
        """Return the network of one task, a module of the same class as the meta-trained one, for queries ``[Q, ...]``."""
        network = deep_copy(self._network)
        run_uncompiled(network)
        network.load_state_dict(
            {name: state[task] for name, state in zip(self._names, self._states, strict=True)},
            strict=False,
        )
        return network


def _one_by_one(of_state: Callable[[Params, Any], Any], states: Params, x: Any) -> Any:
    tasks = range(count(x))
    each = [
        of_state(*map_tensors(lambda tensor, task=task: tensor[task], (states, x)))
        for task in tasks
    ]
    stacked = map(torch.stack, zip(*map(tensors_in, each), strict=True))
    return map_outputs(lambda _: next(stacked), each[0])


def _as_one(
    of_state: Callable[[Params, Any], Any],
    states: Params,
    x: Any,
    randomness: Randomness | Literal["error"] = "error",
) -> Any:
    form: list[Any] = []

    # vmap lets no other objects through
    def tensors_of_outputs(state: Params, x: Any) -> list[Tensor]:
        form.append(of_state(state, x))
        return tensors_in(form[0])

    stacked = iter(torch.func.vmap(tensors_of_outputs, randomness=randomness)(states, x))
    return map_outputs(lambda _: next(stacked), form[0])
