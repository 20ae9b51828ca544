"""Convolution and batch norm as a learner computes them."""

from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml.second_derivatives import BatchNorm, Convolution, times_differentiated


class TaskConvolution:
    """The forward pass of ``layer``, which :func:`is_plain_convolution`.

    Args:
        layer: The convolution.
        channels: ``"last"``: on the CPU images get their channels last in memory, on which convolution, batch norm and pooling are up to ten
            times faster. ``"first"``: they stay as they are.
    """

    def __init__(self, layer: Any, channels: Literal["first", "last"]) -> None:
        self.channels = channels
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer returns for ``x``."""
        layer = self._layer
        if x.ndim == 4 and x.device.type == "cpu" and self.channels == "last":
            x = channels_last(x)
        if x.ndim != len(layer.kernel_size) + 2 or not _writes_out_derivatives(x):
            y: Tensor = type(layer).forward(layer, x)
        else:
            y = Convolution.apply(x, layer.weight, layer.bias, (layer.stride, layer.padding, layer.dilation, layer.groups))
        return y


class TaskNorm:
    """The forward pass of ``layer`` by the statistics of the batch at hand, or of its first part, ``context``."""

    def __init__(self, layer: _BatchNorm, fused: bool) -> None:
        self.context = Fraction(0)
        self._layer, self._fused = layer, fused

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, ``[B, C, ...]``."""
        weight, bias, eps = self._layer.weight, self._layer.bias, self._layer.eps
        if self._fused and not self.context:
            if weight is None or bias is None or not _writes_out_derivatives(x):
                return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
            z: Tensor = BatchNorm.apply(x, weight, bias, eps)
            return z
        rows = int(self.context * len(x)) if self.context else len(x)
        all_but_channels = [0, *range(2, x.ndim)]
        away = x - x[:rows].mean(all_but_channels, keepdim=True)
        scale = torch.rsqrt(away[:rows].square().mean(all_but_channels, keepdim=True) + eps)  # torch.var_mean takes ten times as long
        if weight is None:
            return away * scale
        per_channel = (-1, *[1] * (x.ndim - 2))
        return away * (scale * weight.view(per_channel)) + bias.view(per_channel)


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether ``module`` is one of torch's convolutions, unchanged, that pads with zeros, if at all."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or {"forward", "_conv_forward"} & vars(module).keys():
        return False
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
    own = type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
    return own and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _writes_out_derivatives(x: Tensor) -> bool:
    """Return whether to differentiate by what is written out: it knows no mixed types, and compilers do not see through it."""
    usual = not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or x.is_complex())
    return usual and times_differentiated() == 2


def channels_last(x: Tensor) -> Tensor:
    """Return ``x``, ``[B, C, H, W]``, with its channels last in memory."""
    channels, height, width = x.shape[1:]
    if channels > 1 or x.requires_grad:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous().as_strided(
        x.shape, (height * width, 1, width, 1)
    )  # torch takes one channel for any format, and goes on in another
