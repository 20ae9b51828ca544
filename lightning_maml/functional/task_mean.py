"""The mean over the tasks of a meta-batch."""

from collections.abc import Callable

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.meta_gradient import TaskGradient
from lightning_maml.core.params import Params, add
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.execution.task_map import TaskExecution, cat_chunks, map_tasks


def mean_over_tasks(
    of_tasks: Callable[[AnyEpisodes, TaskAxis], TaskGradient],
    episodes: AnyEpisodes,
    tasks: TaskExecution,
    chunk_size: int | None,
) -> TaskGradient:
    """Return the mean of the tasks' gradients, with the query loss and aux of each task.

    Args:
        of_tasks: Returns the sum of some tasks' gradients.
        episodes: The meta-batch.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
        chunk_size: How many tasks are vectorised together.
    """
    total: Params | None = None
    each = []
    for chunk in map_tasks(of_tasks, episodes, tasks=tasks, chunk_size=chunk_size):
        of_chunk = {name: tensor[0] for name, tensor in chunk.grad.items()}
        total = of_chunk if total is None else add(total, of_chunk)
        each.append((chunk.query_loss, chunk.aux))
    assert total is not None, "there is at least one task"
    query_losses, aux = cat_chunks(each)
    count = len(query_losses)
    return TaskGradient({name: tensor / count for name, tensor in total.items()}, query_losses, aux)
