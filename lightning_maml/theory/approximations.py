"""How far finite differences, first order and samples are from the exact meta-gradient.

The letters are those of :mod:`lightning_maml.theory`.
"""

import math
from typing import NamedTuple

from lightning_maml.core.hvp import CurvatureName
from lightning_maml.errors import UserValueError
from lightning_maml.theory.arguments import check, check_curvature, check_number, of_plain_numbers
from lightning_maml.theory.stepsizes import excess_growth, excess_growth_per_L


@of_plain_numbers
def printed_probe_radius(rho: float, alpha: float) -> float:
    """Return ``1 / (6 rho alpha)`` [parameter], the probing radius of Fallah, Theorem 4.17.

    Do not use it alone: it does not depend on the accuracy wanted and grows as alpha falls, so
    HF-MAML stalls where FO-MAML does. Infinite where rho or alpha is 0.

    Args:
        rho: Lipschitz constant of the Hessians.
        alpha: Inner learning rate.

    Examples:
        >>> from lightning_maml.theory import printed_probe_radius
        >>> round(printed_probe_radius(rho=1.0, alpha=0.5), 4)
        0.3333
    """
    check(rho=rho, alpha=alpha)
    return 1 / (6 * rho * alpha) if rho * alpha > 0 else math.inf


@of_plain_numbers
def probe_radius(
    epsilon: float, L: float, rho: float, alpha: float, steps: int, query_gradient_norm: float
) -> float:
    """Return a probing radius h for which HF-MAML's error is at most ``epsilon / 2`` [parameter].

    ``min(1 / (6 rho alpha), epsilon / (N a^(N-1) alpha rho |v_N|))``, by
    :func:`hessian_free_error`; not in the papers. Rounding sets a lower limit, about the cube root
    of the machine epsilon.

    Args:
        epsilon: The accuracy wanted [loss / parameter].
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N.
        query_gradient_norm: ``|v_N|``, the norm of the query gradient at the adapted parameters.

    Examples:
        >>> from lightning_maml.theory import probe_radius
        >>> probe_radius(0.05, L=1.0, rho=1.0, alpha=0.5, steps=1, query_gradient_norm=1.0)
        0.1
    """
    check(epsilon=epsilon)
    error_per_radius = hessian_free_error(L, rho, alpha, steps, 1.0, query_gradient_norm)
    if math.isinf(error_per_radius):
        raise UserValueError(
            f"Expected an error that is a number but it overflows with alpha = {alpha:.3g} and "
            f"N = {steps}; lower alpha."
        )
    wanted = epsilon / (2 * error_per_radius) if error_per_radius > 0 else math.inf
    return min(printed_probe_radius(rho, alpha), wanted)


@of_plain_numbers
def hessian_free_error(
    L: float, rho: float, alpha: float, steps: int, radius: float, query_gradient_norm: float
) -> float:
    """Return a bound on HF-MAML's error, ``N a^(N-1) alpha (rho h / 2) |v_N|`` [loss / parameter].

    Fallah, after eq. 9, with the sharp 1/2 that is missing there, carried through N steps. Infinite
    where it overflows.

    Args:
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians.
        alpha: Inner learning rate.
        steps: N.
        radius: h, the probing radius [parameter].
        query_gradient_norm: ``|v_N|``, the norm of the query gradient at the adapted parameters.

    Examples:
        >>> from lightning_maml.theory import hessian_free_error
        >>> hessian_free_error(1.0, 1.0, alpha=0.5, steps=1, radius=0.5, query_gradient_norm=2.0)
        0.25
    """
    check(
        L=L,
        rho=rho,
        alpha=alpha,
        radius=radius,
        query_gradient_norm=query_gradient_norm,
        steps=steps,
    )
    grown = 1 + excess_growth(alpha * L, max(steps - 1, 0))
    without_growth = steps * alpha * rho * radius / 2 * query_gradient_norm
    return grown * without_growth if without_growth else 0.0


@of_plain_numbers
def first_order_floor(L: float, alpha: float, steps: int, sigma: float, b: float = 0.0) -> float:
    """Return a bound on ``|grad F|`` where FO-MAML comes to rest [loss / parameter].

    With full batches. It is ``c sigma / (1 - c)`` with ``c = a^N (a^N - 1) / (2 - a^(2N))``, of the
    order ``N alpha L sigma``; where support and query sets differ, a multiple of b is added.
    Neither paper states it: it follows from Ji, Lemmas 12-15, 18 and 19, as the mean query gradient
    at the adapted parameters is 0 there and ``|grad F| <= (a^N - 1) E|v_N|``. Fallah, Corollary
    4.16, gives the order at N = 1 (its abstract and Table 1 leave out L). Infinite where c >= 1.

    Args:
        L: Smoothness of the task losses.
        alpha: Inner learning rate.
        steps: N.
        sigma: Standard deviation of the task gradients over tasks, in the finite-sum case those of
            the query losses.
        b: In the finite-sum case the mean distance between support and query gradients.

    Examples:
        >>> from lightning_maml.theory import first_order_floor
        >>> round(first_order_floor(L=1.0, alpha=0.1, steps=1, sigma=1.0), 4)
        0.1618
    """
    check(L=L, alpha=alpha, sigma=sigma, b=b, steps=steps)
    gap = 1 - excess_growth(alpha * L, 2 * steps)
    if gap <= 0:
        return math.inf
    grown = excess_growth(alpha * L, steps)  # a^N - 1
    c = (grown + 1) * grown / gap
    if c >= 1:
        return math.inf
    from_sets = grown * ((grown + 1) ** 2 / gap + 1) * b
    return (c * sigma + grown * from_sets) / (1 - c)


