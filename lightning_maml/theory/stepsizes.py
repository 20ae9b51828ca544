"""Smoothness, and what follows from it: stepsizes, inner rates, batches for them.

The letters are those of :mod:`lightning_maml.theory`.
"""

import math
from typing import NamedTuple

from lightning_maml.core.hvp import CurvatureName
from lightning_maml.errors import UserValueError
from lightning_maml.theory.arguments import (
    Rule,
    check,
    check_curvature,
    check_number,
    check_rule,
    of_plain_numbers,
)


class SmoothnessConstants(NamedTuple):
    """The parts of the meta-objective's local smoothness.

    That smoothness is ``growth L + c_l E|grad l_i(w)| + c_b b``.

    Attributes:
        growth: ``(1 + alpha L)^(2 N)``, without a unit.
        c_l: C_L [1 / parameter].
        c_b: C_b [1 / parameter].

    Examples:
        >>> from lightning_maml.theory import smoothness_constants
        >>> smoothness_constants(L=1.0, rho=1.0, alpha=1.0, steps=1)
        SmoothnessConstants(growth=4.0, c_l=2.0, c_b=1.0)
    """

    growth: float
    c_l: float
    c_b: float


@of_plain_numbers
def smoothness_constants(L: float, rho: float, alpha: float, steps: int) -> SmoothnessConstants:
    """Return the constants of Ji, Propositions 1 and 7.

    With ``a = 1 + alpha L``: ``C_L = (rho / L) a^(2N-1) (a^N - 1)``, what eq. 13 simplifies to, and
    ``C_b = (rho / L) a^(N-1) (a^N - 1)^2``. They follow from eqs. 49-53 and give the figures of
    Corollary 10, and there are losses for which each is attained. Eq. 21 prints larger ones, see
    :func:`printed_smoothness_constants`. As L goes to 0 they go to ``N alpha rho`` and 0.

    Args:
        L: Smoothness of the task losses; may be 0.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N, the number of inner steps.

    Raises:
        ValueError: If an argument is out of range, or ``(1 + alpha L)^(2 N)`` overflows.

    Examples:
        >>> from lightning_maml.theory import smoothness_constants
        >>> smoothness_constants(L=1.0, rho=1.0, alpha=1.0, steps=2).growth
        16.0
    """
    check(rho=rho, alpha=alpha, steps=steps)
    a, growth = checked_growth(L, alpha, steps)
    grown = excess_growth(alpha * L, steps)
    spread = rho * a ** (steps - 1) * excess_growth_per_L(L, alpha, steps)
    return SmoothnessConstants(growth, c_l=spread * a**steps, c_b=spread * grown)


@of_plain_numbers
def printed_smoothness_constants(
    L: float, rho: float, alpha: float, steps: int
) -> SmoothnessConstants:
    """Return the constants as Ji, eq. 21, prints them, as far as it can be read.

    ``C_L = C_b = (alpha rho + (rho / L) (1 + alpha L)^(N-1)) (1 + alpha L)^(2N)``. They are valid
    bounds too, larger than those of :func:`smoothness_constants` and not attained: at alpha = 1 /
    (8 N L) C_L is 8 to 10 times, and C_b 72 to 91 times as large. Corollary 10 does not follow from
    them.

    Args:
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N.

    Raises:
        ValueError: If an argument is out of range, or ``(1 + alpha L)^(2 N)`` overflows.

    Examples:
        >>> from lightning_maml.theory import printed_smoothness_constants
        >>> printed_smoothness_constants(L=1.0, rho=1.0, alpha=1.0, steps=1)
        SmoothnessConstants(growth=4.0, c_l=8.0, c_b=8.0)
    """
    check(L=L, rho=rho, alpha=alpha, steps=steps)
    a, growth = checked_growth(L, alpha, steps)
    both = (alpha * rho + rho / L * a ** (steps - 1)) * growth
    return SmoothnessConstants(growth, c_l=both, c_b=both)


