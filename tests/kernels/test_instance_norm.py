"""Instance norm beside the library's convolutions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import RATE, autograd_meta_gradient, make_episodes, relative_error
from helpers.random_numbers import drawn_on_cpu
from lightning_maml import MAML, Episodes

STEPS = 2


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
@pytest.mark.parametrize(("support", "queries"), [(6, 1), (1, 6), (1, 1), (6, 6)])
def test_one_example_alone(support: int, queries: int, tasks: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3),
        nn.InstanceNorm2d(8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    ).double()
    x = drawn_on_cpu(torch.randn, 4, support + queries, 2, 6, 6, dtype=torch.float64)
    y = (torch.arange(support + queries) % 3).repeat(4, 1)
    episodes = Episodes(x[:, :support], y[:, :support], x[:, support:], y[:, support:])
    found = MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)
    expected = autograd_meta_gradient(network, episodes, STEPS, F.cross_entropy)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_one_support_example_that_is_normalised_before_it_is_convolved(tasks: Any) -> None:
    """Its gradient comes straight from the convolution, whose weight has a gradient in the memory
    format of the query images."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.InstanceNorm2d(3, affine=True),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 3),
    ).double()
    support, query = make_episodes(shots=1).support_x[:, :1], make_episodes(queries=3).query_x
    x, q = (
        images.repeat(1, 1, 3, 1, 1) * torch.rand(3, 1, 1).double() for images in (support, query)
    )
    y = (torch.arange(9) % 3).repeat(3, 1)
    episodes = Episodes(x, y[:, :1], q, y)
    found = MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)
    expected = autograd_meta_gradient(network, episodes, STEPS, F.cross_entropy)
    assert relative_error(found, expected) < 1e-12
