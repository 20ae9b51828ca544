"""iMAML: the meta-gradient at the inner problem's solution (Rajeswaran et al. 2019)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, check_episodes
from lightning_maml.batches.trees import detached
from lightning_maml.core.hvp import CurvatureName, hessian_vector_product
from lightning_maml.core.inner_loop import adapt
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import InnerRates, Rates, rates_of_steps
from lightning_maml.core.meta_gradient import TaskGradient
from lightning_maml.core.objective import twice_differentiable
from lightning_maml.core.params import Params, add_scaled, dot
from lightning_maml.core.precision import full_precision
from lightning_maml.core.task_axis import SINGLE_TASK, TaskAxis
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.execution.task_map import TaskExecution
from lightning_maml.functional.losses import Loss, LossFunctions, QueryLoss
from lightning_maml.functional.meta_gradient import MetaGradient, mean_over_tasks


def proximal(loss: Loss, anchor: Params, strength: float) -> Loss:
    """Return ``loss + strength / 2 |params - anchor|^2`` (Rajeswaran et al. 2019, eq. 3).

    Args:
        loss: Returns the loss and outputs.
        anchor: The meta-parameters that adapt.
        strength: lambda.
    """

    def pulled_back(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        value, aux = loss(params, x, y)
        away = {name: params[name] - tensor for name, tensor in anchor.items()}
        return value + strength / 2 * dot(away, away), aux

    return pulled_back


def implicit_gradient(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    inner_optimizer: InnerOptimizer | None = None,
    strength: float,
    cg_steps: int,
    curvature: CurvatureName = "exact",
    probe_radius: float | None = None,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> MetaGradient:
    """Return the mean over tasks of ``(I + H / lambda)^-1 grad q(w_N)``.

    H is the Hessian of the support loss at ``w_N``. That is the gradient of ``w -> q(w*(w))`` if
    ``w_N`` is ``w*``, the minimiser of the support loss with its proximal term (Rajeswaran et al.
    2019, Lemma 1). Nothing of the path to ``w_N`` is kept.

    Args:
        loss: The support loss with its proximal term, as :func:`proximal` gives it.
        params: As in :func:`lightning_maml.meta_gradient`, like all arguments that are not
            explained here.
        episodes: Of the finite-sum case.
        inner_lr: alpha, or rates by parameter.
        steps: N, at least 1.
        inner_optimizer: How they are taken. The minimum does not depend on it, unless it moves
            parameters without gradient (weight decay), for which the result is wrong.
        strength: lambda of the proximal term.
        cg_steps: Iterations of the conjugate gradient method, one Hessian-vector product each; 0
            gives the first-order gradient.
        curvature: How these products are taken.
        probe_radius: With ``"finite_difference"`` only.
        query_loss: ``query_loss(params, task)``, without proximal term.
        has_aux: The losses return ``(loss, aux)``.
        tasks: How tasks are run.
        chunk_size: How many tasks are vectorised together.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If the episodes have a support batch for each inner step.
    """
    if not isinstance(episodes, Episodes):
        raise UserTypeError(
            "Expected Episodes, whose one support set has a minimum to be at, but got "
            "ResampledEpisodes; use regime='finite_sum'."
        )
    if steps < 1:
        raise UserValueError(
            "Expected `steps` to be at least 1, since iMAML needs at least one inner step, but got "
            f"{steps}."
        )
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    hvp = hessian_vector_product(curvature, probe_radius)
    functions = LossFunctions(loss, query_loss, has_aux)

    digits = full_precision() if curvature == "finite_difference" else nullcontext()
    with torch.inference_mode(False), twice_differentiable(), digits:
        episodes, params, rates = detached((episodes, params, rates))

        def of_tasks(task: AnyEpisodes, axis: TaskAxis) -> TaskGradient:
            losses = functions.of_task(task, steps, axis)
            w_N = adapt(losses, axis.expand(params), rates, inner_optimizer)
            value, aux, v = losses.query[-1].value_and_gradient(w_N)
            # another objective: that of the last step would draw that step's random numbers again
            support = functions.of_task(task, steps, axis).support[-1]
            if curvature != "none":
                curved = partial(hvp, support, w_N)
                v = solve_implicitly(v, curved, _moving(rates[-1]), strength, cg_steps, axis)
            return TaskGradient(axis.sum(v), value, aux)

        mean = mean_over_tasks(of_tasks, episodes, tasks, chunk_size)
    return MetaGradient(mean.grad, mean.query_loss, mean.aux, [{}] * steps)


def _moving(rates: Rates) -> list[str]:
    """Return the names of the parameters that leave where they start: those of rates but 0."""
    return [name for name, rate in rates.items() if isinstance(rate, Tensor) or rate]


def solve_implicitly(
    v: Params,
    curved: Callable[[Params], Params],
    names: list[str],
    strength: float,
    cg_steps: int,
    axis: TaskAxis = SINGLE_TASK,
) -> Params:
    """Return ``v - H x``, where ``x`` solves ``(H + lambda I) x = v`` in the parameters that adapt.

    In these parameters the result is ``lambda x = (I + H / lambda)^-1 v``; in the others it has the
    mixed derivatives of H. The conjugate gradient method updates ``v - (H + lambda I) x`` as it
    goes, in all parameters. It stops where the curvature is not positive; if that is so from the
    start, the gradient is first-order.

    Args:
        v: Gradient of the query loss, of all parameters.
        curved: Maps a direction in the parameters that adapt to its product with ``H + lambda I``
            in all parameters.
        names: The parameters that adapt.
        strength: lambda.
        cg_steps: Iterations.
        axis: The task axis; each task has iterations of its own.
    """
    if not names:
        return v
    dot_of, add = axis.vmap(dot), axis.vmap(add_scaled)
    p = {name: v[name] for name in names}
    x = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    squared = dot_of(p, p)
    going = squared > 0
    for _ in range(cg_steps):
        curved_p = curved(p)
        along = dot_of(p, curved_p)
        # a remainder may underflow to zero
        going = going & (along > 0) & (squared > 0)
        step = torch.where(going, squared / along, 0.0)
        x = add(x, step, p)
        v = add(v, -step, curved_p)
        remainder = {name: v[name] for name in names}
        before, squared = squared, dot_of(remainder, remainder)
        p = add(remainder, torch.where(going, squared / before, 0.0), p)
    return add_scaled(v, strength, x)
