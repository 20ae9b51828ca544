"""Convolution and batch norm with their second derivatives written out, for use in Hessian-vector products.

Autograd's own second derivative of batch norm takes some twenty passes over the activations, and
that of a convolution runs kernels as large as its image. Here both are built from the kernels of
their first derivatives.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_maml.errors import UserRuntimeError
from lightning_maml.kernels.grouped_conv import (
    Geometry,
    convolution,
    gradient_of_images,
    gradient_of_weight,
)

_aten = torch.ops.aten


class Convolution(torch.autograd.Function):
    """``Convolution.apply(x, weight, bias, geometry)``: x * W + b, of one task or of several side by side, see ``grouped_conv.py``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Return it for ``x``, ``[B, C, ...]``, or ``[B, T C, ...]``."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return convolution(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        x, weight = ctx.saved_tensors
        by_x, by_weight = _ConvolutionBackward.apply(
            g, x, weight, ctx.geometry, ctx.needs_input_grad[:2]
        )
        by_bias = (
            g.sum([0, *range(2, g.ndim)]).view(weight.shape[: 1 - x.ndim])
            if ctx.needs_input_grad[2]
            else None
        )
        return by_x, by_weight, by_bias, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients with respect to x and W, bilinear in g and the other of the two."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        by_x = gradient_of_images(g, x, weight, geometry) if wanted[0] else None
        return by_x, gradient_of_weight(g, x, weight, geometry) if wanted[1] else None

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients, which torch can differentiate again, of ``<v, by x> + <u, by W> = <g, v * W + x * u>``."""
        g, x, weight = ctx.saved_tensors
        by_g = by_x = by_weight = None
        if v is not None:
            by_g = convolution(v, weight, None, ctx.geometry)
            by_weight = (
                gradient_of_weight(g, v, weight, ctx.geometry) if ctx.needs_input_grad[2] else None
            )
        if u is not None:
            through_weight = convolution(x, u, None, ctx.geometry)
            by_g = through_weight if by_g is None else by_g + through_weight
            by_x = gradient_of_images(g, x, u, ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_g, by_x, by_weight, None, None


class BatchNorm(torch.autograd.Function):
    """``BatchNorm.apply(x, weight, bias, eps)``: w y + b, where y = r (x - m), m is a channel's mean and r = (variance + eps)^(-1/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return it for ``x``, ``[B, C, ...]``."""
        z, m, r = torch.native_batch_norm(
            x, weight, bias, None, None, training=True, momentum=0.0, eps=eps
        )
        ctx.save_for_backward(x, weight, m, r)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        return *_BatchNormBackward.apply(
            g, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[0]
        ), None


class _BatchNormBackward(torch.autograd.Function):
    """The gradients with respect to x, w and b: w r (g - mean g - y mean(g y)), sum(g y) and sum(g)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, m: Tensor, r: Tensor, eps: float, of_x: bool
    ) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _aten.native_batch_norm_backward(
            g, x, w, None, None, m, r, True, eps, (of_x, True, True)
        )
        ctx.save_for_backward(g, x, w, m, r, *gradients[1:])
        ctx.eps = eps
        return gradients

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``<v, by x> + <u, by w> + <c, by b>``.

        With means over all but the channels, s = mean(g y), t = mean(v y), k = mean(v g) - mean v
        mean g - t s, p = w r, q = u - p t and e = s (q - p t) + p k they are

            by g: p (v - mean v) + q y + c
            by x: r (q (g - mean g) - p s (v - mean v) - e y)
            by w: r n k
        """
        v = torch.zeros_like(ctx.saved_tensors[1]) if v is None else v
        with torch.no_grad():
            gradients = _BatchNormBackward._second_derivatives(ctx.saved_tensors, ctx.eps, v, u, c)
        if torch.is_grad_enabled():
            gradients = _Last.apply(3, *gradients, *ctx.saved_tensors, v, u, c)
        return *gradients, None, None, None, None

    @staticmethod
    def _second_derivatives(
        saved: tuple[Tensor, ...], eps: float, v: Tensor, u: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, x, w, m, r, gy, sum_g = saved
        n = x.numel() // x.shape[1]
        _, vy, sum_v = _aten.native_batch_norm_backward(
            v, x, w, None, None, m, r, True, eps, (False, True, True)
        )
        s, t, mean_g, mean_v = gy / n, vy / n, sum_g / n, sum_v / n
        k = (v * g).sum([0, *range(2, x.ndim)]) / n - mean_v * mean_g - t * s
        p = w * r
        q = u - p * t
        e = s * (q - p * t) + p * k
        by_g = _combined(c - p * mean_v - q * r * m, (q * r, x), (p, v))
        by_x = _combined(
            r * (p * s * mean_v - q * mean_g + e * r * m),
            (-e * r * r, x),
            (r * q, g),
            (-r * p * s, v),
        )
        return by_g, by_x, r * n * k


class _Last(torch.autograd.Function):
    """``_Last.apply(count, *tensors)``: the first ``count`` tensors, which cannot be differentiated with respect to the others."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserRuntimeError(
            "Expected at most two derivatives of batch norm but a third was asked for; use "
            "another normalisation."
        )


def _combined(
    constant: Tensor, first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]
) -> Tensor:
    """Return ``constant + sum(a x)`` over pairs (a, x), where the constant and each a are ``[C]`` and each x ``[B, C, ...]``."""
    per_channel = (-1, *[1] * (first[1].ndim - 2))
    total = torch.addcmul(constant.view(per_channel), first[0].view(per_channel), first[1])
    for a, x in others:
        total.addcmul_(a.view(per_channel), x)
    return total
