"""Maps a function of one task, or of several as one, over a meta-batch: one after the other, one per thread, or all at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.batches.episodes import AnyEpisodes, first_task
from lightning_maml.batches.trees import map_tensors
from lightning_maml.core.rng import generators_drawn_from, torch_random_state
from lightning_maml.core.task_axis import SINGLE_TASK, TaskAxis

TaskExecution = Literal["loop", "threads", "vmap"]


class RandomInThreadsError(RuntimeError):
    """Tasks that ran in threads drew random numbers."""


def map_tasks(
    function: Callable[[Any, TaskAxis], Any],
    episodes: AnyEpisodes,
    *,
    tasks: TaskExecution,
    chunk_size: int | None = None,
    may_draw: bool = True,
) -> Iterator[Any]:
    """Yield ``function``'s results for all tasks in their order, a chunk of tasks at a time with a leading task dimension.

    Args:
        function: Takes one task (the same type as ``episodes`` without the leading ``T``) and
            :data:`lightning_maml.core.task_axis.SINGLE_TASK`, or a chunk of tasks and what they are stacked
            as; it returns tensors in tuples and dicts, those of a chunk with its tasks in front.
        episodes: The meta-batch.
        tasks: ``"loop"``: one after the other; ``"threads"``: one for each CPU core, each on one
            core, so ``function`` must be safe to call from several threads and must not draw random
            numbers; ``"vmap"``: all as one.
        chunk_size: How many tasks are vectorised together in any of the three; by default 1, with
            ``"vmap"`` all.
        may_draw: Whether ``function`` might draw random numbers. If so, threads check that it does
            not; other code that draws meanwhile is mistaken for it.

    Raises:
        ValueError: If ``tasks`` is none of the three, or ``chunk_size`` is not positive.
        RuntimeError: If ``function`` drew random numbers in threads.
    """
    check_chunk_size(chunk_size)
    if tasks not in get_args(TaskExecution):
        raise ValueError(f"Expected `tasks` to be 'loop', 'threads' or 'vmap' but got {tasks!r}.")
    stacked = are_stacked(tasks, chunk_size)
    size = chunk_size or (len(episodes.support_y) if stacked else 1)
    chunks = [episodes]
    if size < len(episodes.support_y):
        starts = range(0, len(episodes.support_y), size)
        chunks = [
            map_tensors(lambda tensor, start=start: tensor[start : start + size], episodes)
            for start in starts
        ]

    def of_chunk(chunk: AnyEpisodes) -> Any:
        if stacked:
            return function(chunk, TaskAxis(len(chunk.support_y)))
        result = function(first_task(chunk), SINGLE_TASK)
        return tree_map(
            lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, result
        )

    run = _in_the_callers_modes(of_chunk, episodes.support_y.device.type)
    yield from (
        _in_threads(run, chunks, episodes.support_y.device, may_draw)
        if tasks == "threads"
        else map(run, chunks)
    )


def cat_chunks(chunks: Sequence[Any]) -> Any:
    """Join the chunks that :func:`map_tasks` yields along their task dimension."""
    if len(chunks) == 1:
        return chunks[0]
    return tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *chunks
    )


def are_stacked(tasks: TaskExecution, chunk_size: int | None) -> bool:
    """Return whether several tasks are run as one, with networks called under ``vmap``."""
    return tasks == "vmap" or (chunk_size or 1) > 1


def check_chunk_size(chunk_size: int | None) -> None:
    """Check the number of tasks vectorised at once.

    Raises:
        ValueError: If it is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"Expected `chunk_size` to be at least 1 but got {chunk_size}.")


def _in_the_callers_modes(function: Callable[[Any], Any], device: str) -> Callable[[Any], Any]:
    """Return ``function`` under the caller's grad mode and autocast, which threads do not inherit.

    Autocast runs without its cache, which would keep every inner step's parameters until the caller
    leaves it.
    """
    grad = torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(chunk: AnyEpisodes) -> Any:
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(device, dtype, enabled=autocast, cache_enabled=False),
        ):
            return function(chunk)

    return run


def _in_threads(
    function: Callable[[Any], Any],
    chunks: Iterable[AnyEpisodes],
    device: torch.device,
    may_draw: bool,
) -> Iterator[Any]:
    """Run one chunk per core.

    The caller's own thread is held to one core as well: it works on the results meanwhile, and its
    idle helper threads would spin on the cores that the tasks need.
    """
    # not numpy's and Python's, which other threads of the process may use; the first look knows
    # networks that draw from them
    before = torch_random_state(device)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, chunks)
    finally:
        torch.set_num_threads(cores)
    if may_draw and (drawn_from := generators_drawn_from(before, device)):
        raise RandomInThreadsError(
            "Expected a network and a loss that draw no random numbers with `tasks='threads'` "
            f"but the random state of {' and '.join(drawn_from)} moved, and threads share one "
            "random generator; use tasks='loop'."
        )
