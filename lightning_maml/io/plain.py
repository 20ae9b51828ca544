"""Python's own numbers in place of those of numpy and of tensors, which checkpoints cannot hold or should not."""

import copy
import operator
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor


def number(value: Any, name: str) -> float:
    """Return Python's number for ``value``, a number of Python, numpy or a tensor without dimensions.

    Args:
        value: The number.
        name: What the argument is called.

    Raises:
        TypeError: If it is none.
    """
    found = _item(value)
    if not isinstance(found, Real):
        raise TypeError(f"Expected `{name}` to be a number but got {_described(value)}.")
    return int(found) if isinstance(found, Integral) else float(found)


def whole_number(value: Any, name: str) -> int:
    """Return Python's whole number for ``value``, as :func:`number` does.

    Raises:
        TypeError: If it is none.
    """
    found = _item(value)
    if not isinstance(found, Integral):
        raise TypeError(f"Expected `{name}` to be a whole number but got {_described(value)}.")
    return int(found)


def plain(value: Any) -> Any:
    """Return ``value`` with Python's numbers and strings in place of numpy's, also in dicts, lists, tuples and sets inside it.

    What holds none of numpy's is returned as it is, not copied; tensors stay tensors.
    """
    if isinstance(value, np.generic | np.ndarray):
        return _item(value)
    if isinstance(value, dict):
        keys, items = [*map(plain, value)], [*map(plain, value.values())]
        if all(map(operator.is_, keys, value)) and all(map(operator.is_, items, value.values())):
            return value
        made = copy.copy(value)  # of the same kind
        made.clear()
        made.update(zip(keys, items, strict=True))
        return made
    if type(value) in (list, tuple, set):
        items = [*map(plain, value)]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    return value


def _item(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return value


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{type(value).__name__} of shape {list(value.shape)}"
    return repr(value)
