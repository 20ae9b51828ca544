"""Python's own numbers in place of those of numpy and of tensors.

Checkpoints that are read without running code cannot hold numpy's, and need not hold tensors for
single numbers.
"""

import copy
import operator
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from lightning_maml.errors import UserTypeError


def number(value: Any, name: str) -> float:
    """Return ``value`` as Python's number.

    Args:
        value: A number of Python or numpy, or a tensor without dimensions.
        name: What the argument is called, for the error.

    Returns:
        An int if it is whole by type, else a float.

    Raises:
        TypeError: If it is not a number.

    Examples:
        >>> import torch
        >>> from lightning_maml.io.plain import number
        >>> number(torch.tensor(0.5), "scale")
        0.5
    """
    found = _item(value)
    if not isinstance(found, Real):
        raise UserTypeError(f"Expected `{name}` to be a number but got {_described(value)}.")
    return int(found) if isinstance(found, Integral) else float(found)


def whole_number(value: Any, name: str) -> int:
    """Return ``value`` as Python's int.

    Args:
        value: A whole number of Python or numpy, or a tensor without dimensions.
        name: What the argument is called, for the error.

    Raises:
        TypeError: If it is not a whole number.

    Examples:
        >>> import numpy as np
        >>> from lightning_maml.io.plain import whole_number
        >>> whole_number(np.int64(5), "tasks")
        5
    """
    found = _item(value)
    if not isinstance(found, Integral):
        raise UserTypeError(f"Expected `{name}` to be a whole number but got {_described(value)}.")
    return int(found)


def plain(value: Any) -> Any:
    """Return ``value`` with Python's numbers and strings in place of numpy's.

    Dicts, lists, tuples and sets are converted with what is in them; a container without numpy's
    numbers is returned as it is, not copied. Tensors stay tensors.

    Args:
        value: Anything.

    Examples:
        >>> import numpy as np
        >>> from lightning_maml.io.plain import plain
        >>> plain({"lr": np.float64(0.1), "steps": [np.int64(5)]})
        {'lr': 0.1, 'steps': [5]}
    """
    if isinstance(value, np.generic | np.ndarray):
        return _item(value)
    if isinstance(value, dict):
        keys = [plain(key) for key in value]
        items = [plain(item) for item in value.values()]
        if _are_same(keys, value) and _are_same(items, value.values()):
            return value
        # keep the type: OrderedDict, defaultdict and the like
        made = copy.copy(value)
        made.clear()
        made.update(zip(keys, items, strict=True))
        return made
    if type(value) in (list, tuple, set):
        items = [plain(item) for item in value]
        return value if _are_same(items, value) else type(value)(items)
    return value


def _are_same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    return all(map(operator.is_, first, second))


def _item(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return value


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{type(value).__name__} of shape {list(value.shape)}"
    return repr(value)
