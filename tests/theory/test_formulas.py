"""The theory's functions against the papers' figures, their own recursions, limits and units."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from lightning_maml import theory
from lightning_maml.theory import Rule, SmoothnessConstants

STEPS = [1, 2, 5, 10]


def close(expected: float) -> object:
    return pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("L", "rho"), [(1.0, 1.0), (60.0, 294.0)])
def test_smoothness_constants_at_the_recommended_inner_lr(L: float, rho: float) -> None:
    constants = theory.smoothness_constants(L, rho, theory.recommended_inner_lr(L, 1), 1)
    assert constants == (close(1.265625), close(0.140625 * rho / L), close(0.015625 * rho / L))
    many = theory.smoothness_constants(L, rho, theory.recommended_inner_lr(L, 10**6), 10**6)
    e = math.exp(1 / 8)
    assert many == (close(e**2), close(e**2 * (e - 1) * rho / L), close(e * (e - 1) ** 2 * rho / L))
    assert (round(many.growth, 3), round(many.c_l * L / rho, 4), round(many.c_b * L / rho, 4)) == (
        1.284,
        0.1710,
        0.0201,
    )


@pytest.mark.parametrize("alpha", [0.01, 0.05])
@pytest.mark.parametrize("steps", STEPS)
def test_smoothness_constants_follow_from_the_recursion_of_the_proof(
    steps: int, alpha: float
) -> None:
    """V(m) = alpha rho a^(2(m-1)) + a V(m-1), V(0) = 0 (Ji, eqs. 27 and 28).

    It is how far two products of m factors are apart.
    """
    L, rho = 2.0, 3.0
    a, v = 1 + alpha * L, 0.0
    for m in range(1, steps + 1):
        v = alpha * rho * a ** (2 * (m - 1)) + a * v
    growth, c_l, c_b = theory.smoothness_constants(L, rho, alpha, steps)
    assert (growth, c_l, c_b) == (
        close(a ** (2 * steps)),
        close(v * a**steps),
        close(v * (a**steps - 1)),
    )
    printed = (
        a ** (steps - 1) * alpha * rho + rho / L * a**steps * (a ** (steps - 1) - 1)
    ) * a**steps
    assert c_l == close(printed), "Ji, eq. 13"


@pytest.mark.parametrize("steps", STEPS)
def test_smoothness_constants_have_a_limit_where_L_is_zero(steps: int) -> None:
    at_zero = theory.smoothness_constants(0.0, 3.0, 0.1, steps)
    assert at_zero == (1.0, close(steps * 0.1 * 3), 0.0)
    for L in (1e-6, 1e-12, 1e-18, 1e-300):
        near = theory.smoothness_constants(L, 3.0, 0.1, steps)
        assert near.c_l == pytest.approx(at_zero.c_l, rel=1e-5)
        assert near.c_b == pytest.approx(0, abs=1e-5)
    for rule in ("resampling", "finite_sum"):
        smoothness = theory.meta_smoothness(rule, 0.0, 3.0, 0.1, steps, gradient_norm=2.0, b=9.0)
        assert smoothness == close(steps * 0.1 * 3 * 2)
    one_step = theory.meta_smoothness("one_step", 0.0, 3.0, 0.1, 1, gradient_norm=2.0)
    assert one_step == close(2 * 3 * 0.1 * 2)
    assert theory.largest_inner_lr(0.0, steps) == theory.recommended_inner_lr(0.0, steps)
    assert theory.largest_one_step_inner_lr(0.0, "exact") == math.inf


@pytest.mark.parametrize("steps", STEPS)
def test_path_and_moments_have_a_limit_where_L_is_zero(steps: int) -> None:
    """There each step adds its noise, and the products of Hessians stay near the identity."""
    path = theory.path_error(0.0, 0.1, steps, 2.0, support=4)
    assert path == (close(steps * 0.1), close(2 * steps * (0.1 * 2) ** 2 / 4))
    moments = theory.moment_constants(0.0, 3.0, 0.1, steps, 2.0, 1.0, hessian=4)
    assert moments.err2 == close((0.1 * (steps - 1)) ** 2 * 3 * 2)
    assert (moments.err1, moments.squ2) == (0.0, 0.0)
    for L in (1e-6, 1e-12, 1e-18, 1e-300):
        near = theory.path_error(L, 0.1, steps, 2.0, support=4)
        assert near == (pytest.approx(path.mean, rel=1e-5), pytest.approx(path.mean_square, 1e-5))
        near_moments = theory.moment_constants(L, 3.0, 0.1, steps, 2.0, 1.0, hessian=4)
        assert near_moments == pytest.approx(moments, rel=1e-5, abs=1e-5)


def test_small_integers_of_numpy_are_numbers_of_steps() -> None:
    for steps in (np.int8(100), np.uint8(100)):
        assert theory.largest_inner_lr(1.0, steps) == theory.largest_inner_lr(1.0, 100)
        assert theory.recommended_inner_lr(1.0, steps) == theory.recommended_inner_lr(1.0, 100)
        assert theory.smoothness_constants(1.0, 1.0, 1e-3, steps) == pytest.approx(
            theory.smoothness_constants(1.0, 1.0, 1e-3, 100)
        )
        for function in OF_STEPS:
            assert function(steps) == pytest.approx(function(100)), function
    assert theory.hessian_batch(np.int8(2), np.int8(20)) == 3200
    assert theory.recommended_inner_lr(np.int16(5000), 1) == close(2.5e-5)
    assert theory.recommended_inner_lr(np.float16(2e4), 5) == close(1.25e-6)
    assert type(theory.largest_inner_lr(torch.tensor(2.0), 1)) is float
    sizes = {"tasks": np.int8(20), "support": np.int8(20), "query": np.int8(15)}
    noise = theory.one_step_noise("exact", 1.0, 0.1, sigma=1.0, sample_sigma=2.0, **sizes)
    assert noise == close(math.sqrt(1 / 20 + 4 / (20 * 15) + 4 / 20))


OF_STEPS: list[Callable[[int], object]] = [
    lambda steps: theory.printed_smoothness_constants(1.0, 1.0, 1e-3, steps),
    lambda steps: theory.hessian_free_error(1.0, 1.0, 1e-3, steps, 0.1, 1.0),
    lambda steps: theory.first_order_floor(1.0, 1e-3, steps, 1.0, b=0.1),
    lambda steps: theory.path_error(1.0, 1e-3, steps, 1.0, support=4),
    lambda steps: theory.moment_constants(1.0, 1.0, 1e-3, steps, 1.0, 1.0, hessian=4),
    lambda steps: theory.finite_sum_moments(1.0, 1e-3, steps, sigma=1.0, b=0.1, mean_square_b=0.1),
    lambda steps: theory.resampling_convergence(
        *(1.0, 1.0, 1e-3, steps),
        sigma=1.0,
        sample_sigma=1.0,
        hessian_sigma=1.0,
        tasks=20,
        support=15,
        hessian=1,
        query=15,
    ),
    lambda steps: theory.finite_sum_sizes(
        1.0, 1.0, 1.0, steps, sigma=1.0, b=0.1, mean_square_b=0.1, gap=1.0
    ),
    lambda steps: theory.resampling_sizes(
        1.0, 1.0, 1.0, steps, sigma=1.0, sample_sigma=1.0, hessian_sigma=1.0, gap=1.0
    ),
]


def test_bounds_are_infinite_where_they_overflow() -> None:
    assert theory.first_order_floor(1.0, 1.0, 1000, 1.0) == math.inf
    assert theory.hessian_free_error(1.0, 1.0, 1.0, 2000, 1.0, 1.0) == math.inf
    assert theory.hessian_free_error(1.0, 1.0, 1.0, 2000, 0.0, 1.0) == 0
    assert theory.path_error(1.0, 1.0, 2000, 1.0, support=1).mean == math.inf
    assert theory.path_error(1.0, 1.0, 2000, 0.0, support=1) == (0, 0)
    with pytest.raises(ValueError, match="Expected an error that is a number but it overflows"):
        theory.probe_radius(0.1, 1.0, 1.0, 1.0, 2000, 1.0)
    with pytest.raises(ValueError, match=r"Expected \(1 \+ alpha L\)\^\(2N\) to be a number"):
        theory.smoothness_constants(1e200, 1.0, 1e200, 1)
    assert theory.moment_constants(1.0, 1.0, 0.003, 100, 1.0, 2e4, hessian=1).squ1 == math.inf
    with pytest.raises(ValueError, match=r"Expected scale / L-hat to be a number but got"):
        theory.meta_stepsize(1e-320, 1.0)


def test_whole_numbers_give_what_floats_give() -> None:
    assert type(theory.smoothness_constants(1, 1, 1, 2).growth) is float
    with pytest.raises(ValueError, match="N = 1000 is too much; lower alpha"):
        theory.smoothness_constants(1, 1, 1, 1000)


def test_results_that_overflow_are_said_to_do_so() -> None:
    for call in (
        lambda: theory.resampling_batches(1e-90, 0.01, 0.5, 1e-6),
        lambda: theory.hessian_batch(1e90, 1e90),
        lambda: theory.meta_smoothness("resampling", 1.0, 1e300, 1.0, 20, 0.0),
        lambda: theory.moment_constants(1.0, 1.0, 0.003, 100, 0.0, 2e4, hessian=1),
        lambda: theory.stepsize_batches("finite_sum", 1e-20, 1e-6, 1e90, 2, 1.0, 1, 0.1),
        lambda: theory.finite_sum_bound(theory.Convergence(1e-300, 0.1, 1.0), 0.5, 1, 1),
    ):
        with pytest.raises(
            ValueError, match=r"Expected arguments for which \w+ is a number but got \w+="
        ):
            call()


def test_unknown_names_are_refused() -> None:
    noise = {"sigma": 1.0, "sample_sigma": 1.0, "tasks": 1, "support": 1, "query": 1}
    for call in (
        lambda: theory.theorems("hf", 1, "finite_sum"),
        lambda: theory.known_instead("hf", 1, "finite_sum"),
        lambda: theory.largest_one_step_inner_lr(1.0, "hf"),
        lambda: theory.one_step_noise("hf", 1.0, 1.0, **noise),
        lambda: theory.paper_scale("one_step", "hf"),
    ):
        with pytest.raises(ValueError, match="Expected `curvature` to be 'exact', 'none' or"):
            call()
    for call in (theory.theorems, theory.known_instead):
        with pytest.raises(ValueError, match="Expected `data` to be 'finite_sum' or 'resampling'"):
            call("exact", 1, "episodes")


def test_sizes_and_bounds_need_an_inner_step_and_curvature() -> None:
    spread = {"sigma": 1.0, "b": 0.1, "mean_square_b": 0.1}
    sigmas = {"sigma": 1.0, "sample_sigma": 1.0, "hessian_sigma": 1.0}
    batches = {"tasks": 20, "support": 15, "hessian": 1, "query": 15}
    for call in (
        lambda steps, L: theory.finite_sum_sizes(1.0, L, 1.0, steps, **spread, gap=1.0),
        lambda steps, L: theory.resampling_sizes(1.0, L, 1.0, steps, **sigmas, gap=1.0),
    ):
        with pytest.raises(ValueError, match="Expected `steps` to be a finite number above 0"):
            call(0, 1.0)
        with pytest.raises(ValueError, match="Expected `L` to be a finite number above 0"):
            call(1, 0.0)
    with pytest.raises(ValueError, match="Expected `L` to be a finite number above 0"):
        theory.finite_sum_convergence(0.0, 1.0, 0.1, 1, **spread, tasks=20)
    with pytest.raises(ValueError, match="Expected `L` to be a finite number above 0"):
        theory.resampling_convergence(0.0, 1.0, 0.1, 1, **sigmas, **batches)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 1000])
def test_the_printed_constants_of_eq_21_are_larger(steps: int) -> None:
    L, rho = 2.0, 3.0
    alpha = theory.recommended_inner_lr(L, steps)
    ours = theory.smoothness_constants(L, rho, alpha, steps)
    printed = theory.printed_smoothness_constants(L, rho, alpha, steps)
    a = 1 + alpha * L
    assert (
        printed.c_l
        == printed.c_b
        == close((alpha * rho + 1.5 * a ** (steps - 1)) * a ** (2 * steps))
    )
    assert printed.growth == ours.growth
    assert 8 < printed.c_l / ours.c_l < 10.2
    assert 72 < printed.c_b / ours.c_b < 91.2


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("alpha", [0.02, 0.05])
def test_first_order_floor_holds_where_support_and_query_differ(steps: int, alpha: float) -> None:
    """Quadratic tasks with other centres and curvatures in the query: FO-MAML's rest is linear."""
    random = torch.Generator().manual_seed(steps)
    draw = partial(torch.rand, 40, 6, dtype=torch.float64, generator=random)
    (a, p), (c, d) = (draw(), draw()), (draw() - 0.5, draw() - 0.5)
    # FO-MAML rests where mean_i p (w_N - d) = 0, with w_N - c = (1 - alpha a)^N (w - c)
    shrunk = (1 - alpha * a) ** steps
    w = (p * (d - c + shrunk * c)).sum(0) / (p * shrunk).sum(0)
    at_end = p * (c + shrunk * (w - c) - d)
    assert at_end.mean(0).norm() < 1e-12
    gradient = (shrunk * at_end).mean(0)
    of_support, of_query = a * (w - c), p * (w - d)
    sigma = float((of_query - of_query.mean(0)).square().sum(1).mean().sqrt())
    b = float((of_support - of_query).norm(dim=1).mean())
    floor = theory.first_order_floor(1.0, alpha, steps, sigma, b)
    assert float(gradient.norm()) <= floor < math.inf
    assert floor > theory.first_order_floor(1.0, alpha, steps, sigma)


