"""Max pooling whose second derivative keeps the memory format of its images.

Torch's own returns its gradients with channels first, whatever the images have, so that the layers
before it add and multiply tensors of two formats, which takes a CPU ten times as long. It also
keeps its images until they are needed, though only their shape is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_aten = torch.ops.aten

Size = int | tuple[int, ...]


class Windows(NamedTuple):
    """What is pooled, as ``nn.MaxPool2d`` takes it."""

    kernel_size: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool

    @classmethod
    def of(cls, layer: nn.MaxPool2d) -> "Windows":
        """Return those of a layer."""
        return cls(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)


class MaxPooling(torch.autograd.Function):
    """``MaxPooling.apply(x, windows)`` returns the largest number of each window.

    It can be differentiated any number of times.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.max_pooling import MaxPooling, Windows
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> MaxPooling.apply(x, Windows(2, 2, 0, 1, False))
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows) -> Tensor:
        """Return the pooled ``x``, ``[B, C, H, W]``."""
        y, indices = _aten.max_pool2d_with_indices(x, *windows)
        ctx.save_for_backward(indices)
        ctx.windows, ctx.shape, ctx.strides = windows, x.shape, x.stride()
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to x."""
        (indices,) = ctx.saved_tensors
        # torch asks for images of the right shape and memory format, and does not read them
        x = torch.empty_strided(ctx.shape, ctx.strides, dtype=g.dtype, device=g.device)
        return _MaxPoolingBackward.apply(g, x, indices, ctx.windows), None


class _MaxPoolingBackward(torch.autograd.Function):
    """The gradient with respect to x: g where the largest numbers were, and zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, indices: Tensor, windows: Windows) -> Tensor:
        ctx.save_for_backward(indices)
        by_x: Tensor = _aten.max_pool2d_with_indices_backward(g, x, *windows, indices)
        return by_x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """Return v from where the largest numbers were, which can be differentiated again."""
        (indices,) = ctx.saved_tensors
        if indices.is_contiguous():
            by_g = v.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
            return by_g, None, None, None
        # the same in the order that numbers with channels last have in memory
        pixels, places = v.permute(0, 2, 3, 1), indices.permute(0, 2, 3, 1)
        by_g = pixels.flatten(1, 2).gather(1, places.flatten(1, 2)).view(places.shape)
        return by_g.permute(0, 3, 1, 2), None, None, None
