"""A loss whose backward pass deposits a gradient that was computed elsewhere."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_maml.core.params import Params


def loss_with_gradient(
    points: Iterable[Params], gradients: Iterable[Params], query_loss: Tensor
) -> Tensor:
    """Return a scalar with the value of the mean query loss and the given gradients.

    In this way Lightning's own backward pass deposits the meta-gradient, and all that depends on it
    (all-reduce, scaling, clipping, accumulation) works.

    Args:
        points: The network's parameters, and its inner rates.
        gradients: Their gradients.
        query_loss: The query loss of each task, ``[T]``.
    """
    pairs = [
        (point[name], gradient[name])
        for point, gradient in zip(points, gradients, strict=True)
        for name in gradient
    ]
    value: Tensor = _WithGradients.apply(
        query_loss.mean(), [gradient for _, gradient in pairs], *(point for point, _ in pairs)
    )
    return value


class _WithGradients(torch.autograd.Function):
    """``apply(value, gradients, *points)``: the value, with these gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *points: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(g * gradient for gradient in ctx.saved_tensors)
