"""Copies of networks that share their tensors, or have tensors of their own."""

import copy
import operator
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from types import CellType, FunctionType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.networks.facts import MISSING, facts_of, share_facts
from lightning_maml.networks.places import MODULE_DICTS


def structural_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of ``network`` made of other module objects over the same tensors.

    Parts that were given to ``torch.compile`` run uncompiled in the copy: each copy would be
    compiled anew, and compiled code has no second derivatives and fails under ``vmap``.

    Args:
        network: Any module.
        dtype: If given, floating-point tensors are copies of this type.

    Raises:
        TypeError: If the network holds an object that cannot be copied.
    """
    attributes = [value for module in network.modules() for value in vars(module).values()]
    tensors = chain(
        network.parameters(),
        network.buffers(),
        (value for value in attributes if isinstance(value, Tensor)),
    )
    memo: dict[int, Any] = {id(tensor): _of_type(tensor, dtype) for tensor in tensors}
    # empty dicts of hooks are many, and deepcopy is slow on each
    empty_dicts = [v for v in attributes if type(v) in (dict, OrderedDict) and not v]
    memo |= {id(value): type(value)() for value in empty_dicts}
    with _CopyingTensors(share=True), _naming_what_cannot_be_copied(network):
        copied = copy.deepcopy(network, memo)
        _complete(copied, network, memo)
    if any(map(operator.is_, copied.modules(), network.modules())):
        raise UserTypeError(
            "Expected a network that can be copied (copy.deepcopy), as adaptation needs copies, "
            f"but a copy of {type(network).__name__} shares modules with it; take out the "
            "`__deepcopy__` that returns them."
        )
    may_hold_functions = [v for v in attributes if v.__class__ in _WITH_FUNCTIONS and v]
    if any(_holds_functions(value) for value in may_hold_functions):
        _rebind_functions(copied, memo)
    run_uncompiled(copied)
    share_facts(copied, network)
    _empty_what_was_empty(copied)
    return copied


def deep_copy(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of ``network`` with tensors of its own.

    Unlike ``copy.deepcopy`` it takes networks that keep results of their last pass, which are
    copied without their graph, and lets hooks and functions of the copy refer to the copy.

    Args:
        network: Any module.
        memo: Objects to use in the copy in place of others, by the ids of those, as for
            ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    with _CopyingTensors(share=False):
        copied = copy.deepcopy(network, memo)
        _complete(copied, network, memo)
    _rebind_functions(copied, memo)
    return copied


def copy_in_mode(network: nn.Module, *, training: bool) -> nn.Module:
    """Return a structural copy of ``network`` in training or in evaluation mode.

    Raises:
        TypeError: If the network holds an object that cannot be copied.
        ValueError: If its ``train()`` or ``eval()`` changes tensors, which copies share.
    """
    facts = facts_of(network)
    if not facts.modes_keep_tensors:
        _check_that_modes_keep_tensors(network)
        facts.modes_keep_tensors = True
    copied = structural_copy(network)
    return copied.train(True) if training else copied.eval()


def _check_that_modes_keep_tensors(network: nn.Module) -> None:
    if not any(_has_own_modes(module) for module in network.modules()):
        return
    copied = deep_copy(network)
    # LoRA starts from zeros and averages from the weights themselves, so at first nothing changes
    for p in copied.parameters():
        if p.requires_grad and not is_lazy(p):
            p.data = p.data + 0.01
    named = chain(copied.named_parameters(), copied.named_buffers())
    before = [(name, tensor, tensor.clone()) for name, tensor in named if not is_lazy(tensor)]
    for training in (not network.training, network.training):
        copied.train(True) if training else copied.eval()
        changed = [name for name, tensor, old in before if not _is_equal(tensor, old)]
        if changed:
            raise UserValueError(
                "Expected train() and eval() to leave the tensors of a network as they are but "
                f"they change {changed}, which copies in another mode share with it; leave such "
                "merging and swapping out (loralib: merge_weights=False), or do it by hand after "
                "training."
            )


def _has_own_modes(module: nn.Module) -> bool:
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def _is_equal(now: Tensor, before: Tensor) -> bool:
    try:
        return torch.equal(now.nan_to_num(), before.nan_to_num())
    except (NotImplementedError, RuntimeError):  # types that torch does not compare
        return now.shape == before.shape


def _complete(copied: nn.Module, network: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy what modules leave out that define for themselves how they are copied.

    Those of ``torch.fx`` lose their hooks and what was added to them, and with torchvision's
    feature extractors evaluation mode too.
    """
    if not any(map(_copies_itself, {type(module) for module in network.modules()})):
        return
    copies = dict(copied.named_modules())
    for name, module in network.named_modules():
        twin = copies.get(name)
        if twin is None or not _copies_itself(type(module)):
            continue
        attributes = twin.__dict__
        for key, value in vars(module).items():
            is_graph = isinstance(module, GraphModule)
            are_hooks = key.endswith("_hooks") and value and not attributes.get(key)
            if is_graph and (key not in attributes or are_hooks):
                attributes[key] = copy.deepcopy(value, memo)
            elif isinstance(value, int | float | str) and key != "training":
                attributes[key] = value
        if twin.training != module.training:
            twin.train(module.training)
    # that may have set the modes of all parts, too
    for name, module in network.named_modules():
        if name in copies and copies[name].training != module.training:
            copies[name].training = module.training