@of_plain_numbers
def one_step_noise(
    curvature: CurvatureName,
    L: float,
    alpha: float,
    *,
    sigma: float,
    sample_sigma: float,
    tasks: int,
    support: int,
    query: int,
) -> float:
    """Return what sampling adds to ``|grad F|`` with N = 1, up to a constant [loss / parameter].

    It is ``sqrt(sigma^2 / B + sample_sigma^2 / (B D_o) + sample_sigma^2 / D_in)`` for MAML (Fallah,
    eq. 23), and for FO-MAML with ``sigma^2 (alpha^2 L^2 + 1 / B)`` in place of the first term (eq.
    26). The constant in front is not in the paper.

    Args:
        curvature: Tells which algorithm it is: ``"none"`` for FO-MAML.
        L: Smoothness of the task losses; only used for FO-MAML.
        alpha: Inner learning rate; only used for FO-MAML.
        sigma: Standard deviation of the task gradients over tasks.
        sample_sigma: Standard deviation of single samples' gradients.
        tasks: B, tasks per meta-batch.
        support: D_in, samples of the inner step.
        query: D_o, samples of the query batch.

    Examples:
        >>> from lightning_maml.theory import one_step_noise
        >>> sizes = dict(tasks=4, support=4, query=1)
        >>> round(one_step_noise("exact", 1.0, 0.1, sigma=0.0, sample_sigma=2.0, **sizes), 4)
        1.4142
    """
    check_curvature(curvature)
    check(
        L=L,
        alpha=alpha,
        sigma=sigma,
        sample_sigma=sample_sigma,
        tasks=tasks,
        support=support,
        query=query,
    )
    over_tasks = 1 / tasks + ((alpha * L) ** 2 if curvature == "none" else 0.0)
    over_samples = 1 / tasks / query + 1 / support
    return math.sqrt(sigma**2 * over_tasks + sample_sigma**2 * over_samples)


@of_plain_numbers
def one_step_bias(L: float, alpha: float, sample_sigma: float, support: int) -> float:
    """Return a bound on the bias that sampling the inner step causes [loss / parameter].

    It is ``alpha L sigma-tilde / sqrt(D_in)`` (Fallah, Lemma 4.10, eq. 20).

    Args:
        L: Smoothness of the task losses.
        alpha: Inner learning rate.
        sample_sigma: Standard deviation of single samples' gradients.
        support: D_in, samples in the support batch.

    Examples:
        >>> from lightning_maml.theory import one_step_bias
        >>> one_step_bias(L=1.0, alpha=0.5, sample_sigma=1.0, support=25)
        0.1
    """
    check(L=L, alpha=alpha, sample_sigma=sample_sigma, support=support)
    return alpha * L * sample_sigma / math.sqrt(support)


@of_plain_numbers
def adaptation_gap(
    L: float, alpha: float, sample_sigma: float, hessian_sigma: float, samples: int
) -> float:
    """Return a bound on ``|grad F-hat - grad F|``, where tasks adapt on D_test samples.

    Source: Fallah, Theorem 4.11, eq. 22. In loss / parameter.

    Args:
        L: Smoothness of the task losses.
        alpha: Inner learning rate.
        sample_sigma: Standard deviation of single samples' gradients.
        hessian_sigma: Standard deviation of single samples' Hessians.
        samples: D_test.

    Examples:
        >>> from lightning_maml.theory import adaptation_gap
        >>> adaptation_gap(L=1.0, alpha=0.5, sample_sigma=1.0, hessian_sigma=1.0, samples=4)
        0.5625
    """
    check(L=L, alpha=alpha, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, samples=samples)
    gradients = 2 * alpha * L * sample_sigma / math.sqrt(samples)
    hessians = alpha**2 * L * hessian_sigma * sample_sigma / samples
    return gradients + hessians


class PathError(NamedTuple):
    """How far the sampled inner path strays from the exact one at step j.

    Attributes:
        mean: Bound on ``E|w_j - w~_j|`` [parameter].
        mean_square: Bound on ``E|w_j - w~_j|^2`` [parameter^2].

    Examples:
        >>> from lightning_maml.theory import PathError
        >>> PathError(mean=0.5, mean_square=0.25).mean
        0.5
    """

    mean: float
    mean_square: float


@of_plain_numbers
def path_error(L: float, alpha: float, step: int, sample_sigma: float, support: int) -> PathError:
    """Return the bounds of Ji, Proposition 2, on the error of the inner path.

    They have the ``2 alpha L`` of its proof, where the statement prints ``alpha L``. As L goes to 0
    they go to ``j alpha sample_sigma / sqrt(S)`` and ``2 j (alpha sample_sigma)^2 / S``. Infinite
    where they overflow.

    Args:
        L: Smoothness of the task losses; may be 0.
        alpha: Inner learning rate.
        step: j, the inner step.
        sample_sigma: Standard deviation of single samples' gradients.
        support: S, samples per inner step.

    Examples:
        >>> from lightning_maml.theory import path_error
        >>> error = path_error(L=1.0, alpha=1.0, step=1, sample_sigma=1.0, support=4)
        >>> round(error.mean, 4), round(error.mean_square, 4)
        (0.5, 0.5)
    """
    check(alpha=alpha, step=step, sample_sigma=sample_sigma, support=support)
    check_number("L", L, may_be_zero=True)
    if sample_sigma == 0:
        return PathError(0.0, 0.0)
    x = alpha * L
    mean = excess_growth_per_L(L, alpha, step) * sample_sigma / math.sqrt(support)
    grown_per_L = excess_growth(2 * x * (1 + x), step) / L if L else 2 * alpha * step
    mean_square = grown_per_L * alpha * sample_sigma * sample_sigma / ((1 + x) * support)
    return PathError(mean, mean_square)
