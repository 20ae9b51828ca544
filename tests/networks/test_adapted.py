"""Networks adapted to one task or many, as plain modules."""

import subprocess
import sys
import threading
from collections import UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from helpers.networks import WAYS, build, make_episodes
from lightning_maml import ANIL, MAML, AdaptedNetworks, Conv4, Episodes, MetaSGD, ResNet12


def model_and_episodes(
    batch_norm: str = "batch", algorithm: type[MAML] = MAML, **arguments
) -> tuple[MAML, Episodes]:
    network = build("conv_batch_norm")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.0)
    model = algorithm(
        network, inner_lr=0.3, train_steps=1, test_steps=3, batch_norm=batch_norm, **arguments
    )
    return model.double().eval(), make_episodes(tasks=4)


@pytest.mark.parametrize("algorithm", [MAML, ANIL, MetaSGD])
@pytest.mark.parametrize("batch_norm", ["batch", "support", "running"])
def test_adapted_networks_give_what_evaluation_gives(
    batch_norm: str, algorithm: type[MAML]
) -> None:
    model, episodes = model_and_episodes(batch_norm, algorithm)
    expected = model.evaluate(episodes).aux[:, -1]
    networks = model.adapt(episodes.support_x, episodes.support_y)
    assert isinstance(networks, AdaptedNetworks)
    torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)
    for task in range(4):
        network = model.adapt(episodes.support_x[task], episodes.support_y[task])
        assert type(network) is type(model.network)
        torch.testing.assert_close(
            network(episodes.query_x[task]), expected[task], rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            networks.network(task)(episodes.query_x[task]), expected[task], rtol=1e-10, atol=1e-12
        )


def test_the_number_of_steps_is_free() -> None:
    model, episodes = model_and_episodes()
    for steps in (0, 1, 5):
        expected = (
            MAML(model.network, inner_lr=0.3, test_steps=steps).eval().evaluate(episodes).aux[:, -1]
        )
        networks = model.adapt(episodes.support_x, episodes.support_y, steps=steps)
        torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_norm", ["support", "running"])
def test_queries_do_not_see_each_other_where_statistics_are_kept(batch_norm: str) -> None:
    model, episodes = model_and_episodes(batch_norm)
    network = model.adapt(episodes.support_x[0], episodes.support_y[0])
    one_by_one = torch.cat([network(x[None]) for x in episodes.query_x[0]])
    torch.testing.assert_close(one_by_one, network(episodes.query_x[0]), rtol=1e-10, atol=1e-12)


def test_adapting_leaves_the_model_as_it_is_and_needs_no_evaluation_mode() -> None:
    model, episodes = model_and_episodes("running")
    model.network.append(nn.Dropout(0.5))
    expected = model.eval().evaluate(episodes).aux[:, -1]
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not networks(episodes.query_x).requires_grad


