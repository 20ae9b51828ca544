"""The constants, stepsize rules, conditions and bounds of the two papers, as functions of numbers.

Sources: "Fallah" is Fallah, Mokhtari, Ozdaglar, AISTATS 2020; "Ji" is Ji, Yang, Liang, JMLR 23,
2022. Fallah covers one inner step with fresh samples, Ji N steps: with fresh samples for every step
(resampling), and with one support set and one query set per task (finite-sum).

Arguments mean the same everywhere, in units of the loss per power of the parameters' unit:

- ``L``: smoothness of the task losses, the largest spectral norm of a Hessian [loss / parameter^2];
- ``rho``: Lipschitz constant of their Hessians [loss / parameter^3];
- ``alpha``: the inner rate [parameter^2 / loss], so that ``alpha L`` is a number;
- ``steps``: N;
- ``sigma``: standard deviation of the task gradients over tasks [loss / parameter];
- ``sample_sigma``: of the gradients of single samples within a task (Fallah: sigma-tilde, Ji:
  sigma_g) [loss / parameter];
- ``hessian_sigma``: of their Hessians (sigma_H) [loss / parameter^2];
- ``b``: mean over tasks of the distance between the gradients of support and query loss [loss /
  parameter].

Where the papers as printed cannot be right (dimensions, constants that contradict their own
corollaries, steps of a proof that do not hold), the function follows what the proof gives and says
so.
"""

import math
from typing import Literal, NamedTuple

from lightning_maml.core.hvp import CurvatureName

Rule = Literal["one_step", "resampling", "finite_sum"]
"""The meta-stepsize of Fallah eq. 17, of Ji eq. 14 or of Ji eq. 22."""


class SmoothnessConstants(NamedTuple):
    """The parts of the local smoothness of the meta-objective, ``growth L + c_l E|grad l_i(w)| + c_b b``.

    Attributes:
        growth: ``(1 + alpha L)^(2 N)``, a number.
        c_l: C_L [1 / parameter].
        c_b: C_b [1 / parameter].
    """

    growth: float
    c_l: float
    c_b: float


def smoothness_constants(L: float, rho: float, alpha: float, steps: int) -> SmoothnessConstants:
    """Return the constants of Ji, Propositions 1 and 7.

    With ``a = 1 + alpha L``: ``C_L = (rho / L) a^(2N-1) (a^N - 1)``, what eq. 13 simplifies to, and
    ``C_b = (rho / L) a^(N-1) (a^N - 1)^2``. The printed eq. 21 is illegible; these follow from eqs.
    49-53 and give the figures of Corollary 10. All three are attained.
    """
    _check(L=L, rho=rho, alpha=alpha, steps=steps)
    a = 1 + alpha * L
    try:
        growth = a ** (2 * steps)
    except OverflowError:
        raise ValueError(
            f"Expected (1 + alpha L)^(2N) to be a number but alpha L = {alpha * L:.3g}, N = "
            f"{steps} is too much; lower alpha."
        ) from None
    spread = rho / L * a ** (steps - 1) * (a**steps - 1)
    return SmoothnessConstants(growth, spread * a**steps, spread * (a**steps - 1))


