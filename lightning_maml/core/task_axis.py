"""Run a per-task function on tensors with a leading task dimension."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_maml.core.context import evaluating
from lightning_maml.core.params import Params

Randomness = Literal["different", "same"]


class TaskAxis:
    """The leading dimension of several tasks that are computed as one, or its absence.

    Args:
        tasks: Their number; None for a single task, whose tensors have no such dimension.
        randomness: ``"different"``: each task draws random numbers of its own; ``"same"``: all draw
            the same ones, so that stacked tasks can be compared with single ones.
    """

    def __init__(self, tasks: int | None = None, randomness: Randomness = "different") -> None:
        self._tasks = tasks
        self._randomness = randomness

    @property
    def size(self) -> int:
        """How many dimensions of a tensor are the tasks': 0 or 1."""
        return 0 if self._tasks is None else 1

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which takes the tensors of one task, for those of all tasks."""
        if self._tasks is None:
            return function

        def of_one_task(*arguments: Any) -> Any:
            with evaluating(stacked=True):
                return function(*arguments)

        return torch.func.vmap(of_one_task, randomness=self._randomness)

    def expand(self, params: Params) -> Params:
        """Return ``params`` for each task, without copies."""
        if self._tasks is None:
            return params
        return {name: tensor.expand(self._tasks, *tensor.shape) for name, tensor in params.items()}

    def sum(self, params: Params) -> Params:
        """Return the sum over the tasks, with a task dimension of one.

        Identity without a task dimension.
        """
        if self._tasks is None:
            return params
        small = {name: p for name, p in params.items() if p[0].numel() <= _SMALL}
        together = _sums_of_small(small)
        return {
            name: together[name] if name in together else tensor.sum(0, keepdim=True)
            for name, tensor in params.items()
        }


_SMALL = 2**12
"""Most numbers in a parameter that is summed together with others, in one kernel."""


def _sums_of_small(params: Params) -> Params:
    """Return the sums over the tasks, taken together, with a task dimension of one."""
    by_type: dict[tuple[torch.dtype, torch.device], Params] = {}
    for name, tensor in params.items():
        by_type.setdefault((tensor.dtype, tensor.device), {})[name] = tensor
    sums: Params = {}
    for alike in by_type.values():
        flat = [tensor.reshape(len(tensor), -1) for tensor in alike.values()]
        total = torch.cat(flat, 1).sum(0, keepdim=True)
        parts = torch.split(total, [x.shape[1] for x in flat], 1)
        sums |= {
            name: part.view(1, *tensor.shape[1:])
            for (name, tensor), part in zip(alike.items(), parts, strict=True)
        }
    return sums


SINGLE_TASK = TaskAxis()
"""No task dimension."""
