"""The forward passes of convolution, batch norm, pooling and embedding in functional networks.

Under ``vmap`` with autograd around it they compute all tasks at once, in one call of torch.
"""

import warnings
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypeIs

from lightning_maml.core.context import evaluation
from lightning_maml.errors import UserValueError
from lightning_maml.kernels.double_backward import BatchNorm, Convolution
from lightning_maml.kernels.grouped_conv import as_groups, channels_last, in_one_format
from lightning_maml.kernels.max_pooling import MaxPooling, Windows
from lightning_maml.kernels.side_by_side import for_all_tasks

# This is pooling to 1 x 1, which is cheap even if vmap loops over the tasks. The filter is never
# taken back: warnings.catch_warnings around each call would not be safe where threads run tasks.
warnings.filterwarnings(
    "ignore", "There is a performance drop .* batching rule for aten::as_strided_"
)


class TaskConvolution:
    """The forward pass of a convolution, for one task or for all tasks of a stack.

    Args:
        layer: The convolution; :func:`is_plain_convolution` must be true for it.
        channels: ``"last"`` makes images channels-last in memory on the CPU, where convolution,
            batch norm and pooling are then up to ten times faster. ``"first"`` leaves them as they
            are.
        vectorised: Whether it is called under ``vmap``.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.layers import TaskConvolution
        >>> layer = torch.nn.Conv2d(3, 4, 3)
        >>> TaskConvolution(layer, "last", vectorised=False)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, layer: Any, channels: Literal["first", "last"], vectorised: bool) -> None:
        self.channels = channels
        self._layer, self._vectorised = layer, vectorised

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer returns for ``x``, ``[B, C, ...]``."""
        layer = self._layer
        is_batch = x.ndim == len(layer.kernel_size) + 2  # torch also takes one image alone
        if is_batch and _is_side_by_side():
            return for_all_tasks(self._side_by_side, self._convolved, x, layer.weight, layer.bias)
        if is_batch and not self._vectorised and not _in_a_transform():
            return self._convolved(x, layer.weight, layer.bias)
        y: Tensor = type(layer).forward(layer, x)
        return y

    def _side_by_side(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer for all tasks, ``x`` being ``[B, T, C, ...]``."""
        tasks = x.shape[1]
        if weight.ndim < x.ndim:  # one weight without task dimension: all images are one batch
            return _unflattened(self._convolved(x.flatten(0, 1), weight, bias), 0, tasks)
        # not where the weight is expanded over the tasks, as a copy of it would be made for each
        if self._wants_channels_last(weight[0], len(x)) and weight.stride(0) > 0:
            weight = weight.movedim(2, -1).contiguous().movedim(-1, 2)
        return _unflattened(self._convolved(x.flatten(1, 2), weight, bias), 1, tasks)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer for images ``[B, C, ...]``, or ``[B, T C, ...]`` of T tasks."""
        layer = self._layer
        x, weight = _cast(x), _cast(weight)
        bias = None if bias is None else _cast(bias)
        are_stacked = weight.ndim > x.ndim
        sizes = (layer.stride, layer.padding, layer.dilation)
        stride, padding, dilation = (
            size if isinstance(size, tuple) else (size,) * (x.ndim - 2) for size in sizes
        )
        if self._wants_channels_last(x, len(x)):
            is_pointwise = set(layer.kernel_size) == {1} and not any(padding)
            if is_pointwise and max(stride) > 1:
                # Take the pixels that it reads beforehand: with a stride, oneDNN's gradient of a
                # 1x1 weight writes past the weight's end if it runs in several threads.
                x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
            x = channels_last(x)
            if not are_stacked:
                weight = channels_last(weight)  # once here, rather than in each derivative
        # stacked tasks always, as torch's own derivatives are wrong for one image in groups
        if _uses_own_derivatives(x, least=1 if are_stacked else 2):
            geometry = (stride, padding, dilation, layer.groups)
            y: Tensor = Convolution.apply(x, weight, bias, geometry)
            return y
        groups = layer.groups * (len(weight) if are_stacked else 1)
        bias = None if bias is None else bias.flatten()
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        return convolve(x, as_groups(weight, x), bias, stride, padding, dilation, groups)

    def _wants_channels_last(self, x: Tensor, examples: int) -> bool:
        # on one example alone, torch's instance norm gives a wrong gradient in that format
        if examples == 1:
            return False
        return self.channels == "last" and x.ndim == 4 and x.device.type == "cpu"


class TaskNorm:
    """The forward pass of a batch-norm layer that uses the statistics of the batch.

    Args:
        layer: The layer; its running averages are neither used nor updated.
        vectorised: Whether it is called under ``vmap``.

    Attributes:
        context: The share of the batch, from the first example on, that gives the statistics; 0 if
            the whole batch does.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.layers import TaskNorm
        >>> norm = TaskNorm(torch.nn.BatchNorm1d(1), vectorised=False)
        >>> norm(torch.tensor([[1.0], [3.0]])).round().tolist()
        [[-1.0], [1.0]]
    """

    def __init__(self, layer: _BatchNorm, vectorised: bool) -> None:
        self.context = Fraction(0)
        self._layer, self._vectorised = layer, vectorised

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, ``[B, C, ...]``.

        Raises:
            ValueError: If a channel has one value alone, which has no variance.
        """
        if x.ndim > 1 and x.numel() == x.shape[1]:
            raise UserValueError(
                "Expected several values in each channel, for batch norm's statistics of a batch, "
                "but got one example; give several at once. For single queries there is "
                "batch_norm='support' or 'running', for single support examples nn.GroupNorm."
            )
        weight, bias, eps = self._layer.weight, self._layer.bias, self._layer.eps
        if _is_side_by_side() and not self.context:
            return for_all_tasks(self._side_by_side, self._normalised, x, weight, bias)
        if not self._vectorised and not self.context and not _in_a_transform():
            return self._normalised(x, weight, bias)
        rows = int(self.context * len(x)) if self.context else len(x)
        all_but_channels = [0, *range(2, x.ndim)]
        centred = x - x[:rows].mean(all_but_channels, keepdim=True)
        # torch.var_mean takes ten times as long
        variance = centred[:rows].square().mean(all_but_channels, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        per_channel = (-1, *[1] * (x.ndim - 2))
        normalised = centred * (scale if weight is None else scale * weight.view(per_channel))
        return normalised if bias is None else normalised + bias.view(per_channel)

    def _side_by_side(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Normalise ``x``, ``[B, T, C, ...]``, as if the channels of all tasks were one layer's."""
        tasks = x.shape[1]
        weight, bias = (None if p is None else p.expand(tasks, -1).flatten() for p in parameters)
        return _unflattened(self._normalised(x.flatten(1, 2), weight, bias), 1, tasks)

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``x``, ``[B, C, ...]``, by its own statistics."""
        x = in_one_format(x)
        # The derivatives need both or neither, and of one type. With neither, torch would compute
        # the statistics of half-precision images in half precision.
        given = next((p for p in (weight, bias) if p is not None), None)
        dtype = torch.promote_types(x.dtype, torch.float32) if given is None else given.dtype
        weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight
        bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias
        # torch's derivative reads it from memory as if its stride were 1; that of a weight of one
        # channel that is expanded over the tasks is 0
        weight = weight.contiguous()
        # on a CPU always, as torch's derivative is wrong there for gradients whose strides fit two
        # memory formats
        if _uses_own_derivatives(x, least=1 if x.device.type == "cpu" else 2):
            z: Tensor = BatchNorm.apply(x, weight, bias, self._layer.eps)
            return z
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self._layer.eps)


class TaskPooling:
    """The forward pass of a pooling layer, for one task or for all tasks of a stack.

    It pools the channels of all tasks side by side, and so leaves images in the memory format of
    the layers around it; in ``vmap``'s own they would be copied, and pooled several times as
    slowly. The second derivative of max pooling leaves them in that format too.

    Args:
        layer: The layer; :func:`is_plain_pooling` must be true for it.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.layers import TaskPooling
        >>> TaskPooling(torch.nn.MaxPool2d(2))(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 3, 4, 4])
    """

    def __init__(self, layer: nn.MaxPool2d | nn.AvgPool2d) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer returns for ``x``, ``[B, C, H, W]``."""
        if x.ndim == 4 and _is_side_by_side():
            return for_all_tasks(self._side_by_side, self._pooled, x)
        return self._pooled(x)

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Pool ``x``, ``[B, T, C, H, W]``."""
        return _unflattened(self._pooled(x.flatten(1, 2)), 1, x.shape[1])

    def _pooled(self, x: Tensor) -> Tensor:
        layer = self._layer
        # on a CPU, as images have their channels last only there
        is_batch_on_cpu = x.ndim == 4 and x.device.type == "cpu"
        if isinstance(layer, nn.MaxPool2d) and is_batch_on_cpu and _uses_own_derivatives(x):
            pooled: Tensor = MaxPooling.apply(x, Windows.of(layer))
        else:
            pooled = type(layer).forward(layer, x)  # type: ignore[arg-type]
        return pooled


class TaskEmbedding:
    """The forward pass of an embedding with a padding row, under ``vmap``.

    With torch's own, autograd outside of ``vmap`` sees the embeddings of all tasks as rows of one
    table, and so would leave out the padding row of the first task only.

    Args:
        layer: The embedding; :func:`is_padded_embedding` must be true for it.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.layers import TaskEmbedding
        >>> layer = torch.nn.Embedding(10, 3, padding_idx=0)
        >>> TaskEmbedding(layer)(torch.tensor([[0, 4, 2, 0]])).shape
        torch.Size([1, 4, 3])
    """

    def __init__(self, layer: nn.Embedding) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows for the indices ``x``; the padding row gets no gradient."""
        weight = self._layer.weight
        rows = torch.arange(len(weight), device=weight.device)
        is_padding = rows.eq(self._layer.padding_idx or 0)
        return F.embedding(x, torch.where(is_padding[:, None], weight.detach(), weight))


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether ``module`` is an unmodified convolution of torch with zero padding or none.

    Padding given as a word, ``"same"`` or ``"valid"``, does not count.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    if {"forward", "_conv_forward"} & vars(module).keys():  # replaced in this object
        return False
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
    is_torchs = (
        type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward
    )
    return is_torchs and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_plain_pooling(module: nn.Module) -> TypeIs[nn.MaxPool2d | nn.AvgPool2d]:
    """Return whether ``module`` is an unmodified pooling layer of torch, and returns no indices."""
    if not isinstance(module, nn.MaxPool2d | nn.AvgPool2d) or "forward" in vars(module):
        return False
    is_torchs = type(module).forward in (nn.MaxPool2d.forward, nn.AvgPool2d.forward)
    return is_torchs and not getattr(module, "return_indices", False)


