"""The bounds of Ji, Theorems 5 and 9, and the moments of the meta-gradient that they rest on.

The letters are those of :mod:`lightning_maml.theory`.
"""

import math
import sys
from typing import NamedTuple

from lightning_maml.errors import UserValueError
from lightning_maml.theory.arguments import check, check_number, of_plain_numbers
from lightning_maml.theory.stepsizes import (
    excess_growth,
    excess_growth_per_L,
    largest_inner_lr,
    smoothness_constants,
)


class MomentConstants(NamedTuple):
    """Bias and second moment of the sampled meta-gradient G in the resampling case.

    Source: Ji, Propositions 3 and 4.
    ``|E G - grad F| <= err1 / sqrt(S) + err2 / sqrt(S) (|grad F| + sigma)`` and
    ``E|G|^2 <= squ1 / T + squ2 / S + squ3 (|grad F|^2 + sigma^2)``.

    Examples:
        >>> from lightning_maml.theory import moment_constants
        >>> constants = moment_constants(1.0, 1.0, 0.0, 1, 2.0, 1.0, hessian=4)
        >>> constants.err1, constants.squ1  # without adaptation, G is a plain stochastic gradient
        (0.0, 12.0)
    """

    err1: float
    err2: float
    squ1: float
    squ2: float
    squ3: float


@of_plain_numbers
def moment_constants(
    L: float,
    rho: float,
    alpha: float,
    steps: int,
    sample_sigma: float,
    hessian_sigma: float,
    hessian: int,
) -> MomentConstants:
    """Return the constants of Ji, Propositions 3 and 4 (eqs. 15-18).

    The first two are as their proof (eqs. 29-32) gives them: ``a^N (a^N - 1) sigma_g`` and
    ``a^(2N-1) (a^(N-1) - 1)^2 rho sigma_g / ((2 - a^(2N)) L^2)``. The printed eq. 15 is larger and
    contradicts the figures of Corollary 6.

    Args:
        L: Smoothness of the task losses; may be 0, where the limits are taken.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate, below :func:`largest_inner_lr`.
        steps: N.
        sample_sigma: Standard deviation of single samples' gradients.
        hessian_sigma: Standard deviation of single samples' Hessians.
        hessian: D, samples per Hessian batch.

    Raises:
        ValueError: If an argument is out of range, or alpha is not below :func:`largest_inner_lr`.

    Examples:
        >>> from lightning_maml.theory import moment_constants
        >>> round(moment_constants(1.0, 1.0, 0.1, 1, 1.0, 1.0, hessian=4).err1, 4)
        0.11
    """
    check(rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, hessian=hessian)
    a, gap = _gap(L, alpha, steps)
    x = alpha * L
    factors = 1 + excess_growth(alpha**2 * hessian_sigma**2 / hessian + a**2 - 1, steps)
    squ1 = 3 * factors * sample_sigma**2
    squ3 = 6 * factors * a ** (2 * steps) / gap**2
    # the formula has the exponent N - 1, which would make something of no steps at all
    err2 = 0.0
    if steps:
        grown_per_L = excess_growth_per_L(L, alpha, steps - 1)
        err2 = a ** (2 * steps - 1) * grown_per_L**2 * rho * sample_sigma / gap
    return MomentConstants(
        err1=a**steps * excess_growth(x, steps) * sample_sigma,
        err2=err2,
        squ1=squ1,
        squ2=squ1 * excess_growth(2 * x * (1 + x), steps) * x / (1 + x),
        squ3=squ3,
    )


class Convergence(NamedTuple):
    """The constants of Ji, Theorem 5 (resampling), or Theorem 9 (finite-sum).

    Either theorem bounds ``E|grad F(w_zeta)|`` at a random iterate by the root of
    ``theta x^2 = D (offset + x)``, with ``D = Delta / K + xi / S + phi / B`` in Theorem 5 and
    ``Delta / K + phi / B`` in Theorem 9.

    Attributes:
        theta: Positive where the theorem holds.
        phi: Weight of ``1 / B``.
        xi: In Theorem 5 the weight of ``1 / S``, in Theorem 9 the offset.
        chi: In Theorem 5 the offset; Theorem 9 has none.

    Examples:
        >>> from lightning_maml.theory import Convergence
        >>> Convergence(theta=0.5, phi=1.0, xi=2.0)
        Convergence(theta=0.5, phi=1.0, xi=2.0, chi=None)
    """

    theta: float
    phi: float
    xi: float
    chi: float | None = None


