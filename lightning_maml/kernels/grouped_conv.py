"""Torch's convolution for one task, or for several side by side.

The images of T tasks side by side are ``[B, T C, ...]``; weight and bias have the tasks as their
first dimension. The tasks are the groups of one convolution.

Before the first inner step all tasks share one weight, which is expanded over the tasks with stride
0. No groups are needed then, and no copies of the images: if they are contiguous in memory, all
images of all tasks are one batch; if channels are last, the tasks are taken for the depth of a
volume, and each of its planes is convolved alone. With small images this is several times as fast
as groups. Each task still gets a gradient of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    shared = _without_groups(weight, x, geometry)
    if shared is not None and (bias is None or bias.stride(0) == 0):
        shared_bias = None if bias is None else bias[0]
        return shared.apart(
            torch.convolution(shared.together(x), shared.kernels, shared_bias, *shared.options)
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
    shared = _without_groups(weight, x, geometry)
    if shared is not None:
        gradient, *_ = _backward(
            shared.together(g), shared.together(x), shared.kernels, shared.options, wanted
        )
        return shared.apart(gradient)
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


class _WithoutGroups(NamedTuple):
    """How tasks that share a weight are computed in one convolution without groups for each."""

    together: Callable[[Tensor], Tensor]
    """Turns images ``[B, T C, ...]`` into what is convolved."""
    apart: Callable[[Tensor], Tensor]
    """Turns a result back into ``[B, T O, ...]``."""
    kernels: Tensor
    options: tuple[Any, ...]
    """The arguments of ``torch.convolution`` that follow the bias."""


def _without_groups(weight: Tensor, x: Tensor, geometry: Geometry) -> _WithoutGroups | None:
    """Return how to do without groups.

    None if tasks have weights of their own, or if their images would have to be copied.
    """
    if weight.ndim == x.ndim or weight.stride(0) > 0:
        return None
    tasks = len(weight)
    stride, padding, dilation, groups = geometry
    if _is_channels_last(x):
        # a clone with exactly this format's strides: torch gives wrong results with others
        planes = weight[0].unsqueeze(-1).clone(memory_format=torch.channels_last_3d)
        options = (*stride, 1), (*padding, 0), (*dilation, 1), False, [0] * 3, groups
        return _WithoutGroups(partial(_as_volumes, tasks=tasks), _from_volumes, planes, options)
    if x.is_contiguous():
        options = stride, padding, dilation, False, [0] * len(padding), groups
        as_batch, from_batch = partial(_as_batch, tasks=tasks), partial(_from_batch, tasks=tasks)
        return _WithoutGroups(as_batch, from_batch, weight[0], options)
    return None


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _as_volumes(x: Tensor, tasks: int) -> Tensor:
    """Return images ``[B, T C, H, W]`` as volumes ``[B, C, H, W, T]``."""
    of_task = x.shape[1] // tasks
    by_task = channels_last(x).view(len(x), tasks, of_task, *x.shape[2:])
    return by_task.permute(0, 2, 3, 4, 1)


def _from_volumes(x: Tensor) -> Tensor:
    """Return volumes ``[B, C, H, W, T]`` as images ``[B, T C, H, W]``."""
    return channels_last(x.permute(0, 4, 1, 2, 3).flatten(1, 2))


def _as_batch(x: Tensor, tasks: int) -> Tensor:
    """Return images ``[B, T C, ...]`` of T tasks as one batch ``[B T, C, ...]``."""
    return x.reshape(len(x) * tasks, x.shape[1] // tasks, *x.shape[2:])


def _from_batch(x: Tensor, tasks: int) -> Tensor:
    """Return a batch ``[B T, C, ...]`` as images ``[B, T C, ...]`` of T tasks."""
    return x.reshape(len(x) // tasks, x.shape[1] * tasks, *x.shape[2:])