def is_padded_embedding(module: nn.Module) -> TypeIs[nn.Embedding]:
    """Return whether ``module`` is an unmodified embedding of torch with a padding row.

    Options that matter for its gradient otherwise, ``max_norm`` and ``scale_grad_by_freq``, must
    not be set.
    """
    if not isinstance(module, nn.Embedding):
        return False
    if "forward" in vars(module) or type(module).forward is not nn.Embedding.forward:
        return False
    has_other_options = module.max_norm is not None or module.scale_grad_by_freq
    return module.padding_idx is not None and not has_other_options


def _unflattened(x: Tensor, dim: int, tasks: int) -> Tensor:
    """Split ``[B T, C, ...]`` (``dim`` 0) or ``[B, T C, ...]`` (1) into ``[B, T, C, ...]``."""
    split = (-1, tasks) if dim == 0 else (tasks, -1)
    return x.reshape(*x.shape[:dim], *split, *x.shape[dim + 1 :])


def _cast(x: Tensor) -> Tensor:
    """Return ``x`` in the type that autocast, where it is on, computes convolutions in."""
    is_cast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    if not is_cast or x.dtype == torch.float64:  # which autocast leaves as it is
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _in_a_transform() -> bool:
    """Return whether the network runs the layer in a transform of ``torch.func``.

    Such transforms, and forward-mode differentiation, do not take our autograd functions.
    """
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return is_transformed or forward_ad._current_level >= 0


def _is_side_by_side() -> bool:
    """Return whether to compute a layer for all tasks of a stack at once.

    This is right only if autograd runs outside of ``vmap``, which the context announces.
    """
    now = evaluation()
    return now.stacked and now.derivatives > 0


def _uses_own_derivatives(x: Tensor, least: int = 2) -> bool:
    """Return whether to use our own autograd functions rather than torch's operations.

    They do not support complex types or transforms of ``torch.func``, and compilers cannot see
    through them.

    Args:
        x: Input of the layer.
        least: How many derivatives must be announced for them to pay, or to be needed.
    """
    if torch.compiler.is_compiling() or x.is_complex():
        return False
    if _in_a_transform():  # a layer in a stack that sees nothing of the tasks
        return False
    return evaluation().derivatives >= least
