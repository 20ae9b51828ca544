"""Where the items of a dataset come from, through subsets and concatenations: this tells whether splits share classes."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import ConcatDataset, Subset

Label = int | str
Origin = tuple[int, Label]
"""A class where it comes from: which dataset (its ``id``), and the label there."""


class Source(NamedTuple):
    """Where an item lies.

    Attributes:
        dataset: The dataset that holds it, which is no ``Subset`` or ``ConcatDataset``.
        number: Its number there.
        as_it_is: Whether nothing on the way may give it another label, as a subclass of ``Subset``
            with items of its own may.
    """

    dataset: Any
    number: int
    as_it_is: bool


def source(dataset: Any, number: int) -> Source:
    """Return where an item of a dataset lies."""
    as_it_is = True
    while isinstance(dataset, (Subset, ConcatDataset)):
        kind = Subset if isinstance(dataset, Subset) else ConcatDataset
        as_it_is = as_it_is and type(dataset).__getitem__ is kind.__getitem__
        if isinstance(dataset, Subset):
            dataset, number = dataset.dataset, int(dataset.indices[number])
        else:
            part = bisect_right(dataset.cumulative_sizes, number)
            number -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    return Source(dataset, number, as_it_is)


def origins(
    sources: Sequence[Source],
    labels: Sequence[Label],
    members: Sequence[np.ndarray],
    label_at: Callable[[Any, int], Label],
) -> list[set[Origin]]:
    """Return the origins of each class: several, if a concatenation merges classes of several datasets.

    Args:
        sources: Where each item lies.
        labels: Their labels.
        members: The items of each class.
        label_at: Returns the label of an item where it lies, given the dataset and the number;
            asked only if it may differ.
    """
    of_items = [
        (id(item.dataset), label if item.as_it_is else label_at(item.dataset, item.number))
        for item, label in zip(sources, labels, strict=True)
    ]
    return [{of_items[row] for row in rows} for rows in members]
