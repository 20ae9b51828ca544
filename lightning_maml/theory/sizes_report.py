"""How many iterations, tasks and samples the theorems ask for to reach an accuracy, in words."""

import math
from collections.abc import Callable

from lightning_maml import theory
from lightning_maml.errors import UserValueError
from lightning_maml.theory.measure import Constants
from lightning_maml.theory.report import Settings, aligned, count, judged_by

Row = tuple[str, str, str]
"""A name, its value and its meaning."""


def sizes_report(
    epsilon: float,
    constants: Constants,
    settings: Settings,
    objective: Callable[[float], float],
) -> str:
    """Return the sizes that the theorems ask for if ``E|grad F| <= epsilon``, a table for each.

    Ji's are of Corollaries 6 and 10, with their alpha and C_beta. Fallah's, of Corollaries 4.13 and
    4.16, are up to constants that the paper leaves open, and are given with 1 for each; beside them
    is what the configured batches leave of noise (eqs. 23 and 26). Ji's are a guarantee only if the
    theorem's conditions hold, and the constants are the suprema.

    Args:
        epsilon: The accuracy wanted [loss / parameter].
        constants: As measured, or as known.
        settings: The run's settings.
        objective: Returns F(w) for an inner rate alpha. The distance of F(w) from its infimum is
            taken for this number, the most that it can be if the loss is never negative.

    Raises:
        ValueError: If ``epsilon`` is not positive.

    Examples:
        >>> from lightning_maml.theory.measure import Constants
        >>> from lightning_maml.theory.report import Settings
        >>> from lightning_maml.theory.sizes_report import sizes_report
        >>> constants = Constants(2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 1.0, 100)
        >>> settings = Settings("exact", 0.05, 1, 16, 15, None, 1e-3, stepsize=1e-6, kinks=[])
        >>> text = sizes_report(0.5, constants, settings, objective=lambda alpha: 1.1)
        >>> for part in text.splitlines()[0].split(", with "):
        ...     print(part)
        Sizes for E|grad F| <= 0.5 by Ji, Corollary 10
        F(w) = 1.1 for F(w) - inf F, if the theorem's conditions hold with this alpha
    """
    check_accuracy(epsilon)
    parts = []
    for theorem in judged_by(settings):
        is_one_step = theorem.rule == "one_step"
        recommended = theory.recommended_inner_lr(constants.L, settings.steps)
        gap = objective(settings.inner_lr if is_one_step else recommended)
        rows_of = _one_step_rows if is_one_step else _several_steps_rows
        opening = (
            f"Sizes for E|grad F| <= {epsilon:g} by {theorem.corollary}, with F(w) = {gap:.3g} for "
            "F(w) - inf F"
        )
        if is_one_step:
            opening += ", up to constants"
        else:
            opening += ", if the theorem's conditions hold with this alpha"
        rows = [_NEGATIVE] if gap < 0 else rows_of(epsilon, constants, settings, gap)
        parts.append(f"{opening}\n\n{aligned(rows)}")
    if not parts:
        return (
            f"No theorem gives sizes for E|grad F| <= {epsilon:g} with this algorithm, number of "
            "steps and kind of tasks."
        )
    return "\n\n".join(parts)


def check_accuracy(epsilon: float) -> None:
    """Check an accuracy, before anything is measured for it."""
    if not 0 < epsilon < math.inf:
        raise UserValueError(f"Expected `epsilon` to be a positive number but got {epsilon}.")


def _one_step_rows(
    epsilon: float, constants: Constants, settings: Settings, gap: float
) -> list[Row]:
    L, alpha, sigma, sample_sigma = (
        constants.L,
        settings.inner_lr,
        constants.sigma,
        constants.sample_sigma,
    )
    assert settings.resampling is not None, "no theorem of Fallah's is about Episodes"
    support, hessian = settings.resampling
    if math.isnan(sample_sigma):
        return [_UNKNOWN]
    floor = alpha * L * sigma
    is_first_order = settings.curvature == "none"
    reached = floor if is_first_order else epsilon
    rows = []
    if is_first_order:
        verdict = "at most" if floor <= epsilon else "above"
        text = f"alpha L sigma, what FO-MAML reaches up to a constant, {verdict} the {epsilon:g}"
        rows.append(("accuracy", f"{floor:.3g}", text))
    noise = theory.one_step_noise(
        settings.curvature,
        L,
        alpha,
        sigma=sigma,
        sample_sigma=sample_sigma,
        tasks=settings.tasks,
        support=support,
        query=settings.query,
    )
    rows += [
        ("K", _over_square(gap * L, reached), "meta-iterations, up to a constant"),
        ("B", _over_square(sigma**2, reached, 20), "tasks per step, up to a constant; at least 20"),
        ("D_in", _over_square(sample_sigma**2, reached), "support samples; and as many B D_o"),
    ]
    if not is_first_order:
        needed = theory.hessian_batch(alpha, constants.hessian_sigma)
        rows.append(("D_h", count(needed), f"Hessian samples; configured: {hessian}"))
    equation = "26" if is_first_order else "23"
    meaning = f"of the configured sizes, eq. {equation}, up to a constant"
    return [*rows, ("noise", f"{noise:.3g}", meaning)]


def _several_steps_rows(
    epsilon: float, constants: Constants, settings: Settings, gap: float
) -> list[Row]:
    L, rho, steps = constants.L, constants.rho, settings.steps
    if rho == 0:
        return [("none", "", "rho = 0, so that F is smooth, and the theory of SGD applies")]
    if settings.resampling is None:
        sizes = theory.finite_sum_sizes(
            epsilon,
            L,
            rho,
            steps,
            sigma=constants.sigma,
            b=constants.b,
            mean_square_b=constants.mean_square_b,
            gap=gap,
        )
    elif math.isnan(constants.sample_sigma):
        return [_UNKNOWN]
    else:
        sizes = theory.resampling_sizes(
            epsilon,
            L,
            rho,
            steps,
            sigma=constants.sigma,
            sample_sigma=constants.sample_sigma,
            hessian_sigma=constants.hessian_sigma,
            gap=gap,
        )
    rows = [
        ("alpha", f"{theory.recommended_inner_lr(L, steps):.3g}", "inner rate, 1 / (8 N L)"),
        ("K", count(sizes.iterations), "meta-iterations"),
        ("B", count(sizes.tasks), f"tasks per step; configured: {settings.tasks}"),
    ]
    if settings.resampling is not None:
        support, hessian = settings.resampling
        rows += [
            ("S", count(sizes.support), f"samples per inner step; configured: {support}"),
            ("T", count(sizes.query), f"query samples; configured: {settings.query}"),
            ("D", count(sizes.hessian), f"Hessian samples; configured: {hessian}"),
        ]
    return rows


_NEGATIVE: Row = ("not known", "", "the loss can be negative, so F(w) does not bound the distance")
_UNKNOWN: Row = ("not known", "", "sigma-tilde needs at least two query samples per task")


def _over_square(number: float, accuracy: float, least: int = 1) -> str:
    """Return ``number / accuracy^2`` rounded up."""
    # FO-MAML reaches 0 in the limit, where all tasks are alike
    quotient = number / accuracy / accuracy if accuracy else math.inf
    return "unbounded" if math.isinf(quotient) else count(max(least, math.ceil(quotient)))
