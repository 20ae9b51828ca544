"""Finds out whether tasks in threads would meet in something that all of them write to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

_PLACES = 8
"""In how many places of a task the other one is run, besides the last ones."""

_LAST = 8
"""Before how many of the last operations it is run: they are those of the loss."""


def would_meet(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """Return whether a task gives another loss if a second one runs in its middle.

    Threads run so. Then both write to something that is none of their own copies of the network: a
    container that a hook knows, a global variable, or an attribute of the loss.

    Args:
        first: Returns the loss of a task.
        second: Returns the loss of another one, by another copy of the network.

    Examples:
        >>> import torch
        >>> from lightning_maml.checks.meeting import would_meet
        >>> kept = {}
        >>> def loss(x):
        ...     kept["x"] = x
        ...     return torch.exp(torch.zeros(())) * kept["x"]
        >>> would_meet(lambda: loss(torch.tensor(1.0)), lambda: loss(torch.tensor(2.0)))
        True
    """
    with torch.no_grad():
        with _Interrupted(second, None) as alone:
            right = first()
        calls = alone.calls
        places = {*range(0, calls, max(1, calls // _PLACES)), *range(max(0, calls - _LAST), calls)}
        # one place at a time, as what two do to the loss may cancel
        for place in sorted(places, reverse=True):
            try:
                with _Interrupted(second, place):
                    found = first()
            except Exception:  # noqa: BLE001 # what the other has left may make anything fail
                return True
            if not torch.allclose(found, right, rtol=1e-6, equal_nan=True):
                return True
    return False


class _Interrupted(TorchFunctionMode):
    """Runs something else before one of the calls of torch's functions, and counts these."""

    def __init__(self, other: Callable[[], Any], place: int | None) -> None:
        super().__init__()
        self.calls = 0
        self._other, self._place = other, place

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.calls == self._place:
            self._other()
        self.calls += 1
        return func(*args, **(kwargs or {}))
