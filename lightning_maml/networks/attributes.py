"""Attributes of a network's modules, and which of them a forward pass changes."""

import copy
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from functools import partial
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_maml.networks.facts import MISSING


def modes(network: nn.Module) -> tuple[Any, ...]:
    """Return what decides how a network runs, as far as can be told without running it.

    What was found out about a network holds only as long as this stays the same.

    Returns:
        The classes of its modules, their modes (``training``), the booleans, strings and functions
        among their attributes, and their hooks.
    """
    found: list[Any] = []
    for module in network.modules():
        found.append(module.__class__)
        for key, value in vars(module).items():
            kind = value.__class__
            if kind is bool or kind is str:
                found.append(value)
            elif kind is FunctionType:
                found.append(value.__code__)
            elif key == "forward":  # replaced by a builtin function or a callable object
                found.append(value if kind is BuiltinFunctionType else kind)
            elif kind is OrderedDict and value and key.endswith("_hooks"):
                found.append(key)
                # a copy's hooks are other functions with the same code
                found += [getattr(hook, "__code__", hook.__class__) for hook in value.values()]
    return tuple(found)


class NotComparableError(Exception):
    """An attribute whose changes cannot be detected."""


def plain_state(network: nn.Module, device: torch.device) -> tuple[Any, ...]:
    """Return what else a forward pass may read: numbers, and where tensors lie.

    A CUDA graph holds all of that as it was: it is valid while this and :func:`modes` are the same.

    Args:
        network: Any module.
        device: Tensors there are compared by their addresses, small ones on the CPU by value.

    Returns:
        Of the parameters, buffers and attributes of each module, also in lists, tuples, dicts and
        plain objects: numbers and strings as they are, and the addresses of tensors.

    Raises:
        NotComparableError: If there are attributes of other kinds, or hooks.
    """
    found = []
    reader = _Reader(device, frozenset(network.modules()))
    for name, module in network.named_modules():
        if any(map(vars(module).get, _HOOKS)):
            raise NotComparableError(f"{name or type(module).__name__} has hooks")
        for holder in (module._parameters, module._buffers, vars(module)):
            for key, value in holder.items():
                if key not in OF_EVERY_MODULE:
                    path = f"{name}.{key}".lstrip(".")
                    found.append((key, reader.plain(value, path)))
    return tuple(found)


# numbers of Python first, as most attributes are: it takes long to find out what is a `Number`
_COMPARED_BY_VALUE = (int, str, float, type(None), bytes, Number)
_COMPARED_BY_IDENTITY = (type, torch.dtype, torch.device, BuiltinFunctionType)
_HIDING_WHAT_THEY_HOLD = (set, frozenset, deque, np.ndarray)
"""Kinds whose content is not among their attributes, so that changes of it would go unseen."""


def plain_value(value: Any, device: torch.device, path: str) -> Any:
    """Return what tells a number, tensor, container or plain object from another.

    Args:
        value: Any object.
        device: As in :func:`plain_state`.
        path: Its name in errors.

    Raises:
        NotComparableError: If it is, or holds, anything else.
    """
    return _Reader(device, frozenset()).plain(value, path)


