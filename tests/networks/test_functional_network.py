"""A network as a pure function: its batch-norm policies against torch's own layers, and that it is
left alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import another_process
from helpers.networks import (
    RATE,
    WAYS,
    autograd_meta_gradient,
    build,
    make_episodes,
    relative_error,
)
from helpers.random_numbers import drawn_on_cpu
from lightning_maml.core.context import evaluating
from lightning_maml.functional.meta_gradient import meta_gradient
from lightning_maml.kernels.grouped_conv import channels_last
from lightning_maml.networks.functional_network import FunctionalHead, FunctionalNetwork


def image_batch(seed: int) -> torch.Tensor:
    return drawn_on_cpu(
        torch.rand, 7, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("vectorised", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics_are_those_of_torch_in_training_mode(
    training: bool, vectorised: bool
) -> None:
    network = build("conv_batch_norm").train(training)
    actual = FunctionalNetwork(network, "batch", vectorised=vectorised)(
        dict(network.named_parameters()), image_batch(0)
    )
    torch.testing.assert_close(actual, build("conv_batch_norm").train()(image_batch(0)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("vectorised", [False, True])
def test_support_statistics_normalise_the_query_set(vectorised: bool, affine: bool) -> None:
    network, reference, same = (build("conv_batch_norm") for _ in range(3))
    for each in (network, reference, same):
        each[1] = each[1] if affine else nn.BatchNorm2d(4, affine=False).double()
    support, query = image_batch(0), image_batch(1)
    functional = FunctionalNetwork(network, "support", vectorised=vectorised)
    assert functional.uses_support_statistics

    reference[1].momentum = 1.0  # running averages become the last batch's statistics
    reference.train()(support)
    features = reference[0](support).detach()
    reference[1].running_var.copy_(features.var((0, 2, 3), correction=0))
    torch.testing.assert_close(
        functional(functional.params, query, statistics_of=support), reference.eval()(query)
    )
    torch.testing.assert_close(functional(functional.params, support), same.train()(support))


def test_running_averages_are_used_in_evaluation_only() -> None:
    network = build("conv_batch_norm")
    network.train()(image_batch(0))
    functional = FunctionalNetwork(network.eval(), "running")
    torch.testing.assert_close(
        functional(functional.params, image_batch(1)), network(image_batch(1))
    )
    functional = FunctionalNetwork(network.train(), "running")
    torch.testing.assert_close(
        functional(functional.params, image_batch(1)),
        build("conv_batch_norm").train()(image_batch(1)),
    )


def test_running_policy_refuses_layers_without_running_averages() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(
        ValueError, match=r"keep running averages for `batch_norm='running'` but \['1'\] do not"
    ):
        FunctionalNetwork(network, "running")


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_the_network_is_left_as_it_was(policy: str) -> None:
    network = build("conv_batch_norm").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modules = list(network.modules())
    functional = FunctionalNetwork(network, policy)
    functional(
        {name: 2 * p for name, p in functional.params.items()},
        image_batch(0),
        statistics_of=image_batch(1),
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert modules == list(network.modules())


def test_threads_do_not_see_each_others_parameters() -> None:
    network = build("mlp")
    functional = FunctionalNetwork(network)
    x = make_episodes().support_x[0]
    scaled = [{name: scale * p for name, p in functional.params.items()} for scale in range(8)]
    expected = [torch.func.functional_call(network, w, (x,)) for w in scaled]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for actual, wanted in zip(
                pool.map(lambda w: functional(w, x), scaled), expected, strict=True
            ):
                assert torch.equal(actual, wanted)


def test_frozen_parameters_are_used_but_not_given() -> None:
    network = build("mlp")
    network[1].weight.requires_grad_(False)
    functional = FunctionalNetwork(network)
    assert set(functional.params) == {"1.bias", "3.weight", "3.bias"}
    x = make_episodes().support_x[0]
    assert torch.equal(functional(functional.params, x), network(x))


def test_shared_parameters_stay_shared() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    network[2].weight = network[0].weight
    functional = FunctionalNetwork(network)
    doubled = {name: 2 * p for name, p in functional.params.items()}
    x = torch.rand(3, 4, dtype=torch.float64)
    weight, first, last = doubled["0.weight"], doubled["0.bias"], doubled["2.bias"]
    torch.testing.assert_close(
        functional(doubled, x), F.linear(F.linear(x, weight, first).tanh(), weight, last)
    )


def test_a_network_without_trainable_parameters_is_used_as_it_is() -> None:
    network, x = build("mlp").requires_grad_(False), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(FunctionalNetwork(network)({}, x), network(x))


def test_batch_norm_that_sees_folded_rows_still_uses_the_support_part() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 3, 4]: three rows per example
            return self.norm(x.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1)

    support, query = (
        drawn_on_cpu(
            torch.rand, n, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
        )
        for n in (5, 7)
    )
    functional = FunctionalNetwork(Folded(), "support")
    rows = support.flatten(0, 1)
    expected = (query - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(
        functional(functional.params, query, statistics_of=support), expected.flatten(1)
    )


def test_a_batch_norm_layer_that_stands_twice_is_replaced_twice() -> None:
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm).double().eval()
    x = torch.rand(6, 4, dtype=torch.float64)
    functional = FunctionalNetwork(network)
    torch.testing.assert_close(functional(functional.params, x), network.train()(x))


def test_running_policy_keeps_to_the_mode_of_each_layer() -> None:
    network = build("conv_batch_norm").train()
    network(image_batch(0))
    network[1].eval()  # a frozen backbone's
    functional = FunctionalNetwork(network, "running")
    torch.testing.assert_close(
        functional(functional.params, image_batch(1)), network(image_batch(1))
    )


def test_every_call_starts_from_the_networks_buffers() -> None:
    torch.manual_seed(0)
    network = (
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
        )
        .double()
        .train()
    )
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    functional = FunctionalNetwork(network)
    x = torch.rand(6, 4, dtype=torch.float64)
    assert torch.equal(functional(functional.params, x), functional(functional.params, x))
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_plain_tensor_attributes_are_shared_and_not_copied() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.scale = torch.linspace(1, 2, 3)
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.layer(x)  # has a graph, which deepcopy refuses
            return self.last * self.scale

    network = Keeps()
    x = torch.rand(2, 4)
    expected = network(x)
    functional = FunctionalNetwork(network)
    torch.testing.assert_close(functional(functional.params, x), expected)


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def test_a_batch_norm_class_with_its_own_forward_pass_keeps_it() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), NormAndActivation(4)).double()
    expected = network.train()(image_batch(0))
    before = network[1].running_mean.clone()
    functional = FunctionalNetwork(network.eval())
    torch.testing.assert_close(functional(functional.params, image_batch(0)), expected)
    assert torch.equal(network[1].running_mean, before)
    with pytest.raises(
        ValueError,
        match=r"plain batch-norm layers for `batch_norm='support'` but \['1'\] have a forward pass "
        "of their own",
    ):
        FunctionalNetwork(network, "support")


def test_hooks_on_batch_norm_still_run() -> None:
    network = build("conv_batch_norm")
    network[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    functional = FunctionalNetwork(network)
    torch.testing.assert_close(
        functional(functional.params, image_batch(0)), network.train()(image_batch(0))
    )


FORMATS: list[bool] = []


class Viewing(nn.Module):
    """Flattens its images by ``view``, which those with channels last do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.convolution(x)
        FORMATS.append(features.is_contiguous(memory_format=torch.channels_last))
        return features.view(len(x), -1)


