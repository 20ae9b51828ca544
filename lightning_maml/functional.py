"""Parameters as ``dict[str, Tensor]``, and the few vector operations that the algorithms are written in."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Tree = TypeVar("Tree")
Params = dict[str, Tensor]
"""A point w in parameter space, or a direction v: one tensor per parameter name."""


def differentiable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its graph, and as a copy if it was made in inference mode, which rules out differentiating."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def detached(tree: Tree) -> Tree:
    """Apply :func:`differentiable` to all tensors in tuples, lists and dicts; torch's own functions of trees take five times as long."""
    found: Any = tree
    if isinstance(tree, Tensor):
        found = differentiable(tree)
    elif isinstance(tree, Mapping):
        found = {name: detached(value) for name, value in tree.items()}
    elif isinstance(tree, tuple | list):
        values = map(detached, tree)
        found = type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return cast("Tree", found)


def axpy(a: float | Tensor, x: Params, y: Params) -> Params:
    """Return ``a x + y``, where ``x`` counts as zero in the parameters that it lacks."""
    return {name: y[name] + a * x[name] if name in x else y[name] for name in y}


def norm(x: Params) -> Tensor:
    """Return the 2-norm of ``x`` as one long vector, a scalar tensor."""
    norms: list[Tensor] = [torch.linalg.vector_norm(tensor) for tensor in x.values()]
    size: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return size


def dot(x: Params, y: Params) -> Tensor:
    """Return the inner product of ``x`` and ``y`` as long vectors, a scalar tensor."""
    product: Tensor = torch.stack([(x[name] * y[name]).sum() for name in x]).sum()
    return product


def scaled(a: float | Tensor, x: Params) -> Params:
    """Return ``a x``."""
    return {name: a * tensor for name, tensor in x.items()}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device ran out of memory; for CPUs torch has no exception type for this."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