def test_one_step_noise_has_the_terms_of_eqs_23_and_26() -> None:
    sizes = {"tasks": 10, "support": 5, "query": 2}
    noise = partial(theory.one_step_noise, L=2.0, alpha=0.1, **sizes)
    assert noise("exact", sigma=3.0, sample_sigma=0.0) == close(3 / math.sqrt(10))
    assert noise("exact", sigma=0.0, sample_sigma=3.0) == close(3 * math.sqrt(1 / 20 + 1 / 5))
    assert noise("none", sigma=3.0, sample_sigma=0.0) == close(3 * math.sqrt(0.04 + 0.1))


def test_finite_sum_moments_are_those_of_the_convergence_constants() -> None:
    """With alpha = 0 nothing adapts: E|G|^2 <= 2 |grad F|^2 + 2 sigma^2, and less than printed."""
    assert theory.finite_sum_moments(1.0, 0.0, 3, sigma=2.0, b=1.0, mean_square_b=1.5) == (4, 11)
    alpha = theory.recommended_inner_lr(1.0, 5)
    moments = theory.finite_sum_moments(1.0, alpha, 5, sigma=2.0, b=1.0, mean_square_b=1.5)
    convergence = theory.finite_sum_convergence(
        1.0, 1.0, alpha, 5, sigma=2.0, b=1.0, mean_square_b=1.5, tasks=20
    )
    assert convergence.phi == close(moments.squ2 / 80**2)


