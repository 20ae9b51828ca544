"""Outputs of networks: a tensor, or tensors in a dict, a tuple or an object.

Models of Hugging Face, for instance, return objects with an attribute ``logits``.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml.batches.losses import one_hot_mse


def logits_in(outputs: Any) -> Any:
    """Return the attribute or entry ``logits`` of ``outputs``, or ``outputs`` if there is none."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    else:
        logits = getattr(outputs, "logits", None)
    return outputs if logits is None else logits


def takes_logits(loss: Any) -> bool:
    """Return whether a loss needs the logits as a tensor, as torch's and this library's losses do.

    A loss of the user's is given the network's outputs as they are.

    Args:
        loss: A function, a module, or a ``functools.partial`` of one.
    """
    while isinstance(loss, partial):
        loss = loss.func
    # functions name their module themselves, modules and other callables through their class
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    package = getattr(named, "__module__", "").split(".")[0]
    return loss is one_hot_mse or package == "torch"


def map_outputs(function: Callable[[Tensor], Any], outputs: Any) -> Any:
    """Return ``outputs`` with each tensor replaced by ``function`` of it.

    Args:
        function: Maps a tensor to what takes its place.
        outputs: What a network returned. Tensors are also replaced where they are attributes of an
            object, in a copy of it.
    """

    def map_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        attributes = getattr(leaf, "__dict__", {})
        if not any(isinstance(value, Tensor) for value in attributes.values()):
            return leaf
        copied = copy.copy(leaf)
        for name, value in attributes.items():
            copied.__dict__[name] = map_outputs(function, value)
        return copied

    return function(outputs) if isinstance(outputs, Tensor) else tree_map(map_leaf, outputs)


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of ``outputs`` in their order, also those in attributes of objects."""
    found: list[Tensor] = []
    map_outputs(found.append, outputs)
    return found


def are_tensors(outputs: Any) -> bool:
    """Return whether ``outputs`` are tensors in nothing but dicts, tuples and lists.

    Only then can the outputs of several tasks be joined.
    """
    return all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
