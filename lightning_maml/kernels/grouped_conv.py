"""Torch's convolution for one task, or for several side by side.

The images of T tasks side by side are ``[B, T C, ...]``; weight and bias have the tasks as their
first dimension. The tasks are the groups of one convolution.

Before the first inner step all tasks share one weight, which is expanded over the tasks with stride
0. The tasks are then taken for the depth of a volume, and each of its planes is convolved alone.
This is up to five times as fast as groups. Each task still gets a gradient of its own.
"""

from typing import Any

import torch
from torch import Tensor

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding and dilation, each as long as the images have dimensions, and groups per task."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution x * W + b.

    Args:
        x: Images ``[B, C, ...]`` of one task, or ``[B, T C, ...]`` of T tasks.
        weight: W, ``[O, C, ...]``, or ``[T, O, C, ...]``.
        bias: b, ``[O]``, or ``[T, O]``.
        geometry: Stride, padding, dilation and groups.
    """
    if _is_shared(weight, x) and (bias is None or bias.stride(0) == 0):
        volumes = _as_volumes(x, len(weight))
        shared_bias = None if bias is None else bias[0]
        options = _options_of_volumes(geometry)
        return _from_volumes(
            torch.convolution(volumes, _shared_kernels(weight), shared_bias, *options)
        )
    kernels = in_one_format(as_groups(weight, x))
    flat_bias = None if bias is None else bias.flatten()
    options = _options_of_groups(geometry, weight, x)
    return torch.convolution(in_one_format(x), kernels, flat_bias, *options)


def gradient_of_images(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of ``<g, x * W>`` with respect to x.

    Args:
        g: Gradient with respect to the result, of its shape.
        x: Images, see :func:`convolution`; only shape and memory format are read.
        weight: W.
        geometry: Stride, padding, dilation and groups.
    """
    wanted = (True, False, False)
    if _is_shared(weight, x):
        tasks = len(weight)
        options = _options_of_volumes(geometry)
        of_volumes, *_ = _backward(
            _as_volumes(g, tasks), _as_volumes(x, tasks), _shared_kernels(weight), options, wanted
        )
        return _from_volumes(of_volumes)
    kernels = in_one_format(as_groups(weight, x))
    options = _options_of_groups(geometry, weight, x)
    return _backward(in_one_format(g), in_one_format(x), kernels, options, wanted)[0]


def gradient_of_weight(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of ``<g, x * W>`` with respect to W, one for each task.

    Args:
        g: Gradient with respect to the result, of its shape.
        x: Images, see :func:`convolution`.
        weight: W; only its shape is read, and a shared weight is not copied for each task.
        geometry: Stride, padding, dilation and groups.
    """
    # [O] of one task or [T, O] of several, and the shape of one filter
    outputs, of_filter = weight.shape[: 1 - x.ndim], weight.shape[1 - x.ndim :]
    # torch asks for a weight of the right shape and memory format, and does not read its values
    kernels = torch.empty(
        (outputs.numel(), *of_filter),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format,
    )
    options = _options_of_groups(geometry, weight, x)
    wanted = (False, True, False)
    gradient = _backward(in_one_format(g), in_one_format(x), kernels, options, wanted)[1]
    return gradient.view(*outputs, *of_filter)


def as_groups(weight: Tensor, x: Tensor) -> Tensor:
    """Return the weights of all tasks ``[T, O, C, ...]`` as one of groups, ``[T O, C, ...]``.

    The weight of a single task is returned as it is.
    """
    return weight.flatten(0, weight.ndim - x.ndim)


def channels_last(x: Tensor) -> Tensor:
    """Return images ``[B, C, H, W]`` with their channels last in memory.

    Unlike ``Tensor.contiguous`` it gives the strides of that format even where a dimension is 1.
    """
    _, channels, height, width = x.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return x if x.stride() == strides else x.clone(memory_format=torch.channels_last)


def in_one_format(x: Tensor) -> Tensor:
    """Return ``x`` with exactly the strides of its memory format.

    Where a dimension is 1, torch also takes other strides for that format, but its convolutions in
    groups and its batch norm on the CPU give wrong results with them.
    """
    may_have_other_strides = x.ndim == 4 and 1 in x.shape and not x.is_contiguous()
    return channels_last(x) if may_have_other_strides and _is_channels_last(x) else x


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g, x, weight, None, *options, wanted
    )
    return gradients


def _options_of_groups(geometry: Geometry, weight: Tensor, x: Tensor) -> tuple[Any, ...]:
    """Return the arguments of ``torch.convolution`` that follow the bias."""
    stride, padding, dilation, groups = geometry
    tasks = len(weight) if weight.ndim > x.ndim else 1
    return stride, padding, dilation, False, [0] * len(padding), tasks * groups


def _options_of_volumes(geometry: Geometry) -> tuple[Any, ...]:
    """Return the same for volumes, where kernels are one plane deep."""
    stride, padding, dilation, groups = geometry
    return (*stride, 1), (*padding, 0), (*dilation, 1), False, [0] * 3, groups


def _is_shared(weight: Tensor, x: Tensor) -> bool:
    """Return whether the tasks share one weight, and their images can be seen as volumes.

    Without a copy they can only if their channels are last in memory.
    """
    return weight.ndim == 5 and weight.stride(0) == 0 and _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _shared_kernels(weight: Tensor) -> Tensor:
    """Return the shared weight as kernels that are one plane deep."""
    # a clone with exactly this format's strides: torch gives wrong results with others
    return weight[0].unsqueeze(-1).clone(memory_format=torch.channels_last_3d)


def _as_volumes(x: Tensor, tasks: int) -> Tensor:
    """Return images ``[B, T C, H, W]`` as volumes ``[B, C, H, W, T]``."""
    return channels_last(x).view(len(x), tasks, -1, *x.shape[2:]).permute(0, 2, 3, 4, 1)


def _from_volumes(x: Tensor) -> Tensor:
    """Return volumes ``[B, C, H, W, T]`` as images ``[B, T C, H, W]``."""
    return channels_last(x.permute(0, 4, 1, 2, 3).flatten(1, 2))
