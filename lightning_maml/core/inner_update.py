"""An inner step of an optimizer, for all that adapts, and the backward pass through it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils._pytree import tree_structure as structure_of

from lightning_maml.core.inner_optimizers import InnerOptimizer, Slots, check_inner_optimizer
from lightning_maml.core.inner_rates import Rates, tensor_rates
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.errors import UserValueError

State = dict[str, Slots]
"""An optimizer's state, by the names of the parameters that adapt."""


class UpdateInputs(NamedTuple):
    """The tensors that an inner step depends on, or the gradients with respect to them.

    Attributes:
        w: The parameters that adapt, at w_j.
        gradient: ``grad l(w_j; S_j)``, of these parameters.
        state: The optimizer's state before the step, s_j.
        rates: The rates that are tensors.
    """

    w: Params
    gradient: Params
    state: State
    rates: Params


class InnerUpdate:
    """An inner step of an optimizer, ``(w_{j+1}, s_{j+1}) = U(w_j, s_j, g_j, A_j)``.

    Args:
        optimizer: U.
        axis: The task axis.
    """

    def __init__(self, optimizer: InnerOptimizer, axis: TaskAxis) -> None:
        check_inner_optimizer(optimizer)
        self._optimizer, self._axis = optimizer, axis

    def start(self, w: Params, rates: Sequence[Rates]) -> State:
        """Return s_0.

        Raises:
            ValueError: If the parameters that adapt are not the same in all steps.
        """
        names = rates[0].keys() if rates else set()
        if any(rates_j.keys() != names for rates_j in rates):
            raise UserValueError(
                "Expected rates for the same parameters in each step with an `inner_optimizer`, "
                "whose state counts the steps, but they differ; a rate of 0 keeps a parameter as "
                "it is."
            )
        start = self._axis.vmap(self._optimizer.start)
        return {name: start(w[name]) for name in names}

    def inputs(self, w: Params, gradient: Params, state: State, rates: Rates) -> UpdateInputs:
        """Return the tensors that a step depends on."""
        adapting = {name: w[name] for name in rates}
        return UpdateInputs(adapting, gradient, state, self._axis.expand(tensor_rates(rates)))

    def __call__(self, number: int, rates: Rates, inputs: UpdateInputs) -> tuple[Params, State]:
        """Return the parameters that adapt, and the state, after step ``number``."""

        def of_task(task: UpdateInputs) -> tuple[Params, State]:
            of_names = {**rates, **task.rates}
            points: Params = {}
            state: State = {}
            for name, w in task.w.items():
                points[name], state[name] = self._optimizer.step(
                    w, task.gradient[name], of_names[name], task.state[name], number
                )
            return points, state

        moved: tuple[Params, State] = self._axis.vmap(of_task)(inputs)
        return moved

    def pull_back(
        self, number: int, rates: Rates, inputs: UpdateInputs, v: Params, of_state: State | None
    ) -> UpdateInputs:
        """Return the gradients with respect to what step ``number`` depends on.

        Args:
            number: j.
            rates: A_j.
            inputs: What the step depends on.
            v: The gradient with respect to w_{j+1}.
            of_state: That with respect to s_{j+1}; None counts as zero.
        """
        leaves = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(), inputs)
        with torch.enable_grad():
            points, state = self(number, rates, leaves)
        if of_state is None:
            of_state = tree_map(torch.zeros_like, state)
        outputs = tree_leaves((points, state))
        cotangents = tree_leaves(({name: v[name] for name in points}, of_state))
        curved = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in curved],
            tree_leaves(leaves),
            [cotangent for _, cotangent in curved],
            materialize_grads=True,
        )
        pulled: UpdateInputs = tree_unflatten(found, structure_of(leaves))
        return pulled
