"""Inner loops as people write them: another loss on the support set, and train() and eval()."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, relative_error
from helpers.trainers import trainer_in_double
from lightning_maml import (
    ANIL,
    BOIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Episodes,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
    check,
)

RATE, STEPS = 0.3, 2
WAYS_TO_RUN = pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])


class Smoothed(nn.Module):
    """A cross-entropy whose temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.temperature * outputs, y, label_smoothing=0.2)


class Halving(nn.Module):
    """Dropout whose mask is always the same."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[-1]) % 3 > 0
        return x * mask * 1.5 if self.training else x


def with_modes() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), Halving(), nn.Linear(6, 3)
    ).double()
    network[2].running_mean += torch.rand(6)
    network[2].running_var += torch.rand(6)
    return network


def own_loop(
    network: nn.Module,
    episodes: Episodes,
    support_loss: Any = F.cross_entropy,
    query_loss: Any = F.cross_entropy,
    *,
    two_modes: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the query losses and the meta-parameters of a loop as people write it."""
    w = leaves(network)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        now = {name: p.view_as(p) for name, p in w.items()}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        if two_modes:
            network.train()
        for _ in range(STEPS):
            value = support_loss(functional_call(network, now | buffers, support_x), support_y)
            gradient = torch.autograd.grad(value, [*now.values()], create_graph=True)
            now = {name: p - RATE * g for (name, p), g in zip(now.items(), gradient, strict=True)}
        if two_modes:
            network.eval()
        buffers = dict(network.named_buffers())
        losses.append(query_loss(functional_call(network, now | buffers, query_x), query_y))
    return torch.stack(losses), w


@WAYS_TO_RUN
def test_the_support_loss_may_be_another(tasks: str) -> None:
    episodes, support_loss = make_episodes(), Smoothed()
    losses, w = own_loop(build("mlp"), episodes, support_loss)
    *expected, of_temperature = torch.autograd.grad(
        losses.mean(), [*w.values(), support_loss.temperature]
    )
    model = MAML(build("mlp"), RATE, STEPS, support_loss=support_loss, tasks=tasks)
    loss = model.meta_loss(episodes)
    torch.testing.assert_close(loss.detach(), losses.mean().detach())
    loss.backward()
    found = {name: p.grad for name, p in model.network.named_parameters()}
    assert relative_error(found, dict(zip(w, expected, strict=True))) < 1e-12
    torch.testing.assert_close(support_loss.temperature.grad, of_temperature, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.evaluate(episodes).loss[:, -1], losses.detach())


@pytest.mark.parametrize(
    "algorithm", [MAML, HFMAML, ANIL, BOIL, LSLR, MetaSGD, IMAML, MAMLPlusPlus]
)
def test_every_algorithm_takes_another_support_loss(algorithm: type[MAML]) -> None:
    settings: dict[str, Any] = {"train_steps": STEPS, "support_loss": Smoothed()}
    report = check(algorithm(build("mlp"), 0.1, **settings), make_episodes())
    assert report.ok, str(report)


def test_reptile_takes_another_support_loss_without_parameters() -> None:
    def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, label_smoothing=0.3)

    report = check(Reptile(build("mlp"), 0.1, STEPS, support_loss=smoothed), make_episodes())
    assert report.ok, str(report)
    with pytest.raises(ValueError, match="a `support_loss` without trainable parameters"):
        Reptile(build("mlp"), support_loss=Smoothed()).meta_loss(make_episodes())


@pytest.mark.parametrize(("algorithm", "steps"), [(FOMAML, 2), (MAML, 0)])
def test_a_support_loss_that_would_not_be_trained_is_refused(
    algorithm: type[MAML], steps: int
) -> None:
    model = algorithm(build("mlp"), RATE, steps, support_loss=Smoothed())
    with pytest.raises(ValueError, match="a `support_loss` without trainable parameters"):
        model.meta_loss(make_episodes())
    model.support_loss.requires_grad_(False)
    model.meta_loss(make_episodes())


