"""What networks write into their buffers while training: kept once per meta-step, as plain torch
would, and from no other pass."""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers import another_process
from helpers.networks import WAYS, build, make_episodes, relative_error, unrolled
from helpers.trainers import trainer
from lightning_maml import ANIL, FOMAML, IMAML, MAML, Episodes, ProtoNet, Reptile
from lightning_maml.core.params import Params
from lightning_maml.networks.buffers import BufferUpdate
from lightning_maml.networks.facts import Written, facts_of

RATE, STEPS = 0.3, 2


class OwnNorm(nn.Module):
    """Writes its averages in place, or replaces them."""

    def __init__(self, *, replaces: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.replaces = replaces

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean
        now = x.mean(0)
        if self.replaces:
            self.mean = 0.9 * self.mean + 0.1 * now.detach()
        else:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * now)
        return x - now


class Teacher(nn.Module):
    """A frozen average of a trained layer, written to through frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for average, p in zip(
                    self.teacher.parameters(), self.student.parameters(), strict=True
                ):
                    average.lerp_(2 * p, 0.1)
        return self.student(x) + self.teacher(x)


class Counter(nn.Module):
    """What it returns depends on how often it was called, a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class Codebook(nn.Module):
    """Vectors that follow what is assigned to them (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        if self.training:
            sums = F.one_hot(nearest, 5).to(x).T
            self.codes.copy_(0.9 * self.codes + 0.1 * (sums @ x.detach()))
        return x + self.codes[nearest]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "own norm": OwnNorm,
    "own norm, replaced": partial(OwnNorm, replaces=True),
    "teacher": Teacher,
    "counter": Counter,
    "codebook": Codebook,
}
LAYERS_OF_TORCH = ("spectral_norm", "instance norm")


def network_with(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, WAYS)
    ).double()


def all_inputs(episodes: Episodes) -> Tensor:
    return torch.cat([episodes.support_x.flatten(0, 1), episodes.query_x.flatten(0, 1)])


def state(network: nn.Module) -> tuple[dict[str, Tensor], list[int]]:
    return network.state_dict(), [
        module.calls for module in network.modules() if isinstance(module, Counter)
    ]


@pytest.mark.parametrize("tasks", ["loop", "threads"])
@pytest.mark.parametrize("layer", [*LAYERS])
def test_a_step_keeps_what_one_pass_before_adaptation_writes(layer: str, tasks: str) -> None:
    network, reference = network_with(layer), network_with(layer)
    model = MAML(network, RATE, STEPS, tasks=tasks)
    for seed in range(2):
        episodes = make_episodes(seed=seed)
        with torch.no_grad():
            reference(all_inputs(episodes))
        model.meta_loss(episodes)
        model.meta_gradient(episodes)
    tensors, numbers = state(network)
    expected, expected_numbers = state(reference)
    assert numbers == expected_numbers
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", [FOMAML, ANIL, Reptile, IMAML, ProtoNet])
@pytest.mark.parametrize("layer", LAYERS_OF_TORCH)
def test_every_algorithm_keeps_them(layer: str, algorithm: Callable[[nn.Module], MAML]) -> None:
    network, reference, episodes = network_with(layer), network_with(layer), make_episodes()
    model = algorithm(network)
    model.meta_loss(episodes)
    with torch.no_grad():
        reference(all_inputs(episodes))
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    before = copy.deepcopy(network.state_dict())
    model.eval().evaluate(episodes)
    model.adapt(episodes.support_x, episodes.support_y)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("tasks", ["loop", "threads"])
@pytest.mark.parametrize("layer", [*LAYERS])
def test_every_evaluation_starts_from_the_buffers_as_they_are(layer: str, tasks: str) -> None:
    network, episodes = network_with(layer), make_episodes()

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        fresh = network_with(layer)
        return F.cross_entropy(functional_call(fresh, params, (x,)), y)

    w = {
        name: p.detach().clone().requires_grad_()
        for name, p in network.named_parameters()
        if p.requires_grad
    }
    expected = torch.autograd.grad(unrolled(loss, w, episodes, RATE, STEPS), [*w.values()])
    actual = MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)
    assert relative_error(actual, dict(zip(w, expected, strict=True))) < 1e-12


def test_spectral_norms_stay_one_in_training(tmp_path: Path) -> None:
    network = network_with("spectral_norm")
    model = MAML(network, RATE, optimizer=partial(torch.optim.Adam, lr=3e-2))
    batches = DataLoader([make_episodes(seed=seed) for seed in range(4)], batch_size=None)
    trainer(tmp_path, max_epochs=30, precision="64-true").fit(model, batches)
    original = network[2].parametrizations.weight.original.detach()
    assert abs(float(torch.linalg.matrix_norm(original, 2)) - 1) > 0.3
    assert float(torch.linalg.matrix_norm(network.eval()[2].weight.detach(), 2)) == pytest.approx(
        1, abs=0.1
    )


@pytest.mark.parametrize(("batch_norm", "calls"), [("batch", 0), ("support", 0), ("running", 2)])
def test_networks_that_write_nothing_pay_nothing(batch_norm: str, calls: int) -> None:
    network, seen = build("conv_batch_norm"), []
    model = MAML(network, RATE, STEPS, batch_norm=batch_norm, tasks="loop")
    model.meta_loss(make_episodes())
    network.register_forward_hook(lambda *_: seen.append(1))
    structural = len(seen)
    for _ in range(2):
        with torch.no_grad():
            model._update_buffers(model.network, make_episodes(), model.batch_norm)
    assert len(seen) - structural == calls


@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
def test_a_policy_that_is_set_later_is_refused(algorithm: type) -> None:
    model = algorithm(build("conv_batch_norm"), batch_norm="batch")
    with pytest.raises(ValueError, match="Expected `batch_norm` to stay as the model was made"):
        model.batch_norm = "running"
    assert model.batch_norm == "batch"


@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
def test_running_averages_are_those_of_one_pass_over_all_tasks(algorithm: type) -> None:
    network, reference = build("conv_batch_norm"), build("conv_batch_norm")
    episodes = make_episodes()
    algorithm(network, batch_norm="running").meta_loss(episodes)
    with torch.no_grad():
        reference(torch.cat([episodes.support_x.flatten(0, 1), episodes.query_x.flatten(0, 1)]))
    found, expected = ([*of.buffers()] for of in (network, reference))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_norm", ["batch", "support"])
def test_running_averages_that_the_policy_does_not_use_are_not_moved(batch_norm: str) -> None:
    network = nn.Sequential(*network_with("spectral_norm"))
    network.insert(2, nn.BatchNorm1d(4))
    network.double()
    before = copy.deepcopy(network.state_dict())
    MAML(network, RATE, batch_norm=batch_norm).meta_loss(make_episodes())
    moved = [
        name
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, before[name])
    ]
    assert moved
    assert not any("running" in name or "tracked" in name for name in moved)


def test_a_network_for_a_fixed_number_of_examples_sees_one_set_after_the_other() -> None:
    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network_with("own norm")

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x.view(6, -1))

    network, reference = Six(), Six()
    episodes = make_episodes(shots=2, queries=2)
    MAML(network, RATE).meta_loss(episodes)
    with torch.no_grad():
        for x in (*episodes.support_x, *episodes.query_x):
            reference(x)
    torch.testing.assert_close(
        network.inside[2].mean, reference.inside[2].mean, rtol=1e-12, atol=1e-12
    )


def test_a_forward_pass_that_writes_to_trained_parameters_is_refused() -> None:
    class FirstBatch(nn.Linear):
        ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.bias.data.copy_(-super().forward(x).mean(0))
                self.ready = True
            return super().forward(x)

    network = nn.Sequential(nn.Flatten(), FirstBatch(64, WAYS)).double()
    before = network[1].bias.detach().clone()
    with pytest.raises(
        ValueError, match=r"writes to \['1.bias'\]; run the network once before the model is made"
    ):
        MAML(network, RATE).meta_loss(make_episodes())
    assert torch.equal(network[1].bias, before)
    network(make_episodes().support_x[0])
    MAML(network, RATE).meta_loss(make_episodes())


def test_a_resumed_run_writes_the_same(tmp_path: Path) -> None:
    def ended(epochs: int, checkpoint: Path | None, precedes: int) -> dict[str, Tensor]:
        network = network_with("spectral_norm")
        torch.manual_seed(precedes)
        model = MAML(network, RATE)
        run = trainer(tmp_path, max_epochs=epochs, precision="64-true")
        batches = DataLoader([make_episodes(seed=seed) for seed in range(3)], batch_size=None)
        run.fit(model, batches, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return network.state_dict()

    ended(1, None, 0)
    resumed, whole = ended(2, tmp_path / "1.ckpt", 7), ended(2, None, 0)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


class Means(Callback):
    """Saves the averages that each step starts from."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: MAML) -> None:
        module.network.register_forward_pre_hook(
            lambda network, _: self.means.append(network[2].mean.clone())
        )

    def on_train_end(self, trainer: Trainer, module: MAML) -> None:
        torch.save(self.means, Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.pt")


def trained(folder: Path, **arguments) -> None:
    model = MAML(network_with("own norm"), RATE, tasks="loop")
    episodes = [make_episodes(seed=seed) for seed in range(6)]
    run = trainer(folder, max_epochs=2, precision="64-true", callbacks=[Means()], **arguments)
    run.fit(model, DataLoader(episodes, batch_size=1, collate_fn=lambda items: items[0]))


@pytest.mark.cpu_only
def test_two_processes_start_each_step_from_the_same_buffers(tmp_path: Path) -> None:
    another_process.in_two(trained, tmp_path)
    one, two = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2))
    assert len(one) == len(two) > 4
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[-1])


