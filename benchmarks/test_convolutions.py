"""The ways of convolutions.py compute the same."""

import pytest
import torch

from convolutions import Case, Layer, agree


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_ways_give_the_same_numbers(stride: int, memory_format: torch.memory_format) -> None:
    layer = Layer(tasks=3, images=2, channels=4, filters=5, size=8, stride=stride)
    for ways in Case(layer, "cpu", torch.float64, memory_format).ways().values():
        agree(ways, tolerance=1e-12)
