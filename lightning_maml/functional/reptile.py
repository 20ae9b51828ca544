"""Reptile: towards the adapted parameters, without a query gradient (Nichol et al. 2018)."""

from collections.abc import Sequence
from functools import partial

import torch

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, check_episodes
from lightning_maml.core.inner_rates import InnerRates, rates_of_steps
from lightning_maml.core.objective import Objective
from lightning_maml.core.params import Params, axpy, detached
from lightning_maml.core.task_axis import Stack
from lightning_maml.execution.task_map import TaskExecution
from lightning_maml.functional.adaptation import (
    Loss,
    QueryLoss,
    check_step_count,
    check_support_batches,
    end_of_path,
    task_losses,
)
from lightning_maml.functional.meta_gradient import MetaGradient, mean_over_tasks


def reptile_gradient(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> MetaGradient:
    """Return the mean over tasks of ``w_0 - w_N``: a meta-step of rate epsilon is the paper's ``w <- w + epsilon (w_N - w)``.

    The arguments and the query losses are those of :func:`lightning_maml.meta_gradient`; nothing is
    learned from the query losses.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    if isinstance(episodes, ResampledEpisodes):
        check_support_batches(episodes, steps)

    with torch.inference_mode(False), torch.no_grad():
        episodes, params, rates = detached((episodes, params, rates))

        def of_tasks(task: AnyEpisodes, stack: Stack) -> MetaGradient:
            losses = task_losses(loss, task, steps, query_loss, has_aux, None, stack)
            w_N = end_of_path(
                losses.support, partial(Objective, stack=stack), stack.shared(params), rates
            )
            value, aux = losses.query[-1](w_N)(w_N)
            return MetaGradient(
                stack.sum(axpy(-1.0, w_N, stack.shared(params))), value, aux, [{}] * steps
            )

        return mean_over_tasks(of_tasks, episodes, tasks, chunk_size)
