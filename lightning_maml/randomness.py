"""Which networks draw random numbers, and the states of the generators that they draw from."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import DropBlock2d


def is_random(network: nn.Module) -> bool:
    """Return whether a layer draws random numbers: dropout, DropBlock, attention or recurrence with dropout, or RReLU, in training mode."""
    return drops_blocks(network) or any(module.training and _draws(module) for module in network.modules())


def drops_blocks(network: nn.Module) -> bool:
    """Return whether DropBlock is active, which fills its mask in place and so does not run under ``vmap``."""
    return any(module.training and isinstance(module, DropBlock2d) for module in network.modules())


def _draws(module: nn.Module) -> bool:
    inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    return inside or isinstance(module, (_DropoutNd, nn.RReLU))


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators of torch, the device, numpy and Python, in plain types."""
    name, key, *rest = np.random.get_state()  # the global one, which other code draws from
    of_torch = torch_random_state(device)
    return of_torch | {"numpy": (name, np.asarray(key).tolist(), *rest), "python": random.getstate()}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to ``state``; the device's only if the device is of the kind that the state was taken on."""
    set_torch_random_state(state, device)
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))


def torch_random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators of torch and of the device."""
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_numbered(device))
    return {"torch": torch.get_rng_state(), device.type: own}


def set_torch_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set these generators to ``state``; the device's only if the device is of the kind that the state was taken on."""
    torch.set_rng_state(state["torch"])
    if state.get(device.type) is not None:
        torch.get_device_module(device).set_rng_state(state[device.type], *_numbered(device))


def _numbered(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # of which there is one


def has_drawn(before: dict[str, Any], device: torch.device) -> bool:
    """Return whether torch or the device drew random numbers since :func:`torch_random_state` returned ``before``."""
    now = torch_random_state(device)
    return any(state is not None and not torch.equal(state, now[name]) for name, state in before.items())
