"""The constants of the theorems, term by term, in fractions.

They are as the papers print them or, where they err, as their proofs do.

The sizes are such that every term matters.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from lightning_maml import theory

L, RHO, ALPHA, N = Fraction(2), Fraction(3), Fraction(1, 20), 3
SIGMA, SIGMA_G, SIGMA_H, B_MEAN, B_SQUARE = (
    Fraction(3, 2),
    Fraction(5, 4),
    Fraction(7),
    Fraction(4, 5),
    Fraction(9, 10),
)
TASKS, S, T, D, C_BETA = 3, 2, 5, 4, Fraction(7)
A = 1 + ALPHA * L
GAP = 2 - A**6
# Ji, eqs. 27 and 28, summed
C_L = sum(A ** (N - 1 - m) * A ** (2 * m) for m in range(N)) * ALPHA * RHO * A**N
C_B = C_L / A**N * (A**N - 1)


def close(expected: Fraction | float) -> Any:
    return pytest.approx(float(expected), rel=1e-12)


def floats(*numbers: Fraction) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def strayed(steps: int) -> tuple[Fraction, Fraction]:
    """Ji, proof of Proposition 2, for one sample: each step multiplies the error and adds to it."""
    mean = square = Fraction(0)
    for _ in range(steps):
        mean = A * mean + ALPHA * SIGMA_G
        square = (1 + 2 * ALPHA * L + 2 * (ALPHA * L) ** 2) * square + 2 * ALPHA**2 * SIGMA_G**2
    return mean, square


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_path_error_is_the_recursion_of_proposition_2(steps: int) -> None:
    mean, square = strayed(steps)
    found = theory.path_error(*floats(L, ALPHA), steps, float(SIGMA_G), S)
    assert found == (close(float(mean) / math.sqrt(S)), close(square / S))


@pytest.mark.parametrize("steps", [0, 1, 2, N])
def test_moment_constants_are_those_of_the_proofs(steps: int) -> None:
    gap = 2 - A ** (2 * steps)
    found = theory.moment_constants(*floats(L, RHO, ALPHA), steps, *floats(SIGMA_G, SIGMA_H), D)
    squ1 = 3 * SIGMA_G**2
    for _ in range(steps):
        squ1 *= A**2 + ALPHA**2 * SIGMA_H**2 / D
    assert found.err1 == close(A**steps * L * strayed(steps)[0])
    # a product of no factors has no bias
    curved = A ** (2 * steps - 1) * (A ** (steps - 1) - 1) ** 2 if steps else 0
    assert found.err2 == close(RHO * SIGMA_G / L**2 * curved / gap)
    assert found.squ1 == close(squ1)
    assert found.squ2 == close(squ1 * L**2 * strayed(steps)[1] / SIGMA_G**2)
    assert found.squ3 == close(2 * squ1 / SIGMA_G**2 * (A**steps / gap) ** 2)


def resampling(**changes: Any) -> theory.Convergence:
    arguments = {
        "sigma": float(SIGMA),
        "sample_sigma": float(SIGMA_G),
        "hessian_sigma": float(SIGMA_H),
        "tasks": TASKS,
        "support": S,
    }
    arguments |= {"hessian": D, "query": T, "c_beta": float(C_BETA)}
    return theory.resampling_convergence(*floats(L, RHO, ALPHA), N, **(arguments | changes))


def test_resampling_convergence_has_the_constants_of_theorem_5() -> None:
    err1, err2, squ1, squ2, squ3 = map(
        Fraction, theory.moment_constants(*floats(L, RHO, ALPHA), N, *floats(SIGMA_G, SIGMA_H), D)
    )
    found = resampling()
    theta = (
        Fraction(1, 5)
        - (Fraction(3, 2) + 6 / C_BETA) * err2**2 / S
        - squ3 / C_BETA / TASKS
        - 2 / C_BETA
    )
    assert found.theta == close(theta * 2 * GAP / C_BETA / C_L)
    assert found.phi == close(2 / C_BETA**2 / L * (squ1 / T + squ2 / S + SIGMA**2 * squ3))
    assert found.xi == close((3 / C_BETA + 12 / C_BETA**2) / L * (err1**2 + (err2 * SIGMA) ** 2))
    assert found.chi == close(GAP * A**6 * L / C_L + SIGMA)


def finite_sum(**changes: Any) -> theory.Convergence:
    arguments = {
        "sigma": float(SIGMA),
        "b": float(B_MEAN),
        "mean_square_b": float(B_SQUARE),
        "tasks": TASKS,
        "c_beta": float(C_BETA),
    }
    return theory.finite_sum_convergence(*floats(L, RHO, ALPHA), N, **(arguments | changes))


def test_finite_sum_convergence_has_the_constants_of_theorem_9() -> None:
    a_1 = (2 * A**6 / GAP) ** 2
    a_2 = a_1 * ((A**6 - 1) * (SIGMA + B_MEAN)) ** 2 + 2 * A**12 * SIGMA**2 + 2 * A**12 * B_SQUARE
    found = finite_sum()
    assert found.theta == close(GAP / C_L * (C_BETA - 1 - a_1 / TASKS) / C_BETA**2)
    assert found.phi == close(a_2 / L / C_BETA**2)
    assert found.xi == close(
        GAP * A**6 * L / C_L + GAP * C_B * B_MEAN / C_L + SIGMA + (A**6 - A**3) * B_MEAN
    )
    assert found.chi is None
    with pytest.raises(
        ValueError, match=r"Expected the constants of Theorem 5, .* use `finite_sum_bound"
    ):
        theory.resampling_bound(found, gap=1.0, iterations=10, tasks=20, support=5)


def test_sizes_take_equal_parts_of_what_the_bounds_allow() -> None:
    L, rho, steps, epsilon, gap = 2.0, 3.0, 2, 0.3, 5.0
    alpha = 1 / (8 * steps * L)
    noise = {"sigma": 1.5, "sample_sigma": 1.25, "hessian_sigma": 7.0}
    found = theory.resampling_sizes(epsilon, L, rho, steps, gap=gap, **noise)
    least, hessian = theory.resampling_batches(L, rho, 1.25, 7.0)

    def constants(support: int) -> theory.Convergence:
        return theory.resampling_convergence(
            L, rho, alpha, steps, tasks=20, support=support, query=support, hessian=hessian, **noise
        )

    of_least = constants(least)
    third = of_least.theta * epsilon**2 / (of_least.chi + epsilon) / 3
    support = max(least, math.ceil(of_least.xi / third))
    assert found == (
        math.ceil(gap / third),
        math.ceil(constants(support).phi / third),
        support,
        support,
        hessian,
    )
    spread = {"sigma": 15.0, "b": 8.0, "mean_square_b": 90.0}
    of_sum = theory.finite_sum_convergence(L, rho, alpha, steps, tasks=20, **spread)
    half = of_sum.theta * epsilon**2 / (of_sum.xi + epsilon) / 2
    sizes = theory.finite_sum_sizes(epsilon, L, rho, steps, gap=gap, **spread)
    assert sizes.tasks > 20 < found.tasks
    assert sizes == (math.ceil(gap / half), math.ceil(of_sum.phi / half), 0, 0, 0)
    assert theory.resampling_sizes(1e9, L, rho, steps, gap=gap, **noise).tasks == 20
    assert theory.finite_sum_sizes(1e9, L, rho, steps, gap=gap, **spread).tasks == 20


def test_stepsize_batches_are_the_smallest_of_each_rule() -> None:
    spread = {"sigma": 30.0, "sample_sigma": 40.0}
    one_step = theory.stepsize_batches("one_step", 2.0, 300.0, 0.05, 1, **spread)
    assert one_step == (math.ceil((300 * 0.05 * 30 / 2) ** 2 / 2), (300 * 0.05 * 40) ** 2)
    arguments = (*floats(L, 100 * RHO, ALPHA), N)
    spread_of_gradient = 100 * C_L / (L * A**6)  # C_L is linear in rho
    resampling = theory.stepsize_batches("resampling", *arguments, **spread)
    assert resampling == (
        math.floor((30 * spread_of_gradient) ** 2 * 4 / 3) + 1,
        math.floor((8 * 40 * spread_of_gradient) ** 2) + 1,
    )
    finite_sum = theory.stepsize_batches("finite_sum", *arguments, sigma=300.0, b=2.0)
    assert finite_sum == (math.ceil(2 * (300 * 100 * C_L / (100 * C_B * 2 + L * A**6)) ** 2), 0)


def test_inner_rates_are_unbounded_without_inner_steps() -> None:
    assert theory.largest_inner_lr(2.0, 0) == theory.recommended_inner_lr(2.0, 0) == math.inf


def test_first_order_floor_is_infinite_where_c_reaches_one() -> None:
    assert theory.first_order_floor(*floats(L, ALPHA), 2, 3.0) == close(
        3 / ((2 - A**4) / (A**2 * (A**2 - 1)) - 1)
    )
    grown = Fraction(127, 100)  # its square is below 2, its cube is not, and c is below 1
    c = grown * (grown - 1) / (2 - grown**2)
    assert theory.first_order_floor(1.0, 0.27, 1, 3.0) == close(c * 3 / (1 - c))
    assert theory.first_order_floor(1.0, 0.3, 1, 1.0) == math.inf, "c = 1.26"


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_alpha_is_accepted_up_to_largest_inner_lr(steps: int) -> None:
    def constants(alpha: float) -> theory.MomentConstants:
        return theory.moment_constants(2.0, 3.0, alpha, steps, 1.0, 1.0, 1)

    largest = (2 ** (1 / (2 * steps)) - 1) / 2
    constants(0.999 * largest)
    with pytest.raises(ValueError, match=r"^Expected alpha < .*; lower alpha\.$"):
        constants(1.001 * largest)


def test_probe_radius_grows_with_the_accuracy_up_to_the_printed_one() -> None:
    """What is below the accuracy with a radius of 1 allows a larger one, up to the papers'."""
    error = theory.hessian_free_error(2.0, 3.0, 0.01, 2, 1.0, 5.0)
    assert 0 < error < 1
    assert theory.probe_radius(0.1, 2.0, 3.0, 0.01, 2, 5.0) == close(0.1 / (2 * error))
    assert theory.probe_radius(1e9, 2.0, 3.0, 0.01, 2, 5.0) == theory.printed_probe_radius(
        3.0, 0.01
    )


