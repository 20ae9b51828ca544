"""Parts of messages, and the message of what was found."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def first_five(items: Iterable[object]) -> str:
    """Return the first five items as text, and dots if there are more."""
    first = [str(item) for item in islice(items, 6)]
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")


def say_what_was_found(
    dataset: str,
    where: str,
    sizes: Mapping[str, Sequence[int]],
    published: Mapping[str, int] | None = None,
) -> None:
    """Log the number of classes and images of each split, and warn if they are not all there.

    Args:
        dataset: Name of the dataset.
        where: Where it was found.
        sizes: The number of images of each class of each split.
        published: How many images each split should have, if that is known.
    """
    counts = {split: sum(of_split) for split, of_split in sizes.items()}
    found = "; ".join(
        f"{split} {len(of_split)} classes, {counts[split]} images"
        for split, of_split in sizes.items()
    )
    rank_zero_info(f"{dataset} from {where}: {found}")
    if published is not None and counts != published:
        expected = ", ".join(f"{count} {split}" for split, count in published.items())
        rank_zero_warn(
            f"{dataset} in {where} has other numbers of images than published ({expected}); "
            "accuracies will not compare with others'."
        )
