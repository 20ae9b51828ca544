"""Inputs of networks: a tensor, or a dict, tuple or list of tensors.

The first dimension of each tensor is that of the examples.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Tree = TypeVar("Tree")

Inputs = Tensor | dict[str, Any] | tuple[Any, ...] | list[Any]
"""Inputs of a network, or any tree of tensors."""


def call(network: nn.Module, inputs: Any) -> Any:
    """Call ``network`` with a tensor, the entries of a dict, or the items of a tuple or list."""
    if isinstance(inputs, Tensor):
        return network(inputs)
    return network(**inputs) if isinstance(inputs, Mapping) else network(*inputs)


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply ``function`` to the tensors of one or more trees.

    Torch's own ``tree_map`` takes five times as long, and this runs in every step.

    Args:
        function: Takes one tensor of each tree.
        trees: Trees of the same structure: a tensor, or mappings, tuples and lists of trees.

    Returns:
        The first tree with the results in place of its tensors. Mappings become dicts, tuples
        without names and lists plain ones, as torch's own trees have them; other leaves stay as
        they are.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, Mapping):
        return {name: map_tensors(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple | list):
        values = [map_tensors(function, *parts) for parts in zip(*trees, strict=True)]
        if hasattr(first, "_fields"):
            return type(first)(*values)
        return tuple(values) if isinstance(first, tuple) else values
    return first


def differentiable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its graph, as autograd can use it.

    Autograd refuses tensors made in inference mode, so those are copied.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def detached(tree: Tree) -> Tree:
    """Return the tree with :func:`differentiable` applied to each tensor."""
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
    """Return the size of the first dimension of ``inputs``: the number of examples or tasks."""
    return len(inputs if isinstance(inputs, Tensor) else tensors(inputs)[0])


def cat(parts: Iterable[Any]) -> Any:
    """Concatenate inputs along the dimension of the examples."""
    return map_tensors(lambda *tensors: torch.cat(tensors), *parts)


def unstacked(tree: Any) -> list[Any]:
    """Return a tree for each entry of the tensors' first dimension."""
    return [map_tensors(lambda tensor, k=k: tensor[k], tree) for k in range(count(tree))]


def shapes(inputs: Any) -> tuple[Any, ...]:
    """Return dtype and shape of each tensor without the first dimension.

    Inputs of the same shapes and dtypes are of the same kind, however many examples there are.
    """
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors(inputs))