@of_plain_numbers
def resampling_convergence(
    L: float,
    rho: float,
    alpha: float,
    steps: int,
    *,
    sigma: float,
    sample_sigma: float,
    hessian_sigma: float,
    tasks: int,
    support: int,
    hessian: int,
    query: int,
    c_beta: float = 100.0,
) -> Convergence:
    """Return theta, phi, xi and chi of Ji, Theorem 5 (eqs. 19, 20, 37-44).

    The bias has the weight 1/2 where eq. 37 has 1/5: eq. 37 bounds E beta from below in a term that
    needs a bound from above. (xi grows 2.4 times, theta hardly changes, and no order does.)

    Args:
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians, positive.
        alpha: Inner learning rate, positive and below :func:`largest_inner_lr`.
        steps: N, positive.
        sigma: Standard deviation of the task gradients over tasks.
        sample_sigma: Standard deviation of single samples' gradients.
        hessian_sigma: Standard deviation of single samples' Hessians.
        tasks: B, tasks per meta-batch.
        support: S, samples per inner step.
        hessian: D, samples per Hessian batch.
        query: T, samples in the query batch.
        c_beta: C_beta, which is 1 / scale.

    Raises:
        ValueError: If an argument is out of range, alpha is not below :func:`largest_inner_lr`, or
            rho, alpha or N is 0.

    Examples:
        >>> from lightning_maml.theory import resampling_convergence
        >>> sigmas = dict(sigma=1.0, sample_sigma=1.0, hessian_sigma=1.0)
        >>> sizes = dict(tasks=20, support=15, hessian=1, query=15)
        >>> resampling_convergence(1.0, 1.0, 0.125, 1, **sigmas, **sizes).theta > 0
        True
    """
    check(L=L, sigma=sigma, tasks=tasks, support=support, query=query, c_beta=c_beta)
    a, gap = _gap(L, alpha, steps)
    err1, err2, squ1, squ2, squ3 = moment_constants(
        L, rho, alpha, steps, sample_sigma, hessian_sigma, hessian
    )
    c_l = smoothness_constants(L, rho, alpha, steps).c_l
    _check_curved(c_l)
    bias = 1 / 2 + 2 / c_beta
    descent = 1 / 5 - 3 * bias * err2**2 / support - squ3 / (c_beta * tasks) - 2 / c_beta
    return Convergence(
        theta=2 * gap / (c_beta * c_l) * descent,
        phi=2 / (c_beta**2 * L) * (squ1 / query + squ2 / support + squ3 * sigma**2),
        xi=6 / (c_beta * L) * bias * (err1**2 + err2**2 * sigma**2),
        chi=gap * a ** (2 * steps) * L / c_l + sigma,
    )


@of_plain_numbers
def resampling_bound(
    convergence: Convergence, gap: float, iterations: int, tasks: int, support: int
) -> float:
    """Return the bound of Ji, Theorem 5, on ``E|grad F(w_zeta)|`` [loss / parameter].

    Args:
        convergence: The constants, from :func:`resampling_convergence`.
        gap: ``Delta = F(w_0) - inf F`` [loss].
        iterations: K, meta-iterations.
        tasks: B, tasks per meta-batch.
        support: S, samples per inner step.

    Returns:
        The bound; infinite where theta is not positive.

    Raises:
        ValueError: If the constants are those of Theorem 9.

    Examples:
        >>> from lightning_maml.theory import Convergence, resampling_bound
        >>> constants = Convergence(theta=1.0, phi=1.0, xi=1.0, chi=0.0)
        >>> resampling_bound(constants, gap=1.0, iterations=2, tasks=4, support=4)
        1.0
    """
    check(gap=gap, iterations=iterations, tasks=tasks, support=support)
    theta, phi, xi, _ = convergence
    return _root(theta, offset_of(convergence), gap / iterations + xi / support + phi / tasks)


def offset_of(convergence: Convergence) -> float:
    """Return chi, the offset of Theorem 5.

    Raises:
        ValueError: If the constants are those of Theorem 9.
    """
    if convergence.chi is None:
        raise UserValueError(
            "Expected the constants of Theorem 5, from `resampling_convergence`, but got those of "
            "Theorem 9; use `finite_sum_bound`."
        )
    return convergence.chi


class FiniteSumMoments(NamedTuple):
    """Second moment of the meta-gradient of a sampled task in the finite-sum case.

    Source: Ji, Proposition 8. ``E|G|^2 <= squ1 |grad F|^2 + squ2``.

    Attributes:
        squ1: A_1, without a unit.
        squ2: A_2 [loss^2 / parameter^2].

    Examples:
        >>> from lightning_maml.theory import FiniteSumMoments
        >>> FiniteSumMoments(squ1=4.0, squ2=1.0).squ1
        4.0
    """

    squ1: float
    squ2: float


@of_plain_numbers
def finite_sum_moments(
    L: float, alpha: float, steps: int, *, sigma: float, b: float, mean_square_b: float
) -> FiniteSumMoments:
    """Return the constants of Ji, Proposition 8.

    ``A_2`` is that of the proof, which Corollary 10 uses, not the larger eq. 23 (whose ``(1 +
    alpha)^(4N)`` lacks an L).

    Args:
        L: Smoothness of the task losses.
        alpha: Inner learning rate, below :func:`largest_inner_lr`.
        steps: N.
        sigma: Standard deviation of the query gradients over tasks.
        b: Mean of ``|grad l_S - grad l_T|`` over tasks.
        mean_square_b: Mean of its square (b-tilde).

    Raises:
        ValueError: If an argument is out of range, or alpha is not below :func:`largest_inner_lr`.

    Examples:
        >>> from lightning_maml.theory import finite_sum_moments
        >>> spread = dict(sigma=2.0, b=0.0, mean_square_b=0.0)
        >>> finite_sum_moments(1.0, 0.0, 1, **spread)  # without adaptation
        FiniteSumMoments(squ1=4.0, squ2=8.0)
    """
    check(sigma=sigma, b=b, mean_square_b=mean_square_b)
    a, gap = _gap(L, alpha, steps)
    growth = a ** (2 * steps)
    squ1 = 4 * growth**2 / gap**2
    over_tasks = squ1 * excess_growth(alpha * L, 2 * steps) ** 2 * (sigma + b) ** 2
    return FiniteSumMoments(squ1, over_tasks + 2 * growth**2 * (sigma**2 + mean_square_b))


