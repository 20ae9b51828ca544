"""What measured constants imply, and whether given settings satisfy the theorems, in words."""

import math
from typing import NamedTuple

from lightning_maml import theory
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.theory import Rule
from lightning_maml.theory.measure import Constants


class Adaptive(NamedTuple):
    """How an adaptive meta-stepsize is configured.

    Attributes:
        rule: Its rule.
        scale: Its numerator.
        tasks: B' over all processes.
    """

    rule: Rule
    scale: float
    tasks: int


class Settings(NamedTuple):
    """What a run is configured to do.

    Attributes:
        curvature: Tells which algorithm it is.
        inner_lr: alpha.
        steps: N.
        tasks: B, tasks per optimizer step over all processes and accumulated batches.
        query: Samples in a query set.
        resampling: None in the finite-sum case, else the samples (S, D) of a support and a Hessian
            batch.
        probe_radius: h of HF-MAML.
        stepsize: The adaptive meta-stepsize; or the fixed rate of plain SGD; or None for another
            optimizer.
        kinks: Layers at which the network is not twice differentiable.
    """

    curvature: CurvatureName
    inner_lr: float
    steps: int
    tasks: int
    query: int
    resampling: tuple[int, int] | None
    probe_radius: float
    stepsize: Adaptive | float | None
    kinks: list[str]


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
_EQUATION: dict[Rule, str] = {
    "one_step": "Fallah eq. 17",
    "resampling": "Ji eq. 14",
    "finite_sum": "Ji eq. 22",
}


def rules(settings: Settings) -> list[Rule]:
    """Return the stepsize rules that apply: Fallah's for one step, and Ji's except for FO-MAML, which Ji does not treat."""
    general: Rule = "finite_sum" if settings.resampling is None else "resampling"
    one_step: list[Rule] = ["one_step"] if settings.steps == 1 else []
    return one_step if settings.curvature == "none" else [*one_step, general]


def stepsize(rule: Rule, scale: float, constants: Constants, settings: Settings) -> float:
    """Return beta."""
    arguments = (
        constants.L,
        constants.rho,
        settings.inner_lr,
        settings.steps,
        constants.gradient_norm,
    )
    return theory.meta_stepsize(theory.meta_smoothness(rule, *arguments, b=constants.b), scale)


def conditions(constants: Constants, settings: Settings) -> list[Condition]:
    """Return every condition of the theorems that bears on the settings."""
    kinks = f"; it has kinks in {', '.join(settings.kinks)}" if settings.kinks else ""
    found = [
        Condition("both papers", f"the network is twice differentiable{kinks}", not settings.kinks)
    ]
    if settings.steps == 1:
        found += _of_fallah(constants, settings)
    if settings.curvature == "none":
        floor = theory.first_order_floor(
            constants.L, settings.inner_lr, settings.steps, constants.sigma
        )
        text = (
            "FO-MAML is not among its algorithms; |grad F| may come to rest anywhere below "
            f"{floor:.3g}"
        )
        found.append(Condition("Ji", text, False))
    else:
        found += _of_ji(constants, settings)
    return [*found, *_of_the_stepsize(constants, settings)]


def _of_fallah(constants: Constants, settings: Settings) -> list[Condition]:
    theorem = f"Fallah, Theorem {_THEOREM[settings.curvature]}"
    largest = theory.largest_one_step_inner_lr(constants.L, settings.curvature)
    formula = "1 / (10 L)" if settings.curvature == "none" else "1 / (6 L)"
    found = [
        _at_most(theorem, "alpha", settings.inner_lr, largest, formula),
        _at_least(theorem, "B", settings.tasks, 20, "20", "tasks per step"),
    ]
    if settings.resampling is not None and settings.curvature != "none":
        if math.isnan(constants.hessian_sigma):
            found.append(
                Condition(theorem, "D_h: sigma_H needs at least two query samples per task", None)
            )
        else:
            needed = theory.hessian_batch(settings.inner_lr, constants.hessian_sigma)
            found.append(
                _at_least(
                    theorem,
                    "D_h",
                    settings.resampling[1],
                    needed,
                    "2 alpha^2 sigma_H^2",
                    "Hessian samples",
                )
            )
    if settings.curvature == "finite_difference":
        printed = theory.printed_probe_radius(constants.rho, settings.inner_lr)
        text = (
            f"probing radius h = {settings.probe_radius:.3g}; the 1 / (6 rho alpha) = "
            f"{printed:.3g} printed there guarantees nothing"
        )
        found.append(Condition(theorem, text, None))
    return found


