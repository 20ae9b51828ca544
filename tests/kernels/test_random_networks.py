"""Stacked tasks have the right gradients for networks and images of any size, sizes of 1 above all,
where the memory format of a tensor cannot be told from its strides."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import RATE, autograd_meta_gradient, relative_error
from lightning_maml import FOMAML, MAML, Episodes

WAYS = 3

Layer = Callable[[int], nn.Module]
"""Makes a layer for images with so many channels."""


def layers_of(choose: random.Random) -> list[Layer]:
    outputs, size, stride = (
        choose.choice([1, 1, 2, 4]),
        choose.choice([1, 2, 3]),
        choose.choice([1, 2]),
    )
    kinds: list[Layer] = [
        lambda channels: nn.Conv2d(channels, outputs, size, stride, padding=size // 2),
        lambda channels: nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d,
        lambda channels: nn.BatchNorm2d(channels, affine=False),
        lambda channels: nn.GroupNorm(1, channels),
        lambda channels: nn.InstanceNorm2d(channels, affine=True),
        lambda _: nn.MaxPool2d(2, padding=1),
        lambda _: nn.AvgPool2d(2, padding=1),
        lambda _: nn.Tanh(),
    ]
    return choose.choices(kinds, weights=[4, 1, 4, 1, 1, 1, 1, 1, 1], k=choose.randint(2, 5))


def drawn(seed: int) -> tuple[nn.Module, Episodes]:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    tasks, channels = choose.randint(1, 4), choose.randint(1, 3)
    height, width = choose.choice([1, 4, 5, 8]), choose.choice([1, 1, 4, 8])

    def images() -> tuple[Tensor, Tensor]:
        number = choose.choice([1, 2, 3, 9])
        x = torch.rand(tasks, number, channels, height, width, dtype=torch.float64)
        return x, (torch.arange(number) % WAYS).repeat(tasks, 1)

    support, query = images(), images()
    network = nn.Sequential()
    x = torch.rand(2, *support[0].shape[2:])
    for layer in layers_of(choose):
        network.append(layer(x.shape[1]))
        x = network[-1](x)
    features = x.flatten(1).shape[1]
    network.extend([nn.Tanh(), nn.Flatten(), nn.Linear(features, WAYS)])
    return network.double(), Episodes(*support, *query)


def right_one(network: nn.Module, episodes: Episodes) -> dict[str, Tensor] | None:
    """Return the meta-gradient by autograd; None where plain torch fails, for instance as a norm
    would have one number alone."""
    try:
        right = autograd_meta_gradient(network, episodes, steps=2)
    except (ValueError, RuntimeError):
        return None
    return right if all(g.isfinite().all() for g in right.values()) else None


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, 10))
def test_gradients_of_random_networks(first: int) -> None:
    compared = 0
    for seed in range(first, first + 10):
        try:
            network, episodes = drawn(seed)
        except (ValueError, RuntimeError):  # layers that do not fit each other
            continue
        if (right := right_one(drawn(seed)[0], episodes)) is None:
            continue
        for tasks in ("vmap", "loop"):
            found = MAML(network, RATE, 2, tasks=tasks).meta_gradient(episodes)
            assert relative_error(found, right) < 1e-8, (seed, tasks)
        stacked, loop = (
            FOMAML(network, RATE, 2, tasks=tasks).meta_gradient(episodes)
            for tasks in ("vmap", "loop")
        )
        assert relative_error(stacked, loop) < 1e-8, seed
        compared += 1
    assert compared > 3
