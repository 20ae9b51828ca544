"""The inner loop: gradient descent on a task's support set, from the meta-parameters w_0 to w_N."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import Rates, tensor_rates
from lightning_maml.core.inner_update import InnerUpdate, State
from lightning_maml.core.objective import Objective
from lightning_maml.core.params import Params, add_scaled, number_on


class TaskLosses(NamedTuple):
    """The losses of one task's batches; with a task axis, of several tasks' batches.

    Attributes:
        support: S_0 .. S_{N-1}; in the finite-sum case N times the support set.
        hessian: D_0 .. D_{N-1}; in the finite-sum case the same objects as in ``support``.
        query: The query batch T, as it is evaluated at w_0 .. w_N.
    """

    support: Sequence[Objective]
    hessian: Sequence[Objective]
    query: Sequence[Objective]


class InnerStep(NamedTuple):
    """One step ``w_{j+1} = w_j - A_j grad l(w_j; S_j)``.

    Attributes:
        number: j.
        w: The point before the step, w_j.
        rates: A_j.
        hessian: The loss whose Hessian the backward pass takes at w_j, that of D_j.
        gradient: ``grad l(w_j; S_j)``: with an optimizer of all parameters that adapt, else of
            those whose rate is a tensor, and so may need a gradient itself.
        state: The optimizer's state before the step; empty in gradient descent.
    """

    number: int
    w: Params
    rates: Rates
    hessian: Objective
    gradient: Params
    state: State


def inner_loop(
    losses: TaskLosses,
    w: Params,
    rates: Sequence[Rates],
    optimizer: InnerOptimizer | None = None,
) -> tuple[list[InnerStep], Params]:
    """Take the steps ``w_{j+1} = w_j - A_j grad l(w_j; S_j)``, or those of an optimizer.

    Ji et al. 2022, eqs. 6 (fresh S_j), 9 and 11 (always the support set); Fallah et al. 2020, eq. 4
    (one step).

    Args:
        losses: The losses of the task's batches.
        w: The meta-parameters ``w_0``.
        rates: A_j for each step.
        optimizer: What a step does with the gradient; by default gradient descent.

    Returns:
        The steps, and the adapted parameters ``w_N``.
    """
    points = _reserve(w, rates)
    update, state = _start(losses, w, rates, optimizer)
    steps = []
    for j, (objective, rates_j) in enumerate(zip(losses.support, rates, strict=True)):
        gradient = objective.gradient(w, rates_j.keys())
        kept = gradient
        if optimizer is None:
            kept = {name: gradient[name] for name in tensor_rates(rates_j)}
        steps.append(InnerStep(j, w, rates_j, losses.hessian[j], kept, state))
        w, state = _step(update, j, w, rates_j, gradient, state, points[j])
    return steps, w


def adapt(
    losses: TaskLosses,
    w: Params,
    rates: Sequence[Rates],
    optimizer: InnerOptimizer | None = None,
) -> Params:
    """Return ``w_N`` alone; no other point of the path is kept.

    The arguments are those of :func:`inner_loop`.
    """
    update, state = _start(losses, w, rates, optimizer)
    for j, (objective, rates_j) in enumerate(zip(losses.support, rates, strict=True)):
        w, state = _step(update, j, w, rates_j, objective.gradient(w, rates_j.keys()), state)
    return w


def _start(
    losses: TaskLosses, w: Params, rates: Sequence[Rates], optimizer: InnerOptimizer | None
) -> tuple[InnerUpdate | None, State]:
    """Return the update of an optimizer and its state before the first step."""
    if optimizer is None:
        return None, {}
    update = InnerUpdate(optimizer, losses.query[-1].axis)
    return update, update.start(w, rates)


def _step(
    update: InnerUpdate | None,
    number: int,
    w: Params,
    rates: Rates,
    gradient: Params,
    state: State,
    point: Params | None = None,
) -> tuple[Params, State]:
    """Return w_{j+1}, in the memory of ``point`` if that is given, and the state after the step."""
    if update is None:
        return {**w, **sgd_step(w, rates, gradient, point)}, state
    moved, state = update(number, rates, update.inputs(w, gradient, state, rates))
    if point is not None:
        moved = {name: tensor.copy_(moved[name]) for name, tensor in point.items()}
    return {**w, **moved}, state


def sgd_step(w: Params, rates: Rates, gradient: Params, point: Params | None = None) -> Params:
    """Return ``w - A gradient`` for the parameters that adapt.

    Args:
        w: The parameters.
        rates: A.
        gradient: Their gradient.
        point: Tensors to write it to.
    """
    alpha = number_on(rates)
    if alpha is not None and point is None:
        adapting = {name: w[name] for name in rates}
        return add_scaled(adapting, -alpha, gradient)
    moved: Params = {}
    for name, rate in rates.items():
        out = None if point is None else point[name]
        if isinstance(rate, Tensor):
            moved[name] = torch.sub(w[name], rate * gradient[name], out=out)
        else:
            moved[name] = torch.sub(w[name], gradient[name], alpha=float(rate), out=out)
    return moved


def _reserve(w: Params, rates: Sequence[Rates]) -> Sequence[Params | None]:
    """Allocate the points of the path at once, on a CPU.

    Allocated one by one they would lie between the graphs of the steps, and leave holes when these
    are freed. On a GPU, whose memory torch keeps in blocks, all parameters move in one kernel if
    nothing is reserved.
    """
    if any(tensor.device.type != "cpu" for tensor in w.values()):
        return [None] * len(rates)
    return [{name: torch.empty_like(w[name]) for name in rates_j} for rates_j in rates]
