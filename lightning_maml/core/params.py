"""Parameters as ``dict[str, Tensor]``, and the few vector operations that the algorithms are written in."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_maml.batches.trees import map_tensors

Tree = TypeVar("Tree")
Params = dict[str, Tensor]
"""A point w in parameter space, or a direction v: one tensor per parameter name."""


def differentiable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its graph, and as a copy if it was made in inference mode, which rules out differentiating."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def detached(tree: Tree) -> Tree:
    """Apply :func:`differentiable` to all tensors in tuples, lists and dicts."""
    return cast("Tree", map_tensors(differentiable, tree))


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


Place = tuple[Any, Any]
"""A dict or list that holds a tensor, and the key or number under which it does."""

Places = dict[str, list[Place]]
"""Where the modules of a network hold each of its parameters and buffers: shared ones in several
places."""


OF_MODULES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module holds its parameters, buffers and parts."""


def places(network: nn.Module) -> Places:
    """Return all places of parameters and buffers, those in plain attributes, lists and dicts of the modules included."""
    of_tensor: dict[int, list[Place]] = {}
    for module in network.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            _add_places(holder, of_tensor)
    named = chain(
        network.named_parameters(remove_duplicate=False),
        network.named_buffers(remove_duplicate=False),
    )
    return {name: of_tensor[id(tensor)] for name, tensor in named}


_CONTAINERS = frozenset({dict, list, OrderedDict})


def _add_places(holder: Any, of_tensor: dict[int, list[Place]], depth: int = 4) -> None:
    for key, value in enumerate(holder) if isinstance(holder, list) else holder.items():
        # most are, and this runs in every step
        if value is None or value is False or value is True:
            continue
        if isinstance(value, Tensor):
            of_tensor.setdefault(id(value), []).append((holder, key))
        elif value.__class__ in _CONTAINERS and value and depth and key not in OF_MODULES:
            _add_places(value, of_tensor, depth - 1)


@contextmanager
def holding(where: Places, tensors: Params) -> Iterator[None]:
    """Put other tensors into a network for a while; ``torch.func.functional_call`` would search the whole network for them every time."""
    before = [(holder, key, holder[key]) for name in tensors for holder, key in where.get(name, ())]
    try:
        for name, tensor in tensors.items():
            for holder, key in where.get(name, ()):
                holder[key] = tensor
        yield
    finally:
        for holder, key, tensor in before:
            holder[key] = tensor