def _of_ji(constants: Constants, settings: Settings) -> list[Condition]:
    theorem, corollary = (
        ("Ji, Theorem 5", "Ji, Corollary 6")
        if settings.resampling
        else ("Ji, Theorem 9", "Ji, Corollary 10")
    )
    alpha, L, steps = settings.inner_lr, constants.L, settings.steps
    found = [
        _at_most(theorem, "alpha", alpha, theory.largest_inner_lr(L, steps), "(2^(1/2N) - 1) / L"),
        _at_most(corollary, "alpha", alpha, theory.recommended_inner_lr(L, steps), "1 / (8 N L)"),
        _theta(theorem, constants, settings),
    ]
    if settings.resampling is None:
        return found
    if math.isnan(constants.sample_sigma):
        return [
            *found,
            Condition(
                corollary,
                "S and D: sigma-tilde and sigma_H need at least two query samples per task",
                None,
            ),
        ]
    support, hessian = theory.resampling_batches(
        L, constants.rho, constants.sample_sigma, constants.hessian_sigma
    )
    return [
        *found,
        _at_least(
            corollary,
            "S",
            settings.resampling[0],
            support,
            "15 rho^2 sigma_g^2 / L^4",
            "samples per inner step",
        ),
        _at_least(
            corollary, "D", settings.resampling[1], hessian, "sigma_H^2 / L^2", "Hessian samples"
        ),
    ]


def _theta(theorem: str, constants: Constants, settings: Settings) -> Condition:
    """Return the condition under which Ji's theorem says something: its theta is positive with these batch sizes."""
    arguments = (constants.L, constants.rho, settings.inner_lr, settings.steps)
    if settings.inner_lr >= theory.largest_inner_lr(constants.L, settings.steps):
        return Condition(
            theorem, "theta > 0 needed; there is none while (1 + alpha L)^(2N) is 2 or more", False
        )
    if theory.smoothness_constants(*arguments).c_l == 0:
        return Condition(
            theorem,
            "theta > 0 needed; C_L = 0, so F is smooth and any small stepsize will do",
            True,
        )
    if settings.resampling is None:
        theta = theory.finite_sum_convergence(
            *arguments,
            sigma=constants.sigma,
            b=constants.b,
            mean_square_b=constants.mean_square_b,
            tasks=settings.tasks,
        ).theta
    elif math.isnan(constants.sample_sigma):
        return Condition(
            theorem,
            "theta > 0 needed; sigma-tilde and sigma_H need at least two query samples per task",
            None,
        )
    else:
        theta = theory.resampling_convergence(
            *arguments,
            sigma=constants.sigma,
            sample_sigma=constants.sample_sigma,
            hessian_sigma=constants.hessian_sigma,
            tasks=settings.tasks,
            support=settings.resampling[0],
            hessian=max(settings.resampling[1], 1),
            query=settings.query,
        ).theta
    return Condition(
        theorem, f"theta = {theta:.3g} with B = {settings.tasks}, above 0 needed", theta > 0
    )


def _of_the_stepsize(constants: Constants, settings: Settings) -> list[Condition]:
    if settings.stepsize is None:
        return [
            Condition(
                "both papers",
                "the meta-optimizer is plain SGD; it is another one, which no theorem covers",
                False,
            )
        ]
    if not isinstance(settings.stepsize, Adaptive):
        rate, papers = (
            settings.stepsize,
            {rule: theory.paper_scale(rule, settings.curvature) for rule in rules(settings)},
        )
        return [
            _at_most(
                _EQUATION[rule],
                "fixed beta",
                rate,
                stepsize(rule, scale, constants, settings),
                "beta here",
            )
            for rule, scale in papers.items()
        ]
    rule, scale, tasks = settings.stepsize
    source = _EQUATION[rule]
    if rule not in rules(settings):
        return [
            Condition(
                source,
                f"AdaptiveMetaStepsize with rule {rule!r} is not made for this algorithm, N and "
                "kind of tasks",
                False,
            )
        ]
    needed = _stepsize_batches(rule, constants, settings)
    found = [
        _at_most(
            source,
            "scale",
            scale,
            theory.paper_scale(rule, settings.curvature),
            "the papers' constant",
        ),
        _at_least(source, "B'", tasks, needed.tasks, "the theorem's", "tasks for the stepsize"),
    ]
    if rule != "finite_sum":
        if math.isnan(constants.sample_sigma):
            found.append(
                Condition(
                    source,
                    "samples of each: sigma-tilde needs at least two query samples per task",
                    None,
                )
            )
        else:
            found.append(
                _at_least(
                    source,
                    "query samples",
                    settings.query,
                    needed.samples,
                    "the theorem's",
                    "for the stepsize",
                )
            )
    return found


def _stepsize_batches(
    rule: Rule, constants: Constants, settings: Settings
) -> theory.StepsizeBatches:
    sample_sigma = 0.0 if math.isnan(constants.sample_sigma) else constants.sample_sigma
    arguments = (
        constants.L,
        constants.rho,
        settings.inner_lr,
        settings.steps,
        constants.sigma,
        sample_sigma,
        constants.b,
    )
    return theory.stepsize_batches(rule, *arguments)


