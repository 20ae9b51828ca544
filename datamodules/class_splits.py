"""Which classes are trained on and which are tested on."""

from collections.abc import Collection, Mapping
from itertools import combinations

import numpy as np

from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

Shares = tuple[float, float, float]
"""Fractions of the classes for training, validation and testing."""


def check_shares(shares: Shares) -> None:
    """Check that the argument ``shares`` is three positive numbers that sum to 1.

    Raises:
        ValueError: If it is not.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserValueError(
            f"Expected `shares` to be three positive numbers that sum to 1 but got {list(shares)}."
        )


def split_classes(count: int, shares: Shares, seed: int) -> dict[str, list[int]]:
    """Divide classes among the splits at random, the same way for the same seed.

    Args:
        count: Number of classes.
        shares: Fractions for training, validation and testing.
        seed: Seed of the split.

    Returns:
        The class numbers, from 0 to ``count - 1``, of each split in ascending order.

    Raises:
        ValueError: If ``shares`` are not three positive numbers that sum to 1.
    """
    check_shares(shares)
    order = np.random.RandomState(seed).permutation(count).tolist()
    val, test = (round(share * count) for share in shares[1:])
    train = count - val - test
    return {
        "train": sorted(order[:train]),
        "val": sorted(order[train : train + val]),
        "test": sorted(order[train + val :]),
    }


def check_disjoint(classes: Mapping[str, Collection[str]], where: str, cure: str = "") -> None:
    """Check that no class is in two splits.

    Args:
        classes: Names of the classes of each split.
        where: Where the classes were found, for the message.
        cure: What to do about it, for the message.

    Raises:
        ValueError: If a class is in two splits.
    """
    for one, other in combinations(classes, 2):
        shared = sorted(set(classes[one]) & set(classes[other]))
        if shared:
            raise UserValueError(
                f"Expected the splits of {where} to share no class but {len(shared)} are both in "
                f"{one} and in {other} ({first_five(shared)}): splits that share classes are for "
                "ordinary classification; few-shot learning is tested on classes it was not "
                f"trained on{cure}."
            )
