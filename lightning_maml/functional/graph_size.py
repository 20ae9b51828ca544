"""How much memory the graphs take that :func:`lightning_maml.meta_gradient` may keep."""

from collections.abc import Sequence

import torch

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import detached, tensors
from lightning_maml.core.objective import twice_differentiable
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.execution.graphs import bytes_of_graph
from lightning_maml.execution.task_map import TaskExecution, split
from lightning_maml.functional.losses import Loss, LossFunctions


def graph_bytes(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    tasks: TaskExecution,
    chunk_size: int | None,
    has_aux: bool = False,
) -> int:
    """Return the bytes that the graphs of one inner step take, of all tasks that run at once.

    They are measured at the first chunk of tasks; what is drawn meanwhile is drawn again. The
    arguments are those of :func:`lightning_maml.meta_gradient`.
    """
    device = episodes.support_y.device
    states = generator_states(device)
    with torch.inference_mode(False), twice_differentiable():
        chunks = split(detached(episodes), tasks, chunk_size)
        task, axis = chunks.tasks[0], chunks.axes[0]
        w = axis.expand(detached(params))
        first = loss if callable(loss) else loss[0]
        objective = LossFunctions(first, has_aux=has_aux).of_task(task, 1, axis).support[0]
        known = [*w.values(), *tensors(task)]
        size = bytes_of_graph(lambda: objective.hessian(w), known)
    set_generator_states(states, device)
    at_once = min(torch.get_num_threads(), len(chunks.tasks)) if tasks == "threads" else 1
    return size * at_once
