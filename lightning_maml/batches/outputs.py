"""What a network returns: a tensor, or tensors in a dict, a tuple or an object, as the models of Hugging Face do."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml.batches.losses import one_hot_mse


def logits_in(outputs: Any) -> Any:
    """Return the attribute or the entry ``logits`` of outputs that have one, and others as they are."""
    if isinstance(outputs, Tensor):
        return outputs
    found = (
        outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    )
    return outputs if found is None else found


def takes_logits(loss: Any) -> bool:
    """Return whether a loss is one of torch's or of this library's, which know no other outputs than a tensor."""
    while isinstance(loss, partial):
        loss = loss.func
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return loss is one_hot_mse or getattr(named, "__module__", "").split(".")[0] == "torch"


def map_outputs(function: Callable[[Tensor], Any], outputs: Any) -> Any:
    """Return outputs with ``function`` of their tensors in place of each tensor, also of those that an object has as attributes."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values()):
            return leaf
        copied = copy.copy(leaf)
        copied.__dict__.update(
            {name: map_outputs(function, value) for name, value in vars(leaf).items()}
        )
        return copied

    return function(outputs) if isinstance(outputs, Tensor) else tree_map(of_leaf, outputs)


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors of outputs, in their order."""
    found: list[Tensor] = []
    map_outputs(found.append, outputs)
    return found


def are_tensors(outputs: Any) -> bool:
    """Return whether outputs are tensors in dicts, tuples and lists alone, which results of several tasks can be joined from."""
    return all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
