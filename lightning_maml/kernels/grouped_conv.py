"""torch's convolution for one task or several: in groups, or as one convolution where all tasks have the same weight.

The images of T tasks side by side are ``[B, T C, ...]``; weight and bias have the tasks as their
first dimension. Before the first inner step all tasks share one weight, expanded over the tasks
with stride 0. It is applied as if the tasks were the depth of a volume whose planes are each
convolved alone, which is up to five times as fast as in groups. Each task still gets a gradient of
its own.
"""

from typing import Any

import torch
from torch import Tensor

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation, and the groups of one task."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return x * W + b, where ``x`` is ``[B, C, ...]`` and W ``[O, C, ...]``, or ``[B, T C, ...]`` and ``[T, O, C, ...]``."""
    if _is_one_for_all(weight, x) and (bias is None or bias.stride(0) == 0):
        of_one = _of_one(weight), None if bias is None else bias[0]
        return _side_by_side(
            torch.convolution(_in_depth(x, len(weight)), *of_one, *_over_depth(geometry))
        )
    kernels = in_one_format(as_groups(weight, x))
    return torch.convolution(
        in_one_format(x),
        kernels,
        None if bias is None else bias.flatten(),
        *_in_groups(geometry, weight, x),
    )


def gradient_of_images(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of ``<g, x * W>`` with respect to x, whose values are not read."""
    if _is_one_for_all(weight, x):
        volumes = _in_depth(g, len(weight)), _in_depth(x, len(weight))
        return _side_by_side(
            _backward(*volumes, _of_one(weight), _over_depth(geometry), (True, False, False))[0]
        )
    kernels = in_one_format(as_groups(weight, x))
    return _backward(
        in_one_format(g),
        in_one_format(x),
        kernels,
        _in_groups(geometry, weight, x),
        (True, False, False),
    )[0]


def gradient_of_weight(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of ``<g, x * W>`` with respect to W, whose values are neither read nor copied for each task."""
    tasks = weight.shape[: 1 - x.ndim]
    of_format = torch.channels_last if _is_last(x) else torch.contiguous_format
    kernels = torch.empty(
        (tasks.numel(), *weight.shape[1 - x.ndim :]),
        dtype=x.dtype,
        device=x.device,
        memory_format=of_format,
    )
    gradient = _backward(
        in_one_format(g),
        in_one_format(x),
        kernels,
        _in_groups(geometry, weight, x),
        (False, True, False),
    )[1]
    return gradient.view(*tasks, *weight.shape[1 - x.ndim :])


def as_groups(weight: Tensor, x: Tensor) -> Tensor:
    """Return the weights of all tasks as that of one convolution in groups; the weight of a single task already is one."""
    return weight.flatten(0, weight.ndim - x.ndim)


def channels_last(x: Tensor) -> Tensor:
    """Return ``x``, ``[B, C, H, W]``, with its channels last in memory, and with the strides of that format even where a dimension is 1."""
    _, channels, height, width = x.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return x if x.stride() == strides else x.clone(memory_format=torch.channels_last)


def in_one_format(x: Tensor) -> Tensor:
    """Return ``x`` with exactly the strides of its memory format.

    Where a dimension is 1, other strides pass for that format too, but torch's convolutions in
    groups and batch norm on the CPU are wrong with them.
    """
    is_last = (
        x.ndim == 4
        and 1 in x.shape
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    return channels_last(x) if is_last else x


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g, x, weight, None, *options, wanted
    )
    return gradients


def _in_groups(geometry: Geometry, weight: Tensor, x: Tensor) -> tuple[Any, ...]:
    stride, padding, dilation, groups = geometry
    tasks = len(weight) if weight.ndim > x.ndim else 1
    return stride, padding, dilation, False, [0] * len(padding), tasks * groups


def _over_depth(geometry: Geometry) -> tuple[Any, ...]:
    stride, padding, dilation, groups = geometry
    return (*stride, 1), (*padding, 0), (*dilation, 1), False, [0] * 3, groups


def _is_one_for_all(weight: Tensor, x: Tensor) -> bool:
    """Return whether the tasks share one weight and can be planes of a volume, for which their images need the channels last."""
    return weight.ndim == 5 and weight.stride(0) == 0 and _is_last(x)


def _is_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _of_one(weight: Tensor) -> Tensor:
    # with that format's strides: with others torch is wrong
    return weight[0].unsqueeze(-1).clone(memory_format=torch.channels_last_3d)


def _in_depth(x: Tensor, tasks: int) -> Tensor:
    """Return images ``[B, T C, H, W]`` as volumes ``[B, C, H, W, T]``."""
    return channels_last(x).view(len(x), tasks, -1, *x.shape[2:]).permute(0, 2, 3, 4, 1)


def _side_by_side(x: Tensor) -> Tensor:
    return channels_last(x.permute(0, 4, 1, 2, 3).flatten(1, 2))
