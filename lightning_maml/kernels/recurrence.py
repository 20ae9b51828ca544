"""The forward pass of recurrent layers in functional networks."""

import threading
from typing import Any

import torch
from torch import nn

# cuDNN is switched off for the whole process; a layer of one's own may call another one
_SWITCH = threading.RLock()


class TaskRecurrence:
    """The forward pass of an LSTM, a GRU or an RNN, without cuDNN where derivatives are taken.

    cuDNN's recurrent kernels have no second derivative, and no derivative at all in evaluation
    mode, in which networks are adapted too; torch's own kernels have both.

    Args:
        layer: The layer.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.recurrence import TaskRecurrence
        >>> outputs, _ = TaskRecurrence(torch.nn.GRU(3, 4))(torch.rand(5, 2, 3))
        >>> outputs.shape
        torch.Size([5, 2, 4])
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        self._layer = layer

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the layer returns."""
        layer = self._layer
        is_cuda = any(getattr(given, "is_cuda", False) for given in (*inputs, *named.values()))
        if not is_cuda or not torch.is_grad_enabled():
            return type(layer).forward(layer, *inputs, **named)
        with _SWITCH, torch.backends.cudnn.flags(enabled=False):
            return type(layer).forward(layer, *inputs, **named)