def test_each_set_has_the_labels_of_its_own_loss() -> None:
    episodes = make_episodes()
    padded = episodes.support_y.clone()
    padded[:, 0] = 255
    ignoring = nn.CrossEntropyLoss(ignore_index=255)
    model = MAML(build("mlp"), RATE, STEPS, support_loss=ignoring)
    losses, w = own_loop(build("mlp"), episodes._replace(support_y=padded), ignoring)
    expected = torch.autograd.grad(losses.mean(), [*w.values()])
    found = model.meta_gradient(episodes._replace(support_y=padded))
    assert relative_error(found, dict(zip(w, expected, strict=True))) < 1e-12
    with pytest.raises(ValueError, match=r"labels from 0 to 2.* but got 0 to 255"):
        MAML(build("mlp"), RATE, loss=ignoring, support_loss=F.cross_entropy).meta_loss(
            episodes._replace(support_y=padded)
        )
    targets = torch.eye(3, dtype=torch.float64)[episodes.support_y]
    with pytest.raises(ValueError, match=r"labels from 0 to 2.* but got 1 to 3"):
        MAML(build("mlp"), RATE, support_loss=F.mse_loss).meta_loss(
            episodes._replace(support_y=targets, query_y=episodes.query_y + 1)
        )
    classes = episodes._replace(query_y=torch.randn(3, 9, 3, dtype=torch.float64))
    losses, w = own_loop(build("mlp"), classes, query_loss=F.mse_loss)
    expected = torch.autograd.grad(losses.mean(), [*w.values()])
    model = MAML(build("mlp"), RATE, STEPS, support_loss=F.cross_entropy, loss=F.mse_loss)
    assert relative_error(model.meta_gradient(classes), dict(zip(w, expected, strict=True))) < 1e-12


def test_targets_to_adapt_on_may_be_of_another_kind() -> None:
    """Adapted on targets of floats, asked for classes."""
    episodes = make_episodes()
    targets = torch.eye(3, dtype=torch.float64)[episodes.support_y]
    losses, w = own_loop(build("mlp"), episodes._replace(support_y=targets), F.mse_loss)
    expected = torch.autograd.grad(losses.mean(), [*w.values()])
    model = MAML(build("mlp"), RATE, STEPS, support_loss=F.mse_loss)
    found = model.meta_gradient(episodes._replace(support_y=targets))
    assert relative_error(found, dict(zip(w, expected, strict=True))) < 1e-12


def test_a_support_loss_is_looked_at_like_any_loss() -> None:
    def pairs(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs[:, :1] - y).square().mean()

    model = MAML(build("mlp"), RATE, support_loss=pairs)
    with pytest.raises(ValueError, match="element by element"):
        model.meta_loss(make_episodes())
    model = MAML(build("mlp"), RATE, support_loss=lambda outputs, y: outputs.square())
    with pytest.raises(ValueError, match="a scalar"):
        model.meta_loss(make_episodes())
    with pytest.raises(TypeError, match="Expected `support_loss` to be a function or a module"):
        MAML(build("mlp"), support_loss=nn.CrossEntropyLoss)


def test_a_checkpoint_names_the_support_loss(tmp_path: Path) -> None:
    model = MAML(build("mlp"), RATE, support_loss=Smoothed())
    run = trainer_in_double(tmp_path)
    run.fit(model, DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(tmp_path / "model.ckpt")
    path = tmp_path / "model.ckpt"
    with pytest.raises(ValueError, match=r"Expected the loss .*support_loss.temperature"):
        MAML.load_from_checkpoint(path, network=build("mlp"))
    loaded = MAML.load_from_checkpoint(path, network=build("mlp"), support_loss=Smoothed())
    assert torch.equal(loaded.support_loss.temperature, model.support_loss.temperature)


def test_a_resumed_run_says_that_the_modes_differ(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes()], batch_size=None)
    run = trainer_in_double(tmp_path)
    run.fit(MAML(build("mlp"), RATE, query_in_eval=True), loader)
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="query_in_eval True but this one with no query_in_eval"):
        trainer_in_double(tmp_path).fit(
            MAML(build("mlp"), RATE), loader, ckpt_path=tmp_path / "model.ckpt"
        )


@WAYS_TO_RUN
def test_train_on_the_support_set_and_eval_on_the_query_set(tasks: str) -> None:
    episodes = make_episodes()
    losses, w = own_loop(with_modes(), episodes, two_modes=True)
    expected = torch.autograd.grad(losses.mean(), [*w.values()])
    model = MAML(with_modes(), RATE, STEPS, batch_norm="running", query_in_eval=True, tasks=tasks)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model.evaluate(episodes).loss[:, -1], losses.detach())
        found = model.meta_gradient(episodes)
        assert relative_error(found, dict(zip(w, expected, strict=True))) < 1e-12
    assert (
        relative_error(
            MAML(with_modes(), RATE, STEPS, batch_norm="running").meta_gradient(episodes), found
        )
        > 1e-2
    )


@pytest.mark.parametrize("many", [False, True])
def test_adapted_networks_answer_in_evaluation_mode(many: bool) -> None:
    episodes = make_episodes()
    losses, _ = own_loop(with_modes(), episodes, two_modes=True)
    model = MAML(with_modes(), RATE, STEPS, batch_norm="running", query_in_eval=True)
    if many:
        outputs = model.adapt(*episodes[:2])(episodes.query_x)
        found = [F.cross_entropy(*pair) for pair in zip(outputs, episodes.query_y, strict=True)]
    else:
        found = []
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            network = model.adapt(support_x, support_y)
            assert not any(module.training for module in network.modules())
            found.append(F.cross_entropy(network(query_x), query_y))
    torch.testing.assert_close(torch.stack(found), losses.detach())


@pytest.mark.parametrize(
    "algorithm", [MAML, FOMAML, HFMAML, ANIL, BOIL, LSLR, IMAML, MAMLPlusPlus, Reptile]
)
@pytest.mark.parametrize("batch_norm", ["batch", "support", "running"])
def test_every_algorithm_takes_both_modes(algorithm: type[MAML], batch_norm: Any) -> None:
    model = algorithm(with_modes(), 0.1, STEPS, batch_norm=batch_norm, query_in_eval=True, head="5")
    report = check(model, make_episodes())
    assert report.ok, str(report)


def test_dropout_is_drawn_on_the_support_set_alone() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    episodes = make_episodes()
    model = MAML(network, RATE, STEPS, query_in_eval=True)
    before = model.evaluate(episodes).loss
    model.eval()
    again = model.evaluate(episodes).loss
    assert torch.equal(before[:, 0], again[:, 0])  # the query set alone was evaluated so far
    assert not torch.equal(before[:, -1], again[:, -1])
    report = check(model, episodes)
    assert report.ok, str(report)


def test_copies_in_two_modes_are_checked_once() -> None:
    network = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    episodes = make_episodes()
    episodes = episodes._replace(
        support_x=episodes.support_x.reshape(3, -1, 16, 4),
        query_x=episodes.query_x.reshape(3, -1, 16, 4),
    )
    model = MAML(network, RATE, STEPS, query_in_eval=True)
    for _ in range(2):
        model.meta_loss(episodes)
        checks = len(model._findings)
    assert checks <= 5
    for _ in range(3):
        model.meta_loss(episodes)
    assert len(model._findings) == checks


def test_only_support_sets_move_the_running_averages(tmp_path: Path) -> None:
    network, episodes = with_modes(), make_episodes()
    norm = network[2]
    with torch.no_grad():
        x = network[1](episodes.support_x.flatten(0, 1).flatten(1))
        mean = norm.running_mean.lerp(x.mean(0), 0.1)
        variance = norm.running_var.lerp(x.var(0), 0.1)
    model = MAML(network, RATE, STEPS, batch_norm="running", query_in_eval=True)
    trainer_in_double(tmp_path).fit(model, DataLoader([episodes], batch_size=None))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_parts_in_evaluation_mode_are_kept_there_by_their_own_train() -> None:
    network = with_modes()
    network[2].eval()
    model = MAML(network, RATE, STEPS, batch_norm="running", query_in_eval=True)
    with pytest.raises(ValueError, match="parts of it are in evaluation mode"):
        model.meta_loss(make_episodes())
    with pytest.raises(ValueError, match="but got 'per_step'"):
        MAML(with_modes(), batch_norm="per_step", query_in_eval=True)


class Pretrained(nn.Sequential):
    """A network whose batch norm stays in evaluation mode."""

    def train(self, mode: bool = True) -> "Pretrained":
        super().train(mode)
        self[2].eval()
        return self


def test_batch_norm_that_is_always_in_evaluation_mode() -> None:
    """Also where nobody has called train() on it yet."""
    network = Pretrained(*with_modes())
    assert network[2].training
    mean = network[2].running_mean.clone()
    MAML(network, RATE, batch_norm="running", query_in_eval=True).meta_loss(make_episodes())
    assert torch.equal(network[2].running_mean, mean)
    assert network[2].training

    episodes = make_episodes()
    losses, w = own_loop(network, episodes, two_modes=True)
    expected = torch.autograd.grad(losses.mean(), [*w.values()])
    model = MAML(Pretrained(*with_modes()), RATE, STEPS, batch_norm="running", query_in_eval=True)
    model.train()
    found = model.meta_gradient(episodes)
    assert relative_error(found, dict(zip(w, expected, strict=True))) < 1e-12
