"""Reinforcement learning by likelihood ratios.

It is unbiased against a closed form, uses the same trajectories at every point, and learns.
"""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from helpers.folders import ROOT
from helpers.networks import flat, relative_error
from lightning_maml import meta_gradient
from lightning_maml.core.params import Params

EXAMPLE = ROOT / "examples" / "point_navigation.py"
specification = importlib.util.spec_from_file_location("point_navigation", EXAMPLE)
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)


class Drift(nn.Module):
    """A policy that moves by the same mean whatever the position.

    The expected return is then a quadratic in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drift = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, position: Tensor) -> Tensor:
        return self.drift.expand_as(position)


GOAL = torch.tensor([0.4, 0.1], dtype=torch.float64)


def expected_gradient_and_curvature(drift: Tensor) -> tuple[Tensor, float]:
    """Of ``sum_t |t STEP d - g|^2 + 2 t STEP_STD^2``, minus the expected return."""
    t = torch.arange(1, example.HORIZON + 1, dtype=torch.float64)[:, None] * example.STEP
    return (2 * t * (t * drift - GOAL)).sum(0), float(2 * t.square().sum())


def within_five_standard_errors(samples: Tensor, expected: Tensor) -> bool:
    error = samples.std(0) / len(samples) ** 0.5
    assert (error < 0.1 * expected.abs().max()).all(), "enough samples to tell"
    return bool(((samples.mean(0) - expected).abs() < 5 * error).all())


@pytest.mark.slow
def test_gradient_and_hessian_are_unbiased() -> None:
    policy, random = Drift(), torch.Generator().manual_seed(0)
    task, params = example.Navigation(policy), {"drift": policy.drift.detach()}

    def derivatives(noise: Tensor) -> tuple[Tensor, Tensor]:
        runs, goals = task.sample(params, noise, GOAL.expand(len(noise), 2))

        def loss(params: Params) -> Tensor:
            return task.loss(params, runs, goals)

        return torch.func.grad(loss)(params)["drift"], torch.func.hessian(loss)(params)["drift"][
            "drift"
        ]

    noise = torch.randn(4000, 50, example.HORIZON, 2, dtype=torch.float64, generator=random)
    gradients, hessians = torch.func.vmap(derivatives)(noise)
    gradient, curvature = expected_gradient_and_curvature(params["drift"])
    assert within_five_standard_errors(gradients, gradient)
    assert within_five_standard_errors(hessians, curvature * torch.eye(2))


def test_importance_weights_are_unbiased_away_from_where_the_runs_were_drawn() -> None:
    policy, random = Drift(), torch.Generator().manual_seed(1)
    task, here = example.Navigation(policy), {"drift": policy.drift.detach()}
    there = {"drift": here["drift"] + 0.05}

    def gradient(noise: Tensor) -> Tensor:
        runs, goals = task.sample(here, noise, GOAL.expand(len(noise), 2))
        return torch.func.grad(task.loss)(there, runs, goals)["drift"]

    noise = torch.randn(4000, 50, example.HORIZON, 2, dtype=torch.float64, generator=random)
    assert within_five_standard_errors(
        torch.func.vmap(gradient)(noise), expected_gradient_and_curvature(there["drift"])[0]
    )


def test_the_loss_where_the_runs_were_drawn_is_minus_their_mean_return() -> None:
    policy = Drift()
    task, params = example.Navigation(policy), {"drift": policy.drift.detach()}
    noise = torch.randn(
        7, example.HORIZON, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    runs, goals = task.sample(params, noise, GOAL.expand(7, 2))
    torch.testing.assert_close(task.loss(params, runs, goals), -runs.rewards.sum(1).mean())


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_the_two_probes_of_hf_maml_weigh_the_same_runs(tasks: str) -> None:
    """So it converges to the exact curvature of those runs at second order; fresh runs at each
    probe would explode as radii shrink."""
    torch.manual_seed(0)
    policy = example.build_policy().double()
    task = example.Navigation(policy)
    params = {name: p.detach() for name, p in policy.named_parameters()}
    episodes = example.draw_tasks(
        3, 2, runs=10, hessian_runs=6, random=torch.Generator().manual_seed(2)
    )
    episodes = type(episodes)(*(tensor.double() for tensor in episodes))

    def of(curvature: str, **radius: float) -> Params:
        result = meta_gradient(
            *(task.loss, params, episodes),
            inner_lr=0.02,
            steps=2,
            curvature=curvature,
            sample=task.sample,
            tasks=tasks,
            **radius,
        )
        return result.grad

    exact = of("exact")
    errors = [relative_error(of("finite_difference", probe_radius=h), exact) for h in (4e-3, 2e-3)]
    assert errors[1] < 1e-3
    assert 3.5 < errors[0] / errors[1] < 4.5, "second order"
    assert relative_error(of("none"), exact) > 0.1


def test_the_meta_gradient_is_the_explicit_product_of_runs_drawn_at_each_inner_point() -> None:
    policy = Drift()
    task, params = example.Navigation(policy), {"drift": policy.drift.detach()}
    episodes = example.draw_tasks(
        1, 2, runs=10, hessian_runs=6, random=torch.Generator().manual_seed(3)
    )
    episodes = type(episodes)(*(tensor.double() for tensor in episodes))
    alone = type(episodes)(*(tensor[0] for tensor in episodes))

    def derivatives(w: Tensor, noise: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        runs, goals = task.sample({"drift": w}, noise, goals)

        def loss(w: Tensor) -> Tensor:
            return task.loss({"drift": w}, runs, goals)

        return torch.func.grad(loss)(w), torch.func.hessian(loss)(w)

    w, product = params["drift"], torch.eye(2, dtype=torch.float64)
    for j in range(2):
        product = product @ (
            torch.eye(2) - 0.01 * derivatives(w, alone.hessian_x[j], alone.hessian_y[j])[1]
        )
        w = w - 0.01 * derivatives(w, alone.support_x[j], alone.support_y[j])[0]
    expected = product @ derivatives(w, alone.query_x, alone.query_y)[0]
    actual = meta_gradient(
        task.loss, params, episodes, inner_lr=0.01, steps=2, sample=task.sample
    ).grad
    assert relative_error(actual, {"drift": expected}) < 1e-12


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "HF-MAML"))
        for name in example.ALGORITHMS
    ],
)
def test_each_algorithm_learns_to_reach_the_goal(algorithm: str) -> None:
    torch.manual_seed(0)
    policy = example.build_policy()
    untrained = flat(dict(policy.named_parameters()))
    example.meta_train(policy, example.ALGORITHMS[algorithm], iterations=100)
    before, after = example.returns_on_new_tasks(policy, steps=1).mean(0)
    assert not torch.equal(untrained, flat(dict(policy.named_parameters())))
    staying = -2 * example.GOALS**2 / 3 * example.HORIZON  # the expected return of never moving
    assert after > staying / 2, "it finds goals that it is not told"
    assert after > before + 1


def test_the_picture_shows_every_algorithm_before_and_after() -> None:
    figure = example.draw_runs(
        {"one": example.build_policy(), "two": example.build_policy()}, steps=1
    )
    assert [axes.get_title() for axes in figure.axes][:2] == [
        "one, before adaptation",
        "two, before adaptation",
    ]
    assert all(len(axes.lines) == 4 * 21 for axes in figure.axes)
