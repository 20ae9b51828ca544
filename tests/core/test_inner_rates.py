"""Rates by parameter and by step, and learned rates, in float64.

Some parts do not adapt. The reference is autograd through the unrolled loop.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers.networks import (
    build,
    flat,
    leaves,
    make_episodes,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from lightning_maml import (
    Episodes,
    MetaGradient,
    ResampledEpisodes,
    adaptation_curve,
    meta_gradient,
)
from lightning_maml.core.inner_rates import InnerRates, Rates
from lightning_maml.core.params import Params
from lightning_maml.networks.functional_network import FunctionalNetwork

SMOOTH = ["mlp", "conv_group_norm", "conv_batch_norm"]
STEPS = 3


def head(w: Params) -> list[str]:
    return list(w)[-2:]


def body(w: Params) -> list[str]:
    return list(w)[:-2]


def random_rates(w: Params, shape_of: str, seed: int) -> Rates:
    """Rates between 0.1 and 0.5: one per parameter tensor, per output channel or per element."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "layer": lambda p: (),
        "channel": lambda p: (len(p), *[1] * (p.ndim - 1)),
        "parameter": lambda p: p.shape,
    }
    return {
        name: 0.1
        + 0.4 * drawn_on_cpu(torch.rand, shapes[shape_of](p), dtype=p.dtype, generator=random)
        for name, p in w.items()
    }


def only(rates: Rates, names: list[str]) -> Rates:
    return {name: rates[name] for name in names}


RATES = {
    "head, fixed": lambda w: [dict.fromkeys(head(w), 0.3)] * STEPS,
    "body, fixed": lambda w: [dict.fromkeys(body(w), 0.3)] * STEPS,
    "per layer": lambda w: [random_rates(w, "layer", 1)] * STEPS,
    "per layer and step": lambda w: [random_rates(w, "layer", step) for step in range(STEPS)],
    "per channel": lambda w: [random_rates(w, "channel", 1)] * STEPS,
    "per parameter": lambda w: [random_rates(w, "parameter", 1)] * STEPS,
    "head, per parameter and step": lambda w: [
        only(random_rates(w, "parameter", step), head(w)) for step in range(STEPS)
    ],
    "body, per layer": lambda w: [only(random_rates(w, "layer", 1), body(w))] * STEPS,
    "another part in each step": lambda w: [
        only(random_rates(w, "layer", 7), names) for names in (head(w), body(w), list(w))
    ],
}


def with_own_leaves(rates: list[Rates]) -> list[Rates]:
    """The same rates with a leaf for each step.

    Each step's gradient can then be told from the others'.
    """
    return [
        {n: r.clone().requires_grad_() if isinstance(r, Tensor) else r for n, r in of_step.items()}
        for of_step in rates
    ]


def expected(
    network: torch.nn.Module, episodes: Episodes, rates: list[Rates]
) -> tuple[Params, list[Params]]:
    w, rates = leaves(network), with_own_leaves(rates)
    inputs = [
        *w.values(),
        *(r for of_step in rates for r in of_step.values() if isinstance(r, Tensor)),
    ]
    gradients = iter(
        torch.autograd.grad(unrolled(plain_loss(network), w, episodes, rates, STEPS), inputs)
    )
    return (
        {name: next(gradients) for name in w},
        [
            {name: next(gradients) for name, r in of_step.items() if isinstance(r, Tensor)}
            for of_step in rates
        ],
    )


def gradient_of(
    network: torch.nn.Module, episodes: Episodes, rates: InnerRates, **options
) -> MetaGradient:
    return meta_gradient(
        plain_loss(network), leaves(network), episodes, inner_lr=rates, steps=STEPS, **options
    )