@of_plain_numbers
def finite_sum_convergence(
    L: float,
    rho: float,
    alpha: float,
    steps: int,
    *,
    sigma: float,
    b: float,
    mean_square_b: float,
    tasks: int,
    c_beta: float = 80.0,
) -> Convergence:
    """Return theta, phi and xi of Ji, Theorem 9 (eqs. 24, 25, 57-62), for B tasks.

    A_1 and A_2 are those of :func:`finite_sum_moments`; xi has the sigma that the printed theorem
    leaves out.

    Args:
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians, positive.
        alpha: Inner learning rate, positive and below :func:`largest_inner_lr`.
        steps: N, positive.
        sigma: Standard deviation of the query gradients over tasks.
        b: Mean of ``|grad l_S - grad l_T|`` over tasks.
        mean_square_b: Mean of its square (b-tilde).
        tasks: B, tasks per meta-batch.
        c_beta: C_beta, which is 1 / scale.

    Raises:
        ValueError: If an argument is out of range, alpha is not below :func:`largest_inner_lr`, or
            rho, alpha or N is 0.

    Examples:
        >>> from lightning_maml.theory import finite_sum_convergence
        >>> spread = dict(sigma=1.0, b=0.5, mean_square_b=0.25)
        >>> finite_sum_convergence(1.0, 1.0, 0.125, 1, **spread, tasks=20).theta > 0
        True
    """
    check(L=L, tasks=tasks, c_beta=c_beta)
    a_1, a_2 = finite_sum_moments(L, alpha, steps, sigma=sigma, b=b, mean_square_b=mean_square_b)
    a, gap = _gap(L, alpha, steps)
    growth, c_l, c_b = smoothness_constants(L, rho, alpha, steps)
    _check_curved(c_l)
    path_growth = a**steps * excess_growth(alpha * L, steps)
    return Convergence(
        theta=gap / c_l * (1 / c_beta - (a_1 / tasks + 1) / c_beta**2),
        phi=a_2 / (L * c_beta**2),
        xi=gap / c_l * (growth * L + c_b * b) + sigma + path_growth * b,
    )


@of_plain_numbers
def finite_sum_bound(convergence: Convergence, gap: float, iterations: int, tasks: int) -> float:
    """Return the bound of Ji, Theorem 9, on ``E|grad F(w_zeta)|`` [loss / parameter].

    Args:
        convergence: The constants, from :func:`finite_sum_convergence`.
        gap: ``Delta = F(w_0) - inf F`` [loss].
        iterations: K, meta-iterations.
        tasks: B, tasks per meta-batch.

    Returns:
        The bound; infinite where theta is not positive.

    Examples:
        >>> from lightning_maml.theory import Convergence, finite_sum_bound
        >>> finite_sum_bound(Convergence(1.0, phi=2.0, xi=0.0), gap=1.0, iterations=2, tasks=4)
        1.0
    """
    check(gap=gap, iterations=iterations, tasks=tasks)
    return _root(convergence.theta, convergence.xi, gap / iterations + convergence.phi / tasks)


def _root(theta: float, offset: float, d: float) -> float:
    """Return the positive root of ``theta x^2 = d (offset + x)``.

    Infinite where theta is not positive, that is, where the theorem does not hold.
    """
    if theta <= 0:
        return math.inf
    return d / (2 * theta) + math.sqrt(offset * d / theta + (d / (2 * theta)) ** 2)


def _gap(L: float, alpha: float, steps: int) -> tuple[float, float]:
    """Return ``a`` and ``2 - a^(2N)``, positive where the theorems hold."""
    check(alpha=alpha, steps=steps)
    check_number("L", L, may_be_zero=True)
    largest = largest_inner_lr(L, steps)
    if alpha >= largest:
        raise UserValueError(
            f"Expected alpha < (2^(1/2N) - 1) / L = {largest:.3g} but got {alpha:.3g}; lower alpha."
        )
    # just below that limit, rounding may make it 0
    gap = max(1 - excess_growth(alpha * L, 2 * steps), sys.float_info.epsilon)
    return 1 + alpha * L, gap


def _check_curved(c_l: float) -> None:
    if c_l == 0:
        raise UserValueError(
            "Expected rho, alpha and N to be positive but one of them is 0: "
            "then C_L = 0, the meta-objective is smooth, and needs no such bound."
        )
