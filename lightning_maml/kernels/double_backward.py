"""Convolution and batch norm with hand-written second derivatives, for Hessian-vector products.

Autograd's own second derivative of batch norm takes some twenty passes over the activations, and
that of a convolution uses kernels as large as the image. Here both are built from torch's kernels
for the first derivatives.
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
    """``Convolution.apply(x, weight, bias, geometry)`` returns x * W + b.

    It takes one task, or several side by side, see ``grouped_conv.py``.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.double_backward import Convolution
        >>> x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
        >>> geometry = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
        >>> Convolution.apply(x, weight, None, geometry).shape
        torch.Size([2, 4, 8, 8])
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Return the convolution of ``x``, ``[B, C, ...]``, or ``[B, T C, ...]`` for T tasks."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return convolution(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x, weight and bias."""
        x, weight = ctx.saved_tensors
        by_x, by_weight = _ConvolutionBackward.apply(
            g, x, weight, ctx.geometry, ctx.needs_input_grad[:2]
        )
        by_bias = None
        if ctx.needs_input_grad[2]:
            by_channel = g.sum([0, *range(2, g.ndim)])
            by_bias = by_channel.view(weight.shape[: 1 - x.ndim])
        by_x = None if by_x is None else _laid_out_as(x, by_x)
        return by_x, by_weight, by_bias, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients with respect to x, bilinear in g and W, and to W, bilinear in g and x."""

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
        # a gradient that is not used comes as None, and its terms are left out
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        by_x = gradient_of_images(g, x, weight, geometry) if wanted[0] else None
        by_weight = gradient_of_weight(g, x, weight, geometry) if wanted[1] else None
        return by_x, by_weight

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``<v, by x> + <u, by W> = <g, v * W + x * u>``.

        They are made of torch's own operations, which can be differentiated again.
        """
        g, x, weight = ctx.saved_tensors
        by_g = by_x = by_weight = None
        if v is not None:
            by_g = convolution(v, weight, None, ctx.geometry)
            if ctx.needs_input_grad[2]:
                by_weight = gradient_of_weight(g, v, weight, ctx.geometry)
        if u is not None:
            through_weight = convolution(x, u, None, ctx.geometry)
            by_g = through_weight if by_g is None else by_g + through_weight
            if ctx.needs_input_grad[1]:
                by_x = _laid_out_as(x, gradient_of_images(g, x, u, ctx.geometry))
        by_g = None if by_g is None else _laid_out_as(g, by_g)
        return by_g, by_x, by_weight, None, None


class BatchNorm(torch.autograd.Function):
    """``BatchNorm.apply(x, weight, bias, eps)`` returns w y + b for the weight w and the bias b.

    Here y = r (x - m) is the normalised x, m the mean of a channel over the batch, and
    r = (variance + eps)^(-1/2). It can be differentiated twice.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.double_backward import BatchNorm
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> BatchNorm.apply(x, torch.ones(1), torch.zeros(1), 0.0)
        tensor([[-1.],
                [ 1.]])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return the normalised ``x``, ``[B, C, ...]``, scaled and shifted."""
        z, m, r = torch.native_batch_norm(
            x, weight, bias, None, None, training=True, momentum=0.0, eps=eps
        )
        ctx.save_for_backward(x, weight, m, r)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x, weight and bias."""
        x, w, m, r = ctx.saved_tensors
        gradients = _BatchNormBackward.apply(
            _laid_out_as(x, g), x, w, m, r, ctx.eps, ctx.needs_input_grad[0]
        )
        return *gradients, None


class _BatchNormBackward(torch.autograd.Function):
    """The gradients w r (g - mean g - y mean(g y)), sum(g y) and sum(g).

    They are those with respect to x, w and b.
    """

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

        With means over all dimensions but the channels, n values in each of them, and

            s = mean(g y), t = mean(v y), k = mean(v g) - mean v mean g - t s,
            p = w r, q = u - p t, e = s (q - p t) + p k

        they are

            by g: p (v - mean v) + q y + c
            by x: r (q (g - mean g) - p s (v - mean v) - e y)
            by w: r n k
        """
        x = ctx.saved_tensors[1]
        v = torch.zeros_like(x) if v is None else _laid_out_as(x, v)
        with torch.no_grad():
            gradients = _BatchNormBackward._second_derivatives(ctx.saved_tensors, ctx.eps, v, u, c)
        if torch.is_grad_enabled():
            # makes a third derivative an error rather than zero
            gradients = _NotDifferentiable.apply(3, *gradients, *ctx.saved_tensors, v, u, c)
        return *gradients, None, None, None, None

    @staticmethod
    def _second_derivatives(
        saved: tuple[Tensor, ...], eps: float, v: Tensor, u: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, x, w, m, r, gy, sum_g = saved
        n = x.numel() // x.shape[1]
        # the sums over v y and v are the gradients that v in place of g gives for w and b
        _, vy, sum_v = _aten.native_batch_norm_backward(
            v, x, w, None, None, m, r, True, eps, (False, True, True)
        )
        # not in half precision, as k is a small difference of these means
        vg = (v.to(m.dtype) * g).sum([0, *range(2, x.ndim)])
        s, t, mean_g, mean_v, mean_vg = torch._foreach_div([gy, vy, sum_g, sum_v, vg], n)
        # several products in one kernel each, as they are short
        p = w * r
        k, q = torch._foreach_addcmul([mean_vg, u], [mean_v, p], [mean_g, t], value=-1)
        k, e = torch._foreach_addcmul([k, q], [t, p], [s, t], value=-1)
        e = e.mul_(s).addcmul_(p, k)
        ps, rr = torch._foreach_mul([p, r], [s, r])
        rq, rps, rre = torch._foreach_mul([q, ps, e], [r, r, rr])
        # y = r (x - m) is not computed: its terms are written in x and a constant per channel
        constants = torch._foreach_addcmul([c, rps * mean_v], [p, rq], [mean_v, mean_g], value=-1)
        of_g, of_x = torch._foreach_addcmul(constants, [rq, rre], [m, m], [-1.0, 1.0])
        by_g = _weighted_sum(of_g, (1, rq, x), (1, p, v))
        by_x = _weighted_sum(of_x, (-1, rre, x), (1, rq, g), (-1, rps, v))
        return by_g, by_x, r * k * n


class _NotDifferentiable(torch.autograd.Function):
    """``_NotDifferentiable.apply(count, *tensors)`` returns the first ``count`` tensors.

    To differentiate them with respect to any of the tensors is an error.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserRuntimeError(
            "Expected at most two derivatives of batch norm but a third was asked for; use "
            "another normalisation."
        )


def _laid_out_as(x: Tensor, g: Tensor) -> Tensor:
    """Return ``g`` with the strides of ``x``.

    Torch's CPU kernel takes several times as long if the two memory formats differ, and reads ``g``
    in a wrong order if its strides fit two formats, as they can where a dimension is 1.
    """
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


Term = tuple[int, Tensor, Tensor]
"""A sign, a number for each channel ``[C]``, and a tensor ``[B, C, ...]``."""


def _weighted_sum(constant: Tensor, first: Term, *others: Term) -> Tensor:
    """Return ``constant + sum(sign a x)`` over the terms, with a constant ``[C]``."""
    sign, a, x = first
    per_channel = (-1, *[1] * (x.ndim - 2))
    total = torch.addcmul(constant.view(per_channel), a.view(per_channel), x, value=sign)
    for sign, a, x in others:
        total.addcmul_(a.view(per_channel), x, value=sign)
    return total