def _at_most(source: str, name: str, value: float, bound: float, formula: str) -> Condition:
    return Condition(
        source, f"{name} = {value:.3g}, at most {formula} = {bound:.3g} needed", value <= bound
    )


def _at_least(source: str, name: str, value: int, bound: int, formula: str, of: str) -> Condition:
    needed = formula if formula == str(bound) else f"{formula} = {_count(bound)}"
    return Condition(source, f"{name} = {value} {of}, at least {needed} needed", value >= bound)


def _count(number: int) -> str:
    return str(number) if number < 10**6 else f"{number:.3g}"


def report(constants: Constants, settings: Settings) -> str:
    """Return the constants, what they imply and the conditions, as three tables."""
    closing = (
        "The conditions are sufficient in the worst case, and not necessary: "
        "L and rho as measured often ask for an alpha far below what trains best."
    )
    found = [(_WORDS[c.holds], c.source, c.text) for c in conditions(constants, settings)]
    tables = [
        (
            f"Measured with {constants.gradient_evaluations} gradient evaluations; L, rho and sigma_H "
            "are lower bounds"
        ),
        _aligned(_measured(constants)),
        "Implied",
        _aligned(_implied(constants, settings)),
        "Conditions of the theorems",
        _aligned(found),
        closing,
    ]
    return "\n\n".join(tables)


_WORDS = {True: "holds", False: "does not hold", None: "not decided"}


def _measured(constants: Constants) -> list[tuple[str, str, str]]:
    rows = [
        (
            "L",
            constants.L,
            "smoothness of the task losses: largest over tasks, sets and inner steps",
        ),
        ("rho", constants.rho, "Lipschitz constant of their Hessians, likewise"),
        ("sigma", constants.sigma, "standard deviation of the gradients over tasks"),
        ("sigma-tilde", constants.sample_sigma, "... over the samples of a task"),
        (
            "sigma_H",
            constants.hessian_sigma,
            "... of the Hessians over the samples of a task, along their leading direction",
        ),
        ("b", constants.b, "distance between support and query gradients, mean over tasks"),
        ("E|grad l|", constants.gradient_norm, "norm of the query gradients, mean over tasks"),
    ]
    return [
        (name, "not known: one query sample" if math.isnan(value) else f"{value:.4g}", meaning)
        for name, value, meaning in rows
    ]


def _implied(constants: Constants, settings: Settings) -> list[tuple[str, str, str]]:
    L, rho, alpha, steps = constants.L, constants.rho, settings.inner_lr, settings.steps
    growth, c_l, c_b = theory.smoothness_constants(L, rho, alpha, steps)
    rows = [
        (
            "alpha to use",
            f"{theory.recommended_inner_lr(L, steps):.3g}",
            f"1 / (8 N L), N = {steps}; configured: {alpha:g}",
        ),
        ("(1 + alpha L)^2N", f"{growth:.4g}", "below 2 in Ji's theorems"),
        ("C_L, C_b", f"{c_l:.4g}, {c_b:.4g}", "how L-hat grows with the task gradients and with b"),
    ]
    for rule in rules(settings):
        beta = stepsize(rule, theory.paper_scale(rule, settings.curvature), constants, settings)
        tasks, samples = _stepsize_batches(rule, constants, settings)
        known = (
            ""
            if rule == "finite_sum"
            else f" of {'not known' if math.isnan(constants.sample_sigma) else _count(samples)} "
            "samples"
        )
        rows.append(
            (f"beta, {_EQUATION[rule]}", f"{beta:.3g}", "meta-stepsize with the papers' constant")
        )
        rows.append((f"B', {_EQUATION[rule]}", _count(tasks), f"tasks{known}, for its estimate"))
    if settings.curvature != "none" and not math.isnan(constants.hessian_sigma):
        needed = theory.hessian_batch(alpha, constants.hessian_sigma)
        rows.append(
            (
                "D_h",
                _count(needed),
                (
                    "samples for a Hessian-vector product, 2 alpha^2 sigma_H^2, where they are drawn "
                    "for it"
                ),
            )
        )
    if settings.curvature == "finite_difference":
        bound = theory.hessian_free_error(L, rho, alpha, steps, settings.probe_radius, 1.0)
        rows.append(
            (
                "probing radius h",
                f"{settings.probe_radius:.3g}",
                (
                    "by default the cube root of the machine epsilon; error of the meta-gradient at "
                    f"worst {bound:.2g} |v|"
                ),
            )
        )
    return rows


def _aligned(rows: list[tuple[str, str, str]]) -> str:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows)
