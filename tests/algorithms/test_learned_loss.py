"""Parameters of a loss get their gradient, through the inner steps too.

Parameters that are neither the loss's nor the network's are refused by name.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from helpers.networks import IMAGE, WAYS, build, leaves, make_episodes, relative_error
from helpers.trainers import trainer
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
    ProtoNet,
    Reptile,
    ResampledEpisodes,
)
from lightning_maml.core.params import Params

RATE, STEPS = 0.3, 2


class Scaled(nn.Module):
    """Cross-entropy with a learned temperature and learned offsets.

    Its parameters have names that the network's have too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.register_parameter("1", None)
        self.offsets = nn.Linear(1, WAYS).double()

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.log_scale.exp() + self.offsets.weight[:, 0] ** 2, y)


def objective(
    network: nn.Module,
    loss: nn.Module,
    w: Params,
    episodes: Episodes,
    adapting: list[str],
    create_graph: bool = True,
) -> Tensor:
    """The mean query loss after adaptation, with its whole graph.

    ``w`` has the loss's parameters as ``loss.``
    """

    def value(w: Params, x: Tensor, y: Tensor) -> Tensor:
        of_loss = {
            name.removeprefix("loss."): p for name, p in w.items() if name.startswith("loss.")
        }
        of_network = {name: p for name, p in w.items() if not name.startswith("loss.")}
        return functional_call(loss, of_loss, (functional_call(network, of_network, (x,)), y))

    total = torch.zeros((), dtype=torch.float64)
    for s_x, s_y, q_x, q_y in zip(*episodes, strict=True):
        adapted = w
        for _ in range(STEPS):
            gradient = torch.autograd.grad(
                value(adapted, s_x, s_y),
                [adapted[name] for name in adapting],
                create_graph=create_graph,
            )
            moved = {
                name: adapted[name] - RATE * g for name, g in zip(adapting, gradient, strict=True)
            }
            adapted = adapted | (
                moved
                if create_graph
                else {name: w[name] + (p - w[name]).detach() for name, p in moved.items()}
            )
        total = total + value(adapted, q_x, q_y)
    return total / len(episodes.support_x)