class Drawing(nn.Module):
    """Draws from numpy and views images, which fails if their channels are last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        DRAWN.append(np.random.rand())
        features = self.convolution(x)
        return self.head(features.view(len(x), -1))


DRAWN: list[float] = []


def test_a_pass_that_is_repeated_with_channels_first_draws_the_same_numbers() -> None:
    functional, x = FunctionalNetwork(Drawing()), torch.rand(2, 1, 8, 8)
    DRAWN.clear()
    functional(functional.params, x)
    assert len(DRAWN) == 2
    assert DRAWN[0] == DRAWN[1]


def test_images_have_their_channels_last_where_the_network_allows_it() -> None:
    torch.manual_seed(0)
    x, network = torch.rand(4, 2, 8, 8), Viewing()
    expected = network(x)
    for _ in range(2):
        functional = FunctionalNetwork(network)
        torch.testing.assert_close(functional(functional.params, x), expected)
    assert FORMATS == [False, True, False, False]  # one attempt for all learners of this network


def test_features_of_a_network_that_views_its_images() -> None:
    x = torch.rand(4, 2, 8, 8)
    fresh = [nn.Sequential(Viewing(), nn.Linear(108, 2)) for _ in range(2)]
    assert FunctionalNetwork(fresh[0]).ends_with("1", x)
    functional = FunctionalNetwork(fresh[1])
    torch.testing.assert_close(functional.features(functional.params, x, "1"), fresh[1][0](x))


def test_an_error_of_the_network_is_raised_as_it_is() -> None:
    functional = FunctionalNetwork(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(7, 2)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        functional(functional.params, torch.rand(4, 2, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_of_one_channel_too(channels: int) -> None:
    x = torch.rand(4, channels, 6, 5)
    last = channels_last(x)
    assert torch.equal(last, x)
    assert last.stride() == (30 * channels, 1, 5 * channels, channels)
    assert nn.functional.conv2d(last, torch.rand(2, channels, 3, 3)).is_contiguous(
        memory_format=torch.channels_last
    )


class Standardised(nn.Conv2d):
    """Weights of zero mean, by the method that torch's layers leave to that."""

    def _conv_forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def scaled_in_place(convolution: nn.Conv2d) -> nn.Conv2d:
    convolution.forward = lambda x: (
        2 * nn.functional.conv2d(x, convolution.weight, convolution.bias)
    )  # type: ignore[method-assign]
    return convolution


