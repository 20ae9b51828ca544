"""Convolution and batch norm as a functional computes them."""

import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypeIs

from lightning_maml.core.context import evaluation
from lightning_maml.kernels.double_backward import BatchNorm, Convolution
from lightning_maml.kernels.grouped_conv import as_groups, channels_last, in_one_format

# pooling to 1 x 1 is cheap
warnings.filterwarnings(
    "ignore", "There is a performance drop .* batching rule for aten::as_strided_"
)


class TaskConvolution:
    """The forward pass of ``layer``, for which :func:`is_plain_convolution` must be true.

    Args:
        layer: The convolution.
        channels: ``"last"``: on the CPU images get their channels last in memory, with which
            convolution, batch norm and pooling are up to ten times faster. ``"first"``: they stay
            as they are.
        vectorised: Whether it is called under ``vmap``.
    """

    def __init__(self, layer: Any, channels: Literal["first", "last"], vectorised: bool) -> None:
        self.channels = channels
        self._layer, self._vectorised = layer, vectorised

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer returns for ``x``."""
        layer = self._layer
        is_batch = x.ndim == len(layer.kernel_size) + 2
        if is_batch and _is_side_by_side():
            try:
                y: Tensor = TaskBatchedLayer.apply(self._side_by_side, x, layer.weight, layer.bias)
            except NothingIsStackedError:
                y = self._convolved(x, layer.weight, layer.bias)
        elif is_batch and not self._vectorised and not _in_a_transform():
            y = self._convolved(x, layer.weight, layer.bias)
        else:
            y = type(layer).forward(layer, x)
        return y

    def _side_by_side(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tasks = x.shape[1]
        if weight.ndim < x.ndim:  # shared
            return _unflattened(self._convolved(x.flatten(0, 1), weight, bias), 0, tasks)
        # a shared weight is not copied for each task
        if self._wants_channels_last(weight[0]) and weight.stride(0) > 0:
            weight = weight.movedim(2, -1).contiguous().movedim(-1, 2)
        return _unflattened(self._convolved(x.flatten(1, 2), weight, bias), 1, tasks)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self._layer
        are_stacked = weight.ndim > x.ndim
        sizes = (layer.stride, layer.padding, layer.dilation)
        stride, padding, dilation = (
            size if isinstance(size, tuple) else (size,) * (x.ndim - 2) for size in sizes
        )
        if self._wants_channels_last(x):
            if set(layer.kernel_size) == {1} and max(stride) > 1 and not any(padding):
                # take what it reads beforehand: with a stride oneDNN's gradient of such a weight,
                # in several threads, writes past its end
                x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
            # the weight once, not in each derivative
            x, weight = channels_last(x), weight if are_stacked else channels_last(weight)
        # torch's own are wrong for one image in groups
        if _writes_out_derivatives(x, least=1 if are_stacked else 2):
            y: Tensor = Convolution.apply(
                x, weight, bias, (stride, padding, dilation, layer.groups)
            )
            return y
        groups = layer.groups * (len(weight) if are_stacked else 1)
        bias = None if bias is None else bias.flatten()
        return (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](
            x, as_groups(weight, x), bias, stride, padding, dilation, groups
        )

    def _wants_channels_last(self, x: Tensor) -> bool:
        return self.channels == "last" and x.ndim == 4 and x.device.type == "cpu"


class TaskNorm:
    """The forward pass of ``layer`` with the statistics of the batch at hand, or of its first part, whose share is ``context``."""

    def __init__(self, layer: _BatchNorm, vectorised: bool) -> None:
        self.context = Fraction(0)
        self._layer, self._vectorised = layer, vectorised

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, ``[B, C, ...]``."""
        weight, bias, eps = self._layer.weight, self._layer.bias, self._layer.eps
        if _is_side_by_side() and not self.context:
            try:
                z: Tensor = TaskBatchedLayer.apply(self._side_by_side, x, weight, bias)
            except NothingIsStackedError:
                z = self._normalised(x, weight, bias)
            return z
        if not self._vectorised and not self.context and not _in_a_transform():
            return self._normalised(x, weight, bias)
        rows = int(self.context * len(x)) if self.context else len(x)
        all_but_channels = [0, *range(2, x.ndim)]
        away = x - x[:rows].mean(all_but_channels, keepdim=True)
        # torch.var_mean takes ten times as long
        scale = torch.rsqrt(away[:rows].square().mean(all_but_channels, keepdim=True) + eps)
        per_channel = (-1, *[1] * (x.ndim - 2))
        normalised = away * (scale if weight is None else scale * weight.view(per_channel))
        return normalised if bias is None else normalised + bias.view(per_channel)

    def _side_by_side(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        tasks = x.shape[1]
        of_all = (None if p is None else p.expand(tasks, -1).flatten() for p in parameters)
        return _unflattened(self._normalised(x.flatten(1, 2), *of_all), 1, tasks)

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = in_one_format(x)
        # torch's second derivative fails without one of the two
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)
        elif bias is None and weight is not None:
            bias = torch.zeros_like(weight)
        if weight is None or bias is None or not _writes_out_derivatives(x):
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=self._layer.eps)
        z: Tensor = BatchNorm.apply(x, weight, bias, self._layer.eps)
        return z


