"""The inner loop: gradient descent on a task's support set, from the meta-parameters w_0 to w_N."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.trees import Inputs, map_tensors
from lightning_maml.core.inner_rates import InnerRates, Rates, descend, learned, rates_of_steps
from lightning_maml.core.objective import BatchLoss, Objective
from lightning_maml.core.params import Params, detached
from lightning_maml.core.task_axis import ONE, Stack
from lightning_maml.execution.task_map import TaskExecution, map_tasks

Loss = Callable[[Params, Any, Tensor], Any]
"""``loss(params, x, y)`` of one task's batch: a scalar, or with ``has_aux`` the scalar and anything
else worth keeping."""

QueryLoss = Callable[[Params, Any], Any]
"""``query_loss(params, task)`` for a query loss that also looks at the support set (batch
statistics, say)."""

Sample = Callable[[Params, Any, Tensor], tuple[Any, Any]]
"""``sample(params, x, y)`` returns what ``loss`` gets in place of ``x`` and ``y``, if data depend
on the parameters they are drawn at."""

LossAt = Callable[[Params], BatchLoss]
"""Maps parameters to the loss of a batch drawn at them (without ``sample``, to the loss of a batch
that already exists)."""

Differentiate = Callable[[BatchLoss], Objective]
"""Builds the objective of a loss."""


class TaskLosses(NamedTuple):
    """The losses of the batches of one task, or of several stacked tasks.

    Attributes:
        support: S_0 .. S_{N-1}; in the finite-sum case N times the support set.
        hessian: D_0 .. D_{N-1}, or None in the finite-sum case, where the objective of S_j at w_j
            is used again.
        query: The query batch T, as it is evaluated at w_0 .. w_N.
    """

    support: list[LossAt]
    hessian: list[LossAt] | None
    query: list[LossAt]


class AdaptationCurve(NamedTuple):
    """Results on the query sets over the course of adaptation.

    Attributes:
        loss: Query loss after 0 .. N steps, ``[T, N + 1]``.
        aux: What the loss function returned besides the loss, each tensor ``[T, N + 1, ...]``;
            empty without ``has_aux``.
    """

    loss: Tensor
    aux: Any


class InnerPath(NamedTuple):
    """The result of the inner loop.

    Attributes:
        points: w_0 .. w_N.
        objectives: The N objectives that were descended.
        gradients: Their gradients for the steps that have a learned rate, an empty dict for the
            others.
    """

    points: list[Params]
    objectives: list[Objective]
    gradients: list[Params]


def inner_path(
    support: Sequence[LossAt],
    objective: Differentiate,
    w: Params,
    rates: Sequence[Rates],
    *,
    keep_last_graph: bool = False,
) -> InnerPath:
    """Take the steps ``w_{j+1} = w_j - A_j grad l(w_j; S_j)``.

    Ji et al. 2022, eqs. 6 (fresh S_j), 9 and 11 (always the support set); Fallah et al. 2020, eq. 4
    (one step).

    Args:
        support: One batch per step.
        objective: Builds the objective of a loss, which differentiates it.
        w: The meta-parameters ``w_0``.
        rates: A_j for each step.
        keep_last_graph: Keep the last gradient's graph for a Hessian-vector product at ``w_{N-1}``.
    """
    path = InnerPath([w], [], [])
    # allocate all points at once: allocated one by one they would lie between the graphs and leave
    # holes
    kept = [{name: torch.empty_like(w[name]) for name in of_step} for of_step in rates]
    for j, (loss_at, rates_j) in enumerate(zip(support, rates, strict=True)):
        w = path.points[j]
        path.objectives.append(objective(loss_at(w)))
        gradient = path.objectives[j].gradient(
            w, rates_j.keys(), keep_graph=keep_last_graph and j == len(support) - 1
        )
        path.points.append(
            {
                name: kept[j][name].copy_(p) if name in rates_j else p
                for name, p in descend(w, rates_j, gradient).items()
            }
        )
        path.gradients.append(gradient if learned(rates_j) else {})
    return path


def end_of_path(
    support: Sequence[LossAt], objective: Differentiate, w: Params, rates: Sequence[Rates]
) -> Params:
    """Return ``w_N`` alone, keeping no other point."""
    for loss_at, rates_j in zip(support, rates, strict=True):
        w = descend(w, rates_j, objective(loss_at(w)).gradient(w, rates_j.keys()))
    return w


def adaptation_curve(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    sample: Sample | None = None,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> AdaptationCurve:
    """Adapt to each task and evaluate every point ``w_0 .. w_N`` of the path on its query set.

    Works in any grad mode, inference mode included. The arguments are those of
    :func:`lightning_maml.meta_gradient`; sequences of losses have ``steps + 1`` entries, one for
    each point of the path. Of ``ResampledEpisodes`` the first ``steps`` support batches are used.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    if isinstance(episodes, ResampledEpisodes) and steps > episodes.support_y.shape[1]:
        raise ValueError(
            f"Expected `steps` to be at most {episodes.support_y.shape[1]}, the support batches "
            f"of a task, but got {steps}."
        )

    with torch.inference_mode(False), torch.no_grad():
        episodes, params, rates = detached((episodes, params, rates))

        def judge(task: AnyEpisodes, stack: Stack) -> AdaptationCurve:
            losses = task_losses(loss, task, steps, query_loss, has_aux, sample, stack)
            points = inner_path(
                losses.support, partial(Objective, stack=stack), stack.shared(params), rates
            ).points
            values, aux = zip(
                *(query(w)(w) for query, w in zip(losses.query, points, strict=True)), strict=True
            )
            return AdaptationCurve(
                torch.stack(values, stack.dim),
                tree_map(lambda *leaves: torch.stack(leaves, stack.dim), *aux),
            )

        chunks = list(map_tasks(judge, episodes, tasks=tasks, chunk_size=chunk_size))
    curve: AdaptationCurve = cat_chunks(chunks)
    return curve