class Recurrent(nn.Module):
    """vmap does not take it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, WAYS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("tasks", ["auto", "threads", "loop"])
def test_networks_that_vmap_does_not_take_are_adapted_one_by_one(
    tasks: str, chunk_size: int | None
) -> None:
    torch.manual_seed(0)
    network, episodes = Recurrent().double(), make_episodes(tasks=3)
    model = MAML(network, inner_lr=0.3, test_steps=2, tasks=tasks, chunk_size=chunk_size)
    expected = (
        MAML(network, inner_lr=0.3, test_steps=2, tasks="loop").eval().evaluate(episodes).aux[:, -1]
    )
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("tasks", ["auto", "threads", "loop"])
def test_networks_that_draw_in_evaluation_are_adapted_one_by_one(
    tasks: str, chunk_size: int | None
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build("mlp")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x + torch.randn_like(x))

    episodes = make_episodes(tasks=6)
    networks = (
        MAML(Noisy(), inner_lr=0.3, tasks=tasks, chunk_size=chunk_size)
        .double()
        .adapt(*episodes[:2])
    )
    assert networks(episodes.query_x).shape == (*episodes.query_y.shape, WAYS)


@pytest.mark.usefixtures("two_threads")
def test_others_may_draw_while_many_tasks_are_adapted_to() -> None:
    class Drawn(nn.Module):
        """Draws where it is not looked at, as another thread of the program might."""

        def __init__(self) -> None:
            super().__init__()
            self.body = build("mlp")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is not threading.main_thread():
                torch.rand(1)
            return self.body(x)

    episodes = make_episodes(tasks=400)
    assert MAML(Drawn(), inner_lr=0.3).double().adapt(*episodes[:2])(episodes.query_x).shape == (
        *episodes.query_y.shape,
        WAYS,
    )


class Watched(nn.Module):
    """Notes down the thread of each call."""

    threads: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.body = build("conv_batch_norm")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.threads.append(threading.get_ident())
        return self.body(x)


@pytest.mark.usefixtures("two_threads")
def test_many_tasks_are_adapted_in_stacks_one_per_core() -> None:
    torch.manual_seed(0)
    model, episodes = (
        MAML(Watched(), inner_lr=0.3, test_steps=2).double().eval(),
        make_episodes(tasks=400),
    )
    expected = model.evaluate(episodes).aux[:, -1]
    Watched.threads.clear()
    networks = model.adapt(episodes.support_x, episodes.support_y)
    assert set(Watched.threads) - {threading.get_ident()}
    assert len(Watched.threads) < 200  # looks and stacks, not two steps of 400 tasks
    torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_queries_of_other_tasks_than_were_adapted_to_are_refused(tasks: str) -> None:
    model, episodes = model_and_episodes(tasks=tasks)
    networks = model.adapt(episodes.support_x, episodes.support_y)
    for wrong in (
        episodes.query_x[:3],
        episodes.query_x.repeat(2, 1, 1, 1, 1),
        episodes.query_x[0],
    ):
        with pytest.raises(
            ValueError,
            match=r"Expected queries \[T, Q, ...\] of the 4 tasks that were adapted to but got "
            "shape",
        ):
            networks(wrong)


def test_bad_labels_say_nothing_of_the_network() -> None:
    model, episodes = model_and_episodes()
    with pytest.raises(ValueError, match=r"Expected labels from 0 to .*, the outputs of `network`"):
        model.adapt(episodes.support_x, episodes.support_y + 1)
    assert not any(key[0] == "stacking" for key in model._findings._found)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, scale = self.layer(x).split(1, -1)
        return mean, F.softplus(scale)


@pytest.mark.parametrize("tasks", ["auto", "loop"])
def test_networks_with_several_outputs(tasks: str) -> None:
    model = MAML(
        TwoOutputs(),
        inner_lr=0.1,
        loss=lambda outputs, y: F.gaussian_nll_loss(outputs[0], y, outputs[1]),
        tasks=tasks,
    )
    x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
    mean, scale = model.adapt(x, y)(x)
    expected = model.eval().evaluate(Episodes(x, y, x, y)).aux
    torch.testing.assert_close((mean, scale), (expected[0][:, -1], expected[1][:, -1]))


def test_regression_tasks_are_adapted_together() -> None:
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    model = MAML(network, inner_lr=0.1, test_steps=2, loss=F.mse_loss)
    episodes = Episodes(
        torch.randn(3, 5, 2), torch.randn(3, 5, 1), torch.randn(3, 7, 2), torch.randn(3, 7, 1)
    )
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(
        networks(episodes.query_x), model.eval().evaluate(episodes).aux[:, -1]
    )


def test_networks_adapted_in_inference_mode_are_ordinary_ones() -> None:
    model, episodes = model_and_episodes("support")
    with torch.inference_mode():
        network = model.adapt(episodes.support_x[0], episodes.support_y[0])
    network.requires_grad_(True)
    network(episodes.query_x[0]).sum().backward()
    assert network[5].weight.grad is not None


def test_a_network_of_one_task_holds_nothing_of_the_others(tmp_path: Path) -> None:
    model, episodes = model_and_episodes("support")
    sizes = []
    for tasks in (1, 4):
        network = model.adapt(*(tensor[:tasks] for tensor in episodes[:2])).network(0)
        torch.save(network.state_dict(), tmp_path / "network.pt")
        sizes.append((tmp_path / "network.pt").stat().st_size)
    assert sizes[0] == sizes[1]


class Branching(nn.Module):
    """Calls one batch norm twice, or leaves one out in evaluation."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.norm, self.unused, self.head, self.twice = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 3),
            twice,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x).tanh())
        x = self.norm(x + 1) if self.twice else x
        return self.head(self.unused(x) if self.training else x)