def spectral(convolution: nn.Conv2d) -> nn.Conv2d:
    return nn.utils.parametrizations.spectral_norm(convolution)


class Complex(nn.Module):
    """A convolution by real and imaginary parts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 1, 3, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x.to(torch.complex128), self.weight).abs()


ODD_LAYERS = {
    "overridden": lambda: Standardised(1, 2, 3),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)),
    "scripted": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), torch.jit.trace(nn.Softplus(), torch.rand(2, 2, 6, 6).double())
    ),
    "complex": Complex,
    "without bias": lambda: nn.Conv2d(1, 2, 3, bias=False),
    "strided, of single pixels": lambda: nn.Conv2d(1, 6, 1, stride=(2, 3)),
    "norm without affine": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False)
    ),
}


@pytest.mark.parametrize("kind", ODD_LAYERS)
def test_the_exact_meta_gradient_of_odd_layers(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        ODD_LAYERS[kind](), nn.Tanh(), nn.Flatten(), nn.Linear(72, WAYS)
    ).double()
    functional, episodes = FunctionalNetwork(network), make_episodes()
    loss = lambda w, x, y: F.cross_entropy(functional(w, x), y)
    expected = autograd_meta_gradient(network, episodes, 2, F.cross_entropy)
    assert (
        relative_error(
            meta_gradient(loss, functional.params, episodes, inner_lr=RATE, steps=2).grad, expected
        )
        < 1e-12
    )


SHORTCUTS = """
import torch
from lightning_maml import MAML, Episodes
torch.set_num_threads(2)
pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1, stride=2), *pooled, torch.nn.Linear(64, 5))
images, labels = torch.rand(2, 5, 3, 84, 84), torch.arange(5).repeat(2, 1)
model = MAML(network, inner_lr=0.1, train_steps=2, tasks="loop")
for _ in range(5):
    model.meta_loss(Episodes(images, labels, images, labels)).backward()
"""


@pytest.mark.cpu_only
def test_strided_convolutions_of_single_pixels_leave_the_memory_of_others_alone() -> None:
    another_process.output(SHORTCUTS)


def test_a_forward_pass_that_was_replaced_stays() -> None:
    network = nn.Sequential(scaled_in_place(nn.Conv2d(1, 2, 3)), nn.Flatten())
    functional, x = FunctionalNetwork(network), torch.rand(2, 1, 4, 4)
    with evaluating(derivatives=2):
        torch.testing.assert_close(functional(functional.params, x), network(x))


def test_a_parametrization_with_a_state_is_asked_once() -> None:
    torch.manual_seed(0)
    network, x = (
        nn.Sequential(spectral(nn.Conv2d(1, 2, 3)), nn.Flatten()).train(),
        torch.rand(2, 1, 4, 4),
    )
    functional = FunctionalNetwork(network)
    plain = functional(functional.params, x)
    with evaluating(derivatives=2):
        torch.testing.assert_close(functional(functional.params, x), plain)


def test_the_second_attempt_draws_the_same_random_numbers() -> None:
    """One of the first evaluation alone: a Hessian-vector product draws its masks again."""
    network = nn.Sequential(nn.Dropout(0.5), Viewing()).train()
    functional, x = FunctionalNetwork(network), torch.rand(4, 2, 8, 8)
    state = torch.get_rng_state()
    first = functional(functional.params, x)
    torch.set_rng_state(state)
    torch.testing.assert_close(functional(functional.params, x), first)


def test_a_head_that_views_its_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), Viewing())
    head, x = FunctionalHead(network, "1"), torch.rand(4, 2, 8, 8)
    torch.testing.assert_close(head(head.params, x), network[1](x))


def test_names_that_are_no_parameters_are_left_alone() -> None:
    network = build("mlp")
    functional, x = FunctionalNetwork(network), image_batch(0)
    torch.testing.assert_close(
        functional({**functional.params, "temperature": torch.ones(())}, x), network(x)
    )


def test_a_tied_parameter_goes_by_any_of_its_names() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    x, zero = torch.rand(2, 3), torch.zeros(3, 3)
    torch.testing.assert_close(
        FunctionalNetwork(network)({"1.weight": zero}, x), network[1].bias.expand(2, 3)
    )
