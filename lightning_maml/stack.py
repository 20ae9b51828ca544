"""What a function of one task becomes where several tasks are stacked: their tensors have the tasks in front."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from lightning_maml.functional import Params

_here = threading.local()


class Stack:
    """One task, or several as one.

    Args:
        tasks: Their number; None for one task, whose tensors have no dimension for it.
    """

    def __init__(self, tasks: int | None = None) -> None:
        self._tasks = tasks

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, of tensors of one task, as one of the tensors of all."""
        return function if self._tasks is None else torch.func.vmap(_announced(function), randomness="different")

    def shared(self, params: Params) -> Params:
        """Return ``params`` for each task, without copies."""
        return params if self._tasks is None else {name: tensor.expand(self._tasks, *tensor.shape) for name, tensor in params.items()}

    def sum(self, params: Params) -> Params:
        """Return the sum over the tasks, as that of one task; one task's own tensors are their sum."""
        return params if self._tasks is None else {name: tensor.sum(0, keepdim=True) for name, tensor in params.items()}

    @property
    def dim(self) -> int:
        """The first dimension of a task's own tensors."""
        return 0 if self._tasks is None else 1


ONE = Stack()
"""One task."""


def in_stack() -> bool:
    """Return whether this thread is inside what a stack made of a function."""
    return getattr(_here, "inside", False)


def _announced(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        before, _here.inside = in_stack(), True
        try:
            return function(*arguments)
        finally:
            _here.inside = before

    return call
