"""The places where a network holds its tensors, to put others there for a while."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_maml.core.params import Params

Place = tuple[Any, Any]
"""A dict or list that holds a tensor, and the key or index of the tensor in it."""

Places = dict[str, list[Place]]
"""The places of each parameter and buffer of a network, by name; shared ones have several."""

MODULE_DICTS = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module holds its parameters, buffers and submodules."""


def places(network: nn.Module) -> Places:
    """Return all places of a network's parameters and buffers.

    Modules may also hold them in plain attributes, and in lists and dicts there.
    """
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
"""Types that are searched for tensors."""


def _add_places(holder: Any, of_tensor: dict[int, list[Place]], depth: int = 4) -> None:
    items = enumerate(holder) if isinstance(holder, list) else holder.items()
    for key, value in items:
        # a shortcut for most attributes, as this runs in every step
        if value is None or value is False or value is True:
            continue
        if isinstance(value, Tensor):
            of_tensor.setdefault(id(value), []).append((holder, key))
        elif value.__class__ in _CONTAINERS and value and depth and key not in MODULE_DICTS:
            _add_places(value, of_tensor, depth - 1)


@contextmanager
def holding(where: Places, tensors: Params) -> Iterator[None]:
    """Put other tensors into a network for a while.

    ``torch.func.functional_call`` would search the whole network for their places every time.

    Args:
        where: Places of the network's tensors.
        tensors: What to put there, by name; names without a place are ignored.
    """
    before = [(holder, key, holder[key]) for name in tensors for holder, key in where.get(name, ())]
    try:
        for name, tensor in tensors.items():
            for holder, key in where.get(name, ()):
                holder[key] = tensor
        yield
    finally:
        for holder, key, tensor in before:
            holder[key] = tensor