class TaskEmbedding:
    """The forward pass of ``layer``, for which :func:`is_padded_embedding` must be true, under ``vmap``.

    torch's own gradient would know the padding row of the first task only: to autograd, which is
    outside of ``vmap``, the embeddings of all tasks are rows of one table.
    """

    def __init__(self, layer: nn.Embedding) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows that the indices ``x`` name; the padding row gets no gradient."""
        weight = self._layer.weight
        is_padding = torch.arange(len(weight), device=weight.device).eq(
            self._layer.padding_idx or 0
        )
        return F.embedding(x, torch.where(is_padding[:, None], weight.detach(), weight))


class NothingIsStackedError(Exception):
    """None of a layer's tensors has a dimension of tasks: the layer is computed as without ``vmap``."""


class TaskBatchedLayer(torch.autograd.Function):
    """``TaskBatchedLayer.apply(layer, x, *parameters)``: one layer for all tasks of a stack.

    ``layer(x, *parameters)`` computes it for ``x``, ``[B, T, C, ...]``, and parameters that are all
    ``[T, ...]``, or all shared. It is called outside of ``vmap``, so it may use what ``vmap`` does
    not accept.

    Raises:
        NothingIsStackedError: If no tensor has a dimension of tasks.
    """

    @staticmethod
    def forward(layer: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Refuse to compute the layer without tasks."""
        raise NothingIsStackedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: ``forward`` returns nothing."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        layer: Callable[..., Tensor],
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, int]:
        """Return the layer's results for all tasks, which are the second dimension."""
        _, of_x, *of_parameters = in_dims
        tasks: int = info.batch_size
        x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if of_x is None else x.movedim(of_x, 1)
        own = any(dim is not None for dim in of_parameters)
        stacked = [
            p
            if p is None or not own
            else p.expand(tasks, *p.shape)
            if dim is None
            else p.movedim(dim, 0)
            for p, dim in zip(parameters, of_parameters, strict=True)
        ]
        return layer(x, *stacked), 1


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether ``module`` is one of torch's convolutions, unmodified, and pads with zeros, if at all."""
    if (
        not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        or {"forward", "_conv_forward"} & vars(module).keys()
    ):
        return False
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
    own = type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
    return own and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_padded_embedding(module: nn.Module) -> TypeIs[nn.Embedding]:
    """Return whether ``module`` is torch's embedding with a padding row and nothing else that matters for its gradient."""
    if (
        not isinstance(module, nn.Embedding)
        or "forward" in vars(module)
        or type(module).forward is not nn.Embedding.forward
    ):
        return False
    return (
        module.padding_idx is not None and module.max_norm is None and not module.scale_grad_by_freq
    )


def _unflattened(x: Tensor, dim: int, tasks: int) -> Tensor:
    """Return ``x`` with the tasks as dimension 1; in the given ``x`` they share dimension ``dim`` with another one."""
    size = (-1, tasks) if dim == 0 else (tasks, -1)
    return x.reshape(*x.shape[:dim], *size, *x.shape[dim + 1 :])


def _in_a_transform() -> bool:
    """Return whether a network has put a transform of ``torch.func`` around the layer, which takes torch's own functions only."""
    return bool(torch._C._functorch.peek_interpreter_stack() is not None)


def _is_side_by_side() -> bool:
    """Return whether to compute a layer for all tasks of a stack as one: only if autograd outside of ``vmap`` was announced."""
    now = evaluation()
    return now.stacked and now.derivatives > 0


def _writes_out_derivatives(x: Tensor, least: int = 2) -> bool:
    """Return whether to use the written-out derivatives, which do not support mixed types and which compilers cannot see through."""
    usual = not (
        torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or x.is_complex()
    )
    return usual and evaluation().derivatives >= least