class _Reader(NamedTuple):
    """Reads attributes as what can be compared.

    Attributes:
        device: Where tensors are read in their place.
        modules: Those of the network, which are read by themselves.
    """

    device: torch.device
    modules: frozenset[nn.Module]

    def plain(self, value: Any, path: str, depth: int = 6, above: tuple[int, ...] = ()) -> Any:
        """Return a number or string, or what tells a tensor or container of such from another."""
        if isinstance(value, _COMPARED_BY_VALUE):
            return value
        if isinstance(value, Tensor):
            return self._place_of(value, path)
        if isinstance(value, np.generic):
            return value.item()
        is_closed = isinstance(value, FunctionType) and not value.__closure__
        is_of_network = isinstance(value, nn.Module) and value in self.modules
        if is_closed or is_of_network or isinstance(value, _COMPARED_BY_IDENTITY):
            return value  # held, so that no other has its id
        if id(value) in above:  # it holds itself
            return "above", above.index(id(value))
        if not depth:
            raise NotComparableError(f"{path} is nested too deeply to compare")
        inside = partial(self.plain, path=path, depth=depth - 1, above=(*above, id(value)))
        attributes: Mapping[str, Any] = getattr(value, "__dict__", {})
        if isinstance(value, Mapping):
            held = tuple((key, inside(part)) for key, part in value.items())
        elif isinstance(value, list | tuple):
            held = tuple(map(inside, value))
        elif isinstance(value, partial):
            held = inside(value.func), inside(value.args), inside(value.keywords)
        elif _is_plain_object(value):
            held = ()
        else:
            raise NotComparableError(f"{path} is a {type(value).__name__}, which may change unseen")
        of_attributes = tuple(
            (key, inside(part, path=f"{path}.{key}")) for key, part in attributes.items()
        )
        return type(value), held, of_attributes

    def _place_of(self, tensor: Tensor, path: str) -> Any:
        if tensor.layout is not torch.strided:
            raise NotComparableError(f"{path} is a sparse tensor")
        if tensor.device == self.device:
            form = tensor.shape, tensor.stride(), tensor.dtype
            return id(tensor), tensor.data_ptr(), *form
        if tensor.device.type == "cpu" and tensor.numel() <= 64:
            return tuple(tensor.flatten().tolist())
        raise NotComparableError(f"{path} is a tensor on another device")


def _is_plain_object(value: Any) -> bool:
    """Return whether an object is its attributes alone, as configurations are."""
    is_hiding = isinstance(value, (nn.Module, *_HIDING_WHAT_THEY_HOLD))
    return hasattr(value, "__dict__") and not is_hiding and type(value).__module__ != "builtins"


def trainable_besides_parameters(network: nn.Module) -> list[str]:
    """Return the names of buffers and attributes that are trainable leaves but no parameters."""
    names = []
    for prefix, module in network.named_modules():
        for holder in (module._buffers, vars(module)):
            for key, value in holder.items():
                if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                    continue
                if value.requires_grad and value.is_leaf:
                    names.append(f"{prefix}.{key}".lstrip("."))
    return names


HeldTensor = tuple[dict[str, Any], str, Tensor, Tensor]
"""A dict of a module, the name under which it holds a tensor, the tensor, and a copy of it."""


def held_tensors(module: Any) -> list[HeldTensor]:
    """Return the buffers, frozen parameters and tensor attributes of a module, with copies.

    Args:
        module: Anything; what is no module holds none.
    """
    parts = module.modules() if isinstance(module, nn.Module) else ()
    held: list[HeldTensor] = []
    for part in parts:
        for holder in (part._buffers, part._parameters, vars(part)):
            for name, value in holder.items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    held.append((holder, name, value, value.clone()))
    return held


@torch.no_grad()
def put_back(before: list[HeldTensor]) -> list[str]:
    """Restore the tensors that :func:`held_tensors` returned.

    Returns:
        The names of those that had changed.
    """
    written = []
    for holder, name, tensor, value in before:
        now = holder[name] if name in holder else None  # noqa: SIM401 # TorchScript's have no get
        is_written = _is_other(tensor, value)
        if is_written if now is tensor else _is_other(now, value):
            written.append(name)
        if is_written:
            tensor.copy_(value)
        holder[name] = tensor
    return written