def test_meta_smoothness_and_scale_of_each_rule() -> None:
    arguments = {"L": 2.0, "rho": 3.0, "alpha": 0.0625, "steps": 1, "gradient_norm": 5.0}
    a = 1.125
    assert theory.meta_smoothness("one_step", **arguments) == close(4 * 2 + 2 * 3 * 0.0625 * 5)
    assert theory.meta_smoothness("resampling", **arguments, b=7) == close(
        a**2 * 2 + 1.5 * a * (a - 1) * 5
    )
    assert theory.meta_smoothness("finite_sum", **arguments, b=7) == close(
        a**2 * 2 + 1.5 * a * (a - 1) * 5 + 1.5 * (a - 1) ** 2 * 7
    )
    assert theory.meta_stepsize(8.0, scale=0.5) == 0.0625
    scales = [
        theory.paper_scale("one_step", curvature)
        for curvature in ("exact", "none", "finite_difference")
    ]
    assert scales == [1 / 12, 1 / 18, 1 / 25]
    assert (theory.paper_scale("resampling"), theory.paper_scale("finite_sum", "none")) == (
        1 / 100,
        1 / 80,
    )


@pytest.mark.parametrize(
    ("steps", "largest"), [(1, 0.4142), (2, 0.1892), (5, 0.0718), (10, 0.0353)]
)
def test_largest_and_recommended_inner_lr(steps: int, largest: float) -> None:
    assert theory.largest_inner_lr(2.0, steps) * 2 == pytest.approx(largest, abs=5e-5)
    at_the_edge = theory.smoothness_constants(2.0, 1.0, theory.largest_inner_lr(2.0, steps), steps)
    assert at_the_edge.growth == close(2)
    assert theory.recommended_inner_lr(2.0, steps) == close(1 / (16 * steps))
    assert [
        theory.largest_one_step_inner_lr(2.0, curvature) for curvature in ("exact", "none")
    ] == [close(1 / 12), close(1 / 20)]


