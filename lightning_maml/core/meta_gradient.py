"""The meta-gradient of one task: the query gradient at w_N, taken back through the inner steps.

The product of Ji et al. 2022, eqs. 7 (H_j on D_j) and 12 (H_j on the support set), is applied from
its last factor to its first. One step is Algorithms 1-3 of Fallah et al. 2020. The three algorithms
differ in the Hessian-vector product alone (:mod:`lightning_maml.core.hvp`).

Memory: the points w_0 .. w_N, and the graphs of all steps where they are kept, else of one at a
time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_maml.core.hvp import HessianVectorProduct
from lightning_maml.core.inner_loop import InnerStep, TaskLosses, adapt, inner_loop
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import Rates, tensor_rates
from lightning_maml.core.inner_update import InnerUpdate, State
from lightning_maml.core.params import Params, add, add_scaled, number_on, scale, subtract
from lightning_maml.core.task_axis import TaskAxis

StepBack = Callable[[InnerStep, Params], Params]
"""``back(step, v)`` turns the gradient with respect to w_{j+1} into that with respect to w_j."""


class TaskGradient(NamedTuple):
    """What the backward pass ends with.

    Attributes:
        grad: The meta-gradient, and with :func:`with_rate_gradients` that of the inner rates too.
        query_loss: The query loss at w_N.
        aux: What the query loss function returned besides the loss.
    """

    grad: Params
    query_loss: Tensor
    aux: Any


def task_meta_gradient(
    losses: TaskLosses,
    w: Params,
    rates: Sequence[Rates],
    back: StepBack | None,
    optimizer: InnerOptimizer | None = None,
) -> TaskGradient:
    """Return the gradient of ``w -> q(w_N(w))``.

    Args:
        losses: The losses of the task's batches.
        w: The meta-parameters ``w_0``.
        rates: A_j for each step.
        back: Takes a gradient back through one step; :func:`through_step` with a Hessian-vector
            product, and what is wrapped around it. None if the gradient at w_N is that at w_0, so
            that no other point of the path is needed.
        optimizer: What a step does with the gradient; by default gradient descent.
    """
    if back is None:
        w_N = adapt(losses, w, rates, optimizer)
        query_loss, aux, v = losses.query[-1].value_and_gradient(w_N)
        return TaskGradient(v, query_loss, aux)
    steps, w_N = inner_loop(losses, w, rates, optimizer)
    query_loss, aux, v = losses.query[-1].value_and_gradient(w_N)
    while steps:  # a point that was passed is freed
        v = back(steps.pop(), v)
    return TaskGradient(v, query_loss, aux)


def through_step(step: InnerStep, v: Params, hvp: HessianVectorProduct) -> Params:
    """Return ``v - H_j A_j v``: the transposed derivative of ``w_j -> w_j - A_j grad l(w_j)``.

    The papers' A_j is alpha times the identity. With other rates A_j comes before H_j, so that a
    parameter that does not adapt still gets the mixed terms of those that do.
    """
    alpha = number_on(step.rates)
    if alpha is not None and step.rates.keys() == v.keys():
        return add_scaled(v, -alpha, hvp(step.hessian, step.w, v))
    Hv = hvp(step.hessian, step.w, scale(step.rates, v))
    return subtract(v, Hv)


class ThroughUpdate:
    """``back(step, v)`` for the steps of an optimizer, called from the last to the first.

    With ``(w_{j+1}, s_{j+1}) = U(w_j, s_j, g_j, A_j)`` and ``g_j = grad l(w_j)``, the gradient with
    respect to w_j is that through the first argument, plus H_j times that with respect to g_j. It
    needs the gradient with respect to s_{j+1}, which the step before has left here. Gradient
    descent, ``U = w_j - A_j g_j``, gives :func:`through_step`.

    The gradients of rates that are tensors stand among those of the parameters, see
    :func:`rate_name`.

    Args:
        optimizer: U.
        axis: The task axis.
        hvp: H_j times a vector; None for FO-MAML, which takes the gradient at w_N as it is.
    """

    def __init__(
        self, optimizer: InnerOptimizer, axis: TaskAxis, hvp: HessianVectorProduct | None
    ) -> None:
        self._update = InnerUpdate(optimizer, axis)
        self._hvp = hvp
        self._of_state: State | None = None

    def __call__(self, step: InnerStep, v: Params) -> Params:
        """Return the gradient with respect to w_j."""
        rates = tensor_rates(step.rates)
        if self._hvp is None and not rates:
            return v
        inputs = self._update.inputs(step.w, step.gradient, step.state, step.rates)
        pulled = self._update.pull_back(step.number, step.rates, inputs, v, self._of_state)
        of_rates = {rate_name(step.number, name): pulled.rates[name] for name in rates}
        if self._hvp is None:
            return {**v, **of_rates}
        self._of_state = pulled.state
        Hv = self._hvp(step.hessian, step.w, pulled.gradient)
        return add({**v, **pulled.w}, Hv) | of_rates


def with_rate_gradients(back: StepBack) -> StepBack:
    """Let ``back`` also return the gradients of inner rates that are tensors.

    They stand among those of the parameters, under the names of :func:`rate_name`.
    """

    def back_with_rates(step: InnerStep, v: Params) -> Params:
        axis = step.hessian.axis
        of_rates: Params = axis.vmap(partial(_rate_gradients, step))(step.gradient, v)
        return back(step, v) | of_rates

    return back_with_rates


def rate_name(step: int, name: str) -> str:
    """Return the name that the gradient of an inner rate has among those of the parameters."""
    return f"(inner rate {step} of) {name}"


def _rate_gradients(step: InnerStep, gradient: Params, v: Params) -> Params:
    """Return the gradient of A in ``w_{j+1} = w_j - A g``, which is ``-g v_{j+1}``.

    A is real, of complex parameters too.
    """
    return {
        rate_name(step.number, name): -_real_product(gradient[name], v[name]).sum_to_size(
            rate.shape
        )
        for name, rate in tensor_rates(step.rates).items()
    }


def _real_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b``; of complex numbers, as of pairs of real ones."""
    return (a.conj() * b).real if a.is_complex() else a * b


def with_query_losses(back: StepBack, losses: TaskLosses, weights: Sequence[float]) -> StepBack:
    """Let ``back`` differentiate query losses on the way too (Antoniou et al. 2019, section 4).

    Args:
        back: What this is wrapped around.
        losses: The task's losses, of which the query losses at ``w_1 .. w_{N-1}`` are added.
        weights: Their weights, and last that of the query loss at ``w_N``.
    """
    last = len(weights) - 1

    def back_with_losses(step: InnerStep, v: Params) -> Params:
        if step.number == last:
            v = scale(weights[last], v)
        v = back(step, v)
        if step.number > 0 and weights[step.number - 1]:
            gradient = losses.query[step.number].gradient(step.w)
            v = add_scaled(v, weights[step.number - 1], gradient)
        return v

    return back_with_losses
