"""What a network is called with: a tensor, or a dict, tuple or list of tensors, all of whose first dimension is the examples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Tree = TypeVar("Tree")

Inputs = Tensor | dict[str, Any] | tuple[Any, ...] | list[Any]
"""Inputs of a network, or any tree of tensors."""


def call(network: nn.Module, inputs: Any) -> Any:
    """Return ``network(inputs)`` for a tensor, ``network(**inputs)`` for a dict, ``network(*inputs)`` for a tuple or list."""
    if isinstance(inputs, Tensor):
        return network(inputs)
    return network(**inputs) if isinstance(inputs, Mapping) else network(*inputs)


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """Return the first of some trees of one structure with ``function`` of their tensors in place of each tensor.

    Torch's own functions of trees take five times as long.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, Mapping):
        return {name: map_tensors(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple | list):
        values = [map_tensors(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first


def differentiable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its graph.

    It is a copy if it was made in inference mode, because autograd takes no such tensors.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def detached(tree: Tree) -> Tree:
    """Apply :func:`differentiable` to all tensors of a tree."""
    return cast("Tree", map_tensors(differentiable, tree))


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in their order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [tensor for value in tree.values() for tensor in tensors(value)]
    if isinstance(tree, tuple | list):
        return [tensor for value in tree for tensor in tensors(value)]
    return []


def count(inputs: Any) -> int:
    """Return the size of the first dimension: the number of examples, or of tasks."""
    return len(inputs if isinstance(inputs, Tensor) else tensors(inputs)[0])


def cat(parts: Iterable[Any]) -> Any:
    """Return the examples of some inputs as one."""
    return map_tensors(lambda *of_parts: torch.cat(of_parts), *parts)


def shapes(inputs: Any) -> tuple[Any, ...]:
    """Return types and shapes of some inputs without the first dimension: what tells one kind of batch from another."""
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors(inputs))
