"""What single tensors are: their memory, the leaves behind them, and errors of their devices."""

from typing import Any

import torch
from torch import Tensor


def leaves_of(value: Any) -> set[int]:
    """Return the ids of the trainable tensors that a result was computed from."""
    waiting, seen, leaves = [getattr(value, "grad_fn", None)], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return leaves


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
