"""The meta-gradient: the gradient of the query loss after N inner steps, pulled back to the meta-parameters one step at a time."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, check_episodes
from lightning_maml.core.hvp import (
    CurvatureName,
    HessianVectorProduct,
    exact,
    hessian_vector_product,
)
from lightning_maml.core.inner_rates import (
    InnerRates,
    Rates,
    applied,
    gradient_of_rates,
    learned,
    rates_of_steps,
)
from lightning_maml.core.objective import Objective, twice_differentiable
from lightning_maml.core.params import Params, axpy, detached, scaled
from lightning_maml.core.task_axis import Stack
from lightning_maml.execution.task_map import TaskExecution, map_tasks
from lightning_maml.functional.adaptation import (
    Differentiate,
    Loss,
    QueryLoss,
    Sample,
    TaskLosses,
    cat_chunks,
    check_step_count,
    check_support_batches,
    inner_path,
    task_losses,
)

Encode = Callable[[Params, Any], tuple[Tensor, Tensor]]
"""``encode(params, task)``: the features of one task's support and query inputs."""

Call = Callable[..., Any]
"""``call(function, *inputs)`` returns ``function(*inputs)``, where the function depends on no
tensors but those among its inputs."""

# names that no parameters have
_FEATURES = ("(features of the support set)", "(features of the query set)")


class MetaGradient(NamedTuple):
    """The meta-gradient of a meta-batch.

    Attributes:
        grad: Mean over the tasks, shaped like the parameters.
        query_loss: Query loss of each task after adaptation, ``[T]``.
        aux: What the loss function returned besides the query loss, each tensor ``[T, ...]``; empty
            without ``has_aux``.
        inner_lr: For each step the gradient with respect to the inner rates that are tensors, mean
            over the tasks, shaped like these rates.
    """

    grad: Params
    query_loss: Tensor
    aux: Any
    inner_lr: list[Params]


def not_finite(result: MetaGradient) -> list[str]:
    """Return the names of the parameters and inner rates whose gradient is not finite."""
    of_rates = {
        f"inner rate {step} of {name}": rate
        for step, rates in enumerate(result.inner_lr)
        for name, rate in rates.items()
    }
    gradients = {
        name: gradient for name, gradient in (result.grad | of_rates).items() if gradient.numel()
    }
    largest = {
        name: torch.linalg.vector_norm(gradient, float("inf"))
        for name, gradient in gradients.items()
    }
    if torch.stack([*largest.values()]).max().isfinite():  # so that a GPU is waited for only once
        return []
    return [name for name, size in largest.items() if not size.isfinite()]


def pull_back(
    losses: TaskLosses,
    objective: Differentiate,
    w: Params,
    rates: Sequence[Rates],
    product: HessianVectorProduct | None,
    step_weights: Sequence[float] | None = None,
) -> MetaGradient:
    """Return one task's meta-gradient.

    ``v = grad q(w_N)``, then ``v <- v - H_j A_j v`` for ``j = N-1 .. 0``: the product of Ji et al.
    2022, eqs. 7 (H_j on D_j) and 12 (H_j on the support set), applied from its last factor to its
    first. One step is Algorithms 1-3 of Fallah et al. 2020; without curvature (``product`` None)
    ``v`` stays as it is (eq. 8). The papers' A_j is alpha times the identity; with other rates A_j
    is applied before H_j, so that a parameter that does not adapt still gets the mixed terms of
    those that do. ``step_weights`` add the query gradients along the path. Memory: the N + 1 points
    of the path (with learned rates N gradients as well) and one graph at a time; with N = 1 the
    step's graph is kept beside the query loss's, which saves some 15 % of the time (with N = 5 it
    would save 3 %).
    """
    reusable = product is exact and losses.hessian is None and len(losses.support) == 1
    path = inner_path(losses.support, objective, w, rates, keep_last_graph=reusable)
    w_N = path.points[-1]
    last = objective(losses.query[-1](w_N))
    query_loss, aux, v = last.value_and_gradient(w_N)
    on_the_way = [0.0, *([0.0] * (len(rates) - 1) if step_weights is None else step_weights[:-1])]
    if step_weights:
        v = scaled(step_weights[-1], v)
    of_rates: list[Params] = []
    for j in reversed(range(len(rates))):
        w_j = path.points[j]
        of_rates.insert(
            0,
            last.stack.each(partial(gradient_of_rates, rates[j]))(path.gradients[j], v)
            if learned(rates[j])
            else {},
        )
        if product is not None:
            curved = (
                path.objectives[j] if losses.hessian is None else objective(losses.hessian[j](w_j))
            )
            v = axpy(-1.0, product(curved, w_j, applied(rates[j], v)), v)
        if on_the_way[j]:
            v = axpy(on_the_way[j], objective(losses.query[j](w_j)).gradient(w_j), v)
    return MetaGradient(v, query_loss, aux, of_rates)