def _copies_itself(kind: type) -> bool:
    """Return whether a class of modules defines for itself how it is copied."""
    if kind.__module__.startswith("torch.nn."):  # which are copied whole
        return False
    if issubclass(kind, torch.jit.ScriptModule | OptimizedModule):
        return False
    names = ("__deepcopy__", "__reduce_ex__", "__getstate__", "__setstate__")
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _empty_what_was_empty(copied: nn.Module) -> None:
    """Take out what a pass of the user's own has left in the network since the first look at it.

    It was computed from other parameters than those that the copy will be given.
    """
    written = facts_of(copied).written
    if not written or not written.empty:
        return
    modules = dict(copied.named_modules())
    for (name, key), before in written.empty.items():
        if name not in modules:  # another layer has taken its place
            continue
        attributes = modules[name].__dict__
        now = attributes.get(key)
        if isinstance(now, list | dict) and isinstance(before, list | dict):
            now.clear()  # in place, as hooks may hold it too
        elif before is MISSING:
            attributes.pop(key, None)
        else:
            attributes[key] = copy.copy(before)


def run_uncompiled(network: nn.Module) -> None:
    """Make the parts of a network that were given to ``torch.compile`` run uncompiled."""
    for part in network.modules():
        if isinstance(part, OptimizedModule):
            part.forward = part._orig_mod.__call__


