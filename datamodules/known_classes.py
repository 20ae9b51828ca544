"""Which classes the pipelines of other libraries draw from, as far as they tell: splits must not share any."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from torch import Tensor

from lightning_maml.datamodules.class_splits import check_disjoint
from lightning_maml.datamodules.origins import Source, source

Known = Callable[[Any], dict[Any, Source]]
"""Returns one item of each class that is drawn from, by its label; nothing if that is not known."""

_KEEP_ALL_CLASSES = {
    "NWays",
    "KShots",
    "FusedNWaysKShots",
    "LoadData",
    "RemapLabels",
    "ConsecutiveLabels",
}


def check_splits(known: Known, **splits: Any) -> None:
    """Check that no class is in two splits, as far as their classes are known.

    A class is that of the same label in the same dataset, below subsets and concatenations.

    Args:
        known: Returns the classes of a split.
        **splits: What each split draws its tasks from; None if there is no such split.

    Raises:
        ValueError: If two splits are the same thing, or share a class.
    """
    given = {name: tasks for name, tasks in splits.items() if tasks is not None}
    for one, other in combinations(given, 2):
        if given[one] is given[other]:
            raise ValueError(
                f"Expected `{one}` and `{other}` to draw from different classes but they are the "
                f"same {type(given[one]).__name__}; few-shot learning is tested on classes it was "
                "not trained on. Leave one of them out, or give it others."
            )
        classes = {name: known(given[name]) for name in (one, other)}
        shared = set.intersection(
            *({id(item.dataset) for item in items.values()} for items in classes.values())
        )
        # reading an item may draw random numbers, so it is done only if two splits are taken from
        # one dataset
        origins = [_origins(items, shared) for items in classes.values()]
        labels = [label for _, label in origins[0] & origins[1]]
        check_disjoint({one: labels, other: labels}, f"`{one}` and `{other}`")


def _origins(classes: dict[Any, Source], datasets: set[int]) -> set[tuple[int, str]]:
    """Return the dataset and the label there of each class that comes from some of the datasets."""
    found = set()
    for item in classes.values():
        pair = item.dataset[item.number] if id(item.dataset) in datasets else None
        if isinstance(pair, (tuple, list)) and len(pair) > 1:
            label = pair[1].item() if isinstance(pair[1], Tensor) and pair[1].ndim == 0 else pair[1]
            found.add((id(item.dataset), str(label)))
    return found


def of_learn2learn(taskset: Any) -> dict[Any, Source]:
    """Return an item of each class of a taskset, unless its transforms may leave out classes."""
    dataset, transforms = (
        getattr(taskset, "dataset", None),
        getattr(taskset, "task_transforms", None) or (),
    )
    items = getattr(dataset, "labels_to_indices", None)
    keeps_all = all(type(each).__name__ in _KEEP_ALL_CLASSES for each in transforms)
    if (
        dataset is None
        or not hasattr(dataset, "dataset")
        or not isinstance(items, Mapping)
        or not keeps_all
    ):
        return {}
    return {label: source(dataset.dataset, int(numbers[0])) for label, numbers in items.items()}


def of_easyfsl(loader: Any) -> dict[Any, Source]:
    """Return an item of each class of a loader with easyfsl's ``TaskSampler``."""
    items = getattr(getattr(loader, "batch_sampler", None), "items_per_label", None)
    if not isinstance(items, Mapping):
        return {}
    return {label: source(loader.dataset, int(numbers[0])) for label, numbers in items.items()}
