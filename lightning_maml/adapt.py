"""The inner loop: gradient descent on a task's support set, from the meta-parameters w_0 to w_N."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.episodes import Episodes, check_episodes
from lightning_maml.functional import Params, axpy, differentiable
from lightning_maml.objective import AutogradObjective, BatchLoss, FunctionalObjective, Objective
from lightning_maml.task_map import TaskExecution, map_tasks

Loss = Callable[[Params, Tensor, Tensor], Any]
"""``loss(params, x, y)`` of one task's batch: a scalar, or with ``has_aux`` the scalar and anything else worth keeping."""

QueryLoss = Callable[[Params, Episodes], Any]
"""``query_loss(params, task)`` for a query loss that also looks at the support set (batch statistics, say)."""


class AdaptationCurve(NamedTuple):
    """How adaptation goes on the query sets.

    Attributes:
        loss: Query loss after 0 .. N steps, ``[T, N + 1]``.
        aux: What the loss function gave beside it, each tensor ``[T, N + 1, ...]``; empty without ``has_aux``.
    """

    loss: Tensor
    aux: Any


def inner_path(support: Sequence[Objective], w: Params, inner_lr: float, *, keep_last_graph: bool = False) -> list[Params]:
    """Return ``w_0 .. w_N`` with ``w_{j+1} = w_j - alpha grad l(w_j; S_j)`` (Ji et al. 2022, eqs. 9 and 11; Fallah et al. 2020, eq. 4).

    Args:
        support: One objective per step; in the finite-sum case all of the same support set.
        w: The meta-parameters ``w_0``.
        inner_lr: alpha.
        keep_last_graph: Keep the last gradient's graph for a Hessian-vector product at ``w_{N-1}``.
    """
    path = [w]
    for j, objective in enumerate(support):
        gradient = objective.gradient(path[j], keep_graph=keep_last_graph and j == len(support) - 1)
        path.append(axpy(-inner_lr, gradient, path[j]))
    return path


def adaptation_curve(
    loss: Loss,
    params: Params,
    episodes: Episodes,
    *,
    inner_lr: float,
    steps: int,
    query_loss: QueryLoss | None = None,
    has_aux: bool = False,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
) -> AdaptationCurve:
    """Adapt to each task and judge every point ``w_0 .. w_N`` of the way on its query set.

    Works in any grad mode, inference mode included. The arguments are those of :func:`lightning_maml.meta_gradient`.
    """
    check_inner_loop(inner_lr, steps)
    check_episodes(episodes)
    objective = objective_for(tasks)

    with torch.inference_mode(False), torch.no_grad():
        episodes = Episodes(*map(differentiable, episodes))
        params = {name: differentiable(tensor) for name, tensor in params.items()}

        def judge(task: Episodes) -> AdaptationCurve:
            support, query = task_losses(loss, task, query_loss, has_aux)
            path = inner_path([objective(support) for _ in range(steps)], params, inner_lr)
            losses, aux = zip(*(query(w) for w in path), strict=True)
            return AdaptationCurve(torch.stack(losses), tree_map(lambda *leaves: torch.stack(leaves), *aux))

        chunks = list(map_tasks(judge, episodes, tasks=tasks, chunk_size=chunk_size))
    curve: AdaptationCurve = cat_chunks(chunks)
    return curve


def objective_for(tasks: TaskExecution) -> type[Objective]:
    """Return the way to differentiate: under ``vmap`` only ``torch.func`` works, elsewhere autograd is faster."""
    return FunctionalObjective if tasks == "vmap" else AutogradObjective


def task_losses(loss: Loss, task: Episodes, query_loss: QueryLoss | None, has_aux: bool) -> tuple[BatchLoss, BatchLoss]:
    """Return one task's support loss and query loss as functions of the parameters alone."""

    def support(w: Params) -> tuple[Tensor, Any]:
        value = loss(w, task.support_x, task.support_y)
        return (value[0], ()) if has_aux else (value, ())

    def query(w: Params) -> tuple[Tensor, Any]:
        value = loss(w, task.query_x, task.query_y) if query_loss is None else query_loss(w, task)
        return value if has_aux else (value, ())

    return support, query


def cat_chunks(chunks: Sequence[Any]) -> Any:
    """Join the chunks that :func:`lightning_maml.task_map.map_tasks` yields along their task dimension."""
    return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *chunks)


def check_inner_loop(inner_lr: float, steps: int, name: str = "steps") -> None:
    """Check the inner rate and the number of steps.

    Raises:
        ValueError: If the rate is negative or not finite, or the number of steps is negative.
    """
    if not 0 <= inner_lr < float("inf"):
        raise ValueError(f"Expected `inner_lr` to be a finite number of at least 0 but got {inner_lr}.")
    if steps < 0:
        raise ValueError(f"Expected `{name}` to be at least 0 but got {steps}.")