def error_of_rates(actual: list[Params], expected: list[Params]) -> float:
    assert [of_step.keys() for of_step in actual] == [of_step.keys() for of_step in expected]
    assert all(
        a[name].shape == e[name].shape for a, e in zip(actual, expected, strict=True) for name in e
    )
    if not any(expected):
        return 0.0
    a, e = (
        torch.cat([flat(of_step) for of_step in steps if of_step]) for steps in (actual, expected)
    )
    return float((a - e).norm() / e.norm())


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("name", SMOOTH)
def test_exact_equals_autograd_through_the_unrolled_loop(name: str, kind: str, tasks: str) -> None:
    network, episodes = build(name), make_episodes()
    rates = RATES[kind](leaves(network))
    of_w, of_rates = expected(network, episodes, rates)
    functional = FunctionalNetwork(network, vectorised=tasks == "vmap")
    loss = lambda params, x, y: torch.nn.functional.cross_entropy(functional(params, x), y)
    result = meta_gradient(
        loss, leaves(network), episodes, inner_lr=rates, steps=STEPS, tasks=tasks
    )
    assert relative_error(result.grad, of_w) < 1e-12
    assert error_of_rates(result.inner_lr, of_rates) < 1e-12


@pytest.mark.parametrize("kind", RATES)
def test_finite_difference_converges_at_second_order_in_the_radius(kind: str) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    rates = RATES[kind](leaves(network))
    of_w, of_rates = expected(network, episodes, rates)
    errors = []
    for radius in (4e-2, 2e-2, 1e-2):
        result = gradient_of(
            network, episodes, rates, curvature="finite_difference", probe_radius=radius
        )
        errors.append(
            torch.tensor(
                [relative_error(result.grad, of_w), error_of_rates(result.inner_lr, of_rates)]
            )
        )
    for coarse, fine in pairwise(errors):
        orders = (coarse / fine).log2()[: 1 + any(of_rates)]
        assert ((orders > 1.8) & (orders < 2.2)).all(), errors


