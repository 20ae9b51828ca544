"""Layers of stacked tasks as one: the gradients of tasks one by one, where torch's own shortcuts go
wrong."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import make_episodes, relative_error
from lightning_maml import FOMAML, MAML, Episodes, ProtoNet
from lightning_maml.core.context import evaluating
from lightning_maml.kernels.layers import TaskNorm, is_plain_pooling

WAYS = 3


def to_one_pixel() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.SiLU()),
        *(nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(4, WAYS)),
    )


def in_groups() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(4, 8, 3, stride=2, groups=4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(72, WAYS),
        ),
    )


def on_sequences() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Flatten(2),
            nn.Conv1d(2, 4, 5, stride=3),
            nn.BatchNorm1d(4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * 20, WAYS),
            nn.BatchNorm1d(WAYS),
        )
    )


def of_single_pixels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1, stride=(2, 3)),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(4 * 12, WAYS),
    )


class Nested(nn.Module):
    """Has a convolution whose weights another one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.code = nn.Conv2d(2, 2, 3, padding=1), nn.Parameter(torch.randn(4, 2, 3, 3))
        self.layer, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 36, WAYS)
        del self.layer.weight
        self.layer.weight = torch.zeros(4, 2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = torch.tanh(self.maker(self.code))
        return self.head(torch.sigmoid(self.layer(x)).flatten(1))


class Viewing(nn.Module):
    """Flattens as learn2learn's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4 * 36, WAYS),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.norm(self.layer(x)))
        return self.head(y.view(y.size(0), -1))


class Positional(nn.Module):
    """Has layers that see no image."""

    def __init__(self) -> None:
        super().__init__()
        self.of_places, self.norm, self.head = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.Linear(128, WAYS),
        )
        self.register_buffer("places", torch.rand(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(x + self.norm(self.of_places(self.places))).flatten(1))


def frozen(make: Callable[[], nn.Module], name: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        network = make()
        for parameter, p in network.named_parameters():
            p.requires_grad_(not parameter.startswith(name))
        return network

    return made


def integer_sizes() -> nn.Module:
    network = to_one_pixel()
    network[0].stride, network[2].padding = 2, 0
    return network


def normalised(channels: int, stride: int) -> nn.Module:
    """Its batch norm's weight has other numbers behind it in memory.

    Over stacked tasks a single one is expanded with stride 0, and torch's own derivative of batch
    norm takes every stride for 1.
    """
    norm = nn.BatchNorm2d(channels)
    numbers = torch.arange(1.0, 30.0, dtype=torch.float64)
    norm.weight = nn.Parameter(numbers[: channels * stride : stride])
    layers = nn.Conv2d(2, channels, 3, padding=1), norm, nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(channels * 64, WAYS))


def scale_free() -> nn.Module:
    norm = nn.BatchNorm2d(2, affine=False)
    layers = nn.Conv2d(2, 2, 3, padding=1), norm, nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, WAYS))


def one_column() -> nn.Module:
    layers = nn.Conv2d(2, 3, (3, 8)), nn.BatchNorm2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(18, WAYS))


NETWORKS = {
    **{
        make.__name__: make
        for make in (
            to_one_pixel,
            in_groups,
            of_single_pixels,
            on_sequences,
            Nested,
            Viewing,
            Positional,
            integer_sizes,
        )
    },
    "one channel": lambda: normalised(1, 1),
    "strided weight": lambda: normalised(2, 3),
    "no scale": scale_free,
    "one column": one_column,
    "frozen layer": frozen(Viewing, "layer"),
    "frozen weight": frozen(Viewing, "layer.weight"),
    "frozen bias": frozen(Viewing, "layer.bias"),
    "frozen norm": frozen(Viewing, "norm"),
}


def episodes(shots: int) -> Episodes:
    """Of images with two channels; no shots stand for a support set of one image, of the last
    class: it says how many there are."""
    found = make_episodes(tasks=4, shots=max(shots, 1))
    x, q = (
        torch.cat([tensor, 1 - tensor.square()], 2) for tensor in (found.support_x, found.query_x)
    )
    return (
        Episodes(x[:, -1:], found.support_y[:, -1:], q, found.query_y)
        if shots == 0
        else Episodes(x, found.support_y, q, found.query_y)
    )


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("name", "shots"),
    [
        *((name, 2) for name in NETWORKS),
        *((name, 0) for name in NETWORKS if name != "on_sequences"),
    ],
)  # batch norm of a vector for each of one image is of one number
def test_stacked_tasks_have_the_gradients_of_a_loop(
    name: str, shots: int, onednn: bool, algorithm: type[MAML]
) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    with torch.backends.mkldnn.flags(enabled=onednn):
        stacked, loop = (
            algorithm(network, 0.1, 2, tasks=tasks).meta_gradient(episodes(shots))
            for tasks in ("vmap", "loop")
        )
    assert relative_error(stacked, loop) < 1e-12


@pytest.mark.parametrize("name", ["one channel", "no scale", "one column", "in_groups"])
@pytest.mark.parametrize("shots", [0, 2])
def test_stacked_tasks_have_the_gradients_of_a_loop_in_bf16(name: str, shots: int) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().float()
    of_images = episodes(shots)
    rounded = of_images._replace(
        support_x=of_images.support_x.float(), query_x=of_images.query_x.float()
    )
    with torch.autocast("cpu", torch.bfloat16):
        stacked, loop = (
            MAML(network, 0.1, 2, tasks=tasks).meta_gradient(rounded) for tasks in ("vmap", "loop")
        )
    assert relative_error(stacked, loop) < 0.1


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_gradients_whose_strides_fit_two_memory_formats(tasks: str, algorithm: type[MAML]) -> None:
    """Torch's own batch norm reads them in a wrong order, in plain autograd too, so the reference
    is batch norm written out."""

    class Sequences(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(15, WAYS)
            self.written_out = written_out

        def forward(self, x: Tensor) -> Tensor:
            if self.written_out:
                y = (x - x.mean((0, 2, 3), keepdim=True)) * torch.rsqrt(
                    x.var((0, 2, 3), correction=0, keepdim=True) + self.norm.eps
                )
                y = y * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
            else:
                y = self.norm(x)
            return self.head(y.squeeze(-1).transpose(1, 2).reshape(len(x), -1))

    torch.manual_seed(0)
    norm, written_out = Sequences(False).double(), Sequences(True).double()
    written_out.load_state_dict(norm.state_dict())
    x, y = torch.randn(2, 9, 3, 5, 1, dtype=torch.float64), torch.arange(9).repeat(2, 1) % WAYS
    of_sequences = Episodes(x, y, x.flip(1), y.flip(1))
    found, right = (
        algorithm(network, 0.1, 2, tasks=tasks).meta_gradient(of_sequences)
        for network in (norm, written_out)
    )
    assert relative_error(found, right) < 1e-12


@pytest.mark.parametrize("derivatives", [0, 1, 2])
def test_batch_norm_without_parameters_has_float32_statistics(derivatives: int) -> None:
    norm = TaskNorm(nn.BatchNorm2d(3, affine=False), vectorised=False)
    torch.manual_seed(0)
    x = (3 * torch.randn(50, 3, 8, 8) + 5).bfloat16()
    with evaluating(derivatives=derivatives):
        found = norm(x).double()
    right = F.batch_norm(x.double(), None, None, training=True)
    # that of rounding the result is 0.0017; statistics in bf16 give 0.0040
    assert float((found - right).norm() / right.norm()) < 0.0025


def test_frozen_layers_that_see_no_image_are_stacked() -> None:
    torch.manual_seed(0)
    network = Positional().double()
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith("head"))
    stacked, loop = (
        MAML(network, 0.1, 2, tasks=tasks).meta_gradient(make_episodes())
        for tasks in ("vmap", "loop")
    )
    assert relative_error(stacked, loop) < 1e-12


def test_prototypes_of_a_network_with_layers_that_see_no_image() -> None:
    torch.manual_seed(0)
    network = Positional().double()
    gradients = []
    for tasks in ("vmap", "loop"):
        network.zero_grad()
        ProtoNet(network, tasks=tasks).meta_loss(episodes(2)).backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    assert relative_error(*gradients) < 1e-12


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize(
    "pooling",
    [
        lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        lambda: nn.AvgPool2d(2, count_include_pad=False),
        lambda: nn.MaxPool2d(2, dilation=2),
    ],
)
def test_tasks_are_pooled_side_by_side(
    pooling: Callable[[], nn.Module], algorithm: type[MAML]
) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), pooling(), nn.GELU(), nn.AdaptiveAvgPool2d(2)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, WAYS)).double()
    stacked, loop = (
        algorithm(network, 0.1, 2, tasks=tasks).meta_gradient(episodes(2))
        for tasks in ("vmap", "loop")
    )
    assert relative_error(stacked, loop) < 1e-12


def test_pooling_that_returns_indices_or_was_replaced_is_left_alone() -> None:
    assert is_plain_pooling(nn.MaxPool2d(2))
    assert not is_plain_pooling(nn.MaxPool2d(2, return_indices=True))
    replaced = nn.AvgPool2d(2)
    replaced.forward = lambda x: x
    assert not is_plain_pooling(replaced)
    assert not is_plain_pooling(nn.AdaptiveAvgPool2d(1))
