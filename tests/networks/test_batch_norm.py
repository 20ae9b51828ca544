"""Running averages of each inner step, against a loop that keeps them by hand."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import IMAML, MAML, MAMLPlusPlus, ProtoNet
from lightning_maml.core.params import Params
from lightning_maml.networks.facts import writes

STEPS, RATE = 2, 0.3


def statistics_on_the_way(x: Tensor, y: Tensor, query_x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of the first convolution's output for support and query set, at w_0 .. w_N
    of a descent by batch statistics."""
    network, loss = build("conv_batch_norm"), plain_loss(build("conv_batch_norm"))
    here, found = leaves(network), []
    for _ in range(STEPS + 1):
        entering = F.conv2d(
            torch.cat([x, query_x]), here["0.weight"], here["0.bias"], padding=1
        ).detach()
        torchs = nn.BatchNorm2d(4, momentum=1.0).double()
        torchs(entering)
        found.append((torchs.running_mean, torchs.running_var))
        gradient = torch.autograd.grad(loss(here, x, y), list(here.values()))
        here = {
            name: (p - RATE * g).detach().requires_grad_()
            for (name, p), g in zip(here.items(), gradient, strict=True)
        }
    return found


def evaluated(
    network: nn.Module, averages: list[dict[str, Tensor]], task: tuple[Tensor, ...], steps: int
) -> tuple[Tensor, Params]:
    """Query outputs after 0 .. steps steps, each by the averages of its point, and the last
    point."""
    here, outputs = leaves(network), []
    network.eval()
    for j in range(steps + 1):
        own = averages[min(j, STEPS)]
        outputs.append(functional_call(network, here | own, (task[2],)).detach())
        gradient = torch.autograd.grad(
            F.cross_entropy(functional_call(network, here | own, (task[0],)), task[1]),
            list(here.values()),
        )
        last = here
        here = {
            name: (p - RATE * g).detach().requires_grad_()
            for (name, p), g in zip(here.items(), gradient, strict=True)
        }
    return torch.stack(outputs), last


def different_averages(model: MAML) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    for average in model.step_statistics.buffers():
        average.copy_(drawn_on_cpu(torch.rand, average.shape, generator=random) + 0.5)
    return [model.step_statistics(j) for j in range(STEPS + 1)]


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_training_moves_the_averages_of_every_step(tmp_path: Path, tasks: str) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    network[1].momentum = 0.25
    model = MAML(
        network,
        RATE,
        STEPS,
        batch_norm="per_step",
        tasks=tasks,
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    trainer(tmp_path).fit(model, DataLoader([episodes], batch_size=None))
    for j, (mean, variance) in enumerate(
        statistics_on_the_way(*(tensor[0] for tensor in episodes[:3]))
    ):
        averages = model.step_statistics(j)
        torch.testing.assert_close(averages["1.running_mean"], 0.25 * mean)
        torch.testing.assert_close(averages["1.running_var"], 0.75 + 0.25 * variance)


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_evaluation_normalises_each_step_by_its_own(tasks: str) -> None:
    model = MAML(
        build("conv_batch_norm"), RATE, STEPS, STEPS + 1, batch_norm="per_step", tasks=tasks
    ).eval()
    averages, episodes = different_averages(model), make_episodes()
    found = model.evaluate(episodes).aux
    for t, task in enumerate(zip(*episodes, strict=True)):
        torch.testing.assert_close(
            found[t], evaluated(build("conv_batch_norm"), averages, task, STEPS + 1)[0]
        )


@pytest.mark.parametrize("steps", [1, STEPS + 1])
def test_adapted_networks_keep_the_averages_of_their_last_step(steps: int) -> None:
    model = MAML(build("conv_batch_norm"), RATE, STEPS, batch_norm="per_step")
    averages, episodes = different_averages(model), make_episodes()
    networks, one = (
        model.adapt(*episodes[:2], steps),
        model.adapt(episodes.support_x[1], episodes.support_y[1], steps),
    )
    for t, task in enumerate(zip(*episodes, strict=True)):
        outputs, last = evaluated(build("conv_batch_norm"), averages, task, steps)
        torch.testing.assert_close(networks(episodes.query_x)[t], outputs[-1])
        if t == 1:
            torch.testing.assert_close(one(task[2]), outputs[-1])
            assert relative_error(dict(one.named_parameters()), last) < 1e-12
    assert not model.network[1].running_mean.any(), "the network's own averages stay"


def test_the_meta_gradient_is_that_of_batch_statistics() -> None:
    gradients = [
        MAML(build("conv_batch_norm"), RATE, STEPS, batch_norm=policy).meta_gradient(
            make_episodes()
        )
        for policy in ("batch", "per_step")
    ]
    assert relative_error(*gradients) == 0


@pytest.mark.parametrize("algorithm", [MAMLPlusPlus, IMAML])
def test_checkpoints_hold_them(tmp_path: Path, algorithm: type[MAML]) -> None:
    def model() -> MAML:
        return algorithm(build("conv_batch_norm").float(), RATE, STEPS, batch_norm="per_step")

    run, trained, episodes = trainer(tmp_path, precision="32-true"), model(), make_episodes()
    single = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    run.fit(trained, DataLoader([single], batch_size=None), DataLoader([single], batch_size=None))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = model()
    loaded.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert loaded.step_statistics(1)["1.running_mean"].any()
    assert torch.equal(
        loaded.step_statistics(1)["1.running_mean"], trained.step_statistics(1)["1.running_mean"]
    )


def test_the_meta_gradient_in_evaluation_mode_is_that_of_the_averages_of_each_step() -> None:
    episodes = make_episodes(tasks=1)
    model = MAML(build("conv_batch_norm"), RATE, STEPS, batch_norm="per_step").eval()
    averages, network = different_averages(model), build("conv_batch_norm").eval()
    w = leaves(network)
    here = w
    for j in range(STEPS):
        value = F.cross_entropy(
            functional_call(network, here | averages[j], (episodes.support_x[0],)),
            episodes.support_y[0],
        )
        gradient = torch.autograd.grad(value, list(here.values()), create_graph=True)
        here = {name: p - RATE * g for (name, p), g in zip(here.items(), gradient, strict=True)}
    value = F.cross_entropy(
        functional_call(network, here | averages[STEPS], (episodes.query_x[0],)),
        episodes.query_y[0],
    )
    expected = dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
    assert relative_error(model.meta_gradient(episodes), expected) < 1e-12


def test_averages_of_a_layer_in_evaluation_mode_stay() -> None:
    network = build("conv_batch_norm")
    model = MAML(network, RATE, STEPS, batch_norm="per_step")
    network[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.meta_loss(make_episodes())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_other_buffers_are_written_once_for_a_step() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    network = nn.Sequential(build("conv_batch_norm"), Counting())
    MAML(network, RATE, STEPS, batch_norm="per_step").meta_loss(make_episodes())
    assert network[1].calls == 1


@pytest.mark.parametrize(
    "other", [{"batch_norm": "batch"}, {"batch_norm": "per_step", "train_steps": STEPS + 1}]
)
def test_a_checkpoint_with_other_averages_is_refused_in_a_sentence(
    tmp_path: Path, other: dict
) -> None:
    run = trainer(tmp_path)
    run.fit(
        MAML(build("conv_batch_norm"), RATE, STEPS, batch_norm="per_step"),
        DataLoader([make_episodes()], batch_size=None),
    )
    run.save_checkpoint(tmp_path / "a.ckpt")
    model = MAML(build("conv_batch_norm"), **({"inner_lr": RATE, "train_steps": STEPS} | other))
    with pytest.raises(
        ValueError,
        match="Expected a checkpoint with the inner rates and batch-norm averages of this model "
        "but got others",
    ):
        trainer(tmp_path).test(
            model, DataLoader([make_episodes()], batch_size=None), ckpt_path=tmp_path / "a.ckpt"
        )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="to keep running averages for `batch_norm='per_step'`"):
        MAML(
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            batch_norm="per_step",
        )
    with pytest.raises(ValueError, match="as there are no inner steps"):
        ProtoNet(build("conv_batch_norm"), batch_norm="per_step")
    with pytest.raises(ValueError, match="'running' or 'per_step' but got 'other'"):
        MAML(build("mlp"), batch_norm="other")


def test_averages_that_are_read_are_not_taken_for_written() -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    model = MAML(network, RATE, STEPS, batch_norm="per_step", tasks="loop")
    model.meta_loss(episodes)
    model.eval().evaluate(episodes)
    assert writes(network) is False
