"""How tasks are run if this is left open: small ones stacked, larger ones one per core, the largest one after the other on all cores."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_maml.episodes import AnyEpisodes, Episodes
from lightning_maml.functional import Params, detached, is_out_of_memory
from lightning_maml.objective import Objective
from lightning_maml.randomness import drops_blocks, is_random, set_torch_random_state, torch_random_state
from lightning_maml.stack import Stack
from lightning_maml.task_map import TaskExecution, check_chunk_size

TasksName = Literal["auto"] | TaskExecution
Result = TypeVar("Result")

STACKED_INPUTS = 2**16
"""Most numbers in the inputs of tasks stacked together on a CPU: with more, layers outgrow its caches (benchmarks/README.md)."""

ADAPTED_INPUTS = 2 * STACKED_INPUTS
"""The same limit for tasks that are only adapted to, by first derivatives, which keep half as much."""

ADAPTED_AT_ONCE = 32
"""Tasks adapted to at once if ``vmap`` is asked for: more are slower on a CPU, because what they need outgrows its caches."""

STACKED_PARAMETERS = 2**22
"""Most numbers in the parameters of tasks stacked together on a CPU; each task has its own parameters."""

FEWEST_STACKED = 4
"""Fewer tasks than this are not worth stacking."""

LARGE_INPUTS = 2**20
"""Fewest numbers in the inputs of a task that alone keeps all CPU cores busy (measured on 2); one per core would need more memory."""


class Execution(NamedTuple):
    """How the tasks of a meta-batch are run, see :func:`lightning_maml.task_map.map_tasks`."""

    tasks: TaskExecution
    chunk_size: int | None


class Executor:
    """Decides how a model's tasks are run: as the user asks or, if that is left open, by the device, the network and the tasks' size.

    Args:
        tasks: See :class:`lightning_maml.MAML`.
        chunk_size: See there.
        compiled: Whether tasks are to be compiled, for which they are stacked.

    Raises:
        ValueError: If ``tasks`` is none of the four, or does not stack tasks that are to be compiled, or if ``chunk_size`` is not positive.
    """

    def __init__(self, tasks: TasksName, chunk_size: int | None, compiled: bool) -> None:
        if tasks not in ("auto", *get_args(TaskExecution)):
            raise ValueError(f"Expected `tasks` to be 'auto', 'loop', 'threads' or 'vmap' but got {tasks!r}.")
        check_chunk_size(chunk_size)
        if compiled and tasks not in ("auto", "vmap"):
            raise ValueError(f"Expected `tasks` to be 'auto' or 'vmap' with `compiled=True` but got {tasks!r}; leave it uncompiled.")
        self.tasks, self.chunk_size = tasks, chunk_size
        self._compiled = compiled
        self._fitting: int | None = None

    def __call__(self, network: nn.Module, device: torch.device, episodes: AnyEpisodes, takes_stacks: Callable[[], bool]) -> Execution:
        """Return how these tasks are run.

        Args:
            network: The network; what it draws at random matters.
            device: Where the network is.
            episodes: The meta-batch.
            takes_stacks: Tells whether the network and its loss can be stacked; called only if stacking is a choice.
        """
        if self._compiled:
            return Execution("vmap", self.chunk_size or self._fitting)
        chunk_size = None if drops_blocks(network) else self.chunk_size
        if self.tasks != "auto":
            return Execution(self.tasks, chunk_size)
        if device.type != "cpu" and not drops_blocks(network):
            left_open = chunk_size is None and not is_random(network)
            return Execution("loop", None) if left_open and not takes_stacks() else Execution("vmap", chunk_size or self._fitting)
        if is_random(network):
            return Execution("loop", chunk_size)
        if chunk_size is not None:
            return Execution(_one_by_one(-(-len(episodes.support_x) // chunk_size)), chunk_size)
        return for_cpu(episodes, sum(p.numel() for p in network.parameters()), takes_stacks)

    def of_adaptation(self, network: nn.Module, device: torch.device, support: Episodes) -> Execution:
        """Return how tasks that can be stacked are adapted to; on a CPU this is decided as in training, but from the support sets alone."""
        if self.tasks != "auto" or self.chunk_size is not None or device.type != "cpu":
            return Execution("vmap", self.chunk_size or ADAPTED_AT_ONCE)
        alone = support._replace(query_x=support.query_x[:, :0])
        return for_cpu(alone, sum(p.numel() for p in network.parameters()), lambda: True, ADAPTED_INPUTS)

    def within_memory(self, function: Callable[[AnyEpisodes], Result], episodes: AnyEpisodes, device: torch.device) -> Result:
        """Return ``function(episodes)``; if memory runs out and the number of stacked tasks is left open, retry with half as many.

        Raises:
            torch.OutOfMemoryError: On a CPU, if the number is not left open, or if one task is too many.
        """
        while True:
            try:
                return function(episodes)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                stacked = min(self._fitting or len(episodes.support_x), len(episodes.support_x))
                if self.tasks != "auto" or self.chunk_size is not None or stacked == 1 or device.type == "cpu":
                    fewer = "" if self.tasks == "loop" else "with a smaller `chunk_size`, or tasks='loop', fewer are held at once; "
                    raise torch.OutOfMemoryError(
                        f"Expected memory for {len(episodes.support_x)} tasks but there is not enough (tasks={self.tasks!r}, "
                        f"chunk_size={self.chunk_size}); {fewer}smaller are tasks with fewer `queries`, of FO-MAML, and of precision "
                        "bf16-mixed."
                    ) from error
            self._fitting = stacked // 2
            torch.get_device_module(device).empty_cache()
            rank_zero_info(f"There is no memory for {stacked} tasks at once; from here on {self._fitting} are stacked.")


def for_cpu(episodes: AnyEpisodes, parameters: int, takes_stacks: Callable[[], bool], stacked_inputs: int = STACKED_INPUTS) -> Execution:
    """Return what is fastest on the CPU for tasks of this size.

    A small task is mostly Python, in which threads wait for each other, and kernels that take microseconds: such tasks are stacked, or run
    one after the other if there are only a few. The kernels of larger tasks are slower if tasks are stacked. The largest tasks have tensors
    that a Python thread gets from Linux anew each time, even where the main thread has kept them
    (:func:`lightning_maml.keep_freed_memory`).

    Args:
        episodes: The meta-batch.
        parameters: How many numbers the network's parameters hold.
        takes_stacks: Tells whether the network and its loss can be stacked; called only if they would be.
        stacked_inputs: Most numbers in the inputs of tasks stacked together.
    """
    cores, tasks = torch.get_num_threads(), len(episodes.support_x)
    inputs = max(1, sum(x[0].numel() for x in episodes[::2]))
    fitting = min(stacked_inputs // inputs, STACKED_PARAMETERS // max(1, parameters))
    if fitting >= FEWEST_STACKED > tasks or inputs >= LARGE_INPUTS:
        return Execution("loop", None)
    if fitting < FEWEST_STACKED or not takes_stacks():
        return Execution(_one_by_one(tasks), None)
    if tasks <= fitting:
        return Execution("vmap", None)
    chunks = cores * -(-tasks // (fitting * cores))  # so that no core waits for another
    return Execution(_one_by_one(chunks), max(FEWEST_STACKED, -(-tasks // chunks)))


def _one_by_one(chunks: int) -> TaskExecution:
    """Return the way of running tasks that gives each core a chunk of them; a single chunk gets all cores."""
    return "loop" if chunks == 1 or torch.get_num_threads() == 1 else "threads"


def takes_stacks(loss: Callable[[Params, Any], tuple[Tensor, Any]], params: Params, task: AnyEpisodes) -> bool:
    """Try whether ``loss`` and its gradient can be stacked: ``vmap`` accepts them without looping over tasks, and nothing is random.

    Args:
        loss: ``loss(params, task)`` returns a scalar and something else.
        params: The parameters.
        task: One task.
    """
    stack = Stack(2)
    device = task.support_x.device
    before = torch_random_state(device)
    with torch.inference_mode(False), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            w, task = detached((params, task))
            tasks = type(task)(*(tensor.expand(2, *tensor.shape) for tensor in task))
            Objective(lambda w: stack.each(loss)(w, tasks), stack).gradient(stack.shared(w))
        except Exception:  # noqa: BLE001 # under vmap any network may raise anything; what is wrong without it too is raised there
            return False
        finally:
            # numbers drawn on a GPU do not matter: tasks are stacked there
            is_drawing = not torch.equal(before["torch"], torch.get_rng_state())
            set_torch_random_state(before, device)
    slow = [warning for warning in caught if "batching rule" in str(warning.message) and "as_strided_" not in str(warning.message)]
    return not slow and not is_drawing
