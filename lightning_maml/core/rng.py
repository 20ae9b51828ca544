"""Which networks draw random numbers, and the states of the generators that they draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import DropBlock2d


def is_random(network: nn.Module) -> bool:
    """Return whether a layer draws random numbers in its present mode.

    Such layers are dropout, DropBlock, RReLU, and attention or recurrence with dropout, all in
    training mode.
    """
    return drops_blocks(network) or any(
        module.training and _draws(module) for module in network.modules()
    )


def drops_blocks(network: nn.Module) -> bool:
    """Return whether DropBlock is active; it fills its mask in place, which ``vmap`` refuses."""
    return any(module.training and isinstance(module, DropBlock2d) for module in network.modules())


def _draws(module: nn.Module) -> bool:
    inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    return (
        inside or (isinstance(module, _DropoutNd) and module.p > 0) or isinstance(module, nn.RReLU)
    )


_DRAWS_NOTHING: ContextVar[bool] = ContextVar("draws nothing", default=False)


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """State that nothing that runs meanwhile draws random numbers.

    Their generators are then left alone, which a CUDA graph's capture demands.
    """
    token = _DRAWS_NOTHING.set(True)
    try:
        yield
    finally:
        _DRAWS_NOTHING.reset(token)


def draws_nothing() -> bool:
    """Return whether that was stated."""
    return _DRAWS_NOTHING.get()


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch, the device, numpy and Python, in plain types for a checkpoint."""
    states = generator_states(device)
    name, key, *rest = states["numpy"]
    return states | {"numpy": (name, np.asarray(key).tolist(), *rest)}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`random_state` returned.

    The state of an accelerator is used only if ``device`` is of the same type.
    """
    name, key, *rest = state["numpy"]
    version, internal, following = state["python"]
    plain = {
        "numpy": (name, np.array(key, dtype=np.uint32), *rest),
        "python": (version, tuple(internal), following),
    }
    set_generator_states(state | plain, device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the global random generators that networks draw from.

    These are the generators of torch, the device, numpy and Python.
    """
    # the global generators: a network that draws from one of its own is refused at the first look
    return torch_random_state(device) | {
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators that ``states`` has to these states."""
    set_torch_random_state(states, device)
    if "numpy" in states:
        np.random.set_state(states["numpy"])
        random.setstate(states["python"])


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Put the generators back to where they are now."""
    before = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(before, device)


def torch_random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators of torch and of the device."""
    module = _generators_of(device)
    own = None if module is None else module.get_rng_state(*_numbered(device))
    return {"torch": torch.get_rng_state(), device.type: own}


def set_torch_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`torch_random_state` returned.

    The state of an accelerator is used only if ``device`` is of the same type.
    """
    torch.set_rng_state(state["torch"])
    if state.get(device.type) is not None:
        _generators_of(device).set_rng_state(state[device.type], *_numbered(device))


def _generators_of(device: torch.device) -> Any:
    """Return the module of torch that has an accelerator's generators, once it was used."""
    module = getattr(torch, device.type, None)
    in_use = getattr(module, "is_initialized", lambda: True)()
    return module if hasattr(module, "get_rng_state") and in_use else None


def _numbered(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # MPS has a single device


def generators_drawn_from(before: dict[str, Any], device: torch.device) -> list[str]:
    """Return the names of the generators that moved since ``before``.

    ``before`` is what :func:`generator_states` returned.
    """
    now = generator_states(device)
    return [name for name, state in before.items() if not _same_state(state, now[name])]


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(_same_state(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)