def expected_gradient(part: str = "all", create_graph: bool = True) -> Params:
    network, loss = build("mlp"), Scaled()
    w = leaves(network) | {
        f"loss.{name}": p.detach().clone().requires_grad_() for name, p in loss.named_parameters()
    }
    parts = {"all": ("1.", "3."), "head": ("3.",), "body": ("1.",)}
    adapting = [name for name in w if name.startswith(parts[part])]
    value = objective(network, loss, w, make_episodes(), adapting, create_graph)
    return dict(
        zip(
            w,
            torch.autograd.grad(value, [*w.values()], allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )


def actual_gradient(model: MAML) -> Params:
    model.meta_loss(make_episodes()).backward()
    return {
        name.removeprefix("network."): p.grad
        for name, p in model.named_parameters()
        if not name.startswith("learned_rates")
    }


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize(
    ("algorithm", "part", "tolerance"),
    [
        *(
            (algorithm, "all", 1e-10)
            for algorithm in (
                MAML,
                LSLR,
                MetaSGD,
                partial(MAMLPlusPlus, multi_step_epochs=0),
                FOMAML,
            )
        ),
        (HFMAML, "all", 1e-6),
        (ANIL, "head", 1e-10),
        (BOIL, "body", 1e-10),
    ],
)
def test_the_gradient_of_a_loss_with_parameters_is_that_of_the_unrolled_loop(
    algorithm: Callable[..., MAML], part: str, tolerance: float, tasks: str
) -> None:
    model = algorithm(build("mlp"), RATE, STEPS, loss=Scaled(), tasks=tasks)
    expected = expected_gradient(part, create_graph=algorithm is not FOMAML)
    actual = actual_gradient(model)
    assert actual.keys() == expected.keys()
    for of in ("loss.", ""):
        mine, theirs = (
            {name: g for name, g in all_.items() if name.startswith(of)}
            for all_ in (actual, expected)
        )
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.slow
def test_the_compiled_gradient_is_the_same() -> None:
    actual = actual_gradient(MAML(build("mlp"), RATE, STEPS, loss=Scaled(), compiled=True))
    assert relative_error(actual, expected_gradient()) < 1e-10


def test_hessian_batches_give_the_mixed_terms_of_resampled_tasks() -> None:
    episodes = make_episodes()
    fresh = [
        episodes.support_x[:, None].expand(-1, STEPS, *[-1] * 4),
        episodes.support_y[:, None].expand(-1, STEPS, -1),
    ]
    model = MAML(build("mlp"), RATE, STEPS, loss=Scaled())
    model.meta_loss(
        ResampledEpisodes(*fresh, *fresh, episodes.query_x, episodes.query_y)
    ).backward()
    expected = expected_gradient()
    actual = {name.removeprefix("network."): p.grad for name, p in model.named_parameters()}
    assert relative_error(actual, expected) < 1e-10


def test_the_implicit_gradient_of_a_loss_with_parameters_is_that_at_the_minimum() -> None:
    network, loss, strength = (
        nn.Sequential(nn.Flatten(), nn.Linear(IMAGE**2, WAYS)).double(),
        Scaled(),
        2.0,
    )
    model = IMAML(network, 0.1, 300, loss=loss, proximal_strength=strength, cg_steps=60)
    episodes = make_episodes(tasks=1)
    model.meta_loss(episodes).backward()
    actual = torch.stack([loss.log_scale.grad, *loss.offsets.weight.grad.flatten()])

    def value(scale: float, offset: int) -> float:
        """The query loss at the minimum, for finite differences of a parameter of the loss."""
        other = Scaled()
        with torch.no_grad():
            other.offsets.weight.copy_(loss.offsets.weight)
            (other.log_scale if offset < 0 else other.offsets.weight[offset]).add_(scale)
        judged = IMAML(network, 0.1, 300, loss=other, proximal_strength=strength)
        return float(judged.evaluate(episodes).loss[0, -1])

    expected = torch.tensor(
        [(value(1e-5, k) - value(-1e-5, k)) / 2e-5 for k in (-1, *range(WAYS))], dtype=torch.float64
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_protonet_trains_the_loss() -> None:
    loss = Scaled()
    ProtoNet(build("mlp"), loss=loss).meta_loss(make_episodes()).backward()
    assert loss.log_scale.grad.abs() > 1e-4


def test_reptile_refuses_a_loss_that_it_would_not_train() -> None:
    model = Reptile(build("mlp"), RATE, STEPS, loss=Scaled())
    with pytest.raises(
        ValueError, match=r"Reptile, which trains only what adapts, but got \['log_scale', "
    ):
        model.meta_loss(make_episodes())
    model = Reptile(build("mlp"), RATE, STEPS, loss=Scaled().requires_grad_(False))
    model.meta_loss(make_episodes())


def test_a_loss_learns_with_a_trainer_and_adapts_as_it_evaluates(tmp_path: Path) -> None:
    loss = Scaled()
    model = MAML(build("mlp"), RATE, STEPS, loss=loss)
    before = loss.log_scale.item()
    trainer(tmp_path, precision="64-true").fit(
        model, DataLoader([make_episodes(seed=k) for k in range(3)], batch_size=None)
    )
    assert loss.log_scale.item() != before
    assert (
        model.meta_gradient(make_episodes()).keys() == dict(model.network.named_parameters()).keys()
    )
    episodes = make_episodes()
    outputs = model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    torch.testing.assert_close(
        outputs, model.eval().evaluate(episodes).aux[:, -1], rtol=1e-10, atol=1e-12
    )


class Temperature(MAML):
    """Keeps a parameter of its own that the loss reads from outside."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.loss = lambda outputs, y: F.cross_entropy(outputs * self.temperature, y)


def test_a_parameter_that_gets_no_gradient_is_refused_by_name(tmp_path: Path) -> None:
    message = r"every parameter that the optimizer was given but \['temperature'\] get none; put them into the network"
    network = build("mlp")
    before = network[1].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, precision="64-true").fit(
            Temperature(network, RATE), DataLoader([make_episodes()], batch_size=None)
        )
    assert torch.equal(network[1].weight, before)
    with pytest.raises(ValueError, match=message):
        Temperature(build("mlp"), RATE).meta_loss(make_episodes())


def test_a_loss_that_holds_the_network_is_refused() -> None:
    class Decayed(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(outputs, y) + sum(
                p.square().sum() for p in self.network.parameters()
            )

    network = build("mlp")
    with pytest.raises(
        ValueError, match=r"it reads the network's parameters .*1.weight.* from outside"
    ):
        MAML(network, RATE, loss=Decayed(network)).meta_loss(make_episodes())


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile, IMAML])
def test_a_loss_that_reads_the_networks_parameters_from_outside_is_refused(
    algorithm: type[MAML],
) -> None:
    network = build("mlp")

    def decayed(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + network[1].weight.square().sum()

    with pytest.raises(
        ValueError, match=r"reads the network's parameters \['1.weight'\] from outside"
    ):
        algorithm(network, RATE, loss=decayed).meta_loss(make_episodes())


class Cached(nn.Module):
    """Reads a parameter from somewhere else than the attribute it is registered as."""

    def __init__(self, kept_in: str) -> None:
        super().__init__()
        self.w = nn.ParameterList(
            [nn.Parameter(0.1 * torch.randn(IMAGE**2, 6)), nn.Parameter(0.1 * torch.randn(6, WAYS))]
        )
        w = self.w[0]
        self.kept = {
            "list": [w],
            "dict": {"a": [{"b": w}]},
            "tuple": (w,),
            "closure of the module": lambda: self.w[0],
            "closure": lambda: w,
        }[kept_in]

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept
        first = (
            kept() if callable(kept) else kept["a"][0]["b"] if isinstance(kept, dict) else kept[0]
        )
        return torch.tanh(x.flatten(1) @ first) @ self.w[1]


def cached(kept_in: str) -> nn.Module:
    torch.manual_seed(0)
    return Cached(kept_in).double()


@pytest.mark.parametrize("kept_in", ["list", "dict", "closure of the module"])
def test_parameters_in_lists_and_dicts_are_adapted(kept_in: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = cached(kept_in).w

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.flatten(1) @ self.w[0]) @ self.w[1]

    episodes = make_episodes()
    expected, model = (MAML(network, RATE, STEPS) for network in (Plain(), cached(kept_in)))
    assert relative_error(model.meta_gradient(episodes), expected.meta_gradient(episodes)) < 1e-12
    given = expected.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    torch.testing.assert_close(
        model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x), given
    )
    one = model.adapt(episodes.support_x[0], episodes.support_y[0])
    torch.testing.assert_close(one(episodes.query_x[0]), given[0])


@pytest.mark.parametrize("kept_in", ["tuple", "closure"])
def test_parameters_read_from_elsewhere_are_refused(kept_in: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"its forward pass reads \['w.0'\] from elsewhere \(a tuple, a closure, a global\)",
    ):
        MAML(cached(kept_in), RATE).meta_loss(make_episodes())


class Reached(nn.Module):
    """Cross-entropy with a learned temperature, which it reaches in one of several ways."""

    def __init__(self, way: str = "attribute") -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.way = way
        self.terms = [lambda outputs, y: F.cross_entropy(outputs * self.temperature, y)]
        self.held = (self.temperature,)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.way == "function in a list":
            return self.terms[0](outputs, y)
        return F.cross_entropy(
            outputs * (self.held[0] if self.way == "tuple" else self.temperature), y
        )


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
def test_parameters_that_a_loss_reaches_past_its_modules_are_refused(algorithm: type[MAML]) -> None:
    gradients = []
    for way in ("attribute", "function in a list"):
        loss = Reached(way)
        algorithm(build("mlp"), RATE, STEPS, loss=loss).meta_loss(make_episodes()).backward()
        gradients.append(loss.temperature.grad)
    assert gradients[0] != 0
    torch.testing.assert_close(*gradients)
    with pytest.raises(
        ValueError,
        match=r"reaches its parameters through its modules but it reads \['temperature'\] from "
        "elsewhere",
    ):
        algorithm(build("mlp"), RATE, STEPS, loss=Reached("tuple")).meta_loss(make_episodes())


def test_a_loss_that_begins_to_read_parameters_between_steps_is_refused() -> None:
    class Decaying(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.decays, self.of_network = False, [*network.parameters()]

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            penalty = sum(p.square().sum() for p in self.of_network) if self.decays else 0.0
            return F.cross_entropy(outputs, y) + penalty

    network = build("mlp")
    model = MAML(network, RATE, STEPS, loss=Decaying(network))
    model.meta_loss(make_episodes())
    model.loss.decays = True
    with pytest.raises(ValueError, match="it reads the network's parameters"):
        model.meta_loss(make_episodes())


def test_a_loss_that_begins_to_broadcast_between_steps_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squares = False

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return (outputs - y).square().mean() if self.squares else F.cross_entropy(outputs, y)

    model = MAML(build("mlp"), RATE, STEPS, loss=Changing())
    episodes = make_episodes(shots=1, queries=1)
    model.meta_loss(episodes)
    model.loss.squares = True
    with pytest.raises(ValueError, match=r"fits labels .* element by element"):
        model.meta_loss(episodes)
