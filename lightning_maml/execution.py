"""How tasks are run where it is left open: small ones stacked, large ones one per core."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml.episodes import AnyEpisodes
from lightning_maml.functional import Params, differentiable
from lightning_maml.objective import Objective
from lightning_maml.stack import Stack
from lightning_maml.task_map import TaskExecution

STACKED_INPUTS = 2**16
"""Numbers in the inputs of the tasks that are stacked on a CPU: with more, what a layer needs outgrows its caches (benchmarks/README.md)."""

STACKED_PARAMETERS = 2**22
"""Numbers in the parameters of the tasks that are stacked on a CPU; each task has its own."""

FEWEST = 4
"""Fewer tasks than these are not worth stacking."""


class Execution(NamedTuple):
    """How the tasks of a meta-batch are run, see :func:`lightning_maml.task_map.map_tasks`."""

    tasks: TaskExecution
    chunk_size: int | None


def for_cpu(episodes: AnyEpisodes, params: Params, takes_stacks: Callable[[], bool]) -> Execution:
    """Return what is fastest on the CPU for tasks of this size.

    A small task is mostly Python, which threads wait for each other in, and kernels that take microseconds: such tasks are stacked. Kernels
    of large ones are slower where tasks are stacked.

    Args:
        episodes: The meta-batch.
        params: The parameters.
        takes_stacks: Whether the network and its loss can be stacked; called where they would be.
    """
    cores, tasks = torch.get_num_threads(), len(episodes.support_x)
    one_by_one = Execution("loop" if cores == 1 else "threads", None)
    inputs = max(1, sum(x[0].numel() for x in episodes[::2]))
    parameters = max(1, sum(tensor.numel() for tensor in params.values()))
    fitting = min(STACKED_INPUTS // inputs, STACKED_PARAMETERS // parameters)
    if min(tasks, fitting) < FEWEST or not takes_stacks():
        return one_by_one
    if tasks <= fitting:
        return Execution("vmap", None)
    return one_by_one._replace(chunk_size=max(FEWEST, min(fitting, -(-tasks // cores))))


def takes_stacks(loss: Callable[[Params, Tensor, Tensor], tuple[Tensor, Any]], params: Params, x: Tensor, y: Tensor) -> bool:
    """Try whether ``loss`` with its gradient can be stacked: ``vmap`` takes it, without a loop of its own over tasks, and it is not random.

    Args:
        loss: ``loss(params, x, y)`` of one task: a scalar and something else.
        params: The parameters.
        x: Inputs of one task, ``[B, ...]``.
        y: Their labels or targets.
    """
    stack = Stack(2)
    random_state = torch.get_rng_state()
    with torch.inference_mode(False), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            w = {name: differentiable(tensor) for name, tensor in params.items()}
            batch = [differentiable(tensor).expand(2, *tensor.shape) for tensor in (x, y)]
            Objective(lambda w: stack.each(loss)(w, *batch), stack).gradient(stack.shared(w))
        except Exception:  # noqa: BLE001 # where it cannot run at all, it says so when it is run
            return False
        finally:
            is_random = not torch.equal(random_state, torch.get_rng_state())
            torch.set_rng_state(random_state)
    slow = [warning for warning in caught if "batching rule" in str(warning.message) and "as_strided_" not in str(warning.message)]
    return not slow and not is_random
