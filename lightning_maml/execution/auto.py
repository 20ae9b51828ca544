"""How tasks are run if this is left open: small ones stacked, larger ones one per core, the largest one after the other on all cores."""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_maml.batches.episodes import AnyEpisodes, Episodes
from lightning_maml.batches.trees import map_tensors, tensors
from lightning_maml.core.rng import drops_blocks
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.execution.task_map import (
    RandomInThreadsError,
    TaskExecution,
    are_stacked,
    check_chunk_size,
)
from lightning_maml.networks.functional_network import caches_parametrizations
from lightning_maml.networks.stacking_trial import Verdict

TasksName = Literal["auto"] | TaskExecution
Result = TypeVar("Result")

STACKED_INPUTS = 2**16
"""Most numbers in the inputs of tasks stacked together on a CPU: with more, layers outgrow its
caches (benchmarks/README.md)."""

ADAPTED_INPUTS = 2 * STACKED_INPUTS
"""The same limit for tasks that are only adapted to, by first derivatives, which keep half as
much."""

ADAPTED_AT_ONCE = 32
"""Tasks adapted to at once if ``vmap`` is asked for: more are slower on a CPU, because what they
need outgrows its caches."""

STACKED_PARAMETERS = 2**22
"""Most numbers in the parameters of tasks stacked together on a CPU; each task has its own
parameters."""

FEWEST_STACKED = 4
"""Fewer tasks than this are not worth stacking."""

LARGE_INPUTS = 2**20
"""Fewest numbers in the inputs of a task that alone keeps all CPU cores busy (measured on 2); one
per core would need more memory."""


class Execution(NamedTuple):
    """How the tasks of a meta-batch are run, see :func:`lightning_maml.execution.task_map.map_tasks`."""

    tasks: TaskExecution
    chunk_size: int | None


