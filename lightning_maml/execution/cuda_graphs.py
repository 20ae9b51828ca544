"""The meta-gradient of batches of one shape as a CUDA graph, whose kernels the host starts at once.

Launched one by one from Python, the small kernels of few-shot tasks take the host longer than the
GPU.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from lightning_maml.batches.trees import map_tensors, tensors
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.precision import precision
from lightning_maml.core.rng import (
    drawing_nothing,
    generator_states,
    generators_drawn_from,
    set_generator_states,
)
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.errors import UserRuntimeError
from lightning_maml.execution.compilation import kind_of_leaf, state_of, tensors_among
from lightning_maml.networks.attributes import NotComparableError, plain_state

CALLS_BEFORE = 2
"""Calls of a kind that run as usual before the next one is captured."""

MOST_GRAPHS = 8
"""Graphs kept at a time, each with memory of its own; then that which was not used longest goes."""

MOST_CAPTURES = 100
"""After so many captures, batches of other kinds run as usual: they may never stop changing."""

MOST_KINDS = 256
"""Kinds of calls that are counted; then counting starts anew."""


def state_read_by(
    network: nn.Module, losses: Sequence[Any], device: torch.device
) -> tuple[Any, ...]:
    """Return all that network and losses may read besides their arguments, to compare.

    Args:
        network: The network.
        losses: Modules, functions or None.
        device: Where they are.

    Raises:
        NotComparableError: If they may read what cannot be compared, such as functions of users.
    """
    states: list[Any] = []
    for part in (network, *losses):
        if isinstance(part, nn.Module):
            states += [state_of(part), plain_state(part, device)]
        elif part is None or _reads_its_arguments_alone(part):
            states.append(part)
        else:
            raise NotComparableError(
                "the loss is a function that may read what changes; make it a module"
            )
    return tuple(states)


def _reads_its_arguments_alone(function: Any) -> bool:
    """Return whether this is a function of torch or of this library, or a partial of one."""
    if isinstance(function, partial):
        plain = all(isinstance(value, int | float | str) for value in function.keywords.values())
        return plain and not function.args and _reads_its_arguments_alone(function.func)
    if isinstance(function, BuiltinFunctionType):
        return True
    is_plain = isinstance(function, FunctionType) and not function.__closure__
    return is_plain and (function.__module__ or "").startswith(("torch.", "lightning_maml."))


class Captured(NamedTuple):
    """A captured call.

    Attributes:
        graph: The CUDA graph.
        inputs: The tensors that it reads, besides those that stay where they are.
        outputs: What it writes.
        arguments: What the call was made of; held, so that the memory that the graph reads stays.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any
    arguments: Any


class CudaGraphs:
    """Runs functions of a meta-batch on a GPU as CUDA graphs, captured after a few calls.

    There is one graph for each kind of call: its numbers, the shapes of its tensors, and where its
    parameters lie. What cannot be captured runs as usual, which is said once: functions that draw
    random numbers, as later passes repeat the draws of the first by setting the generators, which a
    capture forbids; those that fetch a number from the GPU, on which their course depends; and
    those that fail. Copies start without graphs.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_maml.execution.cuda_graphs import CudaGraphs
        >>> graphs = CudaGraphs()
        >>> graphs(partial(torch.add, torch.ones(()), torch.ones(())), setting=())  # on a CPU
        tensor(2.)
    """

    def __init__(self) -> None:
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, Captured] = {}
        self._captures = 0
        self._too_large: set[Hashable] = set()
        self._given_up = False
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type["CudaGraphs"], tuple[()]]:
        return CudaGraphs, ()

    def drop(self) -> bool:
        """Free the graphs, and their memory; return whether there were any."""
        there_were = bool(self._captured)
        self._captured.clear()
        self._calls.clear()
        self._too_large.clear()
        return there_were

    def give_up(self, reason: str) -> None:
        """Run everything as usual from here on."""
        if not self._given_up:
            rank_zero_info(f"The meta-gradient is not run as a CUDA graph: {reason}.")
        self._given_up = True
        self.drop()

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            rank_zero_info(line)
        self._said.add(line)

    def __call__(self, function: partial[Any], setting: Hashable) -> Any:
        """Return ``function()``, by a graph where there is one.

        Args:
            function: A function and all of its arguments by name: ``episodes`` and ``inner_lr``,
                whose tensors may be other ones in each call; ``params``, which are read where they
                lie; functions; and whatever else can be hashed.
            setting: Stands for everything that the functions among the arguments depend on.
        """
        if self._given_up or not _may_be_captured(function.keywords):
            return function()
        with torch.inference_mode(False):
            return self._by_a_graph(function, setting)

    def _by_a_graph(self, function: partial[Any], setting: Hashable) -> Any:
        arguments = function.keywords
        # in plain dicts and lists: torch's trees take subclasses of these for leaves
        plain = {name: map_tensors(_itself, arguments[name]) for name in _CHANGING}
        changing, structure = tree_flatten(plain)
        kind = (
            setting,
            function.func,
            repr(structure),
            *map(kind_of_leaf, changing),
            *_fixed(arguments),
        )
        captured = self._captured.pop(kind, None)
        if captured is None and self._is_due(kind):
            captured = self._capture(kind, function, changing, structure)
        if captured is None:
            return function()
        self._captured[kind] = captured  # the last one used
        return _replayed(captured, tensors_among(changing))

    def _is_due(self, kind: Hashable) -> bool:
        """Count a call; return whether it is to be captured, for which the oldest graph goes."""
        if kind in self._too_large:
            return False
        if len(self._calls) >= MOST_KINDS and kind not in self._calls:
            if not self._captured:
                self._say_once(
                    f"The meta-gradient was not run as a CUDA graph: of {MOST_KINDS} kinds of "
                    f"batches none came {CALLS_BEFORE + 1} times. Shapes, rates or numbers among "
                    "attributes change from step to step."
                )
            self._calls.clear()
        self._calls[kind] += 1
        if self._calls[kind] <= CALLS_BEFORE:
            return False
        if self._captures >= MOST_CAPTURES:
            self._say_once(
                f"Batches of new kinds are not run as CUDA graphs: {MOST_CAPTURES} were captured."
            )
            return False
        self._captures += 1
        if len(self._captured) >= MOST_GRAPHS:
            oldest = next(iter(self._captured))
            del self._captured[oldest], self._calls[oldest]
        return True

    def _capture(
        self, kind: Hashable, function: partial[Any], changing: list[Any], structure: TreeSpec
    ) -> Captured | None:
        try:
            return _captured(function, changing, structure)
        # where only the second derivative fetches a number, it seems that there is none
        except (RuntimeError, NoSecondDerivativeError) as error:
            if any(map(is_out_of_memory, _chain(error))):
                # as usual, the same step may still find room
                self._too_large.add(kind)
                self._say_once(
                    "Batches of one kind are not run as a CUDA graph: there is no memory for it."
                )
            else:
                self.give_up(_reason(error))
        return None