def test_bound_is_infinite_where_theta_is_not_positive() -> None:
    for theta in (0.0, -1.0):
        assert theory.finite_sum_bound(theory.Convergence(theta, 1.0, 1.0), 1.0, 10, 10) == math.inf


@pytest.mark.parametrize(
    "flat",
    [{"L": 1, "rho": 0, "alpha": 0.1, "steps": 1}, {"L": 1, "rho": 1, "alpha": 0.1, "steps": 0}],
)
def test_convergence_refuses_a_smooth_meta_objective(flat: dict[str, float]) -> None:
    message = (
        "Expected rho, alpha and N to be positive but one of them is 0: then C_L = 0, the "
        "meta-objective is smooth, and needs no such bound."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        theory.finite_sum_convergence(**flat, sigma=1, b=1, mean_square_b=1, tasks=9)
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        theory.resampling_convergence(
            **flat, sigma=1, sample_sigma=1, hessian_sigma=1, tasks=9, support=9, hessian=9, query=9
        )


CURVED = {"L": 2.0, "rho": 3.0, "alpha": 0.05, "steps": 2}
NOISE = {"sample_sigma": 1.0, "hessian_sigma": 1.0}
CALLS: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (theory.smoothness_constants, CURVED),
    (theory.meta_stepsize, {"smoothness": 2.0, "scale": 0.1}),
    (partial(theory.meta_smoothness, "finite_sum"), CURVED | {"gradient_norm": 1.0, "b": 1.0}),
    (theory.largest_inner_lr, {"L": 2.0, "steps": 2}),
    (theory.recommended_inner_lr, {"L": 2.0, "steps": 2}),
    (
        partial(theory.stepsize_batches, "resampling"),
        CURVED | {"sigma": 1.0, "sample_sigma": 1.0, "b": 1.0},
    ),
    (theory.hessian_batch, {"alpha": 0.05, "hessian_sigma": 1.0}),
    (theory.printed_probe_radius, {"rho": 3.0, "alpha": 0.05}),
    (theory.resampling_batches, {"L": 2.0, "rho": 3.0} | NOISE),
    (theory.hessian_free_error, CURVED | {"radius": 0.1, "query_gradient_norm": 1.0}),
    (theory.probe_radius, CURVED | {"epsilon": 0.1, "query_gradient_norm": 1.0}),
    (theory.first_order_floor, {"L": 2.0, "alpha": 0.05, "steps": 2, "sigma": 1.0}),
    (theory.one_step_bias, {"L": 2.0, "alpha": 0.05, "sample_sigma": 1.0, "support": 2}),
    (theory.adaptation_gap, {"L": 2.0, "alpha": 0.05, "samples": 2} | NOISE),
    (theory.path_error, {"L": 2.0, "alpha": 0.05, "step": 2, "sample_sigma": 1.0, "support": 2}),
    (theory.moment_constants, CURVED | NOISE | {"hessian": 2}),
    (
        theory.resampling_convergence,
        CURVED
        | NOISE
        | {"sigma": 1.0, "tasks": 2, "support": 2, "hessian": 2, "query": 2, "c_beta": 100.0},
    ),
    (
        theory.finite_sum_convergence,
        CURVED | {"sigma": 1.0, "b": 1.0, "mean_square_b": 1.0, "tasks": 2, "c_beta": 80.0},
    ),
    (
        partial(theory.resampling_bound, theory.Convergence(1.0, 1.0, 1.0, 1.0)),
        {"gap": 1.0, "iterations": 5, "tasks": 2, "support": 2},
    ),
    (
        partial(theory.finite_sum_bound, theory.Convergence(1.0, 1.0, 1.0)),
        {"gap": 1.0, "iterations": 5, "tasks": 2},
    ),
    (
        theory.resampling_sizes,
        {"epsilon": 0.1, "L": 2.0, "rho": 3.0, "steps": 2, "sigma": 1.0, "gap": 1.0} | NOISE,
    ),
    (
        theory.finite_sum_sizes,
        {
            "epsilon": 0.1,
            "L": 2.0,
            "rho": 3.0,
            "steps": 2,
            "sigma": 1.0,
            "b": 1.0,
            "mean_square_b": 1.0,
            "gap": 1.0,
        },
    ),
]


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [(function, arguments, name) for function, arguments in CALLS for name in arguments],
    ids=[
        f"{getattr(function, '__name__', 'bound')}-{name}"
        for function, arguments in CALLS
        for name in arguments
    ],
)
def test_every_argument_is_checked(
    function: Callable[..., object], arguments: dict[str, Any], name: str
) -> None:
    function(**arguments)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^Expected `{name}` to be a finite number"):
            function(**(arguments | {name: bad}))
