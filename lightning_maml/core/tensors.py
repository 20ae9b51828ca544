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


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    # cuDNN's way to say that no algorithm is left whose workspace fits
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # of cuDNN 9
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA ran out of memory outside",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory, for which torch has a type only in part."""
    is_said = any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or is_said


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise an error again if a device ran out of memory, whatever else it could mean."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        raise error