def test_stepsize_hessian_and_resampling_batches() -> None:
    one_step = theory.stepsize_batches("one_step", 1.0, 100.0, 0.1, 1, sigma=2.0, sample_sigma=3.0)
    assert one_step == (200, 3600)
    for rule, tasks, samples in (("resampling", 0.0237, 1.135), ("finite_sum", 0.0355, 0.0)):
        batches = theory.stepsize_batches(
            rule, 1.0, 1e3, theory.recommended_inner_lr(1.0, 10**5), 10**5, 1.0, 1.0
        )
        assert batches.tasks == pytest.approx(tasks * 1e6, rel=5e-3)
        assert batches.samples == pytest.approx(samples * 1e6, rel=5e-3)
    assert theory.stepsize_batches("one_step", 1.0, 0.0, 0.1, 1, sigma=2.0, sample_sigma=3.0) == (
        1,
        1,
    )
    assert theory.hessian_batch(0.1, 39.0) == 31
    assert theory.resampling_batches(2.0, 8.0, 3.0, 9.0) == (540, 21)


def test_probe_radius_and_hessian_free_error() -> None:
    assert theory.printed_probe_radius(2.0, 0.1) == close(1 / 1.2)
    assert theory.hessian_free_error(
        1.0, 2.0, 0.1, 3, radius=0.01, query_gradient_norm=4.0
    ) == close(3 * 1.1**2 * 0.1 * 2 * 0.005 * 4)
    radius = theory.probe_radius(1e-3, 1.0, 2.0, 0.1, 3, 4.0)
    assert theory.hessian_free_error(1.0, 2.0, 0.1, 3, radius, 4.0) == close(5e-4)
    assert theory.probe_radius(1e3, 1.0, 2.0, 0.1, 3, 4.0) == theory.printed_probe_radius(2.0, 0.1)
    assert theory.probe_radius(1e-3, 1.0, 0.0, 0.1, 3, 4.0) == math.inf, (
        "no curvature of curvature, no error"
    )