def meta_gradient(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    curvature: CurvatureName = "exact",
    probe_radius: float | None = None,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    sample: Sample | None = None,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
    step_weights: Sequence[float] | None = None,
    encode: Encode | None = None,
    call: Call | None = None,
) -> MetaGradient:
    """Return the mean over tasks of the meta-gradient.

    With :class:`lightning_maml.Episodes` it is the gradient of ``w -> q(w_N(w))`` (Ji et al. 2022,
    Algorithm 2). With :class:`lightning_maml.ResampledEpisodes` it is the estimate of Algorithm 1,
    whose Hessian batches are not those of the inner steps: autograd through the inner loop would
    give something else, unless D_j = S_j.

    Args:
        loss: ``loss(params, x, y)``, the mean loss of one task's batch as a scalar tensor; or a
            sequence of such for ``w_0 .. w_N``.
        params: The meta-parameters by name. They are not changed, and need not require gradients.
        episodes: The meta-batch of T tasks, of either case.
        inner_lr: alpha, the rate of the inner steps; or a dict by name with the rates of the
            parameters that adapt, each a number or a tensor that broadcasts to its parameter; or a
            sequence of such dicts, one per step, the last for all further steps. Tensors get a
            gradient.
        steps: N >= 0, the number of inner steps; 0 gives the ordinary gradient of the query loss.
            ``ResampledEpisodes`` must hold batches for N steps.
        curvature: ``"exact"`` (MAML), ``"none"`` (FO-MAML) or ``"finite_difference"`` (HF-MAML).
        probe_radius: See :func:`lightning_maml.core.hvp.finite_difference`; only with that
            curvature.
        query_loss: ``query_loss(params, task)``, if the query loss is not
            ``loss(params, task.query_x, task.query_y)``; or a sequence.
        has_aux: The losses return ``(loss, aux)``; the query's aux is returned.
        sample: ``sample(params, x, y)``, if the data depend on the parameters, as in reinforcement
            learning (Ji et al. 2022, Appendix A.1): called once per batch at the point where it is
            used (w_j for S_j and D_j, w_N for the query batch), it returns what ``loss`` gets as
            ``x`` and ``y``. Give ``ResampledEpisodes`` noise as ``x``, and a ``loss`` that weights
            the samples by their likelihood ratio, so that its derivatives are unbiased.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
            ``"threads"`` needs a ``loss`` that several threads may call at once, which one through
            ``functional_call`` on a shared module is not.
        chunk_size: How many tasks are vectorised together.
        step_weights: Weights of the query losses after steps 1 .. N in what is differentiated (the
            multi-step loss of Antoniou et al. 2019, section 4); by default 0 .. 0, 1. The query
            losses returned are those after step N in any case.
        encode: ``encode(params, task)`` returns the features of a task's support and query inputs,
            which take the place of these inputs. For ``Episodes`` only, and only if what precedes
            the features does not adapt: they are computed once per task.
        call: Calls the function of each chunk; a compiler, for instance.

    Returns:
        The meta-gradient, the query losses ``[T]`` and aux, all detached.

    Raises:
        ValueError: If an argument is out of range, or the tensors of ``episodes`` do not fit each
            other.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    product = hessian_vector_product(curvature, probe_radius)
    if step_weights is not None and len(step_weights) != steps:
        raise ValueError(
            f"Expected `step_weights` to hold {steps} weights, one per inner step, but got "
            f"{len(step_weights)}."
        )
    if isinstance(episodes, ResampledEpisodes):
        _check_batches(episodes, steps, curvature)
    if encode is not None and (
        isinstance(episodes, ResampledEpisodes) or sample is not None or not callable(loss)
    ):
        raise ValueError(
            "Expected `encode` with Episodes, whose features are computed once, and one loss, "
            "but got other data or losses."
        )

    attention = twice_differentiable() if curvature == "exact" else nullcontext()
    with torch.inference_mode(False), attention:
        episodes, params, rates = detached((episodes, params, rates))

        def of_tasks(
            stack: Stack, params: Params, rates: list[Rates], task: AnyEpisodes
        ) -> MetaGradient:
            def at(
                w: Params,
                loss: Loss | Sequence[Loss],
                query_loss: QueryLoss | Sequence[QueryLoss] | None,
            ) -> MetaGradient:
                losses = task_losses(loss, task, steps, query_loss, has_aux, sample, stack)
                return pull_back(
                    losses, partial(Objective, stack=stack), w, rates, product, step_weights
                )

            w = stack.shared(params)
            if encode is None:
                return summed(at(w, loss, query_loss), stack)
            features, back = Objective.pull_back(lambda w: stack.each(encode)(w, task), w)
            result = at(
                w | dict(zip(_FEATURES, features, strict=True)), *_of_features(loss, query_loss)
            )
            through = back(tuple(result.grad[name] for name in _FEATURES))
            return summed(result._replace(grad=axpy(1.0, result.grad, through)), stack)

        def called(task: AnyEpisodes, stack: Stack) -> MetaGradient:
            of_stack = partial(of_tasks, stack)
            result: MetaGradient = (
                of_stack(params, rates, task)
                if call is None
                else call(of_stack, params, rates, task)
            )
            return result

        return mean_over_tasks(called, episodes, tasks, chunk_size)


def _check_batches(episodes: ResampledEpisodes, steps: int, curvature: CurvatureName) -> None:
    check_support_batches(episodes, steps)
    if curvature != "none" and steps > 0 and episodes.hessian_y.shape[2] == 0:
        raise ValueError(
            f"Expected Hessian batches of at least one example with `curvature={curvature!r}` but "
            "got none; draw some (a datamodule's `hessian_shots`), or train FO-MAML, which needs "
            "none."
        )


def _of_features(loss: Any, query_loss: Any) -> tuple[Loss, QueryLoss]:
    """Return the losses with the features, which are among the parameters, in place of the inputs."""
    support, query = _FEATURES

    def of_query(w: Params, task: AnyEpisodes) -> Any:
        return (
            loss(w, w[query], task.query_y)
            if query_loss is None
            else query_loss(w, task._replace(query_x=w[query]))
        )

    return lambda w, x, y: loss(w, w[support], y), of_query


def summed(result: MetaGradient, stack: Stack) -> MetaGradient:
    """Return the result with the tasks' gradients summed."""
    return result._replace(
        grad=stack.sum(result.grad), inner_lr=[stack.sum(of_step) for of_step in result.inner_lr]
    )


