"""Where a network is not twice differentiable."""

from torch import nn

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
