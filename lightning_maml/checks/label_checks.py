"""Check that labels and targets fit a network's outputs."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.batches.losses import one_hot_mse
from lightning_maml.errors import UserTypeError, UserValueError

_PADDING = -100
"""The label that torch's losses ignore by default."""

_UNLABELLED = 255
"""The label of pixels without one, in many datasets."""


def check_is_tensor(labels: Any, name: str) -> None:
    """Check that labels or targets are a tensor.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(labels, Tensor):
        raise UserTypeError(
            f"Expected `{name}` to be a tensor but got {type(labels).__name__}; make it one, "
            "torch.tensor(...)."
        )


def warn_of_a_dimension_too_many(episodes: AnyEpisodes) -> None:
    """Warn if a single task looks like a meta-batch that a loader put into one more dimension.

    A network that takes one point at a time would fit the points of all tasks together. Sequences
    with a target for each position look the same, so it cannot be refused.
    """
    if not isinstance(episodes, Episodes) or len(episodes.support_y) > 1:
        return
    sets = [episodes[:2], episodes[2:]]
    if not all(isinstance(x, Tensor) for x, _ in sets):
        return
    have_points = all(
        y.ndim > 2 and 3 < x.ndim <= y.ndim + 1 and x.shape[:3] == y.shape[:3] and y.shape[2] > 1
        for x, y in sets
    )
    if have_points and episodes.support_y.shape[1] == episodes.query_y.shape[1]:
        rank_zero_warn(
            f"A meta-batch holds one task with targets {list(episodes.support_y.shape)}, that is "
            f"{episodes.support_y.shape[1]} sequences: if these are tasks, the loader has added a "
            "dimension; give DataLoader batch_size=None where each item is a meta-batch, and one "
            "loader rather than a list."
        )


def ignored_label(loss: Any) -> int | None:
    """Return the label of the examples that a loss leaves out, its ``ignore_index``.

    Returns:
        None if the loss leaves none out, or does not say so.
    """
    while isinstance(loss, partial):
        if "ignore_index" in loss.keywords:
            return int(loss.keywords["ignore_index"])
        loss = loss.func
    if loss is F.cross_entropy or loss is F.nll_loss or loss is one_hot_mse:
        return _PADDING
    index = getattr(loss, "ignore_index", None)
    return index if isinstance(index, int) else None


def check_labels(
    episodes: AnyEpisodes,
    ways: int,
    ignored: int | None = None,
    names: Collection[str] = ("support_y", "hessian_y", "query_y"),
) -> None:
    """Check that labels are from 0 to ``ways - 1``, but for those that the loss ignores.

    Args:
        episodes: The meta-batch.
        ways: Number of outputs of the network.
        ignored: The label of the examples that the loss leaves out; None if there is none.
        names: The sets whose labels are checked; by default all.

    Raises:
        ValueError: If a label is out of range, or if all labels of a set are ignored.
    """
    of_sets = {name: y for name, y in episodes._asdict().items() if name in names}
    labels = torch.cat([y.flatten() for y in of_sets.values()])
    low, high = int(labels.min()), int(labels.max())
    if ignored is not None and low <= ignored <= high:
        _check_that_some_count(of_sets, isinstance(episodes, ResampledEpisodes), ignored)
        counted = labels[labels != ignored]
        low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= ways:
        cure = ""
        if (low == _PADDING and ignored is None) or high == _UNLABELLED:
            cure = (
                "; for padding take a loss that says which label it ignores, in an attribute "
                "`ignore_index` or by functools.partial"
            )
        elif low == 0 and ways == 1:
            cure = (
                "; give its head an output per class, or give the targets of one output as "
                "floats, y.float()"
            )
        raise UserValueError(
            f"Expected labels from 0 to {ways - 1}, the outputs of `network`, but got {low} to "
            f"{high}{cure}."
        )


def _check_that_some_count(of_sets: Mapping[str, Tensor], steps: bool, ignored: int) -> None:
    """Refuse sets whose labels are all ignored, as the mean of no losses is nan."""
    for name, y in of_sets.items():
        # in the resampling case, each batch of each inner step
        of_batches = y.flatten(2 if steps and not name.startswith("query") else 1)
        empty = (of_batches == ignored).all(-1).reshape(len(y), -1).any(-1)
        if y.numel() and empty.any():
            raise UserValueError(
                f"Expected a label in `{name}` of each task that the loss does not ignore but got "
                f"{ignored} alone in tasks {empty.nonzero().flatten().tolist()}; leave these out."
            )


def check_targets(targets: Tensor, loss: Any) -> None:
    """Refuse the cross-entropy for a regression on one output, where it is always zero.

    Args:
        targets: Regression targets, ``[B, ...]``.
        loss: The loss of outputs and targets.

    Raises:
        ValueError: If ``loss`` is the cross-entropy and there is one target per example.
    """
    while isinstance(loss, partial):
        loss = loss.func
    is_cross_entropy = loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    if is_cross_entropy and targets.shape[1:] in ((), (1,)):
        raise UserValueError(
            "Expected integer labels for the cross-entropy but got floats, one per example; if "
            "these are classes, make them integers, y.long(), or for a regression give the model "
            "`loss=torch.nn.functional.mse_loss`."
        )
