"""Where a network is not twice differentiable."""

from typing import Any

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
    *("abs", "maximum", "minimum", "amax", "amin", "max", "min"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d"),
}
"""Operations, as torch names them inside: pooling in one dimension is one of two."""


class KinkWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees, while it is entered, the operations that are not twice differentiable, also those of functions, which are no layers.

    Attributes:
        found: Their names in torch, ``"relu"`` for instance, in the order of their first call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        has_kink = name in _KINKED or (name == "elu" and len(args) > 1 and args[1] * (args[3] if len(args) > 3 else 1) != 1)
        if has_kink and name not in self.found:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