def adapted_parameters(
    loss: Loss | Sequence[Loss],
    params: Params,
    support_x: Inputs,
    support_y: Tensor,
    *,
    inner_lr: InnerRates,
    steps: int,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
    may_draw: bool = True,
) -> Params:
    """Return ``w_N`` of each task, ``[T, ...]``, for the parameters that adapt, that is, those that have a rate.

    Args:
        loss: ``loss(params, x, y)``, the mean loss of one task's support set as a scalar tensor, or
            a sequence for ``w_0 .. w_N``.
        params: The meta-parameters.
        support_x: Inputs of the support sets, ``[T, S, ...]``.
        support_y: Their labels or targets, ``[T, S, ...]``.
        inner_lr: As in :func:`lightning_maml.meta_gradient`.
        steps: N.
        has_aux: The losses return ``(loss, aux)``.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
        chunk_size: How many tasks are vectorised together, see there.
        may_draw: Whether the losses might draw random numbers, see there.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, max(steps, 1))
    check_episodes(Episodes(support_x, support_y, support_x, support_y))

    with torch.inference_mode(False), torch.no_grad():
        support_x, support_y, params, rates = detached((support_x, support_y, params, rates))
        names = {name: None for of_step in rates for name in of_step}

        def last_point(task: Episodes, stack: Stack) -> Params:
            losses = task_losses(loss, task, steps, None, has_aux, None, stack)
            w = end_of_path(
                losses.support, partial(Objective, stack=stack), stack.shared(params), rates[:steps]
            )
            return {name: w[name] for name in names}

        no_queries = map_tensors(lambda tensor: tensor[:, :0], (support_x, support_y))
        support = Episodes(support_x, support_y, *no_queries)
        adapted = {
            name: params[name].new_empty(len(support_y), *params[name].shape) for name in names
        }
        done = 0
        for chunk in map_tasks(
            last_point, support, tasks=tasks, chunk_size=chunk_size, may_draw=may_draw
        ):
            # copied as they come, so that the next chunk can reuse this one's memory
            for name, tensor in chunk.items():
                adapted[name][done : done + len(tensor)] = tensor
            done += len(tensor)
    return adapted


def task_losses(
    loss: Loss | Sequence[Loss],
    task: AnyEpisodes,
    steps: int,
    query_loss: QueryLoss | Sequence[QueryLoss] | None,
    has_aux: bool,
    sample: Sample | None,
    stack: Stack = ONE,
) -> TaskLosses:
    """Return the losses of a task, or of the tasks of ``stack``, as functions of the parameters alone; sequences are for w_0 .. w_N."""

    def batch(
        x: Any, y: Tensor, value_of: Callable[..., Any], *rest: Any, keep_aux: bool = False
    ) -> LossAt:
        def drawn_at(w: Params) -> BatchLoss:
            drawn = (x, y) if sample is None else stack.each(sample)(w, x, y)

            def batch_loss(params: Params) -> tuple[Tensor, Any]:
                found = stack.each(value_of if keep_aux or not has_aux else first_of(value_of))(
                    params, *drawn, *rest
                )
                value, aux = found if keep_aux and has_aux else (found, ())
                if value.ndim != stack.dim:
                    raise ValueError(
                        "Expected the loss of a task to be a scalar but got shape "
                        f"{list(value.shape[stack.dim :])}; use reduction='mean'."
                    )
                return value, aux

            return batch_loss

        return drawn_at

    def of_query(step: int, params: Params, x: Any, y: Any, task: AnyEpisodes) -> Any:
        of_task = query_losses[step]
        return (
            losses[step](params, x, y)
            if of_task is None
            else of_task(params, task._replace(query_x=x, query_y=y))
        )

    losses = [loss] * (steps + 1) if callable(loss) else list(loss)
    query_losses = (
        [query_loss] * (steps + 1)
        if query_loss is None or callable(query_loss)
        else list(query_loss)
    )
    query = [
        batch(task.query_x, task.query_y, partial(of_query, j), task, keep_aux=True)
        for j in range(steps + 1)
    ]
    if isinstance(task, ResampledEpisodes):
        of_steps = [
            map_tensors(lambda tensor, j=j: tensor.select(stack.dim, j), task[:4])
            for j in range(steps)
        ]
        support = [batch(x, y, losses[j]) for j, (x, y, _, _) in enumerate(of_steps)]
        return TaskLosses(
            support, [batch(x, y, losses[j]) for j, (_, _, x, y) in enumerate(of_steps)], query
        )
    return TaskLosses(
        [batch(task.support_x, task.support_y, losses[j]) for j in range(steps)], None, query
    )


def first_of(function: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Return ``function`` reduced to the first of the two things that it returns."""
    return lambda *arguments: function(*arguments)[0]


def cat_chunks(chunks: Sequence[Any]) -> Any:
    """Join the chunks that :func:`lightning_maml.execution.task_map.map_tasks` yields along their task dimension."""
    if len(chunks) == 1:
        return chunks[0]
    return tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *chunks
    )


def check_step_count(steps: int, name: str = "steps") -> None:
    """Check the number of inner steps.

    Raises:
        ValueError: If it is negative.
    """
    if steps < 0:
        raise ValueError(f"Expected `{name}` to be at least 0 but got {steps}.")


def check_support_batches(episodes: ResampledEpisodes, steps: int) -> None:
    """Check that there is a batch for every inner step.

    Raises:
        ValueError: If there are more or fewer.
    """
    drawn = episodes.support_y.shape[1]
    if drawn != steps:
        raise ValueError(
            f"Expected `episodes` to hold {steps} support batches per task, one per inner step, "
            f"but got {drawn}; give the datamodule the same `train_steps` as the model."
        )
