"""Which classes the pipelines of other libraries draw from, as far as that is known.

It serves to refuse splits that share classes.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from torch import Tensor

from lightning_maml.datamodules.class_splits import check_disjoint
from lightning_maml.datamodules.origins import Source, source
from lightning_maml.errors import UserValueError

Known = Callable[[Any], dict[Any, Source]]
"""Returns one item of each class that a split draws from, by label; none if this is not known."""

# learn2learn's transforms that leave out no class of a dataset
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

    Two classes are the same if they have the same label in the same dataset, below subsets and
    concatenations.

    Args:
        known: Returns the classes of a split.
        **splits: The taskset or loader of each split; None if there is no such split.

    Raises:
        ValueError: If two splits are the same thing, or share a class.
    """
    given = {name: tasks for name, tasks in splits.items() if tasks is not None}
    for one, other in combinations(given, 2):
        if given[one] is given[other]:
            raise UserValueError(
                f"Expected `{one}` and `{other}` to draw from different classes but they are the "
                f"same {type(given[one]).__name__}; few-shot learning is tested on classes it was "
                "not trained on. Leave one of them out, or give it others."
            )
        classes = {name: known(given[name]) for name in (one, other)}
        datasets = [{id(item.dataset) for item in items.values()} for items in classes.values()]
        # Reading an item may draw random numbers, so only items of a dataset that both splits draw
        # from are read.
        shared_datasets = datasets[0] & datasets[1]
        origins = [_origins(items, shared_datasets) for items in classes.values()]
        labels = [label for _, label in origins[0] & origins[1]]
        check_disjoint({one: labels, other: labels}, f"`{one}` and `{other}`")


def _origins(classes: dict[Any, Source], datasets: set[int]) -> set[tuple[int, str]]:
    """Return the original dataset and label of each class that comes from one of the datasets."""
    found = set()
    for item in classes.values():
        if id(item.dataset) not in datasets:
            continue
        pair = item.dataset[item.number]
        if isinstance(pair, (tuple, list)) and len(pair) > 1:
            label = pair[1]
            if isinstance(label, Tensor) and label.ndim == 0:
                label = label.item()
            found.add((id(item.dataset), str(label)))
    return found


def of_learn2learn(taskset: Any) -> dict[Any, Source]:
    """Return an item of each class of a taskset, unless its transforms may leave out classes."""
    dataset = getattr(taskset, "dataset", None)
    transforms = getattr(taskset, "task_transforms", None) or ()
    items = getattr(dataset, "labels_to_indices", None)
    keeps_all = all(type(each).__name__ in _KEEP_ALL_CLASSES for each in transforms)
    if dataset is None or not hasattr(dataset, "dataset") or not keeps_all:
        return {}
    if not isinstance(items, Mapping):
        return {}
    return {label: source(dataset.dataset, int(numbers[0])) for label, numbers in items.items()}


def of_easyfsl(loader: Any) -> dict[Any, Source]:
    """Return an item of each class of a loader with easyfsl's ``TaskSampler``."""
    items = getattr(getattr(loader, "batch_sampler", None), "items_per_label", None)
    if not isinstance(items, Mapping):
        return {}
    return {label: source(loader.dataset, int(numbers[0])) for label, numbers in items.items()}