def checked_growth(L: float, alpha: float, steps: int) -> tuple[float, float]:
    """Return ``a`` and ``a^(2N)``."""
    check_number("L", L, may_be_zero=True)
    a = 1.0 + alpha * L
    try:
        growth = a ** (2 * steps)
    except OverflowError:
        growth = math.inf
    if math.isinf(growth):
        raise UserValueError(
            f"Expected (1 + alpha L)^(2N) to be a number but alpha L = {alpha * L:.3g}, N = "
            f"{steps} is too much; lower alpha."
        )
    return a, growth


def excess_growth(x: float, exponent: int) -> float:
    """Return ``(1 + x)^exponent - 1``, to all digits where x is small; infinite if it overflows."""
    try:
        return math.expm1(exponent * math.log1p(x))
    except OverflowError:
        return math.inf


def excess_growth_per_L(L: float, alpha: float, steps: int) -> float:
    """Return ``((1 + alpha L)^N - 1) / L``, which goes to ``alpha N`` as L goes to 0."""
    return excess_growth(alpha * L, steps) / L if L else alpha * steps


@of_plain_numbers
def meta_smoothness(
    rule: Rule, L: float, rho: float, alpha: float, steps: int, gradient_norm: float, b: float = 0.0
) -> float:
    """Return L-hat, the local smoothness of the meta-objective [loss / parameter^2].

    No constant bounds it: it grows with the task gradients.

    - ``"one_step"``: ``4 L + 2 rho alpha g`` (Fallah, Lemma 4.8 and eq. 16, whose estimate lacks a
      1 / B' in the text before it);
    - ``"resampling"``: ``growth L + C_L g`` (Ji, Proposition 1 and eq. 14);
    - ``"finite_sum"``: ``growth L + C_b b + C_L g`` (Ji, Proposition 7 and eq. 22).

    Args:
        rule: Which of the three.
        L: Smoothness of the task losses; may be 0, where L-hat is ``N alpha rho g``, or ``2 rho
            alpha g`` with ``"one_step"``.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N; 1 with ``"one_step"``.
        gradient_norm: g, the mean over tasks of ``|grad l_i(w)|``; with ``"finite_sum"`` the
            gradient of the query loss.
        b: Mean distance between support and query gradients; only used by ``"finite_sum"``.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning_maml.theory import meta_smoothness
        >>> meta_smoothness("one_step", L=1.0, rho=1.0, alpha=0.5, steps=1, gradient_norm=2.0)
        6.0
    """
    check(gradient_norm=gradient_norm, b=b)
    check_rule(rule, steps)
    constants = smoothness_constants(L, rho, alpha, steps)
    if rule == "one_step":
        return 4 * L + 2 * rho * alpha * gradient_norm
    if rule == "resampling":
        return constants.growth * L + constants.c_l * gradient_norm
    return constants.growth * L + constants.c_b * b + constants.c_l * gradient_norm


@of_plain_numbers
def paper_scale(rule: Rule, curvature: CurvatureName = "exact") -> float:
    """Return the papers' constant in ``beta = scale / L-hat``, a safety factor for the worst case.

    - ``"one_step"``: 1/12 for MAML, 1/18 for FO-MAML, 1/25 for HF-MAML (Fallah, Theorems 4.12, 4.15
      and 4.17);
    - ``"resampling"``: 1/100 (1 / C_beta of Ji, Corollary 6), for exact curvature;
    - ``"finite_sum"``: 1/80 (Ji, Corollary 10), for exact curvature.

    Args:
        rule: Which stepsize rule.
        curvature: Hessian-vector products of the algorithm; changes ``"one_step"`` only.

    Examples:
        >>> from lightning_maml.theory import paper_scale
        >>> paper_scale("resampling")
        0.01
    """
    check_rule(rule)
    check_curvature(curvature)
    if rule == "one_step":
        return {"exact": 1 / 12, "none": 1 / 18, "finite_difference": 1 / 25}[curvature]
    return 1 / 100 if rule == "resampling" else 1 / 80


