"""Inner optimizers: torch's own, differentiated through the unrolled loop, give the same.

The references are ``torch.optim`` with ``differentiable=True`` for the exact meta-gradient, and
copies of the network that torch's optimizers move for the first-order one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error
from helpers.trainers import trainer_in_double
from lightning_maml import (
    ANIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Episodes,
    InnerAdam,
    InnerOptimizer,
    InnerSGD,
    MetaSGD,
    Reptile,
    ResampledEpisodes,
    check,
)
from lightning_maml.checks.inner_steps import check_inner_steps

STEPS = 3
RATE = 0.05
CHOICES: dict[str, tuple[InnerOptimizer, Callable[..., torch.optim.Optimizer]]] = {
    "weight decay": (InnerSGD(weight_decay=0.1), partial(torch.optim.SGD, weight_decay=0.1)),
    "momentum": (InnerSGD(momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    "Nesterov": (
        InnerSGD(momentum=0.9, weight_decay=0.1, nesterov=True),
        partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
    "Adam": (
        InnerAdam(betas=(0.8, 0.9), eps=1e-3),
        partial(torch.optim.Adam, betas=(0.8, 0.9), eps=1e-3),
    ),
    "Adam with decay": (
        InnerAdam(eps=1e-3, weight_decay=0.1),
        partial(torch.optim.Adam, eps=1e-3, weight_decay=0.1),
    ),
    "AdamW": (
        InnerAdam(eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
        partial(torch.optim.AdamW, eps=1e-3, weight_decay=0.1),
    ),
}
EACH = pytest.mark.parametrize("name", CHOICES)


def through_torch(
    make: Callable[..., torch.optim.Optimizer],
    w: dict[str, Tensor],
    episodes: Episodes,
    rates: Iterable[Any] = (RATE,) * STEPS,
) -> Tensor:
    """Return the meta-objective, with the graph of the optimizer's steps."""
    loss = plain_loss(build("mlp"))
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        moving = {name: p.clone() for name, p in w.items()}
        groups = [{"params": [p]} for p in moving.values()]
        # foreach, the default on CUDA, writes to what the graph has kept
        optimizer = make(groups, lr=RATE, differentiable=True, foreach=False)
        if isinstance(optimizer, torch.optim.SGD):
            for p in moving.values():  # or torch detaches the first gradient
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        for rate in rates:
            # copies, because the optimizer writes to the parameters
            now = {name: p.clone() for name, p in moving.items()}
            value = loss(now, support_x, support_y)
            gradient = torch.autograd.grad(value, [*now.values()], create_graph=True)
            for group, p, g in zip(optimizer.param_groups, moving.values(), gradient, strict=True):
                group["lr"] = rate
                p.grad = g
            optimizer.step()
        total = total + loss(moving, query_x, query_y)
    return total / len(episodes.query_y)


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    """Torch's Adam counts its steps in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_torch(name: str, episodes: Episodes) -> dict[str, Tensor]:
    w = leaves(build("mlp"))
    objective = through_torch(CHOICES[name][1], w, episodes)
    return dict(zip(w, torch.autograd.grad(objective, [*w.values()]), strict=True))


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@EACH
def test_exact_meta_gradients_are_those_through_torchs_optimizers(name: str, tasks: str) -> None:
    model = MAML(build("mlp"), RATE, STEPS, inner_optimizer=CHOICES[name][0], tasks=tasks)
    expected = by_torch(name, make_episodes())
    assert relative_error(model.meta_gradient(make_episodes()), expected) < 1e-12
    plain = MAML(build("mlp"), RATE, STEPS).meta_gradient(make_episodes())
    assert relative_error(plain, expected) > 1e-3


@EACH
def test_hessian_free_meta_gradients_are_close(name: str) -> None:
    model = HFMAML(build("mlp"), RATE, STEPS, inner_optimizer=CHOICES[name][0])
    found = model.meta_gradient(make_episodes())
    assert relative_error(found, by_torch(name, make_episodes())) < 1e-7


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@EACH
def test_first_order_is_copies_that_torchs_optimizers_move(name: str, tasks: str) -> None:
    network, episodes = build("mlp"), make_episodes()
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    points = []
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        learner = copy.deepcopy(network)
        inner = CHOICES[name][1](learner.parameters(), lr=RATE)
        for _ in range(STEPS):
            inner.zero_grad()
            F.cross_entropy(learner(support_x), support_y).backward()
            inner.step()
        inner.zero_grad()
        F.cross_entropy(learner(query_x), query_y).backward()
        for key, p in learner.named_parameters():
            total[key] += p.grad / 3
        points.append(learner)

    model = FOMAML(network, RATE, STEPS, inner_optimizer=CHOICES[name][0], tasks=tasks)
    assert relative_error(model.meta_gradient(episodes), total) < 1e-12
    way = Reptile(network, RATE, STEPS, inner_optimizer=CHOICES[name][0], tasks=tasks)
    for key, p in network.named_parameters():
        away = torch.stack([p - dict(of.named_parameters())[key] for of in points]).mean(0)
        torch.testing.assert_close(way.meta_gradient(episodes)[key], away.detach())
        for number, learner in enumerate(points):
            adapted = model.adapt(episodes.support_x[number], episodes.support_y[number])
            torch.testing.assert_close(
                adapted.get_parameter(key), learner.get_parameter(key), rtol=0, atol=1e-13
            )
    losses = [F.cross_entropy(p(x), y) for p, x, y in zip(points, *episodes[2:], strict=True)]
    torch.testing.assert_close(model.evaluate(episodes).loss[:, -1], torch.stack(losses).detach())


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@EACH
def test_rates_can_be_learned_through_them(name: str, tasks: str) -> None:
    optimizer, make = CHOICES[name]
    episodes = make_episodes()
    model = LSLR(build("mlp"), RATE, STEPS, inner_optimizer=optimizer, tasks=tasks)
    model.meta_loss(episodes).backward()
    w = leaves(build("mlp"))
    for number in range(STEPS):  # by central differences, a rate of all layers at a time
        h, ends = 1e-6, []
        for sign in (1, -1):
            rates = [RATE + sign * h * (step == number) for step in range(STEPS)]
            ends.append(float(through_torch(make, w, episodes, rates).detach()))
        slope = (ends[0] - ends[1]) / (2 * h)
        found = sum(float(values.grad[number]) for values in model.learned_rates.values)
        assert abs(found - slope) < 1e-6 * max(1, abs(slope))


def check_finds_nothing_wrong(algorithm: type[MAML], name: str) -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = algorithm(network, RATE, STEPS, inner_optimizer=CHOICES[name][0])
    x = torch.rand(3, 6, 4, dtype=torch.float64)
    y = torch.arange(3).repeat(2).expand(3, 6)
    report = check(model, Episodes(x, y, x.flip(0), y))
    assert report.ok, str(report)


@EACH
def test_the_check_finds_nothing_wrong(name: str) -> None:
    check_finds_nothing_wrong(MAML, name)


@pytest.mark.parametrize("algorithm", [FOMAML, HFMAML, MetaSGD, ANIL])
@pytest.mark.parametrize("name", ["momentum", pytest.param("Adam", marks=pytest.mark.slow)])
def test_the_check_finds_nothing_wrong_with_other_algorithms(
    algorithm: type[MAML], name: str
) -> None:
    check_finds_nothing_wrong(algorithm, name)


def test_the_minimum_of_imaml_is_the_same() -> None:
    """The proximal term is so strong that both get there."""
    episodes = make_episodes()
    settings = {"inner_lr": 0.05, "proximal_strength": 10.0, "cg_steps": 30, "tasks": "loop"}
    plain = IMAML(build("mlp"), train_steps=200, **settings).meta_gradient(episodes)
    moved = IMAML(
        build("mlp"), train_steps=200, inner_optimizer=InnerSGD(momentum=0.5), **settings
    ).meta_gradient(episodes)
    assert relative_error(moved, plain) < 1e-10


class Decaying(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * (gradient + 0.1 * w), slots


@pytest.mark.parametrize(
    "optimizer",
    [
        InnerSGD(weight_decay=0.1),
        InnerAdam(weight_decay=0.1),
        InnerAdam(weight_decay=0.1, decoupled_weight_decay=True),
        Decaying(),
    ],
)
def test_weight_decay_would_move_the_minimum_of_imaml(optimizer: InnerOptimizer) -> None:
    with pytest.raises(ValueError, match="without weight decay with IMAML"):
        IMAML(build("mlp"), inner_optimizer=optimizer).meta_loss(make_episodes())
    IMAML(build("mlp"), inner_optimizer=InnerAdam()).meta_loss(make_episodes())


def test_an_element_without_gradient_gets_the_limit() -> None:
    """Adam's first step of a parameter with a gradient of 0 is ``rate / eps`` times it."""
    w, eps = torch.tensor([0.7, 0.3], dtype=torch.float64), 0.5

    def objective(w: Tensor, c: Tensor) -> Tensor:  # the first gradient, w - c, is 0
        optimizer = InnerAdam(eps=eps)
        (p,) = w[None]
        moved, _ = optimizer.step(p, p - c, 0.1, optimizer.start(p), 0)
        return (moved * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum()

    found = torch.autograd.functional.jacobian(lambda w: objective(w, torch.tensor([0.7, 0.1])), w)
    apart = 0.3 - 0.1
    slopes = [1 - 0.1 / eps, 2 * (1 - 0.1 * eps / (apart + eps) ** 2)]
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=0)