def test_statistics_are_kept_of_the_layers_that_are_called_once() -> None:
    episodes = Episodes(
        *(tensor.flatten(2)[..., :4] if tensor.ndim > 2 else tensor for tensor in make_episodes())
    )
    model = MAML(Branching(twice=False).double(), inner_lr=0.3, batch_norm="support").eval()
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(
        networks(episodes.query_x), model.evaluate(episodes).aux[:, -1], rtol=1e-10, atol=1e-12
    )
    with pytest.raises(
        ValueError, match="each batch norm to be called once but 'norm' is called again"
    ):
        MAML(Branching(twice=True).double(), batch_norm="support").adapt(
            episodes.support_x, episodes.support_y
        )


def test_a_network_that_vmap_cannot_take_is_adapted_to_one_task() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, WAYS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])

    model, episodes = MAML(Recurrent().double(), inner_lr=0.3, tasks="loop").eval(), make_episodes()
    expected = model.evaluate(episodes).aux[:, -1]
    network = model.adapt(episodes.support_x[0], episodes.support_y[0])
    torch.testing.assert_close(network(episodes.query_x[0]), expected[0], rtol=1e-10, atol=1e-12)
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(
        networks.network(2)(episodes.query_x[2]), expected[2], rtol=1e-10, atol=1e-12
    )


def test_labels_that_do_not_fit_are_refused() -> None:
    model, episodes = model_and_episodes()
    with pytest.raises(
        ValueError,
        match=f"Expected labels from 0 to {WAYS - 1}, the outputs of `network`, but got 0 to "
        f"{WAYS}",
    ):
        model.adapt(
            episodes.support_x[0],
            torch.where(episodes.support_y[0] == WAYS - 1, WAYS, episodes.support_y[0]),
        )
    with pytest.raises(
        ValueError, match="Expected `support_x` and `support_y` to hold the same number of examples"
    ):
        model.adapt(episodes.support_x[0], episodes.support_y[0, :-1])


