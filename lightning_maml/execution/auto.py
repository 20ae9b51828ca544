"""How `tasks="auto"` chooses loop, threads or vmap.

Small tasks are stacked, larger ones run one per core, and the largest run one after the other, each
on all cores.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_maml.batches.episodes import AnyEpisodes, Episodes
from lightning_maml.batches.trees import map_tensors, tensors
from lightning_maml.core.rng import drops_blocks, generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.errors import UserOutOfMemoryError, UserValueError
from lightning_maml.execution.task_map import (
    RandomInThreadsError,
    TaskExecution,
    are_stacked,
    check_chunk_size,
)
from lightning_maml.networks.facts import facts_of
from lightning_maml.networks.stacking_trial import Verdict

TasksName = Literal["auto"] | TaskExecution

Cures = Mapping[type[Exception], Callable[[], bool]]
"""What to do about an error before the next attempt. It returns whether it changed anything, and
must run out of changes, as attempts go on until then."""

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
    """How the tasks of a meta-batch are run.

    See :func:`lightning_maml.execution.task_map.map_tasks`.
    """

    tasks: TaskExecution
    chunk_size: int | None


class Executor:
    """Decides how a model's tasks are run.

    The user decides; with ``tasks="auto"`` the device, the network and the size of the tasks do.

    Args:
        tasks: See :class:`lightning_maml.MAML`.
        chunk_size: See there.
        compiled: Whether tasks are to be compiled, for which they are stacked.

    Raises:
        ValueError: If ``tasks`` is none of the four, or does not stack tasks that are to be
            compiled, or if ``chunk_size`` is not positive.

    Examples:
        >>> from lightning_maml.execution.auto import Executor
        >>> Executor("auto", None, compiled=False).is_open()
        True
        >>> Executor("loop", None, compiled=False).is_open()
        False
    """

    def __init__(self, tasks: TasksName, chunk_size: int | None, compiled: bool) -> None:
        if tasks not in ("auto", *get_args(TaskExecution)):
            raise UserValueError(
                f"Expected `tasks` to be 'auto', 'loop', 'threads' or 'vmap' but got {tasks!r}."
            )
        check_chunk_size(chunk_size)
        if compiled and tasks not in ("auto", "vmap"):
            raise UserValueError(
                f"Expected `tasks` to be 'auto' or 'vmap' with `compiled=True` but got {tasks!r}; "
                "leave it uncompiled."
            )
        self.tasks, self.chunk_size = tasks, chunk_size
        self._compiled = compiled
        self._fitting: int | None = None
        self._last: Execution | None = None
        self._drew_in_threads = False
        self._said_apart = False

    def __call__(
        self,
        network: nn.Module,
        device: torch.device,
        episodes: AnyEpisodes,
        draws: Collection[str],
        stacking: Callable[[], Verdict],
        sharing: Callable[[], bool],
    ) -> Execution:
        """Return how these tasks are run.

        Args:
            network: The network.
            device: Where the network is.
            episodes: The meta-batch.
            draws: Names of the random generators that the network and its losses draw from.
            stacking: Tells whether the network and its loss can be stacked; called only if stacking
                is a choice.
            sharing: Tells whether tasks in threads would share what they write to; called only if
                they are to run there.

        Raises:
            ValueError: If the user asked for stacked tasks or for threads, and they would give
                other numbers than single ones in a loop.
            RuntimeError: If the user asked for threads, and the network draws random numbers.
        """
        if self.is_open():
            chosen = self._as_suits(network, device, episodes, draws, stacking)
        else:
            chosen = self._as_asked(network, device, episodes, draws)
            if are_stacked(*chosen):
                self.check_stacking(stacking())
        self._last = self._apart(chosen, sharing)
        return self._last

    def _apart(self, chosen: Execution, sharing: Callable[[], bool]) -> Execution:
        """Return a loop in place of threads that would share what they write to.

        Raises:
            ValueError: If the user asked for threads.
        """
        if chosen.tasks != "threads" or not sharing():
            return chosen
        if self.tasks == "threads":
            raise UserValueError(
                "Expected a network and a loss that write to nothing outside of the network with "
                "`tasks='threads'` but a task gives another loss while another one runs: they "
                "share a container that a hook knows, a global variable, or an attribute of the "
                "loss or of the inner optimizer; use tasks='loop'."
            )
        if not self._said_apart:
            rank_zero_info(
                "Tasks are not run in threads, in which they would share what the network's hooks, "
                "the loss or the inner optimizer write to."
            )
        self._said_apart = True
        return chosen._replace(tasks="loop")

    def _as_suits(
        self,
        network: nn.Module,
        device: torch.device,
        episodes: AnyEpisodes,
        draws: Collection[str],
        stacking: Callable[[], Verdict],
    ) -> Execution:
        if drops_blocks(network) or self._drew_in_threads:
            return Execution("loop", None)
        if device.type != "cpu":
            return Execution("loop", None) if any(stacking()) else Execution("vmap", self._fitting)
        if draws or _keeps_out_threads(network):
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
        raise UserValueError(
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
        if self.tasks == "threads" and facts_of(network).caches_parametrizations:
            raise UserValueError(
                "Expected a network whose copies share nothing with `tasks='threads'` but it uses "
                "torch.nn.utils.parametrize.cached, a cache for all threads; use tasks='loop', or "
                "leave the cache out."
            )
        if self.tasks == "threads" and _a_mode_is_active():
            raise UserValueError(
                "Expected no mode of torch (torch.device or another TorchFunctionMode as a "
                "context, torch.set_default_device) with `tasks='threads'` but one is active, "
                "which threads do not inherit; use tasks='loop', or leave the context."
            )
        if self.tasks != "auto":
            return Execution(self.tasks, chunk_size)
        if chunk_size is None:
            return Execution("loop", None)
        if device.type != "cpu":
            return Execution("vmap", chunk_size)
        if draws or self._drew_in_threads or _keeps_out_threads(network):
            return Execution("loop", chunk_size)
        return Execution(_one_by_one(-(-len(episodes.support_y) // chunk_size)), chunk_size)

    def of_adaptation(
        self,
        network: nn.Module,
        device: torch.device,
        support: Episodes,
        draws: Collection[str],
        sharing: Callable[[], bool],
    ) -> Execution:
        """Return how to adapt to tasks that can be stacked.

        On a CPU this is decided as in training, but from the support sets alone.
        """
        if self.tasks != "auto" or self.chunk_size is not None or device.type != "cpu":
            return Execution("vmap", self.chunk_size or ADAPTED_AT_ONCE)
        if draws or _keeps_out_threads(network):
            return Execution("loop", None)
        alone = support._replace(query_x=map_tensors(lambda tensor: tensor[:, :0], support.query_x))
        chosen = for_cpu(
            alone, sum(p.numel() for p in network.parameters()), lambda: True, ADAPTED_INPUTS
        )
        return self._apart(chosen, sharing)

    def attempts(
        self, count: int, device: torch.device, cures: Cures | None = None
    ) -> Iterator["Attempt"]:
        """Yield contexts to run tasks in, until they come to their end in one.

        If memory runs out on an accelerator, the next attempt stacks half as many tasks; if tasks
        in threads drew random numbers, it runs them in a loop. Decide how tasks are run anew in
        each attempt:

        ``for attempt in executor.attempts(...): with attempt: result = ...``

        Args:
            count: The number of tasks.
            device: Where the network is.
            cures: What to do about other errors before the next attempt.

        Raises:
            RandomInThreadsError: If tasks drew random numbers in threads that the user asked for.
            torch.OutOfMemoryError: On a CPU, if the number is not left open, or if one task is too
                many.
        """
        cures = {RandomInThreadsError: self._stay_out_of_threads, **(cures or {})}
        while True:
            before = generator_states(device)
            attempt = Attempt((*cures,))
            yield attempt
            error = attempt.error
            if error is None:
                return
            out_of_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            found = torch.OutOfMemoryError if out_of_memory else type(error)
            set_generator_states(before, device)
            fitting = [cure for kind, cure in cures.items() if issubclass(found, kind)]
            if not any(cure() for cure in fitting):  # the first that changes something is enough
                if not out_of_memory:
                    raise error
                self._stack_fewer(count, device, error)
            # the error's traceback holds the attempt's tensors, and the attempt is still a variable
            # of whoever made it
            attempt.error = error = None
            if out_of_memory and device.type != "cpu":
                torch.get_device_module(device).empty_cache()

    def _stay_out_of_threads(self) -> bool:
        changes = self.tasks == "auto" and not self._drew_in_threads
        self._drew_in_threads |= changes
        return changes

    def _stack_fewer(self, count: int, device: torch.device, error: BaseException) -> None:
        stacked = min(self._fitting or count, count)
        is_left_open = self.tasks == "auto" and self.chunk_size is None
        is_one_by_one = self._last is not None and not are_stacked(*self._last)
        if not is_left_open or is_one_by_one or stacked == 1 or device.type == "cpu":
            raise self._out_of_memory(count, error) from error
        self._fitting = stacked // 2
        rank_zero_info(
            f"There is no memory for {stacked} tasks at once; from here on {self._fitting} are "
            "stacked."
        )

    def _out_of_memory(self, count: int, error: BaseException) -> UserOutOfMemoryError:
        fewer = "with a smaller `chunk_size`, or tasks='loop', fewer are held at once; "
        # its words, as the error may have another cause, such as a wrong version of cuDNN, and
        # Lightning's batch-size finder looks for them
        said = f" Torch said: {str(error).partition(chr(10))[0]}"
        return UserOutOfMemoryError(
            f"Expected memory for {count} tasks but there is not enough (tasks={self.tasks!r}, "
            f"chunk_size={self.chunk_size}); {'' if self.tasks == 'loop' else fewer}smaller are "
            f"tasks with fewer `queries`, of FO-MAML, and of precision bf16-mixed.{said}"
        )


class Attempt(AbstractContextManager["Attempt"]):
    """A context that keeps an error for which there is a cure, so that another attempt follows.

    Args:
        cured: Types of such errors; running out of memory is one, too.

    Attributes:
        error: The error that it ended with, or None.
    """

    def __init__(self, cured: tuple[type[Exception], ...]) -> None:
        self._cured = cured
        self.error: BaseException | None = None

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        out_of_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        if out_of_memory or isinstance(error, self._cured):
            self.error = error
        return self.error is not None


def for_cpu(
    episodes: AnyEpisodes,
    parameters: int,
    supports_vmap: Callable[[], bool],
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
        supports_vmap: Tells whether the network and its loss can be stacked; called only if they
            would be.
        stacked_inputs: Most numbers in the inputs of tasks stacked together.
    """
    cores, tasks = torch.get_num_threads(), len(episodes.support_y)
    inputs = max(1, sum(tensor[0].numel() for tensor in tensors(episodes[::2])))
    fitting = min(stacked_inputs // inputs, STACKED_PARAMETERS // max(1, parameters))
    if fitting >= FEWEST_STACKED > tasks or inputs >= LARGE_INPUTS:
        return Execution("loop", None)
    if fitting < FEWEST_STACKED or not supports_vmap():
        return Execution(_one_by_one(tasks), None)
    if tasks <= fitting:
        return Execution("vmap", None)
    chunks = cores * -(-tasks // (fitting * cores))  # so that no core waits for another
    return Execution(_one_by_one(chunks), max(FEWEST_STACKED, -(-tasks // chunks)))


def _keeps_out_threads(network: nn.Module) -> bool:
    """Return whether threads that run a network would share a cache of it, or lack a mode."""
    return facts_of(network).caches_parametrizations or _a_mode_is_active()


def _a_mode_is_active() -> bool:
    """Return whether this thread changes what torch's functions do, as other threads would not."""
    return torch._C._len_torch_function_stack() > 0


def _one_by_one(chunks: int) -> TaskExecution:
    """Return how to run chunks: one per core, or a single one on all cores."""
    return "loop" if chunks == 1 or torch.get_num_threads() == 1 else "threads"