def meta_smoothness(
    rule: Rule, L: float, rho: float, alpha: float, steps: int, gradient_norm: float, b: float = 0.0
) -> float:
    """Return L-hat, the local smoothness of the meta-objective [loss / parameter^2]. It has no bound: it grows with the task gradients.

    - ``"one_step"``: ``4 L + 2 rho alpha g`` (Fallah, Lemma 4.8 and eq. 16, whose estimate lacks a
      1 / B' in the text before it);
    - ``"resampling"``: ``growth L + C_L g`` (Ji, Proposition 1 and eq. 14);
    - ``"finite_sum"``: ``growth L + C_b b + C_L g`` (Ji, Proposition 7 and eq. 22).

    Args:
        rule: Which one.
        L: Smoothness.
        rho: Lipschitz constant of the Hessians.
        alpha: Inner rate.
        steps: N; 1 with ``"one_step"``.
        gradient_norm: g, the mean over tasks of ``|grad l_i(w)|``, in the finite-sum case of the
            query loss.
        b: Only used by ``"finite_sum"``.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(gradient_norm=gradient_norm, b=b)
    _check_rule(rule, steps)
    constants = smoothness_constants(L, rho, alpha, steps)
    if rule == "one_step":
        return 4 * L + 2 * rho * alpha * gradient_norm
    if rule == "resampling":
        return constants.growth * L + constants.c_l * gradient_norm
    return constants.growth * L + constants.c_b * b + constants.c_l * gradient_norm


def paper_scale(rule: Rule, curvature: CurvatureName = "exact") -> float:
    """Return the papers' constant in ``beta = scale / L-hat``.

    1/12, 1/18 and 1/25 for MAML, FO-MAML and HF-MAML with ``"one_step"`` (Fallah, Theorems 4.12,
    4.15, 4.17); 1/100 with ``"resampling"`` (C_beta of Ji, Corollary 6) and 1/80 with
    ``"finite_sum"`` (Corollary 10), both for the exact curvature. They are safety factors for the
    worst case.
    """
    _check_rule(rule)
    if rule == "one_step":
        return {"exact": 1 / 12, "none": 1 / 18, "finite_difference": 1 / 25}[curvature]
    return 1 / 100 if rule == "resampling" else 1 / 80


def meta_stepsize(smoothness: float, scale: float) -> float:
    """Return ``beta = scale / L-hat`` [parameter^2 / loss] (Fallah, eq. 17; Ji, eqs. 14 and 22)."""
    _check(smoothness=smoothness, scale=scale)
    return scale / smoothness


def largest_inner_lr(L: float, steps: int) -> float:
    """Return ``(2^(1/2N) - 1) / L``, below which Ji, Theorems 5 and 9, hold: ``(1 + alpha L)^(2N) < 2``."""
    _check(L=L, steps=steps)
    return (2 ** (1 / (2 * steps)) - 1) / L if steps else math.inf


def recommended_inner_lr(L: float, steps: int) -> float:
    """Return ``1 / (8 N L)`` (Ji, Corollaries 6 and 10): without the 1/N the growth ``(1 + alpha L)^(2N)`` explodes."""
    _check(L=L, steps=steps)
    return 1 / (8 * steps * L) if steps else math.inf


def largest_one_step_inner_lr(L: float, curvature: CurvatureName) -> float:
    """Return ``1 / (6 L)``, for FO-MAML ``1 / (10 L)`` (Fallah, Theorems 4.12, 4.15, 4.17)."""
    _check(L=L)
    return 1 / (10 * L) if curvature == "none" else 1 / (6 * L)


class StepsizeBatches(NamedTuple):
    """How many tasks, and samples of each, make ``1 / L-hat`` a good estimate. Neither depends on the accuracy wanted.

    Attributes:
        tasks: ``|B'|``.
        samples: ``D_beta`` or ``|D_L|`` per task; 0 where the whole query set is used (finite-sum).
    """

    tasks: int
    samples: int


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
    """Return the smallest batches of Fallah, eq. 18 (ceilings), Ji, Theorem 5 (strict) and Ji, Theorem 9."""
    _check(sigma=sigma, sample_sigma=sample_sigma, b=b)
    _check_rule(rule, steps)
    growth, c_l, c_b = smoothness_constants(L, rho, alpha, steps)
    if rule == "one_step":
        tasks, samples = (
            0.5 * (rho * alpha * sigma / L) ** 2,
            (2 * rho * alpha * sample_sigma / L) ** 2,
        )
        return StepsizeBatches(_at_least(tasks), _at_least(samples))
    if rule == "resampling":
        tasks, samples = (
            4 * (c_l * sigma) ** 2 / (3 * (growth * L) ** 2),
            64 * (c_l * sample_sigma) ** 2 / (growth * L) ** 2,
        )
        return StepsizeBatches(math.floor(tasks) + 1, math.floor(samples) + 1)
    return StepsizeBatches(_at_least(2 * (c_l * sigma) ** 2 / (c_b * b + growth * L) ** 2), 0)


def hessian_batch(alpha: float, hessian_sigma: float) -> int:
    """Return the smallest ``D_h``: ``2 alpha^2 sigma_H^2`` (Fallah, Theorem 4.12).

    It suffices for HF-MAML too, at every probing radius, if both gradients are taken on the same
    batch. The ``36 (alpha rho sigma-tilde)^2`` of Theorem 4.17 has units, so it cannot be meant;
    and FO-MAML (Theorem 4.15) has no such batch.
    """
    _check(alpha=alpha, hessian_sigma=hessian_sigma)
    return _at_least(2 * (alpha * hessian_sigma) ** 2)


class ResamplingBatches(NamedTuple):
    """The smallest batches of the resampling case, in samples.

    Attributes:
        support: S, of every inner step.
        hessian: D, of every Hessian batch.
    """

    support: int
    hessian: int


def resampling_batches(
    L: float, rho: float, sample_sigma: float, hessian_sigma: float
) -> ResamplingBatches:
    """Return ``S >= 15 rho^2 sigma_g^2 / L^4`` and ``D >= sigma_H^2 / L^2`` (Ji, Corollary 6).

    D is as the proof has it: the statement prints a factor ``L^2`` that its units forbid.
    """
    _check(L=L, rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma)
    return ResamplingBatches(
        _at_least(15 * (rho * sample_sigma) ** 2 / L**4), _at_least((hessian_sigma / L) ** 2)
    )


def printed_probe_radius(rho: float, alpha: float) -> float:
    """Return ``1 / (6 rho alpha)`` [parameter], the probing radius that Fallah, Theorem 4.17, amounts to.

    It does not depend on the accuracy wanted and grows as alpha falls, so HF-MAML stalls where
    FO-MAML does; not to be used alone.
    """
    _check(rho=rho, alpha=alpha)
    return 1 / (6 * rho * alpha) if rho * alpha > 0 else math.inf


def probe_radius(
    epsilon: float, L: float, rho: float, alpha: float, steps: int, query_gradient_norm: float
) -> float:
    """Return a probing radius h for which HF-MAML's error is at most ``epsilon / 2`` [parameter].

    ``min(1 / (6 rho alpha), epsilon / (N a^(N-1) alpha rho |v_N|))``, by
    :func:`hessian_free_error`; not in the papers. Machine precision asks for at least about the
    cube root of its epsilon.
    """
    _check(epsilon=epsilon)
    worst = hessian_free_error(L, rho, alpha, steps, 1.0, query_gradient_norm)
    return min(printed_probe_radius(rho, alpha), epsilon / (2 * worst) if worst > 0 else math.inf)


def hessian_free_error(
    L: float, rho: float, alpha: float, steps: int, radius: float, query_gradient_norm: float
) -> float:
    """Return a bound on HF-MAML's error, ``N a^(N-1) alpha (rho h / 2) |v_N|`` [loss / parameter].

    Fallah, after eq. 9, with the sharp 1/2 that is missing there, carried through N steps.
    """
    _check(
        L=L,
        rho=rho,
        alpha=alpha,
        steps=steps,
        radius=radius,
        query_gradient_norm=query_gradient_norm,
    )
    return steps * (1 + alpha * L) ** (steps - 1) * alpha * rho * radius / 2 * query_gradient_norm


def first_order_floor(L: float, alpha: float, steps: int, sigma: float) -> float:
    """Return a bound on ``|grad F|`` where FO-MAML comes to rest, of the order ``N alpha L sigma`` [loss / parameter].

    ``c sigma / (1 - c)`` with ``c = a^N (a^N - 1) / (2 - a^(2N))``, from Ji, Lemmas 12-15; Fallah,
    Corollary 4.16, gives the order at N = 1 (its abstract and Table 1 leave out L). Infinite where
    c >= 1.
    """
    _check(L=L, alpha=alpha, steps=steps, sigma=sigma)
    grown = (1 + alpha * L) ** steps
    c = grown * (grown - 1) / (2 - grown**2) if grown**2 < 2 else math.inf
    return c * sigma / (1 - c) if c < 1 else math.inf


def one_step_bias(L: float, alpha: float, sample_sigma: float, support: int) -> float:
    """Return ``alpha L sigma-tilde / sqrt(D_in)``, a bound on the bias that sampling the inner step causes (Fallah, Lemma 4.10, eq. 20)."""
    _check(L=L, alpha=alpha, sample_sigma=sample_sigma, support=support)
    return alpha * L * sample_sigma / math.sqrt(support)


def adaptation_gap(
    L: float, alpha: float, sample_sigma: float, hessian_sigma: float, samples: int
) -> float:
    """Return a bound on ``|grad F-hat - grad F|``, if tasks adapt on D_test samples (Fallah, Theorem 4.11, eq. 22)."""
    _check(
        L=L, alpha=alpha, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, samples=samples
    )
    return (
        2 * alpha * L * sample_sigma / math.sqrt(samples)
        + alpha**2 * L * hessian_sigma * sample_sigma / samples
    )


class PathError(NamedTuple):
    """How far the sampled inner path strays from the exact one at step j.

    Attributes:
        mean: Bound on ``E|w_j - w~_j|`` [parameter].
        mean_square: Bound on ``E|w_j - w~_j|^2`` [parameter^2].
    """

    mean: float
    mean_square: float


def path_error(L: float, alpha: float, step: int, sample_sigma: float, support: int) -> PathError:
    """Return the bounds of Ji, Proposition 2, with the ``2 alpha L`` of its proof (the statement prints ``alpha L``)."""
    _check(L=L, alpha=alpha, step=step, sample_sigma=sample_sigma, support=support)
    x = alpha * L
    mean = ((1 + x) ** step - 1) * sample_sigma / (L * math.sqrt(support))
    mean_square = (
        ((1 + 2 * x + 2 * x**2) ** step - 1) * alpha * sample_sigma**2 / ((1 + x) * L * support)
    )
    return PathError(mean, mean_square)


class MomentConstants(NamedTuple):
    """Bias and second moment of the sampled meta-gradient G: Ji, Propositions 3 and 4, resampling case.

    ``|E G - grad F| <= err1 / sqrt(S) + err2 / sqrt(S) (|grad F| + sigma)`` and
    ``E|G|^2 <= squ1 / T + squ2 / S + squ3 (|grad F|^2 + sigma^2)``.
    """

    err1: float
    err2: float
    squ1: float
    squ2: float
    squ3: float


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
    """
    _check(rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, hessian=hessian)
    a, gap = _gap(L, alpha, steps)
    x = alpha * L
    squ1 = 3 * (alpha**2 * hessian_sigma**2 / hessian + a**2) ** steps * sample_sigma**2
    squ3 = 6 * (alpha**2 * hessian_sigma**2 / hessian + a**2) ** steps * a ** (2 * steps) / gap**2
    return MomentConstants(
        err1=a**steps * (a**steps - 1) * sample_sigma,
        err2=a ** (2 * steps - 1) * (a ** (steps - 1) - 1) ** 2 * rho * sample_sigma / (gap * L**2)
        if steps
        else 0.0,
        squ1=squ1,
        squ2=squ1 * ((1 + 2 * x + 2 * x**2) ** steps - 1) * x / (1 + x),
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
        chi: In Theorem 5 the offset; Theorem 9 has none, so nan.
    """

    theta: float
    phi: float
    xi: float
    chi: float = math.nan


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
    """Return theta, phi, xi and chi of Ji, Theorem 5 (eqs. 19, 20, 37-44), for batch sizes B, S, D and T.

    The bias has the weight 1/2 where eq. 37 has 1/5: eq. 37 bounds E beta from below in a term that
    needs a bound from above. (xi grows 2.4 times, theta hardly changes, and no order does.)

    Raises:
        ValueError: If an argument is out of range, alpha is not below :func:`largest_inner_lr`, or
            rho, alpha or N is 0.
    """
    _check(sigma=sigma, tasks=tasks, support=support, query=query, c_beta=c_beta)
    a, gap = _gap(L, alpha, steps)
    err1, err2, squ1, squ2, squ3 = moment_constants(
        L, rho, alpha, steps, sample_sigma, hessian_sigma, hessian
    )
    c_l = smoothness_constants(L, rho, alpha, steps).c_l
    _check_curved(c_l)
    bias = 1 / 2 + 2 / c_beta
    return Convergence(
        theta=2
        * gap
        / (c_beta * c_l)
        * (1 / 5 - 3 * bias * err2**2 / support - squ3 / (c_beta * tasks) - 2 / c_beta),
        phi=2 / (c_beta**2 * L) * (squ1 / query + squ2 / support + squ3 * sigma**2),
        xi=6 / (c_beta * L) * bias * (err1**2 + err2**2 * sigma**2),
        chi=gap * a ** (2 * steps) * L / c_l + sigma,
    )


def resampling_bound(
    convergence: Convergence, gap: float, iterations: int, tasks: int, support: int
) -> float:
    """Return the bound of Ji, Theorem 5, on ``E|grad F(w_zeta)|`` [loss / parameter]; ``gap`` is ``Delta = F(w_0) - inf F`` [loss]."""
    _check(gap=gap, iterations=iterations, tasks=tasks, support=support)
    theta, phi, xi, chi = convergence
    return _root(theta, chi, gap / iterations + xi / support + phi / tasks)


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

    ``A_2`` is that of the proof of Proposition 8, which Corollary 10 uses, not the larger eq. 23
    (whose ``(1 + alpha)^(4N)`` lacks an L); xi has the sigma that the printed theorem leaves out.

    Args:
        L: Smoothness.
        rho: Lipschitz constant of the Hessians, positive.
        alpha: Inner rate, below :func:`largest_inner_lr`.
        steps: N.
        sigma: Standard deviation of the query gradients over tasks.
        b: Mean of ``|grad l_S - grad l_T|`` over tasks.
        mean_square_b: Mean of its square (b-tilde).
        tasks: B.
        c_beta: C_beta, 1 / scale.
    """
    _check(sigma=sigma, b=b, mean_square_b=mean_square_b, tasks=tasks, c_beta=c_beta)
    a, gap = _gap(L, alpha, steps)
    growth, c_l, c_b = smoothness_constants(L, rho, alpha, steps)
    _check_curved(c_l)
    a_1 = 4 * a ** (4 * steps) / gap**2
    a_2 = a_1 * (growth - 1) ** 2 * (sigma + b) ** 2 + 2 * a ** (4 * steps) * (
        sigma**2 + mean_square_b
    )
    return Convergence(
        theta=gap / c_l * (1 / c_beta - (a_1 / tasks + 1) / c_beta**2),
        phi=a_2 / (L * c_beta**2),
        xi=gap / c_l * (growth * L + c_b * b) + sigma + a**steps * (a**steps - 1) * b,
    )


def finite_sum_bound(convergence: Convergence, gap: float, iterations: int, tasks: int) -> float:
    """Return the bound of Ji, Theorem 9, on ``E|grad F(w_zeta)|`` [loss / parameter]; ``gap`` is ``Delta = F(w_0) - inf F`` [loss]."""
    _check(gap=gap, iterations=iterations, tasks=tasks)
    return _root(convergence.theta, convergence.xi, gap / iterations + convergence.phi / tasks)


class Sizes(NamedTuple):
    """The cost of reaching an accuracy.

    Attributes:
        iterations: K.
        tasks: B.
        support: S, samples per inner step; 0 in the finite-sum case, where the support set is
            given.
        query: T, samples of the query batch; 0 likewise.
        hessian: D, samples per Hessian batch; 0 likewise.
    """

    iterations: int
    tasks: int
    support: int = 0
    query: int = 0
    hessian: int = 0


def resampling_sizes(
    epsilon: float,
    L: float,
    rho: float,
    steps: int,
    *,
    sigma: float,
    sample_sigma: float,
    hessian_sigma: float,
    gap: float,
) -> Sizes:
    """Return sizes for which Ji, Theorem 5, guarantees ``E|grad F| <= epsilon`` at alpha = 1 / (8 N L) and C_beta = 100 (Corollary 6).

    Each of K, S and B takes a third of what the bound allows, and T = S. All but D grow as
    ``1 / epsilon^2``.
    """
    _check(epsilon=epsilon, gap=gap)
    alpha, least_tasks = recommended_inner_lr(L, steps), 20
    least_support, hessian = resampling_batches(L, rho, sample_sigma, hessian_sigma)

    def constants(support: int) -> Convergence:
        return resampling_convergence(
            *(L, rho, alpha, steps),
            sigma=sigma,
            sample_sigma=sample_sigma,
            hessian_sigma=hessian_sigma,
            tasks=least_tasks,
            support=support,
            hessian=hessian,
            query=support,
        )

    theta, _, xi, chi = constants(least_support)
    third = theta * epsilon**2 / (3 * (chi + epsilon))
    support = max(least_support, math.ceil(xi / third))
    tasks = max(least_tasks, math.ceil(constants(support).phi / third))
    return Sizes(math.ceil(gap / third), tasks, support, support, hessian)


def finite_sum_sizes(
    epsilon: float,
    L: float,
    rho: float,
    steps: int,
    *,
    sigma: float,
    b: float,
    mean_square_b: float,
    gap: float,
) -> Sizes:
    """Return sizes for which Ji, Theorem 9, guarantees ``E|grad F| <= epsilon`` at alpha = 1 / (8 N L) and C_beta = 80 (Corollary 10).

    K and B each take half of what the bound allows; both grow as ``1 / epsilon^2``.
    """
    _check(epsilon=epsilon, gap=gap)
    alpha, least = recommended_inner_lr(L, steps), 20
    theta, phi, xi, _ = finite_sum_convergence(
        L, rho, alpha, steps, sigma=sigma, b=b, mean_square_b=mean_square_b, tasks=least
    )
    half = theta * epsilon**2 / (2 * (xi + epsilon))
    return Sizes(math.ceil(gap / half), max(least, math.ceil(phi / half)))


def _root(theta: float, offset: float, d: float) -> float:
    """Return the root of ``theta x^2 = d (offset + x)``; infinite where the theorem does not hold."""
    if theta <= 0:
        return math.inf
    return d / (2 * theta) + math.sqrt(offset * d / theta + (d / (2 * theta)) ** 2)


def _gap(L: float, alpha: float, steps: int) -> tuple[float, float]:
    """Return ``a`` and ``2 - a^(2N)``, positive where the theorems hold."""
    _check(L=L, alpha=alpha, steps=steps)
    a = 1 + alpha * L
    if a ** (2 * steps) >= 2:
        raise ValueError(
            f"Expected alpha < (2^(1/2N) - 1) / L = {largest_inner_lr(L, steps):.3g} but got "
            f"{alpha:.3g}; lower alpha."
        )
    return a, 2 - a ** (2 * steps)


def _at_least(number: float) -> int:
    return max(1, math.ceil(number))


def _check_curved(c_l: float) -> None:
    if c_l == 0:
        raise ValueError(
            "Expected rho, alpha and N to be positive but one of them is 0: "
            "then C_L = 0, the meta-objective is smooth, and needs no such bound."
        )


_POSITIVE = (
    "L",
    "smoothness",
    "scale",
    "epsilon",
    "iterations",
    "tasks",
    "support",
    "hessian",
    "query",
    "samples",
    "c_beta",
)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        positive = name in _POSITIVE
        if not (math.isfinite(number) and (number > 0 if positive else number >= 0)):
            raise ValueError(
                f"Expected `{name}` to be a finite number "
                f"{'above' if positive else 'of at least'} 0 but got {number}."
            )
        if name in ("steps", "step") and number != int(number):
            raise ValueError(f"Expected `{name}` to be a whole number but got {number}.")


def _check_rule(rule: Rule, steps: int = 1) -> None:
    if rule not in ("one_step", "resampling", "finite_sum"):
        raise ValueError(
            f"Expected `rule` to be 'one_step', 'resampling' or 'finite_sum' but got {rule!r}."
        )
    if rule == "one_step" and steps != 1:
        raise ValueError(
            f"Expected one inner step with rule 'one_step' but got {steps}; use 'resampling' or "
            "'finite_sum'."
        )
