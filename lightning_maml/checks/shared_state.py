"""Detects whether tasks share state outside of their copies of the network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_maml.core.tensors import raise_if_out_of_memory

_PLACES = 32
"""Before how many of a task's operations, evenly spaced, the other task is run."""

_LAST = 8
"""It is also run before each of so many last ones, which are those of the loss."""


def share_state(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """Return whether a task gives another loss if a second one runs in the middle of it.

    Threads run so. Then both write to something outside of their own copies of the network: a
    container that a hook knows, a global variable, or an attribute of the loss.

    Args:
        first: Returns the loss of a task.
        second: Returns the loss of another one, by another copy of the network.

    Raises:
        RuntimeError: If there is no memory for two tasks at once.

    Examples:
        >>> import torch
        >>> from lightning_maml.checks.shared_state import share_state
        >>> kept = {}
        >>> def loss(x):
        ...     kept["x"] = x
        ...     return torch.exp(torch.zeros(())) * kept["x"]
        >>> share_state(lambda: loss(torch.tensor(1.0)), lambda: loss(torch.tensor(2.0)))
        True
    """
    with torch.enable_grad():  # some layers write with gradients only
        with _Interrupted(second, None) as alone:
            right = first().detach()
        calls = alone.calls
        spaced = {calls * number // _PLACES for number in range(_PLACES)}
        places = spaced | {*range(max(0, calls - _LAST), calls)}
        # one place at a time, as what two do to the loss may cancel
        for place in sorted(places, reverse=True):
            try:
                with _Interrupted(second, place):
                    found = first().detach()
            except Exception as error:  # noqa: BLE001 # what the other has left may fail anything
                raise_if_out_of_memory(error)
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