class Remembering(nn.Module):
    """Keeps what it computes from its scale until it trains again, as timm's LeViT does; or, for
    comparison, nothing."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WAYS))
        self.place, self.kept, self.box, self.rows = place, None, {}, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.place == "nowhere":
            return x * self.scale.exp()
        if self.place == "attribute":
            self.kept = self.scale.exp() if self.kept is None else self.kept
            return x * self.kept
        if self.place == "dict":
            return x * self.box.setdefault("scale", self.scale.exp())
        if self.place == "list":
            if not self.rows:
                self.rows.append(self.scale.exp())
            return x * self.rows[0]
        if not hasattr(self, "late"):
            self.late = self.scale.exp()
        return x * self.late


def remembering(place: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WAYS), Remembering(place)).double()


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads", "vmap"])
@pytest.mark.parametrize("place", ["attribute", "dict", "list", "late"])
def test_what_a_network_keeps_of_its_parameters_is_of_no_other_parameters(
    place: str, tasks: str
) -> None:
    network, episodes = remembering(place), make_episodes(tasks=4)
    model = MAML(network, RATE, STEPS, tasks=tasks).eval()
    plain = remembering("nowhere")
    right = []
    for support_x, support_y, query_x, _ in zip(*episodes, strict=True):
        w = dict(plain.named_parameters())
        for _ in range(STEPS):
            gradient = torch.autograd.grad(
                F.cross_entropy(functional_call(plain, w, (support_x,)), support_y), [*w.values()]
            )
            w = {name: p - RATE * g for (name, p), g in zip(w.items(), gradient, strict=True)}
        right.append(functional_call(plain, w, (query_x,)))
    torch.testing.assert_close(
        model.evaluate(episodes).aux[:, -1], torch.stack(right), rtol=1e-10, atol=1e-12
    )
    adapted = model.adapt(episodes.support_x, episodes.support_y)
    for _ in range(2):
        torch.testing.assert_close(
            adapted(episodes.query_x), torch.stack(right), rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(
        adapted.network(1)(episodes.query_x[1]), right[1], rtol=1e-10, atol=1e-12
    )
    layer = network[2]
    assert (layer.kept, layer.box, layer.rows, hasattr(layer, "late")) == (None, {}, [], False), (
        "the network itself keeps nothing"
    )


def test_a_replaced_buffer_stays_the_object_that_it_was() -> None:
    # compiled programs and captured graphs are found by it
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), OwnNorm(replaces=True)).double()
    model, mean = MAML(network, RATE, 1), network[2].mean
    model.meta_loss(make_episodes())
    first = mean.clone()
    model.meta_loss(make_episodes())
    assert network[2].mean is mean
    assert not torch.equal(mean, first)


class Kept(nn.Module):
    """Tells whether a graph keeps what an earlier layer computed; it may differentiate itself."""

    def __init__(self, *, differentiates: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.register_buffer("passes", torch.zeros(()))
        self.differentiates = differentiates
        self.kept: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().numpy() * 2
        outputs = torch.from_numpy(values) * self.weight  # whose gradient needs the values
        if self.differentiates:
            torch.autograd.grad(outputs.sum(), self.weight, retain_graph=True)
        self.passes += 1
        still_there = weakref.ref(values)
        del values
        self.kept.append(still_there() is not None)
        return outputs


@pytest.mark.cpu_only
@pytest.mark.parametrize("differentiates", [False, True])
def test_a_pass_that_updates_buffers_keeps_no_graph(differentiates: bool) -> None:
    layer = Kept(differentiates=differentiates)
    network = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, WAYS)).double()
    update, episodes = BufferUpdate(), make_episodes(tasks=2)
    facts_of(network).written = Written({"1.passes"})
    update(network, episodes, "batch")
    assert layer.passes == 1, "all tasks are one batch"
    assert layer.kept == [differentiates]
