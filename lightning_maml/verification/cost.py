"""What a function costs: its time, and the memory of the tensors that it holds at once."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, until all that it started on the device has ended."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call adds; None if the memory of the device cannot be watched.

    On CUDA these are the bytes that torch's allocator gave. On the CPU they are those of the
    tensors that operations make in the calling thread: what other threads make, and what kernels
    need inside, is not counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        function()
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    if device.type != "cpu":
        return None
    with _LiveTensors() as watch:
        function()
    return int(watch.peak)


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make and that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in filter(_has_storage, tree_leaves(result)):
            storage = leaf.untyped_storage()
            # views share what they were given
            if id(storage) not in self._sizes and id(storage) not in given:
                self._sizes[id(storage)] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage))
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided
