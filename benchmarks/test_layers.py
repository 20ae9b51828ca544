"""Check a sample of the layers of benchmarks/layers.py in every way of running tasks.

The reference is autograd through the unrolled loop.
"""

import pytest

from helpers.layer_catalogue import CASES
from layers import row

QUICK = (
    "hook",
    "Embedding padding_idx",
    "Embedding sparse",
    "MultiheadAttention",
    "BatchNorm2d",
    "Hardsigmoid",
    "F.dropout",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_gives_the_gradients_of_the_unrolled_loop_or_is_refused_in_a_sentence(
    name: str,
) -> None:
    cells = row(CASES[name])
    assert set(cells.values()) <= {"equal", "refused"}, cells


def test_the_sample_is_in_the_catalogue() -> None:
    assert {*QUICK} <= CASES.keys()
