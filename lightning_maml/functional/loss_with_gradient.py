"""A loss whose backward pass deposits a gradient that was computed elsewhere."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_maml.core.params import Params
from lightning_maml.errors import UserRuntimeError


def loss_with_gradient(
    points: Iterable[Params], gradients: Iterable[Params], query_loss: Tensor
) -> Tensor:
    """Return a scalar with the value of the mean query loss and the given gradients.

    In this way Lightning's own backward pass deposits the meta-gradient, and all that depends on it
    (all-reduce, clipping, accumulation) works. What scales the loss scales the meta-gradient, but
    not the gradients of which it was computed.

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
        ctx.points = points  # not saved: they may be written to before the backward pass
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        found = torch._foreach_mul(ctx.saved_tensors, g)
        if torch.is_grad_enabled():  # create_graph=True
            found = _WithoutDerivative.apply(*found, *ctx.points)
        return None, None, *found


class _WithoutDerivative(torch.autograd.Function):
    """``apply(*gradients, *points)``: the gradients; to differentiate them is an error."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserRuntimeError(
            "Expected one derivative of the meta-loss, whose gradient is computed before its "
            "backward pass, but a second was asked for; leave out what differentiates the "
            "meta-gradient (a gradient penalty), or take it by autograd through your own loop."
        )
