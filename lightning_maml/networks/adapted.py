"""Adapted networks as plain modules, for new queries of their tasks."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import Inputs, call, count, map_tensors, tensors, unstacked
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import Randomness
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.networks.attributes import Kept, numbers_in
from lightning_maml.networks.batch_norm import (
    batch_norm_input_stats,
    batch_norms,
    forget_running_averages,
)
from lightning_maml.networks.copies import deep_copy, run_uncompiled, structural_copy
from lightning_maml.networks.functional_network import BatchNormPolicy
from lightning_maml.networks.places import holding, places
from lightning_maml.networks.stacking_trial import Verdict, compare


class AdaptedNetworks(nn.Module):
    """The networks of T tasks, each with its own adapted parameters, in one module.

    :meth:`lightning_maml.MAML.adapt` returns it.

    Args:
        network: The meta-trained network; it is copied.
        adapted: The adapted parameters and the running averages that differ between the tasks,
            each ``[T, ...]``. All others are the network's.
        batch_norm: Which statistics the batch-norm layers use, see :class:`lightning_maml.MAML`.
        support_x: Inputs of the support sets, ``[T, S, ...]``. With ``batch_norm="support"`` their
            statistics are stored and used for all queries.
        stacked: Whether all networks run at once under ``vmap`` rather than one after the other.

    Raises:
        ValueError: With ``batch_norm="support"``, if a batch-norm layer is called more than once.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> networks = MAML(MLP(4, 3)).adapt(x, y)
        >>> networks(torch.rand(2, 5, 4)).shape  # five queries for each task
        torch.Size([2, 5, 3])
        >>> type(networks.network(0)).__name__
        'MLP'
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
            p.requires_grad = False  # requires_grad_() does not exist on TorchScript modules
        run_uncompiled(self._network)
        if batch_norm in ("batch", "support"):
            for norm in batch_norms(self._network).values():
                forget_running_averages(norm)
        states = dict(adapted)
        if batch_norm == "support":
            states |= self._support_statistics(adapted, support_x)
        # parameters rather than a dict, so that they are saved and moved with the module
        self._names = list(states)
        self._states = nn.ParameterList(
            nn.Parameter(state, requires_grad=False) for state in states.values()
        )

    def _support_statistics(self, adapted: Params, support_x: Inputs) -> Params:
        """Return the statistics of all support sets as running averages, each ``[T, C]``."""
        each = []
        for params, x in unstacked((adapted, support_x)):
            each.append(batch_norm_input_stats(structural_copy(self._network), params, x))
        norms = batch_norms(self._network)
        averages: Params = {}
        for name, (mean, variance) in each[0].items():
            # the layer must have averages, so that those of a task can take their place
            norms[name].track_running_stats = True
            norms[name].running_mean = mean.clone()
            norms[name].running_var = variance.clone()
            means, variances = zip(*(statistics[name] for statistics in each), strict=True)
            averages[f"{name}.running_mean"] = torch.stack(means)
            averages[f"{name}.running_var"] = torch.stack(variances)
        return averages

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network of each task on that task's queries.

        Args:
            *inputs: Queries ``[T, Q, ...]``: a tensor, several tensors for a network of several
                inputs, or ``query_x`` as it is in episodes, a dict, tuple or list.
            **named: The same by name, ``networks(ids=..., mask=...)``.

        Returns:
            The outputs, tensors ``[T, Q, ...]``.

        Raises:
            ValueError: If there are queries of more or fewer tasks than were adapted to.
            TypeError: If some are given by position and others by name.
        """
        if inputs and named:
            raise UserTypeError(
                "Expected all inputs by position or all by name but got both; give them by name."
            )
        x = named or (inputs[0] if len(inputs) == 1 else inputs)
        states = dict(zip(self._names, self._states, strict=True))
        tasks = len(self._states[0])
        if any(len(tensor) != tasks for tensor in tensors(x)):
            raise UserValueError(
                f"Expected queries [T, Q, ...] of the {tasks} tasks that were adapted to but got "
                f"shape {list(tensors(x)[0].shape)}."
            )
        run = _run_stacked if self.stacked else _run_one_by_one
        return run(self._network_of_state(), states, x)

    def compare_stacked(self, x: Inputs) -> Verdict:
        """Compare outputs of the first and last network under ``vmap`` with those of each alone.

        Args:
            x: Inputs ``[T, Q, ...]``.
        """
        pair = [0, count(x) - 1]
        states = {name: state[pair] for name, state in zip(self._names, self._states, strict=True)}
        inputs = map_tensors(lambda tensor: tensor[pair], x)

        def numbered(outputs: Any) -> dict[str, Tensor]:
            return {f"output {number}": leaf for number, leaf in enumerate(tensors_in(outputs))}

        def alone(_: int) -> dict[str, Tensor]:
            return numbered(_run_one_by_one(self._network_of_state(), states, inputs))

        def together(_: int, randomness: Randomness) -> dict[str, Tensor]:
            return numbered(_run_stacked(self._network_of_state(), states, inputs, randomness))

        return compare(alone, together, self._states[0].device)

    def _network_of_state(self) -> Callable[[Params, Any], Any]:
        """Return the network as a function of its state and inputs."""
        # A copy, because a network may keep results of a call in attributes. Those would belong to
        # one task, or be tensors of vmap that cannot be used outside of it.
        network = structural_copy(self._network)
        where, kept = places(network), Kept(network)
        modules, numbers = dict(network.named_modules()), numbers_in(network)

        def run(state: Params, x: Any) -> Any:
            # what a pass writes to buffers and counters is not for the next task
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            with holding(where, buffers | state):
                outputs = call(network, x)
            kept.put_back()
            for (name, key), number in numbers.items():
                modules[name].__dict__[key] = number
            return outputs

        return run

    def network(self, task: int) -> nn.Module:
        """Return a copy of one task's network, for queries ``[Q, ...]``.

        Args:
            task: Index of the task.

        Returns:
            A module of the same class as the meta-trained network, with the adapted parameters.
        """
        network = deep_copy(self._network)
        run_uncompiled(network)
        # not by load_state_dict, which a network may define anew
        own = dict(network.named_parameters()) | dict(network.named_buffers())
        with torch.no_grad():
            for name, state in zip(self._names, self._states, strict=True):
                own[name].copy_(state[task])
        return network


def _run_one_by_one(run: Callable[[Params, Any], Any], states: Params, x: Any) -> Any:
    each = [run(*of_one) for of_one in unstacked((states, x))]
    stacked = map(torch.stack, zip(*map(tensors_in, each), strict=True))
    # outputs may be any object: stacked tensors take the place of the first task's
    return map_outputs(lambda _: next(stacked), each[0])


def _run_stacked(
    run: Callable[[Params, Any], Any],
    states: Params,
    x: Any,
    randomness: Randomness | Literal["error"] = "error",
) -> Any:
    outputs: list[Any] = []

    # vmap returns only tensors, so the object that holds them is noted beside it
    def tensors_of_outputs(state: Params, x: Any) -> list[Tensor]:
        outputs.append(run(state, x))
        return tensors_in(outputs[0])

    x = map_tensors(lambda tensor: tensor, x)  # torch's trees take other mappings for leaves
    by_task = tree_map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, x)
    run_all = torch.func.vmap(tensors_of_outputs, in_dims=(0, by_task), randomness=randomness)
    stacked = iter(run_all(states, x))
    return map_outputs(lambda _: next(stacked), outputs[0])
