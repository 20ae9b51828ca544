"""Random numbers that are the same on every device."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Drawn = TypeVar("Drawn", bound=Tensor | nn.Module)


def drawn_on_cpu(make: Callable[..., Drawn], *arguments: Any, **options: Any) -> Drawn:
    """Make a tensor or a network on the CPU, with its random numbers; move it to the device of the
    test."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        made = make(*arguments, **options)
    return made.to(device)