class Executor:
    """Decides how a model's tasks are run: as the user asks or, if that is left open, by the device, the network and the tasks' size.

    Args:
        tasks: See :class:`lightning_maml.MAML`.
        chunk_size: See there.
        compiled: Whether tasks are to be compiled, for which they are stacked.

    Raises:
        ValueError: If ``tasks`` is none of the four, or does not stack tasks that are to be
            compiled, or if ``chunk_size`` is not positive.
    """

    def __init__(self, tasks: TasksName, chunk_size: int | None, compiled: bool) -> None:
        if tasks not in ("auto", *get_args(TaskExecution)):
            raise ValueError(
                f"Expected `tasks` to be 'auto', 'loop', 'threads' or 'vmap' but got {tasks!r}."
            )
        check_chunk_size(chunk_size)
        if compiled and tasks not in ("auto", "vmap"):
            raise ValueError(
                f"Expected `tasks` to be 'auto' or 'vmap' with `compiled=True` but got {tasks!r}; "
                "leave it uncompiled."
            )
        self.tasks, self.chunk_size = tasks, chunk_size
        self._compiled = compiled
        self._fitting: int | None = None
        self._drew_in_threads = False

    def __call__(
        self,
        network: nn.Module,
        device: torch.device,
        episodes: AnyEpisodes,
        draws: Collection[str],
        stacking: Callable[[], Verdict],
    ) -> Execution:
        """Return how these tasks are run.

        Args:
            network: The network.
            device: Where the network is.
            episodes: The meta-batch.
            draws: Names of the random generators that the network draws from.
            stacking: Tells whether the network and its loss can be stacked; called only if stacking
                is a choice.

        Raises:
            ValueError: If the user asked for stacked tasks, and they would give other numbers than
                single ones.
            RuntimeError: If the user asked for threads, and the network draws random numbers.
        """
        if not self.is_open():
            execution = self._as_asked(network, device, episodes, draws)
            if are_stacked(*execution):
                self.check_stacking(stacking())
            return execution
        if drops_blocks(network) or self._drew_in_threads:
            return Execution("loop", None)
        if device.type != "cpu":
            return Execution("loop", None) if any(stacking()) else Execution("vmap", self._fitting)
        if draws or caches_parametrizations(network):
            return Execution("loop", None)
        return for_cpu(
            episodes, sum(p.numel() for p in network.parameters()), lambda: not any(stacking())
        )

    def is_open(self) -> bool:
        """Return whether the user left it open how tasks are run."""
        return self.tasks == "auto" and self.chunk_size is None and not self._compiled

    def check_stacking(self, verdict: Verdict) -> None:
        """Check that tasks which are stacked because the user asked for it give the right numbers.

        Raises:
            ValueError: If they do not.
        """
        if not verdict.wrong:
            return
        asked = f"tasks={self.tasks!r}" if self.tasks == "vmap" else f"chunk_size={self.chunk_size}"
        raise ValueError(
            "Expected a network and a loss whose tasks can be stacked with "
            f"`{'compiled=True' if self._compiled else asked}` but {verdict.wrong}; use "
            "tasks='loop' without `chunk_size` and `compiled`."
        )

    def _as_asked(
        self,
        network: nn.Module,
        device: torch.device,
        episodes: AnyEpisodes,
        draws: Collection[str],
    ) -> Execution:
        if self._compiled:
            return Execution("vmap", self.chunk_size or self._fitting)
        chunk_size = None if drops_blocks(network) else self.chunk_size
        if self.tasks == "threads" and draws:
            raise RandomInThreadsError(
                "Expected a network and a loss that draw no random numbers with "
                f"`tasks='threads'` but they draw from {' and '.join(draws)}, and threads share "
                "one random generator; use tasks='loop'."
            )
        if self.tasks == "threads" and caches_parametrizations(network):
            raise ValueError(
                "Expected a network that threads do not meet in with `tasks='threads'` but it "
                "uses torch.nn.utils.parametrize.cached, a cache that they share; use "
                "tasks='loop', or leave the cache out."
            )
        if self.tasks != "auto":
            return Execution(self.tasks, chunk_size)
        if chunk_size is None:
            return Execution("loop", None)
        if device.type != "cpu":
            return Execution("vmap", chunk_size)
        if draws or self._drew_in_threads or caches_parametrizations(network):
            return Execution("loop", chunk_size)
        return Execution(_one_by_one(-(-len(episodes.support_y) // chunk_size)), chunk_size)

    def of_adaptation(
        self, network: nn.Module, device: torch.device, support: Episodes
    ) -> Execution:
        """Return how tasks that can be stacked are adapted to; on a CPU this is decided as in training, but from the support sets alone."""
        if self.tasks != "auto" or self.chunk_size is not None or device.type != "cpu":
            return Execution("vmap", self.chunk_size or ADAPTED_AT_ONCE)
        alone = support._replace(query_x=map_tensors(lambda tensor: tensor[:, :0], support.query_x))
        return for_cpu(
            alone, sum(p.numel() for p in network.parameters()), lambda: True, ADAPTED_INPUTS
        )

    def within_memory(
        self, function: Callable[[AnyEpisodes], Result], episodes: AnyEpisodes, device: torch.device
    ) -> Result:
        """Return ``function(episodes)``, and try again in another way if that is left open.

        If memory runs out, half as many tasks are stacked; if tasks in threads drew random numbers,
        they are run in a loop.

        Raises:
            RuntimeError: If tasks drew random numbers in threads that the user asked for.
            torch.OutOfMemoryError: On a CPU, if the number is not left open, or if one task is too
                many.
        """
        while True:
            before = torch.get_rng_state()
            try:
                return function(episodes)
            except RandomInThreadsError:
                if self.tasks != "auto":
                    raise
                torch.set_rng_state(before)
                self._drew_in_threads = True
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                stacked = min(self._fitting or len(episodes.support_y), len(episodes.support_y))
                if (
                    self.tasks != "auto"
                    or self.chunk_size is not None
                    or stacked == 1
                    or device.type == "cpu"
                ):
                    fewer = (
                        ""
                        if self.tasks == "loop"
                        else "with a smaller `chunk_size`, or tasks='loop', fewer are held at "
                        "once; "
                    )
                    raise torch.OutOfMemoryError(
                        f"Expected memory for {len(episodes.support_y)} tasks but there is not "
                        f"enough (tasks={self.tasks!r}, chunk_size={self.chunk_size}); "
                        f"{fewer}smaller are tasks with fewer `queries`, of FO-MAML, and of "
                        "precision bf16-mixed."
                    ) from error
            self._fitting = stacked // 2
            torch.get_device_module(device).empty_cache()
            rank_zero_info(
                f"There is no memory for {stacked} tasks at once; from here on {self._fitting} "
                "are stacked."
            )


def for_cpu(
    episodes: AnyEpisodes,
    parameters: int,
    takes_stacks: Callable[[], bool],
    stacked_inputs: int = STACKED_INPUTS,
) -> Execution:
    """Return what is fastest on the CPU for tasks of this size.

    A small task is mostly Python, in which threads wait for each other, and kernels that take
    microseconds: such tasks are stacked, or run one after the other if there are only a few. The
    kernels of larger tasks are slower if tasks are stacked. The largest tasks have tensors that a
    Python thread gets from Linux anew each time, even where the main thread has kept them
    (:func:`lightning_maml.keep_freed_memory`).

    Args:
        episodes: The meta-batch.
        parameters: How many numbers the network's parameters hold.
        takes_stacks: Tells whether the network and its loss can be stacked; called only if they
            would be.
        stacked_inputs: Most numbers in the inputs of tasks stacked together.
    """
    cores, tasks = torch.get_num_threads(), len(episodes.support_y)
    inputs = max(1, sum(tensor[0].numel() for tensor in tensors(episodes[::2])))
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
