"""The published networks have the published sizes, and the smooth ones are smooth."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.ops import DropBlock2d

from helpers.networks import leaves, plain_loss, relative_error, unrolled
from helpers.trainers import on_device
from lightning_maml import FOMAML, HFMAML, MAML, MLP, Conv4, Episodes, ResNet12, meta_gradient
from lightning_maml.datamodules import EpisodeTransforms, GlyphsDataModule
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import kinks


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_omniglot_network_of_the_maml_paper() -> None:
    network = Conv4(1, 5, 28)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 5)
    convolutions, norms, head = (1 + 3 * 64) * 64 * 9 + 4 * 64, 4 * 2 * 64, 64 * 5 + 5
    assert parameters(network) == convolutions + norms + head
    assert network.features(torch.rand(2, 1, 28, 28)).shape == (2, 64, 2, 2)


def test_mini_imagenet_network_of_the_maml_paper() -> None:
    network = Conv4(3, 5, 84, channels=32, downsample="max")
    assert network(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    assert network.head.in_features == 800
    assert any(isinstance(module, nn.MaxPool2d) for module in network.modules())


def with_the_activation_first(network: nn.Module) -> nn.Module:
    """The order of the papers, which takes more time."""
    usual = copy.deepcopy(network)
    for block in [module for module in usual.modules() if isinstance(module, nn.Sequential)]:
        for i, (first, second) in enumerate(pairwise(list(block))):
            if isinstance(first, nn.MaxPool2d):
                block[i], block[i + 1] = second, first
    return usual


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("kind", ["Conv4", "ResNet12"])
def test_pooling_before_the_activation_changes_no_derivative(kind: str, activation: str) -> None:
    torch.manual_seed(0)
    network = {
        "Conv4": lambda: Conv4(1, 3, 16, 4, activation, "max"),
        "ResNet12": lambda: ResNet12(1, 3, (4, 4, 4, 4), activation),
    }[kind]().double()
    usual = with_the_activation_first(network)
    assert str(usual) != str(network)
    x, y = torch.randn(2, 12, 1, 16, 16).double(), torch.arange(3).repeat(2, 4)
    assert torch.equal(network(x[0]), usual(x[0]))
    episodes = Episodes(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    actual, expected = (
        MAML(n, 0.1, 2, loss=cross_entropy).meta_gradient(episodes) for n in (network, usual)
    )
    assert relative_error(actual, expected) < 1e-9
    assert list(network.state_dict()) == list(usual.state_dict())


@pytest.mark.parametrize("downsample", ["max", "avg"])
def test_activations_that_fall_somewhere_come_before_pooling(downsample: str) -> None:
    _, _, activation, pooling = Conv4(1, 3, 16, 4, "gelu", downsample).features[0]
    assert isinstance(activation, nn.GELU)
    assert isinstance(pooling, nn.MaxPool2d | nn.AvgPool2d)


@pytest.mark.parametrize("downsample", ["stride", "avg"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "tanh"])
def test_smooth_forms_are_twice_differentiable(activation: str, downsample: str) -> None:
    torch.manual_seed(0)
    network = Conv4(1, 3, 16, channels=2, activation=activation, downsample=downsample).double()
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True)


def test_mlp_flattens_its_input() -> None:
    assert MLP(28 * 28, 5, hidden=(16, 8), activation="tanh")(torch.rand(4, 1, 28, 28)).shape == (
        4,
        5,
    )
    assert parameters(MLP(1, 1, hidden=(40, 40))) == 80 + 1640 + 41


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Conv4(1, 0, 28), "`ways` to be at least 1 but got 0"),
        (
            lambda: Conv4(1, 5, 12, downsample="max"),
            "`image_size` to be at least 16 for four poolings by 2 but got 12",
        ),
        (
            lambda: Conv4(1, 5, 28, downsample="mean"),
            "`downsample` to be 'stride', 'max' or 'avg' but got 'mean'",
        ),
        (
            lambda: Conv4(1, 5, 28, activation="swish"),
            "`activation` to be one of .* but got 'swish'",
        ),
        (lambda: ResNet12(3, 5, widths=(64, 0)), r"`widths\[1\]` to be at least 1 but got 0"),
        (
            lambda: ResNet12(3, 5, widths=()),
            "`widths` to hold the filters of at least one block but it is empty",
        ),
        (
            lambda: ResNet12(3, 5, downsample="stride"),
            "`downsample` to be 'max' or 'avg' but got 'stride'",
        ),
        (
            lambda: ResNet12(3, 5, drop_block=1.0),
            r"`drop_block` to be at least 0 and less than 1 but got 1\.0",
        ),
        (lambda: ResNet12(3, 5, drop_block_size=4), "`drop_block_size` to be odd but got 4"),
        (
            lambda: ResNet12(3, 5, activation="swish"),
            "`activation` to be one of .* but got 'swish'",
        ),
        (lambda: MLP(4, 2, hidden=(8, 0)), r"`hidden\[1\]` to be at least 1 but got 0"),
    ],
)
def test_bad_sizes_and_names_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_resnet12_of_the_few_shot_papers() -> None:
    network = ResNet12(3, 5)
    assert parameters(network) == 12_424_320 + 640 * 5 + 5, (
        "12.4 million without the head, as Lee et al. 2019 and their descendants count"
    )
    assert network(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    assert network.blocks(torch.rand(2, 3, 84, 84)).shape == (2, 640, 5, 5)
    assert {
        module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)
    } == {0.1}
    assert not any(isinstance(module, DropBlock2d) for module in network.modules())


def small_resnet(**arguments) -> ResNet12:
    return ResNet12(3, 3, widths=(2, 3, 3, 2), **arguments)


@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "tanh"])
def test_the_smooth_resnet12_is_twice_differentiable(activation: str) -> None:
    torch.manual_seed(0)
    network = small_resnet(activation=activation, downsample="avg").double()
    assert not kinks(network)
    assert len(kinks(small_resnet())) == 4 * (3 + 1), (
        "three activations and a pooling in each block"
    )
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True)


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_the_meta_gradient_of_a_resnet12_is_that_of_the_unrolled_loop(tasks: str) -> None:
    """Its activations work in place, which must not overwrite what a derivative needs."""
    torch.manual_seed(0)
    network = small_resnet().double()
    images = torch.rand(2, 2, 6, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(3).repeat(2, 2)
    episodes = Episodes(images[:, 0], labels, images[:, 1], labels)
    functional = FunctionalNetwork(network, vectorised=tasks == "vmap")
    actual = meta_gradient(
        lambda w, x, y: cross_entropy(functional(w, x), y),
        functional.params,
        episodes,
        inner_lr=0.1,
        steps=3,
        tasks=tasks,
    )
    w = leaves(network)
    loss = unrolled(plain_loss(network), w, episodes, 0.1, 3)
    expected = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    assert relative_error(actual.grad, expected) < 1e-11


def test_drop_block_drops_squares_in_the_last_two_blocks_of_a_network_in_training() -> None:
    torch.manual_seed(0)
    network = ResNet12(3, 5, widths=(4, 8, 16, 32), drop_block=0.3)
    assert [isinstance(block[-1], DropBlock2d) for block in network.blocks] == [
        False,
        False,
        True,
        True,
    ]
    x = torch.rand(2, 3, 84, 84)
    assert not torch.equal(network(x), network(x))
    dropped = network.blocks[:3](x)[0, 0] == 0
    assert dropped.any()
    assert (
        int(torch.nn.functional.max_pool2d(1 - dropped[None, None].float(), 5, stride=1).min()) == 0
    ), "a square of 5"
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
def test_resnet12_with_drop_block_trains(tmp_path: Path, algorithm: type[MAML]) -> None:
    network = ResNet12(
        1,
        5,
        widths=(2, 4, 4, 4),
        activation="gelu",
        downsample="avg",
        drop_block=0.2,
        drop_block_size=3,
    )
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        **on_device(),
        logger=False,
        enable_progress_bar=False,
    )
    data = GlyphsDataModule(
        train_batches=2, meta_batch_size=2, val_tasks=2, transforms=EpisodeTransforms(resize=48)
    )
    before = [p.detach().clone() for p in network.parameters()]
    trainer.fit(algorithm(network, inner_lr=0.1, train_steps=2), data)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_drop_block_draws_the_same_squares_in_every_evaluation_of_a_step() -> None:
    network = small_resnet(
        activation="gelu", downsample="avg", drop_block=0.3, drop_block_size=1
    ).double()
    images, labels = (
        torch.rand(2, 1, 6, 3, 32, 32, dtype=torch.float64),
        torch.arange(3).repeat(1, 2),
    )

    def seeded(curvature: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        episodes = Episodes(images[0], labels, images[1], labels)
        return meta_gradient(
            plain_loss(network),
            leaves(network),
            episodes,
            inner_lr=0.1,
            steps=2,
            curvature=curvature,
        ).grad

    assert relative_error(seeded("finite_difference"), seeded("exact")) < 1e-6
    assert relative_error(seeded("none"), seeded("exact")) > 1e-3
