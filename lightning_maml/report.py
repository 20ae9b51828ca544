"""What measured constants imply, and whether given settings satisfy the theorems, in words."""

import math
from typing import NamedTuple

from lightning_maml import theory
from lightning_maml.curvature import CurvatureName
from lightning_maml.measure import Constants
from lightning_maml.theory import Rule


class Settings(NamedTuple):
    """What a run is configured to do.

    Attributes:
        curvature: Which algorithm.
        inner_lr: alpha.
        steps: N.
        meta_batch_size: B, tasks per optimizer step over all processes.
        resampling: None in the finite-sum case, else the samples (S, D, T) of a support, Hessian and query batch.
        probe_radius: h of HF-MAML.
        stepsize: The meta-optimizer's rate where it is plain SGD, else None.
        kinks: Layers at which the network is not twice differentiable.
    """

    curvature: CurvatureName
    inner_lr: float
    steps: int
    meta_batch_size: int
    resampling: tuple[int, int, int] | None
    probe_radius: float
    stepsize: float | None
    kinks: list[str]

    @property
    def rules(self) -> list[Rule]:
        """The stepsize rules that apply."""
        general: Rule = "finite_sum" if self.resampling is None else "resampling"
        return ["one_step", general] if self.steps == 1 else [general]


class Condition(NamedTuple):
    """A condition of a theorem.

    Attributes:
        source: Where it is from.
        text: The condition with its numbers.
        holds: Whether it does; None where it cannot be judged.
    """

    source: str
    text: str
    holds: bool | None


_THEOREM: dict[CurvatureName, str] = {"exact": "4.12", "none": "4.15", "finite_difference": "4.17"}
_EQUATION: dict[Rule, str] = {"one_step": "Fallah eq. 17", "resampling": "Ji eq. 14", "finite_sum": "Ji eq. 22"}


def stepsize(rule: Rule, constants: Constants, settings: Settings) -> float:
    """Return beta with the papers' constant."""
    L_hat = theory.meta_smoothness(
        rule,
        constants.L,
        constants.rho,
        settings.inner_lr,
        settings.steps,
        constants.gradient_norm,
        constants.b if rule == "finite_sum" else 0.0,
    )
    return theory.meta_stepsize(L_hat, theory.paper_scale(rule, settings.curvature))


def conditions(constants: Constants, settings: Settings) -> list[Condition]:
    """Return every condition of the theorems that bears on the settings."""
    L, alpha, steps, tasks = constants.L, settings.inner_lr, settings.steps, settings.meta_batch_size
    theorem = f"Fallah, Theorem {_THEOREM[settings.curvature]}"
    ji = "5" if settings.resampling else "9"
    found = [
        Condition(
            "both papers, assumptions",
            "the network is twice differentiable" + (f"; it has kinks in {', '.join(settings.kinks)}" if settings.kinks else ""),
            not settings.kinks,
        ),
        _at_most(f"Ji, Theorem {ji}", "alpha", alpha, theory.largest_inner_lr(L, steps), "(2^(1/2N) - 1) / L"),
        _at_most(
            f"Ji, Corollary {'6' if settings.resampling else '10'}", "alpha", alpha, theory.recommended_inner_lr(L, steps), "1 / (8 N L)"
        ),
        _theta(constants, settings),
    ]
    if steps == 1:
        largest = theory.largest_one_step_inner_lr(L, settings.curvature)
        found += [
            _at_most(theorem, "alpha", alpha, largest, "1 / (10 L)" if settings.curvature == "none" else "1 / (6 L)"),
            Condition(theorem, f"B = {tasks} tasks per step, at least 20 needed", tasks >= 20),
        ]
    if settings.resampling is not None:
        found += _batch_conditions(constants, settings, theorem)
    if settings.curvature == "finite_difference":
        found += _radius_conditions(constants, settings, theorem)
    for rule in settings.rules:
        beta = stepsize(rule, constants, settings)
        if settings.stepsize is None:
            found.append(Condition(_EQUATION[rule], "the meta-optimizer is plain SGD; it is another one, which no theorem covers", False))
        else:
            found.append(_at_most(_EQUATION[rule], "meta-stepsize beta", settings.stepsize, beta, "scale / L-hat"))
    return found


def _at_most(source: str, name: str, value: float, bound: float, formula: str) -> Condition:
    return Condition(source, f"{name} = {value:.3g}, at most {formula} = {bound:.3g} needed", value <= bound)


def _theta(constants: Constants, settings: Settings) -> Condition:
    """The theorem of Ji et al. says something: theta is positive with these batch sizes."""
    source = f"Ji, Theorem {'5' if settings.resampling else '9'}"
    arguments = (constants.L, constants.rho, settings.inner_lr, settings.steps)
    if settings.inner_lr >= theory.largest_inner_lr(constants.L, settings.steps):
        return Condition(source, "theta > 0 needed; it does not exist while (1 + alpha L)^(2N) is 2 or more", False)
    if constants.rho == 0:
        return Condition(source, "theta > 0 needed; rho = 0, so F is smooth and any small stepsize will do", True)
    if settings.resampling is None:
        theta = theory.finite_sum_convergence(
            *arguments, sigma=constants.sigma, b=constants.b, mean_square_b=constants.mean_square_b, tasks=settings.meta_batch_size
        ).theta
    else:
        support, hessian, query = settings.resampling
        theta = theory.resampling_convergence(
            *arguments,
            sigma=constants.sigma,
            sample_sigma=constants.sample_sigma,
            hessian_sigma=constants.hessian_sigma,
            tasks=settings.meta_batch_size,
            support=support,
            hessian=max(hessian, 1),
            query=query,
        ).theta
    text = f"theta = {theta:.3g} with B = {settings.meta_batch_size}, above 0 needed"
    return Condition(source, text, None if math.isnan(theta) else theta > 0)