def test_first_order_floor_bias_adaptation_gap_and_path_error() -> None:
    for steps in (1, 5):  # to first order c = N alpha L
        assert theory.first_order_floor(2.0, 1e-7, steps, sigma=3.0) == pytest.approx(
            steps * 1e-7 * 2 * 3, rel=1e-5
        )
    assert theory.first_order_floor(1.0, 0.4, 1, 1.0) == math.inf
    assert theory.first_order_floor(1.0, 0.5, 1, 1.0) == math.inf
    assert theory.one_step_bias(2.0, 0.1, 3.0, 9) == close(0.2)
    assert theory.adaptation_gap(2.0, 0.1, 3.0, 5.0, 9) == close(0.4 + 0.01 * 2 * 15 / 9)
    mean, square = theory.path_error(2.0, 0.1, 1, 3.0, 9)
    assert mean == close(0.1), "one step strays by alpha sigma / sqrt(S)"
    assert mean**2 <= square <= 2.1 * mean**2


def test_resampling_constants_are_the_figures_of_corollary_6() -> None:
    """alpha = 1/(8 N L), C_beta = 100, in units L = rho = sigma_g = 1; N from 1 to infinity."""
    for steps in (1, 2, 5, 10, 1000):
        alpha = theory.recommended_inner_lr(1.0, steps)
        moments = theory.moment_constants(
            1.0, 1.0, alpha, steps, sample_sigma=1.0, hessian_sigma=1.0, hessian=1
        )
        assert 0.14 < moments.err1 < 5 / 16
        assert 0 <= moments.err2 < 0.032
        assert 18 < moments.squ3 < 19.3
        batches = {"tasks": 20, "support": 15, "hessian": 1, "query": 1}
        convergence = theory.resampling_convergence(
            1.0, 1.0, alpha, steps, sigma=1.0, sample_sigma=1.0, hessian_sigma=1.0, **batches
        )
        assert 0.014 < convergence.theta < 0.018
        one_task = theory.resampling_convergence(
            1.0,
            1.0,
            alpha,
            steps,
            sigma=1.0,
            sample_sigma=1.0,
            hessian_sigma=1.0,
            **(batches | {"tasks": 1}),
        )
        assert one_task.theta < 0
        assert theory.resampling_bound(one_task, 1.0, 10, 1, 15) == math.inf