@pytest.mark.cpu_only
def test_adapted_networks_are_exported_and_run_without_this_package(tmp_path: Path) -> None:
    policies = ["batch", "support", "running"]
    for batch_norm in policies:
        model, episodes = model_and_episodes(batch_norm)
        network = model.adapt(episodes.support_x[0], episodes.support_y[0])
        queries = {"x": {0: torch.export.Dim("queries", min=2)}}
        program = torch.export.export(
            network, (episodes.query_x[0],), dynamic_shapes=(queries["x"],)
        )
        torch.export.save(program, tmp_path / f"{batch_norm}.pt2")
        torch.save(
            {"x": episodes.query_x[0, :5], "expected": network(episodes.query_x[0, :5])},
            tmp_path / f"{batch_norm}.pt",
        )
    script = f"""
import sys, torch
for batch_norm in {policies}:
    program = torch.export.load(batch_norm + ".pt2").module()
    saved = torch.load(batch_norm + ".pt", weights_only=True)
    torch.testing.assert_close(program(saved["x"]), saved["expected"], rtol=1e-10, atol=1e-12)
assert not any(name.startswith(("lightning", "pytorch_lightning")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)


def test_adapted_networks_are_saved_like_any_module(tmp_path: Path) -> None:
    model, episodes = model_and_episodes("support")
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.save(networks.state_dict(), tmp_path / "adapted.pt")
    others = model.adapt(episodes.support_x.flip(0), episodes.support_y.flip(0))
    assert not torch.equal(others(episodes.query_x), networks(episodes.query_x))
    others.load_state_dict(torch.load(tmp_path / "adapted.pt", weights_only=True))
    assert torch.equal(others(episodes.query_x), networks(episodes.query_x))


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads", "vmap"])
@pytest.mark.parametrize("many", [True, False])
def test_adaptation_to_images_of_several_channels(tasks: str, many: bool) -> None:
    torch.manual_seed(0)
    model = MAML(
        Conv4(3, 2, 16, channels=4, downsample="max"), inner_lr=0.1, test_steps=2, tasks=tasks
    )
    x, y, queries = (
        torch.rand(3, 4, 3, 16, 16),
        torch.arange(2).repeat(3, 2),
        torch.rand(3, 5, 3, 16, 16),
    )
    outputs = (
        model.adapt(x, y)(queries)
        if many
        else torch.stack([model.adapt(x[t], y[t])(queries[t]) for t in range(3)])
    )
    expected = model.evaluate(Episodes(x, y, queries, torch.arange(2).repeat(3, 3)[:, :5])).aux[
        :, -1
    ]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_networks_that_vmap_cannot_take_are_not_stacked_by_auto() -> None:
    network = ResNet12(1, 2, widths=(4, 4, 4, 4), drop_block=0.1, drop_block_size=1)
    labels = torch.arange(2).repeat(2, 2)
    episodes = Episodes(torch.rand(2, 4, 1, 16, 16), labels, torch.rand(2, 4, 1, 16, 16), labels)
    assert MAML(network, inner_lr=0.1, chunk_size=2).meta_loss(episodes).isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_adapting_needs_no_second_derivative(training: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.Hardsigmoid(), nn.Linear(6, WAYS)
    ).double()
    model, episodes = MAML(network, inner_lr=0.3), make_episodes(tasks=4)
    model.train(training)
    together = model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    w = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    for task in range(4):
        loss = F.cross_entropy(
            functional_call(network, w, (episodes.support_x[task],)), episodes.support_y[task]
        )
        gradient = torch.autograd.grad(loss, [*w.values()])
        adapted = {name: p - 0.3 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
        torch.testing.assert_close(
            together[task], functional_call(network, adapted, (episodes.query_x[task],))
        )
    with pytest.raises(ValueError, match="FOMAML or HFMAML"):
        model.meta_gradient(episodes)


class Normed(nn.Module):
    """Normalises a gradient that has a graph, in a stack over all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 5), nn.Linear(5, WAYS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(self.body(x.flatten(1)))
        if features.requires_grad:
            features.register_hook(lambda g: g / g.norm() if torch.is_grad_enabled() else g)
        return self.head(features)


def test_networks_with_hooks_on_tensors_are_adapted_one_by_one() -> None:
    torch.manual_seed(0)
    network, episodes = Normed().double(), make_episodes(tasks=4)
    together = MAML(network, inner_lr=0.3).adapt(episodes.support_x, episodes.support_y)(
        episodes.query_x
    )
    alone = [
        MAML(network, inner_lr=0.3).adapt(x, y)(query)
        for x, y, query, _ in zip(*episodes, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone))
    with pytest.raises(ValueError, match="hooks on tensors"):
        MAML(network, inner_lr=0.3, tasks="vmap").adapt(episodes.support_x, episodes.support_y)


@pytest.mark.parametrize("batch_norm", ["batch", "per_step"])
def test_networks_adapted_in_no_steps_are_not_the_meta_trained_one(batch_norm: str) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    model = MAML(network, 0.1, batch_norm=batch_norm)
    networks = model.adapt(episodes.support_x, episodes.support_y, steps=0)
    before = networks(episodes.query_x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1)
    assert torch.equal(networks(episodes.query_x), before)


class KeepingActivations(nn.Module):
    def __init__(self, kept_in: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, WAYS)
        self.kept_in, self.box, self.activations = kept_in, {}, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.first(x.flatten(1)))
        if self.kept_in == "attribute":
            self.kept = hidden
        elif self.kept_in == "dict":
            self.box["hidden"] = hidden
        else:
            self.activations = [hidden]
        return self.last(hidden)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 6)), nn.GELU(), nn.Linear(6, WAYS))


