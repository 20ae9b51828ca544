"""Errors that a user can mend, each with one sentence that says how.

Their type decides what the command shows without a traceback. Each is one of Python's errors too,
so that code which catches ``ValueError`` catches them.
"""

import numpy as np
import torch


class UserError(Exception):
    """Something that is not as it has to be, and that the user can mend."""


class UserValueError(UserError, ValueError):
    """A value that is out of range, or that does not fit another one."""


class UserTypeError(UserError, TypeError):
    """A value of another type."""


class UserRuntimeError(UserError, RuntimeError):
    """Something that only showed while it ran."""


class UserOutOfMemoryError(UserError, torch.OutOfMemoryError):
    """A device without enough memory."""


class UserFloatingPointError(UserError, FloatingPointError):
    """A number that is not finite."""


class UserOSError(UserError, OSError):
    """A file that cannot be read or written."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file that is not there."""


class UserModuleNotFoundError(UserError, ModuleNotFoundError):
    """A package that is not installed."""


def check_truth(**values: bool) -> None:
    """Refuse arguments that are neither True nor False: the string "False" would count as true.

    Args:
        **values: The arguments, by name.

    Raises:
        TypeError: If one is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise UserTypeError(f"Expected `{name}` to be True or False but got {value!r}.")
