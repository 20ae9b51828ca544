"""Sums over tasks, small parameters together, and sums of parameters that lie apart in memory."""

import torch

from lightning_maml.core.params import add_scaled
from lightning_maml.core.task_axis import _SMALL, TaskAxis


def test_the_sums_of_small_and_large_parameters_are_each_ones_own() -> None:
    random = torch.Generator().manual_seed(0)
    params = {
        "large": torch.rand(3, _SMALL + 1, generator=random),
        "matrix": torch.rand(3, 4, 5, generator=random),
        "double": torch.rand(3, 2, dtype=torch.float64, generator=random),
        "number": torch.rand(3, generator=random),
        "empty": torch.rand(3, 0, generator=random),
        "transposed": torch.rand(3, 5, 4, generator=random).mT,
    }
    sums = TaskAxis(3).sum(params)
    assert list(sums) == list(params)
    for name, tensor in params.items():
        assert sums[name].dtype == tensor.dtype
        assert sums[name].shape == (1, *tensor.shape[1:])
        torch.testing.assert_close(sums[name][0], tensor[0] + tensor[1] + tensor[2])


def test_a_scaled_sum_takes_tensors_that_lie_apart_in_memory_and_keeps_their_order() -> None:
    x = {
        "transposed": torch.arange(6.0).view(2, 3).mT,
        "alike": torch.ones(2),
        "expanded": torch.ones(1).expand(4),
        "alone": torch.ones(1),
    }
    y = {"alike": torch.full((2,), 3.0), "expanded": torch.arange(4.0)}
    y["transposed"] = torch.arange(6.0).view(3, 2)
    found = add_scaled(x, -2, y)
    assert list(found) == list(x)
    assert found["transposed"].tolist() == [[0.0, 1.0], [-3.0, -2.0], [-6.0, -5.0]]
    assert found["alike"].tolist() == [-5.0, -5.0]
    assert found["expanded"].tolist() == [1.0, -1.0, -3.0, -5.0]
    assert found["alone"] is x["alone"]