@pytest.mark.parametrize(
    "make",
    [
        *(partial(KeepingActivations, kept_in) for kept_in in ("attribute", "dict", "list")),
        *(partial(normed, norm) for norm in (nn.utils.weight_norm, nn.utils.spectral_norm)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_networks_that_keep_tensors_with_a_graph_are_copied_without_it(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    network, episodes = make().double(), make_episodes(tasks=2)
    network(episodes.support_x[0])  # leaves tensors with a graph in the network
    model = MAML(network, inner_lr=0.3, train_steps=2)
    model.meta_loss(episodes).backward()
    model.eval()
    expected = model.evaluate(episodes).aux[:, -1]
    networks = model.adapt(episodes.support_x, episodes.support_y)
    torch.testing.assert_close(networks(episodes.query_x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        networks.network(0)(episodes.query_x[0]), expected[0], rtol=1e-10, atol=1e-12
    )
    one = model.adapt(episodes.support_x[1], episodes.support_y[1])
    torch.testing.assert_close(one(episodes.query_x[1]), expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_network_of_torchscript_trains_and_adapts_as_the_one_it_was_made_of() -> None:
    network, episodes = build("mlp"), make_episodes()
    expected, model = (
        MAML(each, inner_lr=0.3, train_steps=2)
        for each in (network, torch.jit.script(build("mlp")))
    )
    for name, gradient in expected.meta_gradient(episodes).items():
        torch.testing.assert_close(
            model.meta_gradient(episodes)[name], gradient, rtol=1e-10, atol=1e-12
        )
    given = expected.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    torch.testing.assert_close(
        model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x),
        given,
        rtol=1e-10,
        atol=1e-12,
    )


class Drifting(nn.Module):
    """A network whose passes change a buffer, replace another, and count."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.calls, self.in_place = nn.Linear(5, 3), 0, in_place
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:  # which vmap does not take
            self.mean.lerp_(x.mean(0).detach(), 0.5)
        self.last = 0.5 * (self.last + self.mean + x.mean(0).detach())
        self.calls += 1
        return self.layer(x - self.mean - self.last) * self.calls


@pytest.mark.parametrize(("tasks", "in_place"), [("vmap", False), ("loop", False), ("auto", True)])
def test_what_a_pass_changes_is_not_for_the_next_task(tasks: str, in_place: bool) -> None:
    x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.arange(3).repeat(3, 2)
    model = MAML(Drifting(in_place).double(), 0.1, tasks=tasks)
    networks = model.adapt(x, y)
    assert networks.stacked == (tasks == "vmap")
    for _ in range(2):
        found = networks(x)
        for task in range(3):
            alone = model.adapt(x[task], y[task])(x[task])
            torch.testing.assert_close(found[task], alone, rtol=0, atol=1e-12)


class Prefixed(nn.Sequential):
    """A network that loads only what has a prefix."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        named = {key[6:]: value for key, value in state_dict.items() if key.startswith("model.")}
        return super().load_state_dict(named, strict, assign)


def test_a_network_that_loads_in_its_own_way_is_adapted() -> None:
    x, y = torch.randn(6, 5), torch.arange(3).repeat(2)
    network = Prefixed(nn.Linear(5, 3))
    adapted = MAML(network, 0.5).adapt(x, y)
    gradient = torch.autograd.grad(F.cross_entropy(network(x), y), network[0].weight)[0]
    torch.testing.assert_close(adapted[0].weight, network[0].weight - 0.5 * gradient)


class Masked(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if mask is None else x * mask)


def test_inputs_by_position_and_by_name_together_are_refused() -> None:
    x, y = torch.rand(2, 6, 4), (torch.arange(6) % 3).repeat(2, 1)
    networks = MAML(Masked(4, 3), 0.1).adapt(x, y)
    with pytest.raises(TypeError, match="Expected all inputs by position or all by name"):
        networks(x, mask=torch.ones_like(x))


def test_inputs_by_name_may_be_missing() -> None:
    x, y = torch.rand(2, 6, 4), (torch.arange(6) % 3).repeat(2, 1)
    networks = MAML(Masked(4, 3), 0.1).adapt(x, y)
    assert networks.stacked
    torch.testing.assert_close(networks(x=x, mask=None), networks(x))
    torch.testing.assert_close(networks(x, None), networks(x))
    torch.testing.assert_close(networks(UserDict(x=x)), networks(x))
