"""Map a per-task function over a meta-batch: one task at a time, one per thread, or all at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.batches.episodes import AnyEpisodes, first_task
from lightning_maml.batches.trees import map_tensors
from lightning_maml.core.rng import generators_drawn_from, torch_random_state
from lightning_maml.core.task_axis import SINGLE_TASK, TaskAxis
from lightning_maml.errors import UserRuntimeError, UserValueError

TaskExecution = Literal["loop", "threads", "vmap"]

Map = Callable[[Callable[..., Any], Iterable[Any], Iterable[Any]], Iterator[Any]]
"""Like the builtin ``map``."""


class RandomInThreadsError(UserRuntimeError):
    """Tasks that ran in threads drew random numbers."""


class Chunks(NamedTuple):
    """Parts of a meta-batch that are computed one after the other, or one per thread.

    Attributes:
        tasks: Single tasks, without the leading ``T``; or several tasks each.
        axes: The task axis of each part.
    """

    tasks: list[Any]
    axes: list[TaskAxis]


def map_tasks(
    function: Callable[[Any, TaskAxis], Any],
    episodes: AnyEpisodes,
    *,
    tasks: TaskExecution,
    chunk_size: int | None = None,
    may_draw: bool = True,
) -> Iterator[Any]:
    """Yield a function's results for all tasks in their order, a chunk of tasks at a time.

    Args:
        function: Takes one task (the same type as ``episodes`` without the leading ``T``) and
            :data:`lightning_maml.core.task_axis.SINGLE_TASK`, or several tasks and their axis. It
            returns tensors in tuples and dicts, those of several tasks with the tasks in front.
        episodes: The meta-batch.
        tasks: ``"loop"``: one after the other; ``"threads"``: one for each CPU core, each on one
            core, so ``function`` must be safe to call from several threads and must not draw random
            numbers; ``"vmap"``: all as one.
        chunk_size: How many tasks are vectorised together in any of the three; by default 1, with
            ``"vmap"`` all.
        may_draw: Whether ``function`` might draw random numbers. If so, threads check that it does
            not; other code that draws meanwhile is mistaken for it.

    Yields:
        What ``function`` returns, with a leading task dimension for single tasks too.

    Raises:
        ValueError: If ``tasks`` is none of the three, or ``chunk_size`` is not positive.
        RuntimeError: If ``function`` drew random numbers in threads.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.execution.task_map import map_tasks
        >>> x, y = torch.arange(3.0)[:, None, None], torch.zeros(3, 1, dtype=torch.long)
        >>> def query_sum(task, axis):
        ...     return axis.vmap(torch.sum)(task.query_x)
        >>> list(map_tasks(query_sum, Episodes(x, y, x, y), tasks="loop"))
        [tensor([0.]), tensor([1.]), tensor([2.])]
        >>> list(map_tasks(query_sum, Episodes(x, y, x, y), tasks="vmap"))
        [tensor([0., 1., 2.])]
    """
    chunks = split(episodes, tasks, chunk_size)
    run = mapper(tasks, episodes.support_y.device, may_draw=may_draw)
    for axis, found in zip(chunks.axes, run(function, *chunks), strict=True):
        yield with_task_dimension(found, axis)


def split(episodes: AnyEpisodes, tasks: TaskExecution, chunk_size: int | None) -> Chunks:
    """Split a meta-batch into what is computed at once; takes what :func:`map_tasks` takes."""
    check_chunk_size(chunk_size)
    if tasks not in get_args(TaskExecution):
        raise UserValueError(
            f"Expected `tasks` to be 'loop', 'threads' or 'vmap' but got {tasks!r}."
        )
    stacked = are_stacked(tasks, chunk_size)
    count = len(episodes.support_y)
    size = chunk_size or (count if stacked else 1)
    parts = [episodes]
    if size < count:
        parts = [
            map_tensors(lambda tensor, start=start: tensor[start : start + size], episodes)
            for start in range(0, count, size)
        ]
    if stacked:
        return Chunks(parts, [TaskAxis(len(part.support_y)) for part in parts])
    return Chunks([first_task(part) for part in parts], [SINGLE_TASK] * len(parts))


def mapper(tasks: TaskExecution, device: torch.device, *, may_draw: bool = True) -> Map:
    """Return a function like the builtin ``map`` that runs as ``tasks`` says.

    Autocast runs without its cache, which would keep every inner step's parameters until the caller
    leaves it. The other arguments are those of :func:`map_tasks`.
    """
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    grad = torch.is_grad_enabled()

    def autocast() -> torch.autocast:
        return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)

    def one_by_one(function: Callable[..., Any], *inputs: Iterable[Any]) -> Iterator[Any]:
        return map(autocast()(function), *inputs)

    def in_threads(function: Callable[..., Any], *inputs: Iterable[Any]) -> Iterator[Any]:
        def in_the_callers_modes(*arguments: Any) -> Any:
            with torch.set_grad_enabled(grad), autocast():
                return function(*arguments)

        def in_the_callers_context(*arguments: Any) -> Any:  # which threads do not inherit
            return context.copy().run(in_the_callers_modes, *arguments)

        context = copy_context()
        return _in_threads(in_the_callers_context, inputs, device, may_draw)

    return in_threads if tasks == "threads" else one_by_one


def _in_threads(
    function: Callable[..., Any],
    inputs: Sequence[Iterable[Any]],
    device: torch.device,
    may_draw: bool,
) -> Iterator[Any]:
    """Run one chunk per core.

    The caller's own thread is held to one core as well: it works on the results meanwhile, and its
    idle helper threads would spin on the cores that the tasks need.
    """
    # not numpy's and Python's, which other threads of the process may use; the checks of the first
    # batch know networks that draw from them
    before = torch_random_state(device)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, *inputs)
    finally:
        torch.set_num_threads(cores)
    if may_draw and (drawn_from := generators_drawn_from(before, device)):
        raise RandomInThreadsError(
            "Expected a network and a loss that draw no random numbers with `tasks='threads'` but "
            f"the random state of {' and '.join(drawn_from)} moved, and threads share one random "
            "generator; use tasks='loop'."
        )


def with_task_dimension(found: Any, axis: TaskAxis) -> Any:
    """Return the results of a chunk with the task dimension in front, which single tasks lack."""
    if axis.size:
        return found
    return tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, found)


def cat_chunks(chunks: Sequence[Any]) -> Any:
    """Join the chunks that :func:`map_tasks` yields along their task dimension."""
    if len(chunks) == 1:
        return chunks[0]
    return tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *chunks
    )


def are_stacked(tasks: TaskExecution, chunk_size: int | None) -> bool:
    """Return whether several tasks are computed as one, with networks called under ``vmap``."""
    return tasks == "vmap" or (chunk_size or 1) > 1


def check_chunk_size(chunk_size: int | None) -> None:
    """Check the number of tasks vectorised at once.

    Raises:
        ValueError: If it is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise UserValueError(f"Expected `chunk_size` to be at least 1 but got {chunk_size}.")
