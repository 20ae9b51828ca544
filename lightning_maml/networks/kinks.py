"""Kinks: layers and operations that are not twice differentiable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode

_KINKS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Threshold),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
"""Layers with a kink, whatever their arguments."""


def kinks(network: nn.Module) -> list[str]:
    """Return the names and types of the layers at which ``network`` is not twice differentiable."""
    found = []
    for name, module in network.named_modules():
        # with alpha 1 its slope is continuous, and only the second derivative jumps
        is_kinked_elu = isinstance(module, nn.ELU) and module.alpha != 1
        if isinstance(module, _KINKS) or is_kinked_elu:
            found.append(f"{name} ({type(module).__name__})")
    return found


_KINKED = {
    *("relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "threshold"),
    *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
    *("abs", "maximum", "minimum", "amax", "amin", "max", "min", "topk", "sort", "median"),
    *(
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
    ),
    *("adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("multi_margin_loss", "multilabel_margin_loss_forward"),
}
"""Operations with a kink, by their names in ATen, where pooling in 1D is pooling in 2D."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model calls it too
def kinked_operations(run: Callable[[], Any]) -> list[str]:
    """Return the operations in ``run()`` that are not twice differentiable.

    Unlike :func:`kinks` it also finds those that are functions rather than layers: activations,
    pooling, maxima, absolute values, and clamps that cut values off. They count even where their
    results are detached. Kinks made by masks and ``torch.where`` are not found.

    Args:
        run: Runs a network.

    Returns:
        The names of the operations in ATen, each once, in the order of their first call.
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
        if args and isinstance(args[0], Tensor) and not _is_differentiable(args[0]):
            return func(*args, **(kwargs or {}))  # lengths and masks
        # cloned, because a clamp may work in place
        before = args[0].clone() if name.startswith("clamp") else None
        result = func(*args, **(kwargs or {}))
        cuts = before is not None and not torch.equal(before, result)
        is_kinked = name in _KINKED or _is_kinked_elu(name, args) or _is_kinked_norm(name, args)
        if (is_kinked or cuts) and name not in self.found:
            self.found.append(name)
        return result


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_kinked_elu(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether an operation is ``elu(x, alpha, scale, input_scale)`` with a jump of slope."""
    if name != "elu" or len(args) < 2:
        return False
    input_scale = args[3] if len(args) > 3 else 1
    return bool(args[1] * input_scale != 1)


def _is_kinked_norm(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether an operation is a sum or a maximum of absolute values."""
    return name == "linalg_vector_norm" and len(args) > 1 and args[1] in (1, float("inf"))


def weight_normed(network: nn.Module) -> list[str]:
    """Return the names of layers under weight norm if torch gets its second derivative wrong.

    Torch 2.14 does, by most of the derivative.
    """
    found = []
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, _WeightNorm) or any(isinstance(hook, WeightNorm) for hook in hooks):
            found.append(name.split(".parametrizations.")[0])
    return found if found and not _weight_norm_has_second_derivatives() else []


def _weight_norm_has_second_derivatives() -> bool:
    """Compare a second derivative of torch's weight norm with that of its definition."""
    v = torch.tensor([[1.0, 2.0]], requires_grad=True)
    g = torch.ones(1, 1)

    def second_derivative(weight: Tensor) -> Tensor:
        loss = weight.square() @ torch.tensor([1.0, 3.0])
        (gradient,) = torch.autograd.grad(loss, v, torch.ones(1), create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), v)[0]

    with torch.inference_mode(False), torch.enable_grad():
        found = second_derivative(torch._weight_norm(v, g, 0))
        right = second_derivative(v * g / v.norm(dim=1, keepdim=True))
        return torch.allclose(found, right, rtol=1e-3)
