"""What a function of one task becomes if several tasks are stacked, that is, are the first dimension of its tensors."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_maml.core.context import evaluating
from lightning_maml.core.params import Params

Randomness = Literal["different", "same"]


class Stack:
    """One task, or several as one.

    Args:
        tasks: Their number; None for one task, whose tensors have no dimension for it.
        randomness: ``"different"``: each task draws random numbers of its own; ``"same"``: all draw
            the same ones, so that stacked tasks can be compared with single ones.
    """

    def __init__(self, tasks: int | None = None, randomness: Randomness = "different") -> None:
        self._tasks = tasks
        self._randomness = randomness

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which takes the tensors of one task, as a function of the tensors of all tasks."""
        return (
            function
            if self._tasks is None
            else torch.func.vmap(_stacked(function), randomness=self._randomness)
        )

    def shared(self, params: Params) -> Params:
        """Return ``params`` for each task, without copies."""
        return (
            params
            if self._tasks is None
            else {
                name: tensor.expand(self._tasks, *tensor.shape) for name, tensor in params.items()
            }
        )

    def sum(self, params: Params) -> Params:
        """Return the sum over the tasks, as tensors of a stack of one task; the tensors of a single task are their own sum."""
        return (
            params
            if self._tasks is None
            else {name: tensor.sum(0, keepdim=True) for name, tensor in params.items()}
        )

    @property
    def dim(self) -> int:
        """The first dimension of a task's own tensors."""
        return 0 if self._tasks is None else 1


ONE = Stack()
"""One task."""


def _stacked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with evaluating(stacked=True):
            return function(*arguments)

    return call
