"""What a function of one task becomes where several tasks are stacked: their tensors have the tasks in front."""

from collections.abc import Callable
from typing import Any

import torch

from lightning_maml.functional import Params


class Stack:
    """One task, or several as one.

    Args:
        tasks: Their number; None for one task, whose tensors have no dimension for it.
    """

    def __init__(self, tasks: int | None = None) -> None:
        self._tasks = tasks

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, of tensors of one task, as one of the tensors of all."""
        return function if self._tasks is None else torch.func.vmap(function, randomness="different")

    def shared(self, params: Params) -> Params:
        """Return ``params`` for each task, without copies."""
        return params if self._tasks is None else {name: tensor.expand(self._tasks, *tensor.shape) for name, tensor in params.items()}

    @property
    def dim(self) -> int:
        """The first dimension of a task's own tensors."""
        return 0 if self._tasks is None else 1


ONE = Stack()
"""One task."""