def test_dead_units_leave_meta_gradients_finite() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        network[1].bias.fill_(-1e3)
    model = MAML(network, RATE, STEPS, inner_optimizer=InnerAdam())
    found = model.meta_gradient(make_episodes())
    assert all(g.isfinite().all() for g in found.values())
    assert not found["1.weight"].any()


def test_each_step_may_have_its_own_batch() -> None:
    """With the Hessian batches of the steps themselves, it is autograd through mini-batches."""
    episodes = make_episodes(shots=STEPS)
    x, y = (
        t.unflatten(1, (3, STEPS)).transpose(1, 2) for t in (episodes.support_x, episodes.support_y)
    )
    batches = ResampledEpisodes(x, y, x, y, episodes.query_x, episodes.query_y)
    w, loss = leaves(build("mlp")), plain_loss(build("mlp"))
    total = torch.zeros((), dtype=torch.float64)
    for t in range(3):
        now = w
        velocity = {name: torch.zeros_like(p) for name, p in w.items()}
        for step in range(STEPS):
            value = loss(now, x[t, step], y[t, step])
            gradient = torch.autograd.grad(value, [*now.values()], create_graph=True)
            velocity = {
                name: 0.9 * velocity[name] + g for name, g in zip(now, gradient, strict=True)
            }
            now = {name: p - RATE * velocity[name] for name, p in now.items()}
        total = total + loss(now, episodes.query_x[t], episodes.query_y[t]) / 3
    expected = dict(zip(w, torch.autograd.grad(total, [*w.values()]), strict=True))
    model = MAML(build("mlp"), RATE, STEPS, inner_optimizer=InnerSGD(momentum=0.9))
    assert relative_error(model.meta_gradient(batches), expected) < 1e-12