@of_plain_numbers
def meta_stepsize(smoothness: float, scale: float) -> float:
    """Return ``beta = scale / L-hat`` [parameter^2 / loss] (Fallah, eq. 17; Ji, eqs. 14 and 22).

    Args:
        smoothness: L-hat, see :func:`meta_smoothness`.
        scale: The numerator, see :func:`paper_scale`.

    Raises:
        ValueError: If an argument is out of range, or beta overflows.

    Examples:
        >>> from lightning_maml.theory import meta_stepsize
        >>> meta_stepsize(smoothness=4.0, scale=1.0)
        0.25
    """
    check(smoothness=smoothness, scale=scale)
    beta = scale / smoothness
    if math.isinf(beta):
        raise UserValueError(
            "Expected scale / L-hat to be a number but got "
            f"{scale:.3g} / {smoothness:.3g}; lower scale."
        )
    return beta


@of_plain_numbers
def largest_inner_lr(L: float, steps: int) -> float:
    """Return ``(2^(1/2N) - 1) / L``, the alpha below which Ji, Theorems 5 and 9, hold.

    Below it, ``(1 + alpha L)^(2N) < 2``. Infinite without inner steps, and where L is 0.

    Args:
        L: Smoothness of the task losses.
        steps: N.

    Examples:
        >>> from lightning_maml.theory import largest_inner_lr
        >>> round(largest_inner_lr(L=1.0, steps=1), 4)
        0.4142
    """
    check(steps=steps)
    check_number("L", L, may_be_zero=True)
    return math.expm1(math.log(2) / (2 * steps)) / L if steps and L else math.inf


@of_plain_numbers
def recommended_inner_lr(L: float, steps: int) -> float:
    """Return ``1 / (8 N L)``, the alpha of Ji, Corollaries 6 and 10.

    Without the 1/N, the growth ``(1 + alpha L)^(2N)`` would be exponential in N. Infinite without
    inner steps, and where L is 0.

    Args:
        L: Smoothness of the task losses.
        steps: N.

    Examples:
        >>> from lightning_maml.theory import recommended_inner_lr
        >>> recommended_inner_lr(L=1.0, steps=5)
        0.025
    """
    check(steps=steps)
    check_number("L", L, may_be_zero=True)
    return 1 / (8 * steps * L) if steps and L else math.inf


@of_plain_numbers
def largest_one_step_inner_lr(L: float, curvature: CurvatureName) -> float:
    """Return ``1 / (6 L)``, for FO-MAML ``1 / (10 L)`` (Fallah, Theorems 4.12, 4.15, 4.17).

    Infinite where L is 0.

    Args:
        L: Smoothness of the task losses.
        curvature: ``"none"`` for FO-MAML.

    Examples:
        >>> from lightning_maml.theory import largest_one_step_inner_lr
        >>> largest_one_step_inner_lr(L=1.0, curvature="none")
        0.1
    """
    check_number("L", L, may_be_zero=True)
    check_curvature(curvature)
    if L == 0:
        return math.inf
    return 1 / (10 * L) if curvature == "none" else 1 / (6 * L)


class StepsizeBatches(NamedTuple):
    """How many tasks, and samples of each, make ``1 / L-hat`` a good estimate.

    Neither depends on the accuracy that the run should reach.

    Attributes:
        tasks: ``|B'|``.
        samples: ``D_beta`` or ``|D_L|`` per task; 0 where the whole query set is used (finite-sum).

    Examples:
        >>> from lightning_maml.theory import StepsizeBatches
        >>> StepsizeBatches(tasks=4, samples=0).tasks
        4
    """

    tasks: int
    samples: int


