"""Values that are made once, and again where what they were made from has changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """The value that was made last, and what it was made from.

    Attributes of a datamodule may be set between two runs, after its images were read.

    Examples:
        >>> from lightning_maml.datamodules.remembered import Remembered
        >>> remembered = Remembered()
        >>> remembered(("data", 84), lambda: "read")
        'read'
        >>> remembered(("data", 84), lambda: "read again")
        'read'
        >>> remembered(("data", 28), lambda: "read again")
        'read again'
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Value] | None = None

    def __call__(self, made_from: Any, make: Callable[[], Value]) -> Value:
        """Return the value for these settings.

        Args:
            made_from: What it is made from, such as a tuple of settings.
            make: Makes it.
        """
        if self._last is None or self._last[0] != made_from:
            self._last = None  # lets go of what may be large, before there are two
            self._last = made_from, make()
        return self._last[1]

    @contextmanager
    def forgotten_on_error(self) -> Iterator[None]:
        """Make the value again after what fails with it, because what is wrong may be mended."""
        try:
            yield
        except Exception:  # raised again, whatever it is
            self._last = None
            raise