@pytest.mark.parametrize("kind", RATES)
def test_without_curvature_the_adapted_gradient_is_pulled_back_as_it_is(kind: str) -> None:
    """First order: inner gradients count as constants in the unrolled loop."""
    network, episodes = build("conv_group_norm"), make_episodes()
    w, loss = leaves(network), plain_loss(network)
    rates = with_own_leaves(RATES[kind](w))

    def objective() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for task in zip(*episodes, strict=True):
            adapted = w
            for step in rates:
                here = {n: p.detach().requires_grad_() for n, p in adapted.items()}
                gradient = torch.autograd.grad(
                    loss(here, task[0], task[1]), [here[n] for n in step]
                )
                adapted = adapted | {
                    n: adapted[n] - step[n] * g for n, g in zip(step, gradient, strict=True)
                }
            total = total + loss(adapted, task[2], task[3]) / len(episodes.support_x)
        return total

    result = gradient_of(network, episodes, rates, curvature="none")
    of_w = dict(zip(w, torch.autograd.grad(objective(), list(w.values())), strict=True))
    assert relative_error(result.grad, of_w) < 1e-12
    learned = [
        (step, name)
        for step, of_step in enumerate(rates)
        for name, r in of_step.items()
        if isinstance(r, Tensor)
    ]
    of_rates = (
        torch.autograd.grad(objective(), [rates[step][name] for step, name in learned])
        if learned
        else ()
    )
    for (step, name), gradient in zip(learned, of_rates, strict=True):
        torch.testing.assert_close(result.inner_lr[step][name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", RATES)
def test_resampled_with_the_same_batches_is_the_finite_sum_case(kind: str) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    rates = RATES[kind](leaves(network))
    support = [tensor.unsqueeze(1).expand(-1, STEPS, *tensor.shape[1:]) for tensor in episodes[:2]]
    resampled = ResampledEpisodes(*support, *support, *episodes[2:])
    of_w, of_rates = expected(network, episodes, rates)
    result = gradient_of(network, resampled, rates)
    assert relative_error(result.grad, of_w) < 1e-12
    assert error_of_rates(result.inner_lr, of_rates) < 1e-12


@pytest.mark.parametrize("kind", ["head, fixed", "per layer and step", "another part in each step"])
def test_query_losses_on_the_way_are_differentiated_with_their_weights(kind: str) -> None:
    network, episodes, weights = build("conv_batch_norm"), make_episodes(), [0.2, 0.0, 0.7]
    rates = with_own_leaves(RATES[kind](leaves(network)))
    w = leaves(network)
    value = sum(
        weight * unrolled(plain_loss(network), w, episodes, rates, steps)
        for steps, weight in enumerate(weights, start=1)
        if weight
    )
    learned = [rate for of_step in rates for rate in of_step.values() if isinstance(rate, Tensor)]
    gradients = iter(torch.autograd.grad(value, [*w.values(), *learned]))
    result = gradient_of(network, episodes, rates, step_weights=weights)
    assert relative_error(result.grad, {name: next(gradients) for name in w}) < 1e-12
    of_rates = [
        {name: next(gradients) for name, rate in of_step.items() if isinstance(rate, Tensor)}
        for of_step in rates
    ]
    assert error_of_rates(result.inner_lr, of_rates) < 1e-12
    assert torch.equal(result.query_loss, gradient_of(network, episodes, rates).query_loss)


def test_there_is_a_weight_for_each_step() -> None:
    with pytest.raises(
        ValueError, match="Expected `step_weights` to hold 3 weights, one per inner step, but got 2"
    ):
        gradient_of(build("mlp"), make_episodes(), 0.3, step_weights=[0.5, 0.5])


def test_one_rate_may_be_a_tensor() -> None:
    network, episodes = build("mlp"), make_episodes()
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = gradient_of(network, episodes, rate)
    value = unrolled(
        plain_loss(network),
        leaves(network),
        episodes,
        [dict.fromkeys(leaves(network), rate)] * STEPS,
        STEPS,
    )
    torch.testing.assert_close(
        sum(sum(of_step.values()) for of_step in result.inner_lr),
        torch.autograd.grad(value, rate)[0],
    )


def test_further_steps_use_the_last_rates() -> None:
    network, episodes = build("mlp"), make_episodes()
    first, last = (random_rates(leaves(network), "layer", seed) for seed in (1, 2))
    arguments = (plain_loss(network), leaves(network), episodes)
    few = adaptation_curve(*arguments, inner_lr=[first, last], steps=4)
    many = adaptation_curve(*arguments, inner_lr=[first, last, last, last], steps=4)
    assert torch.equal(few.loss, many.loss)


def test_inner_gradient_leaves_out_parameters_that_do_not_adapt() -> None:
    """ANIL is cheap because nothing is differentiated below its head."""
    network, episodes = build("mlp"), make_episodes(tasks=1)
    asked: list[list[str]] = []

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        asked.append([name for name, tensor in params.items() if tensor.requires_grad])
        return plain_loss(network)(params, x, y)

    w = leaves(network)
    adaptation_curve(loss, w, episodes, inner_lr=dict.fromkeys(head(w), 0.3), steps=2)
    assert [names for names in asked if names] == [head(w)] * 2


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({}, "at least one parameter"),
        ([], "at least one inner step"),
        ({"3.weight": -1.0}, "at least 0 but got -1.0"),
        ({"3.weight": float("nan")}, "finite number"),
        ({"9.weight": 0.1}, r"name parameters but \['9.weight'\] are none"),
        (
            [{"3.weight": 0.1}, {"3.weight": torch.ones(5)}],
            r"rate of '3.weight' to broadcast to its shape \[3, 6\] but got shape \[5\]",
        ),
        ({"3.bias": torch.ones(2, 3)}, r"broadcast to its shape \[3\] but got shape \[2, 3\]"),
    ],
)
def test_rates_that_fit_nothing_are_refused(rates: InnerRates, message: str) -> None:
    for function in (meta_gradient, adaptation_curve):
        with pytest.raises(ValueError, match=message):
            function(
                plain_loss(build("mlp")),
                leaves(build("mlp")),
                make_episodes(),
                inner_lr=rates,
                steps=2,
            )