class Kept:
    """A snapshot of the attributes of a network's modules, to restore after a forward pass.

    Some networks cache there what they computed from their parameters (timm's LeViT does so in
    evaluation mode, with the biases of its attention). The next pass has other parameters and must
    not find it. Parameters, buffers and submodules do not belong to the snapshot.

    Args:
        network: The network as it is before a pass.
        names: Pairs of a module's name and an attribute's name to restore; by default all that
            have changed.

    Examples:
        >>> from torch import nn
        >>> from lightning_maml.networks.attributes import Kept
        >>> network = nn.Linear(2, 2)
        >>> kept = Kept(network)
        >>> network.last_inputs = "kept from a pass"
        >>> sorted(kept.changed())
        [('', 'last_inputs')]
        >>> kept.put_back()
        >>> hasattr(network, "last_inputs")
        False
    """

    def __init__(
        self, network: nn.Module, names: Collection[tuple[str, str]] | None = None
    ) -> None:
        self._modules = {name: vars(module) for name, module in network.named_modules()}
        self._names = names
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Return each attribute, and a copy of it if it is a list or a dict."""
        now: dict[tuple[str, str], tuple[Any, Any]] = {}
        for name, attributes in self._modules.items():
            for key, value in attributes.items():
                if key in OF_EVERY_MODULE:
                    continue
                if self._names is None or (name, key) in self._names:
                    content = copy.copy(value) if isinstance(value, list | dict) else None
                    now[name, key] = value, content
        return now

    def changed(self) -> frozenset[tuple[str, str]]:
        """Return module and attribute names of what a pass has changed, other than numbers."""
        now = self._now()
        return frozenset(
            key
            for key in self._before.keys() | now.keys()
            if not _are_same(self._before.get(key), now.get(key))
        )

    def empty(self, names: Collection[tuple[str, str]]) -> dict[tuple[str, str], Any]:
        """Return which attributes were missing, None or empty before, and what they were."""
        found: dict[tuple[str, str], Any] = {}
        for name in names:
            value, content = self._before.get(name, (MISSING, None))
            if value is MISSING or value is None:
                found[name] = value
            elif content in ([], {}):
                found[name] = content
        return found

    def put_back(self) -> None:
        """Undo what a pass has changed."""
        changed = self.changed() if self._names is None else self._names
        for name, key in changed:
            if name not in self._modules:  # another layer has taken its place
                continue
            if (name, key) not in self._before:
                self._modules[name].pop(key, None)
                continue
            value, content = self._before[name, key]
            self._modules[name][key] = value
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, dict):
                value.clear()
                value.update(content)


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, submodules, hooks and mode."""

_HOOKS = tuple(key for key in OF_EVERY_MODULE if key.endswith("_hooks"))


def _are_same(before: tuple[Any, Any] | None, now: tuple[Any, Any] | None) -> bool:
    """Return whether an attribute is the same object with the same content, or still a number.

    Args:
        before: The attribute and, of a list or dict, a copy; None if it did not exist.
        now: The same after the pass.
    """
    if before is None or now is None:
        return False
    (value, content), (value_now, content_now) = before, now
    is_same = value is value_now
    if isinstance(value, dict) and is_same:
        return content.keys() == content_now.keys() and all(
            content_now[key] is part for key, part in content.items()
        )
    if isinstance(value, list) and is_same:
        return [*map(id, content)] == [*map(id, content_now)]
    # counters change in every pass: `numbers_in` takes care of them
    are_numbers = isinstance(value, int | float) and isinstance(value_now, int | float)
    return is_same or are_numbers


def numbers_in(network: nn.Module) -> dict[tuple[str, str], int | float]:
    """Return the plain numbers and booleans among the attributes of a network's modules.

    Returns:
        The values by the name of the module and the name of the attribute.
    """
    numbers = {}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, int | float):
                numbers[name, key] = value
    return numbers


def is_written(now: Tensor | None, original: Tensor) -> bool:
    """Return whether a clone of ``original`` was written to or replaced.

    Args:
        now: What lies in the clone's place after a pass; None if nothing does.
        original: The tensor that was cloned.
    """
    return now is None or now._version > 0 or _is_other(now, original)


def _is_other(now: Any, original: Tensor) -> bool:
    if not isinstance(now, Tensor) or now.shape != original.shape:
        return True
    # sparse tensors have no elementwise comparison
    now = now if now.layout == torch.strided else now.to_dense()
    original = original if original.layout == torch.strided else original.to_dense()
    both_nan = now.isnan() & original.isnan()
    return bool(((now != original) & ~both_nan).any())
