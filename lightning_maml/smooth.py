"""Finds where a network is not twice differentiable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_KINKS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Threshold),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def kinks(network: nn.Module) -> list[str]:
    """Return the names and types of the layers at which ``network`` is not twice differentiable."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if isinstance(module, _KINKS) or (isinstance(module, nn.ELU) and module.alpha != 1)
    ]


_KINKED = {
    *("relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "threshold"),
    *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
    *("abs", "maximum", "minimum", "amax", "amin", "max", "min", "topk", "sort", "median"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d"),
}
"""Operations by their names inside torch, where pooling in one dimension is an operation in two."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model calls it too
def kinked_operations(run: Callable[[], Any]) -> list[str]:
    """Return the operations in ``run()`` that are not twice differentiable, as torch names them; functions that are not layers count too.

    It sees activations, pooling, maxima, absolute values and clamps that cut values off, and takes them for kinks even where their results
    are detached. It does not see what masks and ``torch.where`` do.
    """
    watch = _Watch()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), watch:
        run()
    return watch.found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        before = args[0].clone() if name.startswith("clamp") else None
        result = func(*args, **(kwargs or {}))
        cuts = before is not None and not torch.equal(before, result)
        bends = name == "elu" and len(args) > 1 and args[1] * (args[3] if len(args) > 3 else 1) != 1
        if (name in _KINKED or cuts or bends) and name not in self.found:
            self.found.append(name)
        return result
