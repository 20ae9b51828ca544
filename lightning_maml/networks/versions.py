"""Which tensors are written to in place."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Versions:
    """Tells which of some tensors are written to in place, with whatever values.

    Inference tensors cannot be watched.

    Examples:
        >>> import torch
        >>> x, y = torch.ones(3), torch.ones(3)
        >>> versions = Versions([("x", x), ("y", y)])
        >>> y *= 1
        >>> versions.changed()
        ['y']

    Args:
        tensors: Names, or whatever else tells them apart, and the tensors.
    """

    def __init__(self, tensors: Iterable[tuple[Any, Tensor]]) -> None:
        self._tensors = {name: x for name, x in tensors if not x.is_inference()}
        self._before = {name: x._version for name, x in self._tensors.items()}

    def changed(self) -> list[Any]:
        """Return the names of those that were written to since this was made."""
        return [name for name, x in self._tensors.items() if x._version != self._before[name]]
