"""Parts of messages."""

from collections.abc import Sequence


def first_five(names: Sequence[str]) -> str:
    """Return the first five names, and dots if there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
