"""Networks that a batch-norm policy cannot govern are refused at the first batch; all others are
not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import WAYS, build, make_episodes
from lightning_maml import ANIL, FOMAML, HFMAML, MAML, ProtoNet

POLICIES = ("batch", "support", "running", "per_step")


class Functional(nn.Module):
    """Batch norm called as a function, over the batch always, or in training alone."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=self.always or self.training)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Attending(nn.Module):
    """Attention over the examples of a set."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.softmax(x @ x.T, -1) @ x


def network_with(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), layer, nn.Tanh(), nn.Linear(6, WAYS)
    ).double()


def runs(
    algorithm: Callable[..., MAML], network: nn.Module, batch_norm: str, *, training: bool = True
) -> None:
    model = algorithm(network, batch_norm=batch_norm).train(training)
    if training:
        model.meta_loss(make_episodes())
    else:
        model.evaluate(make_episodes())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML, ANIL, ProtoNet])
@pytest.mark.parametrize("batch_norm", ["support", "running"])
def test_every_algorithm_refuses_normalisation_by_the_batch(
    algorithm: Callable[..., MAML], batch_norm: str, training: bool
) -> None:
    with pytest.raises(
        ValueError,
        match=f"do not depend on the other queries, as `batch_norm='{batch_norm}'` promises",
    ):
        runs(algorithm, network_with(Functional(always=True)), batch_norm, training=training)


@pytest.mark.parametrize("layer", [Centred, Attending])
@pytest.mark.parametrize("batch_norm", ["support", "running", "per_step"])
def test_all_that_looks_over_the_batch_is_refused(layer: type[nn.Module], batch_norm: str) -> None:
    network = nn.Sequential(build("conv_batch_norm")[:2], network_with(layer()))
    network[1][1] = nn.Linear(256, 6).double()
    with pytest.raises(ValueError, match="do not depend on the other queries"):
        runs(MAML, network, batch_norm)
    runs(MAML, network, "batch")


def test_a_last_layer_of_zeros_does_not_hide_it() -> None:
    network = network_with(Centred())
    nn.init.zeros_(network[-1].weight)
    with pytest.raises(ValueError, match="do not depend on the other queries"):
        runs(MAML, network, "support")
    network = network_with(nn.LayerNorm(6))
    nn.init.zeros_(network[-1].weight)
    runs(MAML, network, "support")


@pytest.mark.parametrize("batch_norm", ["batch", "support"])
def test_running_averages_of_batch_norm_as_a_function_are_refused_where_the_policy_uses_none(
    batch_norm: str,
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"follows `batch_norm='{batch_norm}'` but in evaluation mode the network calls",
    ):
        runs(MAML, network_with(Functional(always=False)), batch_norm)


def test_batch_norm_as_a_function_with_running_averages_is_what_running_says() -> None:
    network, layers = (
        network_with(Functional(always=False)),
        network_with(nn.BatchNorm1d(6, affine=False)),
    )
    models = [MAML(each, 0.3, 2, batch_norm="running") for each in (network, layers)]
    for seed in range(2):
        for model in models:
            model.meta_loss(make_episodes(seed=seed))
    torch.testing.assert_close(network[2].mean, layers[2].running_mean)
    one, two = (model.eval().evaluate(make_episodes()).aux for model in models)
    torch.testing.assert_close(one, two)


def test_batch_norm_as_a_function_over_the_batch_is_what_batch_says() -> None:
    network, layers = (
        network_with(Functional(always=True)),
        network_with(nn.BatchNorm1d(6, affine=False)),
    )
    one, two = (
        MAML(each, 0.3, 2).eval().evaluate(make_episodes()).aux for each in (network, layers)
    )
    torch.testing.assert_close(one, two)


GOVERNED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm and dropout": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)),
    "layer norm": lambda: nn.LayerNorm(6),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", POLICIES)
@pytest.mark.parametrize("layer", [*GOVERNED])
def test_networks_that_the_policy_governs_run(layer: str, batch_norm: str, training: bool) -> None:
    runs(MAML, network_with(GOVERNED[layer]()), batch_norm, training=training)
    if batch_norm != "per_step":
        runs(ProtoNet, network_with(GOVERNED[layer]()), batch_norm, training=training)


def test_the_look_moves_no_random_numbers() -> None:
    model, episodes = MAML(network_with(nn.BatchNorm1d(6)), batch_norm="support"), make_episodes()
    before = torch.get_rng_state()
    model.meta_loss(episodes)
    assert torch.equal(torch.get_rng_state(), before)
