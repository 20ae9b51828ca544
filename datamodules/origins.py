"""Where the items of a dataset come from, through subsets and concatenations.

This tells whether two splits share classes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import ConcatDataset, Subset

Label = int | str
Origin = tuple[int, Label]
"""A class of an original dataset: the ``id`` of the dataset, and the label of the class in it."""


class Source(NamedTuple):
    """The original dataset of an item.

    Attributes:
        dataset: The dataset that holds the item, which is no ``Subset`` or ``ConcatDataset``.
        number: Number of the item there.
        as_it_is: Whether the item surely has the same label there. A subclass of ``Subset`` that
            overrides ``__getitem__`` may give it another one.
    """

    dataset: Any
    number: int
    as_it_is: bool


def source(dataset: Any, number: int) -> Source:
    """Find the original dataset of an item, below subsets and concatenations.

    Args:
        dataset: A dataset, which may be a subset or concatenation of others.
        number: Number of the item in ``dataset``.
    """
    as_it_is = True
    while isinstance(dataset, (Subset, ConcatDataset)):
        kind = Subset if isinstance(dataset, Subset) else ConcatDataset
        as_it_is = as_it_is and type(dataset).__getitem__ is kind.__getitem__
        if isinstance(dataset, Subset):
            dataset, number = dataset.dataset, int(dataset.indices[number])
        else:
            part = bisect_right(dataset.cumulative_sizes, number)
            items_before = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, number = dataset.datasets[part], number - items_before
    return Source(dataset, number, as_it_is)


def origins(
    sources: Sequence[Source],
    labels: Sequence[Label],
    members: Sequence[np.ndarray],
    label_at: Callable[[Any, int], Label],
) -> list[set[Origin]]:
    """Return the origins of each class: several, if a concatenation merges classes.

    Args:
        sources: The original dataset of each item.
        labels: The label of each item.
        members: The numbers of the items of each class.
        label_at: Returns the label of an item in an original dataset, given the dataset and the
            number there. It is called only where that label may differ, as it reads the item.
    """
    of_items = [
        (id(item.dataset), label if item.as_it_is else label_at(item.dataset, item.number))
        for item, label in zip(sources, labels, strict=True)
    ]
    return [{of_items[row] for row in rows} for rows in members]
