"""The forward pass of recurrent layers in functional networks."""

from typing import Any

import torch
from torch import nn


class TaskRecurrence:
    """The forward pass of an LSTM, a GRU or an RNN, which on a GPU leaves cuDNN out.

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
        x = inputs[0] if inputs else named["input"]  # a tensor, or a PackedSequence
        # the flag is that of the process, and on a CPU tasks may run in several threads
        if not x.is_cuda:
            return type(self._layer).forward(self._layer, *inputs, **named)
        with torch.backends.cudnn.flags(enabled=False):
            return type(self._layer).forward(self._layer, *inputs, **named)
