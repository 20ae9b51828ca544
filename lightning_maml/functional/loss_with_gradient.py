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
        ctx.save_for_backward(*gradients, *points)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients, points = _halves(ctx.saved_tensors)
        found = tuple(g * gradient for gradient in gradients)
        if torch.is_grad_enabled():  # create_graph=True
            found = _WithoutDerivative.apply(*found, *points)
        return None, None, *found


class _WithoutDerivative(torch.autograd.Function):
    """``apply(*gradients, *points)``: the gradients; to differentiate them is an error."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        gradients, _ = _halves(tensors)
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserRuntimeError(
            "Expected one derivative of the meta-loss, whose gradient is computed before its "
            "backward pass, but a second was asked for; leave out what differentiates the "
            "meta-gradient (a gradient penalty), or take it by autograd through your own loop."
        )


def _halves(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    middle = len(tensors) // 2
    return tensors[:middle], tensors[middle:]