@of_plain_numbers
def stepsize_batches(
    rule: Rule,
    L: float,
    rho: float,
    alpha: float,
    steps: int,
    sigma: float,
    sample_sigma: float = 0.0,
    b: float = 0.0,
) -> StepsizeBatches:
    """Return the smallest batches that may estimate the meta-stepsize.

    They are those of Fallah, eq. 18 (rounded up), of Ji, Theorem 5 (a strict inequality), or of Ji,
    Theorem 9.

    Args:
        rule: Which stepsize rule.
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N; 1 with ``"one_step"``.
        sigma: Standard deviation of the task gradients over tasks.
        sample_sigma: Standard deviation of single samples' gradients; not used by ``"finite_sum"``.
        b: Mean distance between support and query gradients; only used by ``"finite_sum"``.

    Examples:
        >>> from lightning_maml.theory import stepsize_batches
        >>> arguments = dict(L=1.0, rho=1.0, alpha=0.5, steps=1, sigma=4.0, sample_sigma=3.0)
        >>> stepsize_batches("one_step", **arguments)
        StepsizeBatches(tasks=2, samples=9)
    """
    check(L=L, sigma=sigma, sample_sigma=sample_sigma, b=b)
    check_rule(rule, steps)
    growth, c_l, c_b = smoothness_constants(L, rho, alpha, steps)
    if rule == "one_step":
        tasks = 0.5 * (rho * alpha * sigma / L) ** 2
        samples = (2 * rho * alpha * sample_sigma / L) ** 2
        return StepsizeBatches(_at_least(tasks), _at_least(samples))
    if rule == "resampling":
        tasks = 4 * (c_l * sigma) ** 2 / (3 * (growth * L) ** 2)
        samples = 64 * (c_l * sample_sigma) ** 2 / (growth * L) ** 2
        # the smallest whole numbers above, not at, these bounds
        return StepsizeBatches(math.floor(tasks) + 1, math.floor(samples) + 1)
    tasks = 2 * (c_l * sigma) ** 2 / (c_b * b + growth * L) ** 2
    return StepsizeBatches(_at_least(tasks), 0)


@of_plain_numbers
def hessian_batch(alpha: float, hessian_sigma: float) -> int:
    """Return the smallest ``D_h``: ``2 alpha^2 sigma_H^2`` (Fallah, Theorem 4.12).

    It suffices for HF-MAML too, at every probing radius, if both gradients are taken on the same
    batch. The ``36 (alpha rho sigma-tilde)^2`` of Theorem 4.17 has units, so it cannot be meant;
    and FO-MAML (Theorem 4.15) has no such batch.

    Args:
        alpha: Inner learning rate.
        hessian_sigma: Standard deviation of single samples' Hessians.

    Examples:
        >>> from lightning_maml.theory import hessian_batch
        >>> hessian_batch(alpha=0.5, hessian_sigma=4.0)
        8
    """
    check(alpha=alpha, hessian_sigma=hessian_sigma)
    return _at_least(2 * (alpha * hessian_sigma) ** 2)


class ResamplingBatches(NamedTuple):
    """The smallest batches of the resampling case, in samples.

    Attributes:
        support: S, of every inner step.
        hessian: D, of every Hessian batch.

    Examples:
        >>> from lightning_maml.theory import ResamplingBatches
        >>> ResamplingBatches(support=15, hessian=4).hessian
        4
    """

    support: int
    hessian: int


@of_plain_numbers
def resampling_batches(
    L: float, rho: float, sample_sigma: float, hessian_sigma: float
) -> ResamplingBatches:
    """Return ``S >= 15 rho^2 sigma_g^2 / L^4`` and ``D >= sigma_H^2 / L^2`` (Ji, Corollary 6).

    D follows the proof: the statement prints a factor ``L^2`` that the units forbid.

    Args:
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians.
        sample_sigma: Standard deviation of single samples' gradients.
        hessian_sigma: Standard deviation of single samples' Hessians.

    Examples:
        >>> from lightning_maml.theory import resampling_batches
        >>> resampling_batches(L=1.0, rho=1.0, sample_sigma=1.0, hessian_sigma=2.0)
        ResamplingBatches(support=15, hessian=4)
    """
    check(L=L, rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma)
    support = 15 * (rho * sample_sigma) ** 2 / L**4
    hessian = (hessian_sigma / L) ** 2
    return ResamplingBatches(_at_least(support), _at_least(hessian))


def _at_least(number: float) -> int:
    return max(1, math.ceil(number))