@contextmanager
def _naming_what_cannot_be_copied(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        failing = []
        for name, module in network.named_modules():
            for key, value in vars(module).items():
                if not isinstance(value, Tensor | nn.Module) and not _can_be_copied(value):
                    failing.append(f"{name}.{key}".lstrip("."))
        if not failing:
            raise
        raise UserTypeError(
            "Expected a network, and a loss with parameters, that can be copied (copy.deepcopy), "
            f"as adaptation needs copies, but {failing} of {type(network).__name__} cannot be "
            f"({error}); make it where it is used, or leave it out of the module."
        ) from error


def _can_be_copied(value: Any) -> bool:
    if value.__class__ in (dict, OrderedDict) and any(
        isinstance(part, nn.Module | Tensor) for part in value.values()
    ):
        return True  # their own attributes are checked in turn
    try:
        copy.deepcopy(value)
    except TypeError:
        return False
    except Exception:  # noqa: BLE001 # not the TypeError that is to be explained
        return True
    return True


_WITH_FUNCTIONS = frozenset({FunctionType, ReferenceType, partial, list, tuple, dict, OrderedDict})
"""Types of functions, of weak references, and of containers that may hold some."""


def _holds_functions(value: Any, depth: int = 4) -> bool:
    """Return whether a value is or holds a function or weak reference.

    ``copy.deepcopy`` does not copy these.
    """
    kind = value.__class__
    if kind in (FunctionType, ReferenceType, partial):
        return True
    if kind not in _WITH_FUNCTIONS or not value or not depth:
        return False
    parts = value if kind in (list, tuple) else value.values()
    return any(_holds_functions(part, depth - 1) for part in parts)


def _rebind_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let the hooks and functions of a copy refer to the copied objects.

    ``copy.deepcopy`` leaves functions as they are, so closures and defaults of the copy would still
    refer to the original network.
    """
    for module in copied.modules():
        attributes = vars(module)
        for key in [key for key in attributes if key not in MODULE_DICTS]:
            attributes[key] = _rebound_value(attributes[key], memo)


def _rebound_value(value: Any, memo: dict[int, Any], depth: int = 4) -> Any:
    """Return an attribute of a copy whose functions and weak references refer to copies.

    Lists and dicts are changed in place, because other objects may hold them too.
    """
    if not _holds_functions(value, depth):
        return value
    kind = value.__class__
    if kind is FunctionType:
        return _rebound(value, memo)
    if kind is ReferenceType:
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if kind is partial:
        function = _rebound_value(value.func, memo, depth)
        args = [_rebound_value(part, memo, depth) for part in value.args]
        named = {name: _rebound_value(part, memo, depth) for name, part in value.keywords.items()}
        return partial(function, *args, **named)
    if kind is tuple:
        return tuple(_rebound_value(part, memo, depth - 1) for part in value)
    keys = range(len(value)) if kind is list else [*value]
    for key in keys:
        value[key] = _rebound_value(value[key], memo, depth - 1)
    return value


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function whose closure and defaults refer to copies, or itself if none do."""
    if not _refers_to_copies(function, memo, set()):
        return function
    cells = [CellType() for _ in function.__closure__ or ()]
    rebound = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, tuple(cells)
    )
    memo[id(function)] = rebound  # before what it refers to, which may refer back to it

    def copy_of(value: Any) -> Any:
        if isinstance(value, FunctionType) and id(value) not in memo:
            return _rebound(value, memo)
        return memo.get(id(value), value)

    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that is still empty
            cell.cell_contents = copy_of(old.cell_contents)
    rebound.__defaults__ = function.__defaults__ and tuple(map(copy_of, function.__defaults__))
    named = function.__kwdefaults__
    rebound.__kwdefaults__ = named and {name: copy_of(value) for name, value in named.items()}
    rebound.__dict__.update(function.__dict__)
    return rebound


def _refers_to_copies(function: FunctionType, memo: dict[int, Any], seen: set[int]) -> bool:
    """Return whether something that a function, or a function in it, refers to was copied."""
    seen.add(id(function))
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is still empty
            values.append(cell.cell_contents)
    return any(
        memo.get(id(value), value) is not value
        or (
            isinstance(value, FunctionType)
            and id(value) not in seen
            and _refers_to_copies(value, memo, seen)
        )
        for value in values
    )


def _of_type(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(converted, tensor.requires_grad)
    return converted


class _CopyingTensors(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that have a graph, such as activations that are kept.

    Torch itself copies only leaves.

    Args:
        share: Whether copies hold the same tensors rather than copies of them.
    """

    def __init__(self, *, share: bool) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0]
        if self._share:
            return tensor if tensor.is_leaf else tensor.detach()
        copied: Tensor
        if tensor.is_leaf:
            copied = func(*args, **(kwargs or {}))  # type: ignore[no-untyped-call]
        else:
            copied = tensor.detach().clone()
        return copied
