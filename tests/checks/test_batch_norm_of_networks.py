"""Batch norm and outputs of users' networks, under each policy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import relative_error
from helpers.points import (
    RATE,
    STEPS,
    WAYS,
    Plain,
    Several,
    fewer_queries,
    points,
    seeded,
    unrolled,
)
from lightning_maml import FOMAML, MAML, Episodes


def test_support_statistics_need_outputs_with_the_examples_in_front() -> None:
    class WithCodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, WAYS)
            # as many as support and query examples together
            self.codes = nn.Parameter(torch.ones(4 * WAYS, 2))

        def forward(self, x: Tensor) -> Several:
            return Several(self.head(self.norm(x)), 2 * self.codes)

    with pytest.raises(
        ValueError, match="outputs with the examples in front for `batch_norm='support'`"
    ):
        MAML(WithCodes().double(), RATE, STEPS, batch_norm="support").meta_loss(points())


@pytest.mark.parametrize("policy", ["running", "support"])
def test_outputs_of_layers_are_no_look_at_other_examples(policy: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, WAYS)

        def forward(self, x: Tensor) -> Several:
            sequence, hidden = self.layers(x.view(len(x), 2, 4))
            return Several(self.head(sequence[:, -1]), hidden)

    MAML(Recurrent().double(), RATE, STEPS, batch_norm=policy).meta_loss(points()).backward()


class OfAnySize(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(1, 4, 3), norm, nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.convolution(x))).mean((2, 3)))


def of_two_sizes() -> Episodes:
    x = torch.rand(2, 2 * WAYS, 1, 10, 10, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat(2, 2)
    return Episodes(x[..., :8, :8], labels, x, labels)


def test_support_and_query_inputs_of_two_sizes() -> None:
    writes = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    for norm, policy in (
        (nn.BatchNorm2d(4), "batch"),
        (nn.BatchNorm2d(4), "running"),
        (writes, "batch"),
    ):
        MAML(OfAnySize(norm).double(), RATE, STEPS, batch_norm=policy).meta_loss(
            of_two_sizes()
        ).backward()
    assert writes.running_mean.any()
    for policy in ("support", "per_step"):
        with pytest.raises(ValueError, match=f"of one size for `batch_norm='{policy}'`"):
            MAML(OfAnySize(nn.BatchNorm2d(4)).double(), RATE, STEPS, batch_norm=policy).meta_loss(
                of_two_sizes()
            )


def test_batch_norm_with_a_forward_of_its_own_keeps_its_averages_in_training() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if not self.training:
                mean, variance = self.running_mean, self.running_var
            else:
                with torch.no_grad():
                    self.running_mean.mul_(0.9).add_(0.1 * mean)
            return (x - mean[:, None, None]) / (variance + self.eps).sqrt()[:, None, None]

    labels = torch.arange(WAYS).repeat(2, 2)
    x = torch.rand(2, 2 * WAYS, 1, 10, 10, dtype=torch.float64)
    torch.manual_seed(0)
    own = OfAnySize(Own(4)).double()
    torch.manual_seed(0)
    plain = OfAnySize(nn.BatchNorm2d(4, affine=False)).double()
    with pytest.raises(
        ValueError,
        match=r"`batch_norm='batch'` has it, but \['norm'\] need theirs; use "
        "`batch_norm='running'`",
    ):
        MAML(own, RATE, STEPS).meta_loss(Episodes(x, labels, x, labels))
    with pytest.raises(
        ValueError,
        match=r"`batch_norm='batch'` has it, but \['norm'\] need theirs; use "
        "`batch_norm='running'`",
    ):
        MAML(own, RATE, STEPS).meta_loss(Episodes(x, labels, x, labels))
    models = [
        MAML(network, RATE, STEPS, batch_norm="running", tasks="loop") for network in (own, plain)
    ]
    gradients = [model.meta_gradient(Episodes(x, labels, x, labels)) for model in models]
    assert relative_error({name: gradients[0][name] for name in gradients[1]}, gradients[1]) < 1e-10


@pytest.mark.parametrize("model", [MAML, FOMAML])
@pytest.mark.parametrize("without", ["weight", "bias"])
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_batch_norm_without_one_of_its_parameters(
    tasks: str, without: str, model: type[MAML]
) -> None:
    """Torch has no second derivative without a weight, so a weight of ones that does not adapt is
    the oracle."""

    def made(*, missing: bool) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)
        ).double()
        nn.init.normal_(network[1].bias if without == "weight" else network[1].weight)
        constant = torch.ones(6) if without == "weight" else torch.zeros(6)
        setattr(
            network[1],
            without,
            None if missing else nn.Parameter(constant.double(), requires_grad=False),
        )
        return network

    for policy in ("batch", "support"):
        found, expected = (
            model(made(missing=missing), RATE, STEPS, batch_norm=policy, tasks=tasks)
            for missing in (True, False)
        )
        gradients = found.meta_gradient(points()), expected.meta_gradient(points())
        assert relative_error(*gradients) < 1e-10
        torch.testing.assert_close(found.evaluate(points()).loss, expected.evaluate(points()).loss)


class Distribution(Plain):
    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Categorical(logits=super().forward(x))


def test_outputs_that_belong_to_their_examples_may_be_of_two_sizes() -> None:
    def likelihood(outputs: Any, y: Tensor) -> Tensor:
        return -outputs.log_prob(y).mean()

    model, plain = (
        MAML(seeded(Distribution), RATE, STEPS, loss=likelihood),
        MAML(seeded(Plain), RATE, STEPS),
    )
    assert (
        relative_error(model.meta_gradient(fewer_queries()), plain.meta_gradient(fewer_queries()))
        < 1e-10
    )


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_batch_norm_of_torchscript_is_refused(policy: Any) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.script(
            nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, WAYS)).double()
        )
    with pytest.raises(
        ValueError, match=r"\['1'\] are TorchScript's; script the network after training"
    ):
        MAML(scripted, RATE, STEPS, batch_norm=policy)
    if policy == "running":
        network = nn.Sequential(scripted.eval(), nn.Linear(WAYS, WAYS).double())
        model = MAML(network.requires_grad_(True), RATE, STEPS, batch_norm=policy, tasks="loop")
        assert relative_error(model.meta_gradient(points()), unrolled(network)) < 1e-10
