"""Losses of users: what they draw, write, read and return is looked at on the first batch."""

import random
from typing import Any

import numpy as np
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
from lightning_maml import MAML, Episodes, ProtoNet
from lightning_maml.core.params import Params


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_losses_that_draw_run_in_a_loop(draw: Any) -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs * (0.2 + draw()), y)

    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 84 * 84, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    images, labels = torch.rand(8, 4, 3, 84, 84, dtype=torch.float64), torch.arange(2).repeat(8, 2)
    episodes = Episodes(images, labels, images, labels)

    def gradient(tasks: str) -> Params:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return MAML(network, 0.01, 1, loss=loss, tasks=tasks).meta_gradient(episodes)

    assert relative_error(gradient("auto"), gradient("loop")) < 1e-12
    with pytest.raises(RuntimeError, match="draw from"):
        gradient("threads")


def test_a_loss_with_a_generator_of_its_own_is_refused() -> None:
    generator = np.random.default_rng(0)
    model = MAML(
        seeded(Plain),
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs * generator.random(), y),
    )
    with pytest.raises(
        ValueError, match="Expected a loss that returns the same for the same inputs"
    ):
        model.meta_loss(points())


class Averaged(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))
        self.in_place = in_place

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y)
        if self.in_place:
            self.average.mul_(0.5).add_(0.5 * loss.detach())
        else:
            self.average = 0.5 * self.average + 0.5 * loss.detach()
        return loss / self.average.clone()


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads", "vmap"])
@pytest.mark.parametrize("in_place", [False, True])
def test_losses_that_write_are_refused_and_left_as_they_were(tasks: str, in_place: bool) -> None:
    loss = Averaged(in_place=in_place)
    with pytest.raises(ValueError, match="Expected a loss that"):
        MAML(seeded(Plain), RATE, STEPS, loss=loss, tasks=tasks).meta_loss(points())
    assert loss.average == 1


def test_prototypes_have_losses_that_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match="Expected a loss of labels"):
        ProtoNet(nn.Linear(8, 4).double(), loss=F.mse_loss).meta_loss(points())


def test_dropout_in_the_loss_is_active_for_a_network_that_is_trained_in_evaluation_mode() -> None:
    class Dropping(nn.Module):
        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.dropout(outputs, 0.5, self.training), y)

    network = seeded(Plain).eval()
    model = MAML(network, RATE, STEPS, loss=Dropping())
    torch.manual_seed(3)
    expected = unrolled(network, Dropping())
    torch.manual_seed(3)
    assert relative_error(model.meta_gradient(points()), expected) < 1e-10


def test_adapted_networks_do_not_depend_on_dropout_in_the_loss() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.dropout(outputs), y)

    model = MAML(seeded(Plain), RATE, STEPS, loss=Dropping())
    adapted = [
        model.adapt(points().support_x[0], points().support_y[0]).state_dict() for _ in range(2)
    ]
    torch.testing.assert_close(adapted[0], adapted[1], rtol=0, atol=0)
    assert model.loss.training


def test_a_network_may_return_its_weights_to_the_loss() -> None:
    class Returning(Plain):
        def forward(self, x: Tensor) -> Several:
            return Several(super().forward(x), self.body.weight)

    def loss(outputs: Several, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, y) + 0.1 * outputs.other.square().sum()

    model = MAML(seeded(Returning), RATE, STEPS, loss=loss)
    assert relative_error(model.meta_gradient(points()), unrolled(seeded(Returning), loss)) < 1e-10


def quantile_loss(outputs: Tensor, y: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=outputs.dtype)
    away = y.expand_as(outputs) - outputs
    return torch.maximum(levels * away, (levels - 1) * away).mean()


def test_a_loss_that_expands_targets_itself_means_it() -> None:
    found = points()
    targets = found._replace(support_y=found.support_x[..., :1], query_y=found.query_x[..., :1])
    network = nn.Linear(8, 3).double()
    MAML(network, RATE, STEPS, loss=quantile_loss).meta_loss(targets).backward()
    with pytest.raises(ValueError, match=r"let it say so, y\.expand_as"):
        MAML(network, RATE, STEPS, loss=lambda outputs, y: (outputs - y).square().mean()).meta_loss(
            targets
        )


def test_a_loss_may_multiply_by_a_sparse_matrix() -> None:
    matrix = torch.eye(WAYS, dtype=torch.float64).to_sparse()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.sparse.mm(matrix, outputs.mT).mT, y)

    gradient = MAML(seeded(Plain), RATE, STEPS, loss=loss, tasks="loop").meta_gradient(points())
    assert relative_error(gradient, unrolled(seeded(Plain))) < 1e-10


def test_parameters_in_the_closure_of_a_loss_are_refused() -> None:
    temperature = nn.Parameter(torch.zeros((), dtype=torch.float64))
    model = MAML(
        seeded(Plain),
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs * temperature.exp(), y),
    )
    with pytest.raises(ValueError, match="depends on one from elsewhere"):
        model.meta_loss(points())


@pytest.mark.parametrize("where", ["network", "loss"])
def test_a_loss_without_a_graph_is_said_to_be_so(where: str) -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                return super().forward(x)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(F.cross_entropy(outputs, y).item())

    model = (
        MAML(seeded(Detached), RATE, STEPS)
        if where == "network"
        else MAML(seeded(Plain), RATE, STEPS, loss=loss)
    )
    with pytest.raises(ValueError, match="depends on the network's parameters but nothing leads"):
        model.meta_loss(points())


def test_a_loss_that_was_not_made_is_refused() -> None:
    for wrong, got in ((nn.MSELoss, "the class MSELoss"), ("mse", "'mse'")):
        with pytest.raises(TypeError, match=f"`loss` to be a function or a module but got {got}"):
            MAML(seeded(Plain), RATE, loss=wrong)


def test_a_loss_that_reads_parameters_is_refused_in_adaptation_and_evaluation_too() -> None:
    network = seeded(Plain)
    model = MAML(
        network,
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs, y) + network.head.weight.square().sum(),
    )
    for use in (
        lambda: model.adapt(points().support_x[0], points().support_y[0]),
        lambda: model.evaluate(points()),
    ):
        with pytest.raises(ValueError, match="reads the network's parameters"):
            use()


@pytest.mark.parametrize(
    ("made", "got"), [(lambda loss: loss.item(), "float"), (lambda loss: (loss, {}), "tuple")]
)
def test_a_loss_that_returns_no_tensor_is_refused(made: Any, got: str) -> None:
    model = MAML(
        seeded(Plain), RATE, STEPS, loss=lambda outputs, y: made(F.cross_entropy(outputs, y))
    )
    with pytest.raises(TypeError, match=f"loss of a task to be a scalar tensor but got {got}"):
        model.meta_loss(points())


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_losses_of_each_example_are_refused(tasks: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected the loss of a task to be a scalar but got shape \[10\]; use "
        "reduction='mean'",
    ):
        MAML(
            seeded(Plain), RATE, STEPS, loss=nn.CrossEntropyLoss(reduction="none"), tasks=tasks
        ).meta_loss(fewer_queries())


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_trainable_tensors_that_are_no_parameters_are_refused(where: str) -> None:
    network = seeded(Plain)
    scale = torch.ones((), requires_grad=True)
    if where == "buffer":
        network.head.register_buffer("scale", scale)
    else:
        network.head.scale = scale
    with pytest.raises(ValueError, match=r"to be parameters but \['head.scale'\] are none"):
        MAML(network, RATE, STEPS)