def test_finite_sum_constants_are_the_figures_of_corollary_10() -> None:
    for steps in (1, 2, 5, 10, 1000):
        alpha = theory.recommended_inner_lr(1.0, steps)
        convergence = theory.finite_sum_convergence(
            1.0, 1.0, alpha, steps, sigma=0.0, b=0.0, mean_square_b=0.0, tasks=1
        )
        assert 0.043 < convergence.theta < 0.055
        assert convergence.phi == 0
        with_spread = theory.finite_sum_convergence(
            1.0, 1.0, alpha, steps, sigma=1.0, b=1.0, mean_square_b=1.0, tasks=1
        )
        assert with_spread.phi * 80**2 < 8 * 2**2 + 4 * (1 + 1), "A_2 of Corollary 10"


SPREAD = {"sigma": 2.0, "gap": 3.0}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_the_sizes_of_the_corollaries_reach_their_accuracy(steps: int, epsilon: float) -> None:
    L, rho = 2.0, 3.0
    alpha = theory.recommended_inner_lr(L, steps)
    within = {"sample_sigma": 1.5, "hessian_sigma": 4.0}
    sizes = theory.resampling_sizes(epsilon, L, rho, steps, **within, **SPREAD)
    batches = {
        "tasks": sizes.tasks,
        "support": sizes.support,
        "hessian": sizes.hessian,
        "query": sizes.query,
    }
    convergence = theory.resampling_convergence(
        L, rho, alpha, steps, sigma=2.0, **within, **batches
    )
    bound = theory.resampling_bound(convergence, 3.0, sizes.iterations, sizes.tasks, sizes.support)
    assert epsilon / 3 < bound <= epsilon
    between = {"b": 1.0, "mean_square_b": 1.5}
    finite = theory.finite_sum_sizes(epsilon, L, rho, steps, **between, **SPREAD)
    convergence = theory.finite_sum_convergence(
        L, rho, alpha, steps, sigma=2.0, **between, tasks=finite.tasks
    )
    assert (
        epsilon / 3
        < theory.finite_sum_bound(convergence, 3.0, finite.iterations, finite.tasks)
        <= epsilon
    )


def test_sizes_grow_with_the_inverse_square_of_the_accuracy() -> None:
    coarse, fine = (
        theory.resampling_sizes(e, 1.0, 1.0, 5, sample_sigma=1.0, hessian_sigma=3.0, **SPREAD)
        for e in (1e-2, 1e-3)
    )
    for name in ("iterations", "tasks", "support", "query"):
        assert getattr(fine, name) / getattr(coarse, name) == pytest.approx(100, rel=0.02)
    assert fine.hessian == coarse.hessian == 9
    coarse, fine = (
        theory.finite_sum_sizes(e, 1.0, 1.0, 5, b=1.0, mean_square_b=1.0, **SPREAD)
        for e in (1e-2, 1e-3)
    )
    assert fine.iterations / coarse.iterations == pytest.approx(100, rel=0.02)


def test_bounds_solve_the_equation_of_their_theorem() -> None:
    convergence = theory.Convergence(theta=0.3, phi=2.0, xi=5.0, chi=7.0)
    x = theory.resampling_bound(convergence, gap=4.0, iterations=10, tasks=8, support=20)
    assert 0.3 * x**2 == close((4 / 10 + 5 / 20 + 2 / 8) * (7 + x))
    x = theory.finite_sum_bound(convergence, gap=4.0, iterations=10, tasks=8)
    assert 0.3 * x**2 == close((4 / 10 + 2 / 8) * (5 + x))


def scaled(loss: float, parameter: float) -> dict[str, float]:
    """The same problem with the loss and the parameters in other units."""
    gradient, hessian = loss / parameter, loss / parameter**2
    return {
        "L": 2 * hessian,
        "rho": 3 * hessian / parameter,
        "alpha": 0.02 / hessian,
        "gradient": gradient,
        "hessian": hessian,
    }


