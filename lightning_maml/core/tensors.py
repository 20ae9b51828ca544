"""What single tensors are: their memory, the leaves behind them, and errors of their devices."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def nodes_of(value: Any) -> Iterator[Any]:
    """Yield the nodes of the graph that a result was computed by."""
    waiting, seen = [getattr(value, "grad_fn", None)], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [before for before, _ in node.next_functions]


def leaves_of(value: Any) -> set[int]:
    """Return the ids of the trainable tensors that a result was computed from."""
    return {id(node.variable) for node in nodes_of(value) if hasattr(node, "variable")}


def memory(tensor: Tensor) -> int:
    """Return a number for a tensor's memory, which views of it share."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
        return id(tensor)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device ran out of memory; for CPUs torch has no exception type for this."""
    return isinstance(
        error, torch.OutOfMemoryError
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error)
