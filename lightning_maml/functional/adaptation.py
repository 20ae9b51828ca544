"""Adaptation to the tasks of a meta-batch: the adapted parameters, and the losses on the way."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.trees import Inputs, detached, map_tensors
from lightning_maml.core.inner_loop import adapt, inner_loop
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import InnerRates, rates_of_steps
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.errors import UserValueError
from lightning_maml.execution.task_map import TaskExecution, cat_chunks, map_tasks
from lightning_maml.functional.arguments import check_step_count
from lightning_maml.functional.losses import Loss, LossFunctions, QueryLoss, Sample


class AdaptationCurve(NamedTuple):
    """Results on the query sets over the course of adaptation.

    Attributes:
        loss: Query loss after 0 .. N steps, ``[T, N + 1]``.
        aux: What the loss function returned besides the loss, each tensor ``[T, N + 1, ...]``;
            empty without ``has_aux``.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> curve = MAML(MLP(4, 3), test_steps=2).evaluate(Episodes(x, y, x, y))
        >>> curve.loss.shape, curve.aux.shape  # after 0, 1 and 2 steps
        (torch.Size([2, 3]), torch.Size([2, 3, 6, 3]))
    """

    loss: Tensor
    aux: Any


def adaptation_curve(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    inner_optimizer: InnerOptimizer | None = None,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    sample: Sample | None = None,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> AdaptationCurve:
    """Adapt to each task, and evaluate its query set at every point ``w_0 .. w_N`` of the path.

    Works in any grad mode, inference mode included. Takes the arguments of
    :func:`lightning_maml.meta_gradient`; of ``ResampledEpisodes`` the first ``steps`` support
    batches are used.

    Returns:
        The query losses, ``[T, N + 1]``, and aux.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes, adaptation_curve
        >>> x, y = torch.ones(2, 3, 1), torch.ones(2, 3, 1)  # two tasks of three examples
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean()
        >>> adaptation_curve(
        ...     loss, {"w": torch.zeros(())}, Episodes(x, y, x, y), inner_lr=0.25, steps=2
        ... ).loss
        tensor([[1.0000, 0.2500, 0.0625],
                [1.0000, 0.2500, 0.0625]])
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    if isinstance(episodes, ResampledEpisodes) and steps > episodes.support_y.shape[1]:
        raise UserValueError(
            f"Expected `steps` to be at most {episodes.support_y.shape[1]}, the support batches of "
            f"a task, but got {steps}."
        )
    functions = LossFunctions(loss, query_loss, has_aux, sample)

    with torch.inference_mode(False), torch.no_grad():
        episodes, params, rates = detached((episodes, params, rates))

        def of_tasks(task: AnyEpisodes, axis: TaskAxis) -> AdaptationCurve:
            losses = functions.of_task(task, steps, axis)
            path, w_N = inner_loop(losses, axis.expand(params), rates, inner_optimizer)
            points = [*(step.w for step in path), w_N]
            found = [query.value(w) for query, w in zip(losses.query, points, strict=True)]
            values, aux = zip(*found, strict=True)
            return AdaptationCurve(
                torch.stack(values, axis.size),
                tree_map(lambda *leaves: torch.stack(leaves, axis.size), *aux),
            )

        chunks = list(map_tasks(of_tasks, episodes, tasks=tasks, chunk_size=chunk_size))
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
    inner_optimizer: InnerOptimizer | None = None,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
    may_draw: bool = True,
) -> Params:
    """Return ``w_N`` of each task, ``[T, ...]``, for the parameters that adapt: those with a rate.

    Args:
        loss: ``loss(params, x, y)``, the mean loss of one task's support set as a scalar tensor, or
            a sequence for ``w_0 .. w_N``.
        params: The meta-parameters.
        support_x: Inputs of the support sets, ``[T, S, ...]``.
        support_y: Their labels or targets, ``[T, S, ...]``.
        inner_lr: As in :func:`lightning_maml.meta_gradient`.
        steps: N.
        inner_optimizer: As there.
        has_aux: The losses return ``(loss, aux)``.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
        chunk_size: How many tasks are vectorised together, see there.
        may_draw: Whether the losses might draw random numbers, see there.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, max(steps, 1))
    check_episodes(Episodes(support_x, support_y, support_x, support_y))
    functions = LossFunctions(loss, has_aux=has_aux)

    with torch.inference_mode(False), torch.no_grad():
        support_x, support_y, params, rates = detached((support_x, support_y, params, rates))
        names = {name: None for of_step in rates for name in of_step}

        def of_tasks(task: Episodes, axis: TaskAxis) -> Params:
            losses = functions.of_task(task, steps, axis)
            w = adapt(losses, axis.expand(params), rates[:steps], inner_optimizer)
            return {name: w[name] for name in names}

        no_queries = map_tensors(lambda tensor: tensor[:, :0], (support_x, support_y))
        support = Episodes(support_x, support_y, *no_queries)
        count = len(support_y)
        adapted = {name: params[name].new_empty(count, *params[name].shape) for name in names}
        done = 0
        chunks = map_tasks(of_tasks, support, tasks=tasks, chunk_size=chunk_size, may_draw=may_draw)
        for chunk in chunks:
            # copied as they come, so that the next chunk can reuse this one's memory
            for name, tensor in chunk.items():
                adapted[name][done : done + len(tensor)] = tensor
            done += len(tensor)
    return adapted