class Clipped(InnerOptimizer):
    """Gradient descent with a bounded step, and a state that is no tensor of the parameter's."""

    def start(self, w: Tensor) -> tuple[Tensor, ...]:
        return (w.new_ones(()),)

    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        (size,) = slots
        return w - rate * size * (gradient / size).tanh(), (size * gradient.norm() ** 0.1,)


@pytest.mark.parametrize("algorithm", [MAML, MetaSGD, FOMAML])
def test_one_of_ones_own(algorithm: type[MAML]) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    model = algorithm(network, RATE, STEPS, inner_optimizer=Clipped())
    report = check(model, make_episodes())
    assert report.ok, str(report)


def test_training_continues_from_a_checkpoint_and_says_what_adapts(tmp_path: Path) -> None:
    model = MAML(build("mlp"), RATE, inner_optimizer=InnerSGD(momentum=0.9))
    run = trainer_in_double(tmp_path)
    run.fit(model, DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match=r"inner optimizer InnerSGD\(momentum=0.9"):
        MAML.load_from_checkpoint(tmp_path / "model.ckpt", network=build("mlp"))


@pytest.mark.parametrize("given", [torch.optim.Adam, partial(torch.optim.SGD, lr=0.1), "adam"])
def test_torchs_optimizers_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="Expected `inner_optimizer` to be an InnerOptimizer"):
        MAML(build("mlp"), inner_optimizer=given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerSGD(momentum=-1.0), "`momentum` to be a finite number of at least 0"),
        (lambda: InnerSGD(nesterov=True), "a `momentum` above 0 with `nesterov=True`"),
        (lambda: InnerAdam(betas=(0.9, 1.0)), r"`betas` to be two numbers in \[0, 1\)"),
        (lambda: InnerAdam(betas=(0.9,)), r"`betas` to be two numbers in \[0, 1\)"),
        (lambda: InnerAdam(betas=0.9), r"`betas` to be two numbers in \[0, 1\)"),
        (lambda: InnerAdam(eps=-1.0), "`eps` to be a finite number"),
        (lambda: InnerAdam(eps=0.0), "`eps` to be above 0"),
        (lambda: InnerSGD(momentum="0.9"), "`momentum` to be a finite number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Dropping(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * gradient * (torch.rand_like(gradient) > 0.5), slots


class FromTheStart(InnerOptimizer):
    def start(self, w: Tensor) -> tuple[Tensor, ...]:
        return (w,)

    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * (gradient + w - slots[0]), slots


class WithoutGraph(InnerOptimizer):
    @torch.no_grad()
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * gradient, slots


class Counting(InnerOptimizer):
    def start(self, w: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros((), dtype=torch.long),)

    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * gradient, (slots[0] + 1,)


class InPlace(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w.sub_(rate * gradient), slots


class ParameterAlone(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * gradient


class OneNumber(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return (w - rate * gradient).sum(), slots


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Dropping, "without random numbers but Dropping draws from torch"),
        (FromTheStart, "`start` of FromTheStart to return constants"),
        (WithoutGraph, "that autograd can follow"),
        (Counting, "a tuple of tensors of floats"),
        (InPlace, "to leave its arguments as they are"),
        (ParameterAlone, r"without state return \(w, \(\)\)"),
        (OneNumber, r"a parameter of shape \[3\]"),
    ],
)
def test_steps_that_cannot_be_taken_back_are_refused(
    optimizer: type[InnerOptimizer], message: str, algorithm: type[MAML]
) -> None:
    network = build("mlp")
    before = [p.detach().clone() for p in network.parameters()]
    model = algorithm(network, RATE, STEPS, inner_optimizer=optimizer())
    if optimizer is WithoutGraph and algorithm is FOMAML:
        model.meta_loss(make_episodes())
    else:
        with pytest.raises((TypeError, ValueError), match=message):
            model.meta_loss(make_episodes())
    assert all(map(torch.equal, before, network.parameters()))


class Deciding(InnerOptimizer):
    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        size = gradient.norm()
        return w - rate * (gradient / size if size > 1e-3 else gradient), slots


def test_steps_that_decide_by_numbers_are_not_stacked() -> None:
    model = MAML(build("mlp"), RATE, inner_optimizer=Deciding(), tasks="vmap")
    with pytest.raises(ValueError, match="Deciding fails there"):
        model.meta_loss(make_episodes())
    MAML(build("mlp"), RATE, inner_optimizer=Deciding()).meta_loss(make_episodes(tasks=8))


def test_an_optimizer_set_later_is_looked_at_too() -> None:
    model: Any = MAML(build("mlp"), RATE)
    model.inner_optimizer = torch.optim.Adam
    with pytest.raises(TypeError, match="Expected `inner_optimizer` to be an InnerOptimizer"):
        model.meta_loss(make_episodes())
    assert repr(Clipped()) == "Clipped()"
    assert hash(InnerAdam(betas=[0.9, 0.99])) == hash(InnerAdam(betas=(0.9, 0.99)))


def test_the_theory_is_of_gradient_descent() -> None:
    with pytest.raises(ValueError, match="Expected inner steps of gradient descent"):
        MAML(build("mlp"), inner_optimizer=InnerAdam()).check_for_theory()


def test_steps_are_looked_at_under_another_default_device() -> None:
    with torch.device("meta"):  # whose generators are none of the CPU's
        check_inner_steps(InnerSGD(momentum=0.9), torch.rand(3, device="cpu"), 0.1, curved=True)


def test_a_rule_set_later_is_tried_stacked() -> None:
    model: Any = MAML(build("mlp"), RATE)
    model.meta_loss(make_episodes(tasks=8))
    assert model._executor._last.tasks == "vmap"
    model.inner_optimizer = Deciding()
    model.meta_loss(make_episodes(tasks=8))
    assert model._executor._last.tasks != "vmap"


@dataclass
class Bounded(InnerOptimizer):
    """A rule with settings, and so without a hash."""

    bound: float = field(default=1.0, repr=False)

    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        return w - rate * self.bound * (gradient / self.bound).tanh(), slots


class Plain(InnerOptimizer):
    """The same as a plain class."""

    def __init__(self, bound: float = 1.0) -> None:
        self.bound = bound

    step = Bounded.step


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [Bounded, Plain])
@pytest.mark.parametrize("number", [float, lambda bound: torch.tensor(bound).double()])
def test_settings_of_a_rule_may_change(
    kind: Callable[..., Any], compiled: bool, number: Callable[[float], Any]
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    model: Any = MAML(network, RATE, STEPS, inner_optimizer=kind(), compiled=compiled)
    found = []
    for bound in (1.0, 0.1):
        model.inner_optimizer.bound = number(bound)
        found.append(float(model.meta_loss(make_episodes()).detach()))
        alone = MAML(network, RATE, STEPS, inner_optimizer=Bounded(bound), tasks="loop")
        assert found[-1] == pytest.approx(float(alone.meta_loss(make_episodes()).detach()))
    assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_a_rule_whose_settings_may_change_unseen_is_not_compiled() -> None:
    rule: Any = Plain()
    rule.numbers = {1.0, 2.0}
    model = MAML(build("mlp"), RATE, inner_optimizer=rule, compiled=True)
    with pytest.raises(
        ValueError, match=r"attributes are .* but inner_optimizer\.numbers is a set"
    ):
        model.meta_loss(make_episodes())


class Remembering(InnerOptimizer):
    """Momentum in an attribute, which all parameters and tasks share."""

    def step(self, w: Any, gradient: Any, rate: Any, slots: Any, number: int) -> Any:
        before = 0.0 if number == 0 else getattr(self, "mean", 0.0)
        self.mean = 0.9 * before + gradient
        return w - rate * self.mean, slots


def test_a_rule_that_remembers_in_an_attribute_is_refused() -> None:
    model = MAML(build("mlp"), RATE, STEPS, inner_optimizer=Remembering())
    with pytest.raises(ValueError, match="inner steps that can be taken again but Remembering"):
        model.meta_loss(make_episodes())


def test_the_theory_is_not_about_a_loss_that_is_trained() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.scale * outputs, y)

    with pytest.raises(ValueError, match="Expected a loss without trainable parameters, as in the"):
        MAML(build("mlp"), loss=Scaled()).check_for_theory()
    assert MAML(build("mlp"), 0.1, loss=Scaled().requires_grad_(False)).check_for_theory() == 0.1
    with pytest.raises(ValueError, match=r"without trainable parameters, .* but got \['scale'\]"):
        MAML(build("mlp"), support_loss=Scaled()).check_for_theory()
