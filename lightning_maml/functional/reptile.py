"""Reptile: towards the adapted parameters, without a query gradient (Nichol et al. 2018)."""

from collections.abc import Sequence

import torch

from lightning_maml.batches.episodes import AnyEpisodes, check_episodes
from lightning_maml.batches.trees import detached
from lightning_maml.core.inner_loop import adapt
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import InnerRates, rates_of_steps
from lightning_maml.core.meta_gradient import TaskGradient
from lightning_maml.core.params import Params, subtract
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.execution.task_map import TaskExecution
from lightning_maml.functional.arguments import check_step_count, check_support_batches
from lightning_maml.functional.losses import Loss, LossFunctions, QueryLoss
from lightning_maml.functional.meta_gradient import MetaGradient, mean_over_tasks


def reptile_gradient(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    inner_optimizer: InnerOptimizer | None = None,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> MetaGradient:
    """Return the mean over tasks of ``w_0 - w_N``.

    A meta-step of rate epsilon is the paper's ``w <- w + epsilon (w_N - w)``.

    The arguments and the query losses are those of :func:`lightning_maml.meta_gradient`; nothing is
    learned from the query losses.
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    check_support_batches(episodes, steps)
    functions = LossFunctions(loss, query_loss, has_aux)

    with torch.inference_mode(False), torch.no_grad():
        episodes, params, rates = detached((episodes, params, rates))

        def of_tasks(task: AnyEpisodes, axis: TaskAxis) -> TaskGradient:
            losses = functions.of_task(task, steps, axis)
            w = axis.expand(params)
            w_N = adapt(losses, w, rates, inner_optimizer)
            value, aux = losses.query[-1].value(w_N)
            return TaskGradient(axis.sum(subtract(w, w_N)), value, aux)

        mean = mean_over_tasks(of_tasks, episodes, tasks, chunk_size)
    return MetaGradient(mean.grad, mean.query_loss, mean.aux, [{}] * steps)
