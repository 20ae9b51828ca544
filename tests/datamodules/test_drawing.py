"""Draws are Philox's, each number and each order is as frequent as any other, streams differ."""

import math
from itertools import permutations

import numpy as np
import pytest

from lightning_maml.datamodules.drawing import below, distinct, task_words

pytestmark = pytest.mark.cpu_only  # numpy's numbers

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as Salmon et al. 2011 define it, in Python's integers."""
    key = [*key]
    for _ in range(10):
        upper, lower = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        other_upper, other_lower = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [
            other_upper ^ counter[1] ^ key[0],
            other_lower,
            upper ^ counter[3] ^ key[1],
            lower,
        ]
        key[0] = (key[0] + 0x9E3779B97F4A7C15) & MASK
        key[1] = (key[1] + 0xBB67AE8584CAA73B) & MASK
    return counter


def chi_squared(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def bound(cells: int) -> float:
    """Return what chi-squared exceeds with a probability below 1e-6, for numbers of cells.

    Laurent and Massart 2000, Lemma 1.
    """
    freedom, level = cells - 1, math.log(1e6)
    return freedom + 2 * math.sqrt(freedom * level) + 2 * level


def test_philox_is_that_of_its_authors() -> None:
    """The first of their known answers (Random123, kat_vectors)."""
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize("key", [(3, 8), (3, 8, 2), (2**40, 2**50)])
def test_words_of_a_task_are_philoxs_at_its_key(key: tuple[int, ...]) -> None:
    epoch, number, purpose = (*key, 0)[:3]
    words = task_words((7, 1), [(0, 0), key], count=7)[1].tolist()
    expected = [
        word for block in (1, 2) for word in philox([block, number, epoch, purpose], [7, 1])
    ]
    assert words == expected[:7]


def test_words_do_not_depend_on_the_other_tasks() -> None:
    keys = [(epoch, number) for epoch in range(3) for number in range(5)]
    together = task_words((0, 2), keys, count=9)
    backwards = task_words((0, 2), keys[::-1], count=9)[::-1]
    alone = np.concatenate([task_words((0, 2), [key], count=9) for key in keys])
    assert (together == backwards).all()
    assert (together == alone).all()
    assert (together[:, :4] == task_words((0, 2), keys, count=4)).all()


def test_streams_are_independent() -> None:
    """Seeds, splits, epochs, numbers and purposes that differ by one give unrelated words."""
    streams = {
        (seed, split, *key): task_words((seed, split), [key], count=512)[0]
        for seed in range(2)
        for split in range(2)
        for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 1)]
    }
    bits = np.array([np.unpackbits(words.view(np.uint8)) for words in streams.values()])
    signs = 2.0 * bits - 1
    agreement = signs @ signs.T / signs.shape[1] + np.diag([-1.0] * len(streams))
    # a standard deviation is 1 / sqrt(512 * 64); of 276 pairs, none by chance beyond 6 of them
    assert abs(agreement).max() < 6 / math.sqrt(signs.shape[1])
    assert len({word for words in streams.values() for word in words.tolist()}) == 512 * 24


def test_numbers_below_a_limit_are_equally_frequent() -> None:
    words = task_words((0,), [(0, 0)], count=60_000)
    for limit in (1, 2, 7, 4400):
        numbers = below(words, limit)
        counts = np.bincount(numbers[0], minlength=limit)
        assert len(counts) == limit
        assert chi_squared(counts) < bound(limit) + 1e-9
    assert below(np.array([2**64 - 1], np.uint64), 2**32).tolist() == [2**32 - 1]


@pytest.mark.parametrize(("k", "limit"), [(1, 5), (2, 5), (3, 5), (4, 4), (5, 5)])
def test_every_order_of_distinct_numbers_is_equally_frequent(k: int, limit: int) -> None:
    words = task_words((1,), [(0, 0)], count=60_000 * 2 * k).reshape(2, 60_000, k)
    drawn = distinct(*words, limit)
    codes, counts = np.unique(drawn @ limit ** np.arange(k), return_counts=True)
    possible = [sum(n * limit**i for i, n in enumerate(p)) for p in permutations(range(limit), k)]
    assert codes.tolist() == sorted(possible)
    assert chi_squared(counts) < bound(len(counts))


def test_numbers_are_drawn_below_the_limit_of_each_row() -> None:
    limits = np.array([3, 4, 9])
    words = task_words((2,), [(0, 0)], count=20_000 * 2 * 3 * 3).reshape(2, 20_000, 3, 3)
    drawn = distinct(*words, limits)
    for limit, of_row in zip(limits, drawn.swapaxes(0, 1), strict=True):
        assert (np.sort(of_row, 1)[:, 1:] > np.sort(of_row, 1)[:, :-1]).all()
        for place in of_row.T:
            counts = np.bincount(place, minlength=limit)
            assert len(counts) == limit
            assert chi_squared(counts) < bound(limit)
