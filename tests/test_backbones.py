"""The published networks have the published sizes, and the smooth ones are smooth."""

import pytest
import torch
from torch import nn

from lightning_maml import MLP, Conv4


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


@pytest.mark.parametrize("downsample", ["stride", "avg"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "tanh"])
def test_smooth_forms_are_twice_differentiable(activation: str, downsample: str) -> None:
    torch.manual_seed(0)
    network = Conv4(1, 3, 16, channels=2, activation=activation, downsample=downsample).double()
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True)


def test_mlp_flattens_its_input() -> None:
    assert MLP(28 * 28, 5, hidden=(16, 8), activation="tanh")(torch.rand(4, 1, 28, 28)).shape == (4, 5)
    assert parameters(MLP(1, 1, hidden=(40, 40))) == 80 + 1640 + 41


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Conv4(1, 0, 28), "`ways` to be at least 1 but got 0"),
        (lambda: Conv4(1, 5, 12, downsample="max"), "`image_size` to be at least 16 for four poolings by 2 but got 12"),
        (lambda: Conv4(1, 5, 28, downsample="mean"), "`downsample` to be 'stride', 'max' or 'avg' but got 'mean'"),
        (lambda: Conv4(1, 5, 28, activation="swish"), "`activation` to be one of .* but got 'swish'"),
        (lambda: MLP(4, 2, hidden=(8, 0)), r"`hidden\[1\]` to be at least 1 but got 0"),
    ],
)
def test_bad_sizes_and_names_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
