"""Parts of messages."""

from collections.abc import Iterable
from itertools import islice


def first_five(items: Iterable[object]) -> str:
    """Return the first five items as text, and dots if there are more."""
    first = [str(item) for item in islice(items, 6)]
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")
