"""How many meta-iterations, tasks and samples the theorems ask for, given an accuracy.

The letters are those of :mod:`lightning_maml.theory`.
"""

import math
from typing import NamedTuple

from lightning_maml.errors import UserValueError
from lightning_maml.theory.arguments import check, check_number, of_plain_numbers
from lightning_maml.theory.convergence import (
    Convergence,
    finite_sum_convergence,
    offset_of,
    resampling_convergence,
)
from lightning_maml.theory.stepsizes import recommended_inner_lr, resampling_batches


class Sizes(NamedTuple):
    """The cost of reaching an accuracy.

    Attributes:
        iterations: K, meta-iterations.
        tasks: B, tasks per meta-batch.
        support: S, samples per inner step; 0 in the finite-sum case, where the support set is
            given.
        query: T, samples of the query batch; 0 in the finite-sum case.
        hessian: D, samples per Hessian batch; 0 in the finite-sum case.

    Examples:
        >>> from lightning_maml.theory import Sizes
        >>> Sizes(iterations=1000, tasks=20)
        Sizes(iterations=1000, tasks=20, support=0, query=0, hessian=0)
    """

    iterations: int
    tasks: int
    support: int = 0
    query: int = 0
    hessian: int = 0


@of_plain_numbers
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
    """Return sizes for which Ji, Theorem 5, guarantees ``E|grad F| <= epsilon``.

    As in Corollary 6, alpha = 1 / (8 N L) and C_beta = 100. Each of K, S and B takes a third of
    what the bound allows, and T = S. All but D grow as ``1 / epsilon^2``.

    Args:
        epsilon: The accuracy wanted [loss / parameter].
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians, positive.
        steps: N, positive.
        sigma: Standard deviation of the task gradients over tasks.
        sample_sigma: Standard deviation of single samples' gradients.
        hessian_sigma: Standard deviation of single samples' Hessians.
        gap: ``Delta = F(w_0) - inf F`` [loss].

    Raises:
        ValueError: If an argument is out of range, rho or N is 0, or a size overflows.

    Examples:
        >>> from lightning_maml.theory import resampling_sizes
        >>> sigmas = dict(sigma=1.0, sample_sigma=1.0, hessian_sigma=1.0)
        >>> sizes = resampling_sizes(1.0, 1.0, 1.0, 1, **sigmas, gap=1.0)
        >>> sizes.tasks, sizes.support == sizes.query, sizes.hessian
        (20, True, 1)
    """
    check(epsilon=epsilon, gap=gap, L=L)
    check_number("steps", steps, may_be_zero=False)
    alpha = recommended_inner_lr(L, steps)
    # theta grows with the number of tasks, so its value at the fewest is safe for more
    least_tasks = 20
    least_support, hessian = resampling_batches(L, rho, sample_sigma, hessian_sigma)

    def constants(support: int) -> Convergence:
        return resampling_convergence(
            L,
            rho,
            alpha,
            steps,
            sigma=sigma,
            sample_sigma=sample_sigma,
            hessian_sigma=hessian_sigma,
            tasks=least_tasks,
            support=support,
            hessian=hessian,
            query=support,
        )

    of_least = constants(least_support)
    third = _allowed(of_least.theta, offset_of(of_least), epsilon) / 3
    support = max(least_support, _whole(of_least.xi, third))
    # phi falls as the support and query batches grow, so take it at their final size
    tasks = max(least_tasks, _whole(constants(support).phi, third))
    return Sizes(_whole(gap, third), tasks, support, support, hessian)


@of_plain_numbers
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
    """Return sizes for which Ji, Theorem 9, guarantees ``E|grad F| <= epsilon``.

    As in Corollary 10, alpha = 1 / (8 N L) and C_beta = 80. K and B each take half of what the
    bound allows; both grow as ``1 / epsilon^2``.

    Args:
        epsilon: The accuracy wanted [loss / parameter].
        L: Smoothness of the task losses.
        rho: Lipschitz constant of their Hessians, positive.
        steps: N, positive.
        sigma: Standard deviation of the query gradients over tasks.
        b: Mean distance between support and query gradients.
        mean_square_b: Mean of its square.
        gap: ``Delta = F(w_0) - inf F`` [loss].

    Raises:
        ValueError: If an argument is out of range, rho or N is 0, or a size overflows.

    Examples:
        >>> from lightning_maml.theory import finite_sum_sizes
        >>> spread = dict(sigma=1.0, b=0.5, mean_square_b=0.25)
        >>> finite_sum_sizes(1.0, 1.0, 1.0, 1, **spread, gap=1.0).tasks
        20
    """
    check(epsilon=epsilon, gap=gap, L=L)
    check_number("steps", steps, may_be_zero=False)
    alpha = recommended_inner_lr(L, steps)
    # theta grows with the number of tasks, so its value at the fewest is safe for more
    least_tasks = 20
    theta, phi, xi, _ = finite_sum_convergence(
        L, rho, alpha, steps, sigma=sigma, b=b, mean_square_b=mean_square_b, tasks=least_tasks
    )
    half = _allowed(theta, xi, epsilon) / 2
    return Sizes(_whole(gap, half), max(least_tasks, _whole(phi, half)))


def _allowed(theta: float, offset: float, epsilon: float) -> float:
    """Return the D for which ``theta x^2 = D (offset + x)`` has the root epsilon."""
    return theta * epsilon / (1 + offset / epsilon)


def _whole(number: float, part: float) -> int:
    """Return ``number / part``, rounded up."""
    quotient = number / part if part else math.inf
    if math.isinf(quotient):
        raise UserValueError(
            "Expected `epsilon` to be an accuracy within reach but the sizes for it are too large "
            "for a number; raise it."
        )
    return math.ceil(quotient)