def convergence_of(units: dict[str, float], rule: Rule) -> tuple[float, ...]:
    """Bound and L-hat; sizes and batches; in units of their own."""
    g, h = units["gradient"], units["hessian"]
    constants = [units[name] for name in ("L", "rho", "alpha")]
    gap = g * g / h
    spread = (
        {"sigma": 5 * g, "b": 6 * g, "mean_square_b": 40 * g * g}
        if rule == "finite_sum"
        else {"sigma": 5 * g}
    )
    within = {} if rule == "finite_sum" else {"sample_sigma": 7 * g, "hessian_sigma": 8 * h}
    if rule == "finite_sum":
        convergence = theory.finite_sum_convergence(*constants, 3, **spread, tasks=20)
        bound = theory.finite_sum_bound(convergence, 3 * gap, 10**4, 20)
        sizes = theory.finite_sum_sizes(0.3 * g, *constants[:2], 3, **spread, gap=3 * gap)
    else:
        batches = {"tasks": 20, "support": 10**4, "hessian": 4, "query": 30}
        convergence = theory.resampling_convergence(*constants, 3, **spread, **within, **batches)
        bound = theory.resampling_bound(convergence, 3 * gap, 10**4, 20, 10**4)
        sizes = theory.resampling_sizes(0.3 * g, *constants[:2], 3, **spread, **within, gap=3 * gap)
    smoothness = theory.meta_smoothness(rule, *constants, 3, gradient_norm=9 * g, b=6 * g)
    batches = theory.stepsize_batches(
        rule, *constants, 3, sigma=50 * g, sample_sigma=70 * g, b=6 * g
    )
    return bound / g, smoothness / h, *sizes, *batches, theory.hessian_batch(constants[2], 80 * h)


@pytest.mark.parametrize("rule", ["resampling", "finite_sum"])
def test_no_result_depends_on_the_units(rule: Rule) -> None:
    """What the printed conditions with wrong dimensions would fail."""
    assert convergence_of(scaled(loss=100.0, parameter=0.01), rule) == pytest.approx(
        convergence_of(scaled(1.0, 1.0), rule), rel=1e-3
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: theory.smoothness_constants(-1.0, 1.0, 0.1, 1),
            "`L` to be a finite number of at least 0 but got -1.0",
        ),
        (
            lambda: theory.stepsize_batches("finite_sum", 0.0, 1.0, 0.1, 1, 1.0),
            "`L` to be a finite number above 0 but got 0.0",
        ),
        (
            lambda: theory.smoothness_constants(1.0, 1.0, -0.1, 1),
            "`alpha` to be a finite number of at least 0 but got -0.1",
        ),
        (
            lambda: theory.meta_smoothness("one_step", 1, 1, 0.1, 2, 1.0),
            "one inner step with rule 'one_step' but got 2",
        ),
        (
            lambda: theory.meta_smoothness("two_step", 1, 1, 0.1, 2, 1.0),
            "`rule` to be .* but got 'two_step'",
        ),
        (
            lambda: theory.finite_sum_convergence(
                1, 1, 0.5, 1, sigma=1, b=1, mean_square_b=1, tasks=9
            ),
            r"alpha < \(2\^\(1/2N\) - 1\) / L = 0.414 but got 0.5",
        ),
        (
            lambda: theory.finite_sum_convergence(
                1, 0, 0.1, 1, sigma=1, b=1, mean_square_b=1, tasks=9
            ),
            "rho, alpha and N to be positive",
        ),
        (
            lambda: theory.finite_sum_convergence(
                1, 1, 0.1, 1, sigma=1, b=1, mean_square_b=1, tasks=0
            ),
            "`tasks` to be a finite number above 0",
        ),
        (
            lambda: theory.finite_sum_sizes(-1, 1, 1, 1, sigma=1, b=1, mean_square_b=1, gap=1),
            "`epsilon` to be a finite number above 0",
        ),
        (lambda: theory.paper_scale("two_step"), "`rule` to be .* but got 'two_step'"),
        (
            lambda: theory.stepsize_batches("one_step", 1, 1, 0.1, 5, 1.0),
            "one inner step with rule 'one_step' but got 5",
        ),
        (lambda: theory.recommended_inner_lr(1.0, 1.5), "`steps` to be a whole number but got 1.5"),
        (
            lambda: theory.smoothness_constants(100.0, 1.0, 1.0, 200),
            r"\(1 \+ alpha L\)\^\(2N\) to be a number",
        ),
        (lambda: theory.one_step_bias(1.0, 0.1, 1.0, 0), "`support` to be a finite number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(
    call: Callable[[], SmoothnessConstants], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()