_CHANGING = ("episodes", "inner_lr")
"""Arguments whose tensors are copied to where a graph reads them."""


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those before it: the end of a failed capture fails too."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return chain


def _reason(error: BaseException) -> str:
    """Return what went wrong first, in a line."""
    first = _chain(error)[-1]
    lines = str(first).splitlines() or [type(first).__name__]
    return lines[0].rstrip(".")


def works_on(device: torch.device) -> bool:
    """Return whether there are such graphs on a device."""
    return device.type == "cuda"


def _may_be_captured(arguments: Mapping[str, Any]) -> bool:
    if not all(name in arguments for name in (*_CHANGING, "params")):
        return False
    read = tensors([arguments[name] for name in (*_CHANGING, "params")])
    devices = {tensor.device for tensor in read}
    return len(devices) == 1 and works_on(devices.pop())


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fixed(arguments: Mapping[str, Any]) -> list[Hashable]:
    """Return where the parameters lie, and the values of the other arguments but functions."""
    places = [(name, p.data_ptr(), p.dtype, p.shape) for name, p in arguments["params"].items()]
    others = [
        (name, repr(value))
        for name, value in arguments.items()
        if name not in (*_CHANGING, "params") and not _holds_functions(value)
    ]
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return [*places, *others, autocast, precision()]


def _holds_functions(value: Any) -> bool:
    return callable(value) or (isinstance(value, list | tuple) and any(map(callable, value)))


def _captured(function: partial[Any], changing: list[Any], structure: TreeSpec) -> Captured:
    """Run a function once aside, and capture its second run.

    Raises:
        RuntimeError: If it cannot be captured.
    """
    fixed = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in changing]
    arguments = {**function.keywords, **tree_unflatten(fixed, structure)}
    inputs = tensors_among(fixed)
    device = inputs[0].device
    run = partial(function.func, **arguments)
    before = generator_states(device)
    try:
        _run_aside(run, device)
        if drawn := generators_drawn_from(before, device):
            raise UserRuntimeError(f"network or loss draw random numbers ({', '.join(drawn)})")
    except Exception:  # raised again, whatever the network raised
        set_generator_states(before, device)
        raise
    with drawing_nothing():
        graph, outputs = _record(run, device)
    return Captured(graph, inputs, outputs, arguments)


def _run_aside(run: partial[Any], device: torch.device) -> None:
    """Run on another stream, as is recommended before a capture."""
    aside = _side_stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), _refusing_to_wait():
        run()
    torch.cuda.current_stream(device).wait_stream(aside)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise where the host would wait for a result, before that spoils a capture.

    A capture that fails may leave torch's memory in a state in which nothing is freed any more.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # one for all: each has a workspace of cuBLAS
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _record(run: partial[Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a run; return the graph, and what it returned and each replay overwrites."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        aside, current = _side_stream(device), torch.cuda.current_stream(device)
        # so that cuBLAS takes its workspace from the graph's memory, and nobody else uses that:
        # another graph's end would free one that they share
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # other threads, which pin memory for the next batch, must not spoil the capture
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                outputs = run()
        finally:
            torch.cuda.set_stream(current)  # to which a capture that fails does not return
            torch._C._cuda_clearCublasWorkspaces()
    return graph, outputs


def _replayed(captured: Captured, inputs: list[Tensor]) -> Any:
    """Run a graph on other inputs; the next run leaves what is returned as it is."""
    with torch.no_grad():
        torch._foreach_copy_(captured.inputs, [tensor.detach() for tensor in inputs])
        captured.graph.replay()
        return tree_map_only(Tensor, torch.clone, captured.outputs)
