"""Maps a function of one task over the tasks of a meta-batch: one after the other, one per thread, or vectorised."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_maml.episodes import AnyEpisodes

TaskExecution = Literal["loop", "threads", "vmap"]


def map_tasks(
    function: Callable[[Any], Any], episodes: AnyEpisodes, *, tasks: TaskExecution, chunk_size: int | None = None
) -> Iterator[Any]:
    """Yield ``function``'s results for all tasks in their order, a chunk of tasks at a time with a leading task dimension.

    Args:
        function: Takes one task (the same type as ``episodes`` without the leading ``T``) and returns tensors in tuples and dicts.
        episodes: The meta-batch.
        tasks: ``"loop"``; ``"threads"``: one task per CPU core, each on one core, so ``function`` must be safe to call from
            several threads and must not draw random numbers; ``"vmap"``: ``torch.func.vmap`` over chunks.
        chunk_size: Tasks vectorised at once by ``"vmap"``; all of them by default.

    Raises:
        ValueError: If ``tasks`` is none of the three, or ``chunk_size`` is not positive.
        RuntimeError: If ``function`` drew random numbers in threads.
    """
    check_chunk_size(chunk_size)
    function = _in_the_callers_modes(function, episodes.support_x.device.type)
    if tasks == "loop":
        yield from map(_as_chunk, map(function, _each(episodes)))
    elif tasks == "threads":
        yield from map(_as_chunk, _in_threads(function, episodes))
    elif tasks == "vmap":
        size = chunk_size or len(episodes.support_x)
        for chunk in zip(*(torch.split(tensor, size) for tensor in episodes), strict=True):
            yield torch.func.vmap(function, randomness="different")(type(episodes)(*chunk))
    else:
        raise ValueError(f"Expected `tasks` to be 'loop', 'threads' or 'vmap' but got {tasks!r}.")


def check_chunk_size(chunk_size: int | None) -> None:
    """Check the number of tasks vectorised at once.

    Raises:
        ValueError: If it is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"Expected `chunk_size` to be at least 1 but got {chunk_size}.")


def _each(episodes: AnyEpisodes) -> Iterator[AnyEpisodes]:
    return (type(episodes)(*task) for task in zip(*episodes, strict=True))


def _as_chunk(result: Any) -> Any:
    return tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, result)


def _in_the_callers_modes(function: Callable[[Any], Any], device: str) -> Callable[[Any], Any]:
    """Return ``function`` under the caller's grad mode and autocast, which threads do not inherit.

    Autocast goes without its cache, which would keep every inner step's parameters until the caller leaves it.
    """
    grad = torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(task: AnyEpisodes) -> Any:
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype, enabled=autocast, cache_enabled=False):
            return function(task)

    return run


def _in_threads(function: Callable[[Any], Any], episodes: AnyEpisodes) -> Iterator[Any]:
    """Run one task per core.

    The caller's own thread is held to one core as well: it works on the results meanwhile, and its idle helper threads would spin on
    the cores that the tasks need.
    """
    random_state = torch.get_rng_state()
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, _each(episodes))
    finally:
        torch.set_num_threads(cores)
    if not torch.equal(random_state, torch.get_rng_state()):
        raise RuntimeError(
            "Expected a loss that draws no random numbers with `tasks='threads'` but its random state moved, and threads share one "
            "random generator; use tasks='loop'."
        )