def _batch_conditions(constants: Constants, settings: Settings, theorem: str) -> list[Condition]:
    assert settings.resampling is not None
    support, hessian, _ = settings.resampling
    L, rho = constants.L, constants.rho
    if math.isnan(constants.sample_sigma):
        return [Condition("Ji, Corollary 6", "S and D: sigma-tilde and sigma_H need at least two query samples per task", None)]
    needed = max(1, math.ceil(15 * (rho * constants.sample_sigma) ** 2 / L**4))
    found = [
        Condition(
            "Ji, Corollary 6",
            f"S = {support} samples per inner step, at least 15 rho^2 sigma_g^2 / L^4 = {needed} needed",
            support >= needed,
        )
    ]
    if settings.curvature != "none":
        needed = max(1, math.ceil((constants.hessian_sigma / L) ** 2))
        found.append(
            Condition("Ji, Corollary 6", f"D = {hessian} Hessian samples, at least sigma_H^2 / L^2 = {needed} needed", hessian >= needed)
        )
        if settings.steps == 1:
            needed = theory.hessian_batch(settings.inner_lr, constants.hessian_sigma)
            found.append(
                Condition(theorem, f"D_h = {hessian} Hessian samples, at least 2 alpha^2 sigma_H^2 = {needed} needed", hessian >= needed)
            )
    return found


def _radius_conditions(constants: Constants, settings: Settings, theorem: str) -> list[Condition]:
    h = settings.probe_radius
    printed = theory.printed_probe_radius(constants.rho, settings.inner_lr)
    relative = theory.hessian_free_error(constants.L, constants.rho, settings.inner_lr, settings.steps, h, 1.0)
    return [
        _at_most(theorem, "probing radius h", h, printed, "1 / (6 rho alpha)"),
        Condition(
            "Fallah, eq. 9", f"finite differences err by at most {relative:.2g} of the query gradient, 0.1 or less wanted", relative <= 0.1
        ),
    ]


def report(constants: Constants, settings: Settings) -> str:
    """Return the constants, what they imply and the conditions, as three tables."""
    return "\n\n".join(
        [_constants_table(constants), _implied_table(constants, settings), _conditions_table(conditions(constants, settings))]
    )


def _constants_table(constants: Constants) -> str:
    rows = [
        ("L", constants.L, "smoothness of the task losses: largest over tasks, sets and inner steps"),
        ("rho", constants.rho, "Lipschitz constant of their Hessians, likewise"),
        ("sigma", constants.sigma, "standard deviation of the gradients over tasks"),
        ("sigma-tilde", constants.sample_sigma, "... over the samples of a task"),
        ("sigma_H", constants.hessian_sigma, "... of the Hessians over the samples of a task, along their leading direction"),
        ("b", constants.b, "distance between support and query gradients, mean over tasks"),
        ("E|grad l|", constants.gradient_norm, "norm of the query gradients, mean over tasks"),
    ]
    lines = [(name, "not known: one query sample" if math.isnan(value) else f"{value:.4g}", meaning) for name, value, meaning in rows]
    return f"Measured with {constants.gradient_evaluations} gradient evaluations; L, rho and sigma_H are lower bounds\n\n" + _aligned(lines)


def _implied_table(constants: Constants, settings: Settings) -> str:
    L, rho, alpha, steps = constants.L, constants.rho, settings.inner_lr, settings.steps
    growth, c_l, c_b = theory.smoothness_constants(L, rho, alpha, steps)
    rows = [
        ("alpha to use", f"{theory.recommended_inner_lr(L, steps):.3g}", f"1 / (8 N L), N = {steps}; configured: {alpha:g}"),
        ("(1 + alpha L)^2N", f"{growth:.4g}", "below 2 in both papers"),
        ("C_L, C_b", f"{c_l:.4g}, {c_b:.4g}", "how L-hat grows with the task gradients and with b"),
    ]
    for rule in settings.rules:
        batches = theory.stepsize_batches(
            rule, L, rho, alpha, steps, constants.sigma, 0.0 if math.isnan(constants.sample_sigma) else constants.sample_sigma, constants.b
        )
        samples = "" if batches.samples == 0 else f" of {batches.samples} samples"
        rows.append((f"beta, {_EQUATION[rule]}", f"{stepsize(rule, constants, settings):.3g}", "with the papers' constant"))
        rows.append((f"B', {_EQUATION[rule]}", f"{batches.tasks}", f"tasks{samples} for its estimate"))
    if not math.isnan(constants.hessian_sigma):
        rows.append(
            ("D_h", f"{theory.hessian_batch(alpha, constants.hessian_sigma)}", "samples for a Hessian-vector product, 2 alpha^2 sigma_H^2")
        )
    rows.append(
        (
            "probing radius h",
            f"{settings.probe_radius:.3g}",
            f"cube root of the machine epsilon, or as configured; 1 / (6 rho alpha) = {theory.printed_probe_radius(rho, alpha):.3g}",
        )
    )
    return "Implied\n\n" + _aligned(rows)


def _conditions_table(found: list[Condition]) -> str:
    words = {True: "holds", False: "does not hold", None: "not known"}
    return "Conditions of the theorems\n\n" + _aligned([(words[c.holds], c.source, c.text) for c in found])


def _aligned(rows: list[tuple[str, str, str]]) -> str:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows)