def mean_over_tasks(
    of_tasks: Callable[[AnyEpisodes, Stack], MetaGradient],
    episodes: AnyEpisodes,
    tasks: TaskExecution,
    chunk_size: int | None,
) -> MetaGradient:
    """Return the mean of the tasks' gradients, of which ``of_tasks`` returns the sums, with the query losses and aux of each task."""
    totals: list[Params] = []
    rest = []
    for chunk in map_tasks(of_tasks, episodes, tasks=tasks, chunk_size=chunk_size):
        sums = [
            {name: tensor[0] for name, tensor in part.items()}
            for part in (chunk.grad, *chunk.inner_lr)
        ]
        totals = [axpy(1.0, *pair) for pair in zip(sums, totals, strict=True)] if totals else sums
        rest.append((chunk.query_loss, chunk.aux))
    query_losses, aux = cat_chunks(rest)
    count = len(query_losses)
    mean, *of_rates = ({name: tensor / count for name, tensor in total.items()} for total in totals)
    return MetaGradient(mean, query_losses, aux, of_rates)


def surrogate(points: Iterable[Params], gradients: Iterable[Params], query_loss: Tensor) -> Tensor:
    """Return a scalar with the value of the mean query loss and the given gradients, those of the network and of its inner rates.

    In this way Lightning's own backward pass deposits the meta-gradient, and all that depends on it
    (all-reduce, scaling, clipping, accumulation) works.
    """
    pairs = [
        (point[name], gradient[name])
        for point, gradient in zip(points, gradients, strict=True)
        for name in gradient
    ]
    value: Tensor = _WithGradients.apply(
        query_loss.mean(), [gradient for _, gradient in pairs], *(point for point, _ in pairs)
    )
    return value


class _WithGradients(torch.autograd.Function):
    """``_WithGradients.apply(value, gradients, *points)``: the value, with these gradients with respect to the points."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *points: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(g * gradient for gradient in ctx.saved_tensors)
