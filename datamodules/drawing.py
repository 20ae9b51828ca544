"""Drawing for many tasks at once, each from a stream of random words of its own."""

from collections.abc import Sequence

import numpy as np

TaskKey = tuple[int, ...]
"""What an episode depends on besides the seed: the epoch, the number of the task, and for tasks
that are not trained on a third number above 0, which says what they are for."""


def task_words(seed: tuple[int, ...], keys: Sequence[TaskKey], count: int) -> np.ndarray:
    """Return random words for each task, which depend on nothing but the seed and its key.

    They are those of Philox (Salmon et al. 2011), a function of a key and a counter. The seed is
    the key. The task's key is in the counter above its lowest word, which counts the four words
    that each call of the function gives, so no two tasks share any. numpy guarantees that these
    words never change.

    Args:
        seed: One or two numbers below 2**64.
        keys: Keys of the T tasks.
        count: Words for each task.

    Returns:
        ``[T, count]``, uint64.

    Examples:
        >>> from lightning_maml.datamodules.drawing import task_words
        >>> both = task_words((7,), [(0, 3), (0, 4)], count=6)
        >>> bool((both[1] == task_words((7,), [(0, 4)], count=6)[0]).all())
        True
    """
    generator = np.random.Philox(key=_padded(seed, 2))
    state = generator.state
    words = np.empty((len(keys), count), np.uint64)
    for task, key in enumerate(keys):
        epoch, number, purpose = _padded(key, 3)
        state["state"]["counter"][:] = [0, number, epoch, purpose]
        generator.state = state
        words[task] = generator.random_raw(count)
    return words


def below(words: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Return whole numbers from 0 to a limit, without the limit itself.

    Each is the upper half of a word, scaled: one number is more likely than another by at most the
    limit in 2**32.

    Args:
        words: Random words, uint64.
        limits: Limits up to 2**32, which broadcast with ``words``.

    Returns:
        The numbers, int64.
    """
    upper = words >> np.uint64(32)
    scaled = upper * np.asarray(limits, np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def uniform(words: np.ndarray, least: float, most: float) -> np.ndarray:
    """Return numbers that are spread evenly over an interval.

    Args:
        words: Random words, uint64.
        least: Lower end of the interval.
        most: Upper end.

    Returns:
        The numbers, float64.
    """
    # as many bits as a double holds
    return least + (most - least) * (words >> np.uint64(11)) * 2.0**-53


def distinct(words: np.ndarray, order: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Draw k different whole numbers below a limit, in random order, for each of many limits.

    Floyd's algorithm (Bentley and Floyd 1987), which takes k steps whatever the limit, draws each
    set equally often; then the set is put in random order.

    Args:
        words: Random words ``[..., k]`` that the numbers are drawn by.
        order: Random words ``[..., k]`` that they are put in order by.
        limits: Limits ``[...]`` from k to 2**32, or one for all.

    Returns:
        The numbers ``[..., k]``, int64.

    Examples:
        >>> from lightning_maml.datamodules.drawing import distinct, task_words
        >>> words, order = task_words((0,), [(0, 0)], count=6).reshape(2, 3)
        >>> sorted(distinct(words, order, limits=3).tolist())
        [0, 1, 2]
    """
    drawn = np.empty(words.shape, np.int64)
    k = words.shape[-1]
    for place in range(k):
        highest = np.asarray(limits) - k + place
        numbers = below(words[..., place], highest + 1)
        # the highest number cannot have been drawn before, so it stands in for one that was
        repeated = (drawn[..., :place] == numbers[..., None]).any(-1)
        drawn[..., place] = np.where(repeated, highest, numbers)
    return np.take_along_axis(drawn, np.argsort(order, axis=-1, kind="stable"), -1)


def _padded(numbers: tuple[int, ...], length: int) -> list[int]:
    return [*numbers, *[0] * (length - len(numbers))]
