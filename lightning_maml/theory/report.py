"""What measured constants imply, and whether given settings satisfy the theorems, in words."""

import math
from typing import NamedTuple

from lightning_maml import theory
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.theory import Rule
from lightning_maml.theory.coverage import Data, Theorem, described, known_instead, theorems
from lightning_maml.theory.measure import Constants


class Adaptive(NamedTuple):
    """How an adaptive meta-stepsize is configured.

    Attributes:
        rule: Its rule.
        scale: Its numerator.
        tasks: B', summed over all processes.

    Examples:
        >>> from lightning_maml.theory.report import Adaptive
        >>> Adaptive("one_step", scale=0.5, tasks=4).rule
        'one_step'
    """

    rule: Rule
    scale: float
    tasks: int


class Settings(NamedTuple):
    """The settings of a run that the theorems have conditions on.

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
            optimizer, several rates, a schedule, or clipped gradients.
        kinks: Layers at which the network is not twice differentiable.

    Examples:
        >>> from lightning_maml.theory.report import Settings, rules
        >>> settings = Settings("exact", 0.1, 1, 32, 15, (5, 5), 1e-3, stepsize=None, kinks=[])
        >>> rules(settings)
        ['one_step', 'resampling']
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

    @property
    def data(self) -> Data:
        """The kind of tasks."""
        return "finite_sum" if self.resampling is None else "resampling"


class Condition(NamedTuple):
    """A condition of a theorem.

    Attributes:
        source: Paper and theorem.
        text: The condition with its numbers.
        holds: Whether it does; None where the constants do not tell.

    Examples:
        >>> from lightning_maml.theory.report import Condition
        >>> Condition("Ji, Corollary 6", "S = 20, at least 15 needed", holds=True).holds
        True
    """

    source: str
    text: str
    holds: bool | None


_EQUATION: dict[Rule, str] = {
    "one_step": "Fallah eq. 17",
    "resampling": "Ji eq. 14",
    "finite_sum": "Ji eq. 22",
}
_WORDS = {True: "holds", False: "does not hold", None: "not decided"}


def rules(settings: Settings) -> list[Rule]:
    """Return the stepsize rules of the theorems that cover the run, for HF-MAML those of MAML's."""
    return [theorem.rule for theorem in judged_by(settings)]


def judged_as(settings: Settings) -> CurvatureName:
    """Return the algorithm whose theorems are looked at: for HF-MAML it is MAML."""
    return "none" if settings.curvature == "none" else "exact"


def judged_by(settings: Settings) -> list[Theorem]:
    """Return the theorems whose conditions are judged, for HF-MAML those of MAML.

    HF-MAML is MAML but for an error, and none is about it.
    """
    found = theorems(judged_as(settings), settings.steps, settings.data)
    if settings.curvature != "finite_difference":
        return found
    return [
        theorem._replace(name=f"{theorem.name}, on MAML", corollary=f"{theorem.corollary}, on MAML")
        for theorem in found
    ]


def stepsize(rule: Rule, scale: float, constants: Constants, settings: Settings) -> float:
    """Return beta of ``rule`` [parameter^2 / loss], with ``scale`` as its numerator."""
    smoothness = theory.meta_smoothness(
        rule,
        constants.L,
        constants.rho,
        settings.inner_lr,
        settings.steps,
        constants.gradient_norm,
        b=constants.b,
    )
    return theory.meta_stepsize(smoothness, scale)


def conditions(constants: Constants, settings: Settings) -> list[Condition]:
    """Return every condition of the theorems that the settings may break.

    Args:
        constants: As measured, or as known.
        settings: The run's settings.

    Examples:
        >>> from lightning_maml.theory.measure import Constants
        >>> from lightning_maml.theory.report import Settings, conditions
        >>> constants = Constants(2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 1.0, 100)
        >>> settings = Settings("exact", 0.05, 1, 16, 15, (50, 10), 1e-3, stepsize=1e-6, kinks=[])
        >>> for source, text, holds in conditions(constants, settings):
        ...     if holds is False:
        ...         print(source, "|", text)
        Fallah, Theorem 4.12 | B = 16 tasks per step, at least 20 needed
    """
    kinks = f"; there are kinks in {', '.join(settings.kinks)}" if settings.kinks else ""
    smooth = f"network and loss are twice differentiable{kinks}"
    everywhere = (
        "one L, rho, sigma and so on for all parameters, and losses bounded below; a measurement "
        "cannot tell, and networks of several layers usually have no such L"
    )
    found = [
        Condition("both papers", smooth, not settings.kinks),
        Condition("both papers", everywhere, None),
    ]
    if settings.resampling is not None:
        independent = (
            "batches independent of each other; the datamodules draw a task's batches without "
            "common images, so nearly, where classes are large"
        )
        found.append(Condition("both papers", independent, None))
    for theorem in judged_by(settings):
        judge = _fallah_conditions if theorem.rule == "one_step" else _ji_conditions
        found += judge(theorem, constants, settings)
    return [*found, *_stepsize_conditions(constants, settings)]


def coverage(constants: Constants, settings: Settings) -> str:
    """Return which theorems are about the run, or that none is and what is known instead."""
    case = (settings.curvature, settings.steps, settings.data)
    name = described(*case)
    if found := theorems(*case):
        names = " and ".join(theorem.name for theorem in found)
        return f"{name}, is covered by {names} if the conditions below hold"
    sentence = f"No theorem covers {name}: {known_instead(*case)}"
    if settings.steps == 0:
        return sentence
    L, alpha, steps = constants.L, settings.inner_lr, settings.steps
    if settings.curvature == "none":
        b = constants.b if settings.resampling is None else 0.0  # there the losses are the same
        floor = theory.first_order_floor(L, alpha, steps, constants.sigma, b)
        if math.isinf(floor):
            return f"{sentence}, which is infinite at this alpha, so nothing is known"
        return f"{sentence} = {floor:.3g}, with sigma as it is here"
    grown = (1 + alpha * L) ** steps
    at_adapted = grown * constants.gradient_norm + (grown - 1) * constants.b
    error = theory.hessian_free_error(
        L, constants.rho, alpha, steps, settings.probe_radius, at_adapted
    )
    return (
        f"{sentence}, here {error:.3g} (the query gradient is {constants.gradient_norm:.3g}). The "
        "conditions below are those of the theorems on MAML"
    )


def _fallah_conditions(
    theorem: Theorem, constants: Constants, settings: Settings
) -> list[Condition]:
    largest = theory.largest_one_step_inner_lr(constants.L, settings.curvature)
    formula = "1 / (10 L)" if settings.curvature == "none" else "1 / (6 L)"
    found = [
        _at_most(theorem.name, "alpha", settings.inner_lr, largest, formula),
        _at_least(theorem.name, "B", settings.tasks, 20, "20", "tasks per step"),
    ]
    assert settings.resampling is not None, "no theorem of Fallah's is about Episodes"
    if settings.curvature != "none":
        hessian = settings.resampling[1]
        found.append(_hessian_batch_condition(theorem.name, constants, settings.inner_lr, hessian))
    return found


def _hessian_batch_condition(
    theorem: str, constants: Constants, alpha: float, hessian: int
) -> Condition:
    if math.isnan(constants.hessian_sigma):
        text = "D_h: sigma_H needs at least two query samples per task"
        return Condition(theorem, text, None)
    needed = theory.hessian_batch(alpha, constants.hessian_sigma)
    return _at_least(theorem, "D_h", hessian, needed, "2 alpha^2 sigma_H^2", "Hessian samples")


def _ji_conditions(judged_by: Theorem, constants: Constants, settings: Settings) -> list[Condition]:
    theorem, corollary, _ = judged_by
    alpha, L, steps = settings.inner_lr, constants.L, settings.steps
    found = [
        _below(theorem, "alpha", alpha, theory.largest_inner_lr(L, steps), "(2^(1/2N) - 1) / L"),
        _at_most(corollary, "alpha", alpha, theory.recommended_inner_lr(L, steps), "1 / (8 N L)"),
        _theta_condition(judged_by, constants, settings),
    ]
    if settings.resampling is not None:
        found += _resampling_batch_conditions(corollary, constants, settings.resampling)
    return found


def _resampling_batch_conditions(
    corollary: str, constants: Constants, batches: tuple[int, int]
) -> list[Condition]:
    if math.isnan(constants.sample_sigma):
        text = "S and D: sigma-tilde and sigma_H need at least two query samples per task"
        return [Condition(corollary, text, None)]
    needed = theory.resampling_batches(
        constants.L, constants.rho, constants.sample_sigma, constants.hessian_sigma
    )
    support, hessian = batches
    return [
        _at_least(
            corollary,
            "S",
            support,
            needed.support,
            "15 rho^2 sigma_g^2 / L^4",
            "samples per inner step",
        ),
        _at_least(corollary, "D", hessian, needed.hessian, "sigma_H^2 / L^2", "Hessian samples"),
    ]


def _theta_condition(judged_by: Theorem, constants: Constants, settings: Settings) -> Condition:
    """Return the condition that theta is positive: otherwise Ji's theorem bounds nothing."""
    theorem = judged_by.name
    arguments = (constants.L, constants.rho, settings.inner_lr, settings.steps)
    c_beta = _c_beta(judged_by.rule, settings)
    # the cases in which theta has no value come first: its formula refuses them
    if settings.inner_lr >= theory.largest_inner_lr(constants.L, settings.steps):
        text = "theta > 0 needed; there is none while (1 + alpha L)^(2N) is 2 or more"
        return Condition(theorem, text, False)
    if theory.smoothness_constants(*arguments).c_l == 0:
        text = "theta > 0 needed; C_L = 0, so F is smooth and any small stepsize will do"
        return Condition(theorem, text, True)
    if settings.resampling is not None and math.isnan(constants.sample_sigma):
        text = "theta > 0 needed; sigma-tilde and sigma_H need at least two query samples per task"
        return Condition(theorem, text, None)
    if settings.resampling is None:
        convergence = theory.finite_sum_convergence(
            *arguments,
            sigma=constants.sigma,
            b=constants.b,
            mean_square_b=constants.mean_square_b,
            tasks=settings.tasks,
            c_beta=c_beta,
        )
    else:
        support, hessian = settings.resampling
        convergence = theory.resampling_convergence(
            *arguments,
            sigma=constants.sigma,
            sample_sigma=constants.sample_sigma,
            hessian_sigma=constants.hessian_sigma,
            tasks=settings.tasks,
            support=support,
            hessian=max(hessian, 1),
            query=settings.query,
            c_beta=c_beta,
        )
    theta = convergence.theta
    with_these = f"B = {settings.tasks} and C_beta = {c_beta:.3g}"
    return Condition(theorem, f"theta = {theta:.3g} with {with_these}, above 0 needed", theta > 0)


def _c_beta(rule: Rule, settings: Settings) -> float:
    """Return C_beta of the run's stepsize; the papers' where that is not an adaptive one."""
    adaptive = settings.stepsize
    if isinstance(adaptive, Adaptive) and adaptive.rule == rule:
        return 1 / adaptive.scale
    return 1 / theory.paper_scale(rule)


def _stepsize_conditions(constants: Constants, settings: Settings) -> list[Condition]:
    if settings.stepsize is None:
        text = (
            "meta-steps must be those of plain SGD at one rate, fixed or by AdaptiveMetaStepsize, "
            "without clipping; those of this run are others, which no theorem covers"
        )
        return [Condition("both papers", text, False)]
    if isinstance(settings.stepsize, Adaptive):
        return _adaptive_conditions(settings.stepsize, constants, settings)
    found = []
    for rule in rules(settings):
        scale = theory.paper_scale(rule, judged_as(settings))
        beta = stepsize(rule, scale, constants, settings)
        source = _EQUATION[rule]
        found.append(_at_most(source, "fixed beta", settings.stepsize, beta, "beta here"))
    return found


def _adaptive_conditions(
    adaptive: Adaptive, constants: Constants, settings: Settings
) -> list[Condition]:
    rule, scale, tasks = adaptive
    source = _EQUATION[rule]
    if rule not in rules(settings):
        text = (
            f"AdaptiveMetaStepsize has rule {rule!r}, which no theorem uses for this algorithm, N "
            "and kind of tasks"
        )
        return [Condition(source, text, False)]
    paper_scale = theory.paper_scale(rule, judged_as(settings))
    needed = _stepsize_batches(rule, constants, settings)
    theorem = next(each for each in judged_by(settings) if each.rule == rule)
    # Ji's theorems take any scale with which theta is positive, Fallah's this one alone
    of_constant = theorem.name if rule == "one_step" else theorem.corollary
    found = [
        _at_most(of_constant, "scale", scale, paper_scale, "the papers' constant"),
        _at_least(source, "B'", tasks, needed.tasks, "the theorem's", "tasks for the stepsize"),
    ]
    if rule == "finite_sum":
        return found
    if math.isnan(constants.sample_sigma):
        text = "samples of each: sigma-tilde needs at least two query samples per task"
        return [*found, Condition(source, text, None)]
    samples = _at_least(
        source,
        "query samples",
        settings.query,
        needed.samples,
        "the theorem's",
        "for the stepsize",
    )
    return [*found, samples]


def _stepsize_batches(
    rule: Rule, constants: Constants, settings: Settings
) -> theory.StepsizeBatches:
    # callers show no number of samples where sigma-tilde is not known
    sample_sigma = 0.0 if math.isnan(constants.sample_sigma) else constants.sample_sigma
    return theory.stepsize_batches(
        rule,
        constants.L,
        constants.rho,
        settings.inner_lr,
        settings.steps,
        constants.sigma,
        sample_sigma,
        constants.b,
    )


def _at_most(source: str, name: str, value: float, bound: float, formula: str) -> Condition:
    text = f"{name} = {value:.3g}, at most {formula} = {bound:.3g} needed"
    return Condition(source, text, value <= bound)


def _below(source: str, name: str, value: float, bound: float, formula: str) -> Condition:
    text = f"{name} = {value:.3g}, less than {formula} = {bound:.3g} needed"
    return Condition(source, text, value < bound)


def _at_least(source: str, name: str, value: int, bound: int, formula: str, unit: str) -> Condition:
    needed = formula if formula == str(bound) else f"{formula} = {count(bound)}"
    text = f"{name} = {value} {unit}, at least {needed} needed"
    return Condition(source, text, value >= bound)


def count(number: int) -> str:
    """Return a whole number, in three digits where it is long."""
    return str(number) if number < 10**6 else f"{number:.3g}"


def report(constants: Constants, settings: Settings) -> str:
    """Return the constants, what they imply and the conditions, as three tables.

    Args:
        constants: As measured, or as known.
        settings: The run's settings.

    Examples:
        >>> from lightning_maml.theory.measure import Constants
        >>> from lightning_maml.theory.report import Settings, report
        >>> constants = Constants(2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 1.0, 100)
        >>> settings = Settings("exact", 0.05, 1, 16, 15, None, 1e-3, stepsize=1e-6, kinks=[])
        >>> report(constants, settings).splitlines()[0].split(";")[0]
        'Measured with 100 gradient evaluations'
    """
    opening = (
        f"Measured with {constants.gradient_evaluations} gradient evaluations; the theorems take "
        "suprema, of which these are lower bounds"
    )
    closing = (
        "The conditions are sufficient in the worst case, and not necessary: L and rho as measured "
        "often ask for an alpha far below what trains best."
    )
    judged = [(_WORDS[c.holds], c.source, c.text) for c in conditions(constants, settings)]
    parts = [
        opening,
        aligned(_measured(constants)),
        "Implied",
        aligned(_implied(constants, settings)),
        coverage(constants, settings),
        "Conditions of the theorems",
        aligned(judged),
        closing,
    ]
    return "\n\n".join(parts)


_MEANINGS = {
    "L": "smoothness of the task losses: largest over tasks, sets and inner steps",
    "rho": "Lipschitz constant of their Hessians, likewise",
    "sigma": "standard deviation of the gradients over tasks",
    "sigma-tilde": "... over the samples of a task",
    "sigma_H": "... of the Hessians over the samples of a task, along their leading direction",
    "b": "distance between support and query gradients, mean over tasks",
    "E|grad l|": "norm of the query gradients, mean over tasks",
}


def _measured(constants: Constants) -> list[tuple[str, str, str]]:
    values = (
        constants.L,
        constants.rho,
        constants.sigma,
        constants.sample_sigma,
        constants.hessian_sigma,
        constants.b,
        constants.gradient_norm,
    )
    rows = []
    for (name, meaning), value in zip(_MEANINGS.items(), values, strict=True):
        shown = "not known: one query sample" if math.isnan(value) else f"{value:.4g}"
        rows.append((name, shown, meaning))
    return rows


def _implied(constants: Constants, settings: Settings) -> list[tuple[str, str, str]]:
    L, rho, alpha, steps = constants.L, constants.rho, settings.inner_lr, settings.steps
    recommended = theory.recommended_inner_lr(L, steps)
    growth, c_l, c_b = theory.smoothness_constants(L, rho, alpha, steps)
    on_maml = "" if settings.curvature == "exact" else ", for MAML"
    rows = [
        (
            "alpha to use",
            f"{recommended:.3g}",
            f"1 / (8 N L){on_maml}, N = {steps}; configured: {alpha:g}",
        ),
        ("(1 + alpha L)^2N", f"{growth:.4g}", "below 2 in Ji's theorems"),
        ("C_L, C_b", f"{c_l:.4g}, {c_b:.4g}", "how L-hat grows with the task gradients and with b"),
    ]
    for rule in rules(settings):
        rows += _implied_by(rule, constants, settings)
    draws_for_products = settings.resampling is not None and settings.curvature != "none"
    if draws_for_products and not math.isnan(constants.hessian_sigma):
        needed = theory.hessian_batch(alpha, constants.hessian_sigma)
        meaning = "samples for a Hessian-vector product, 2 alpha^2 sigma_H^2"
        rows.append(("D_h", count(needed), meaning))
    if settings.curvature == "finite_difference":
        # with a query gradient of norm 1, so as a fraction of it
        bound = theory.hessian_free_error(L, rho, alpha, steps, settings.probe_radius, 1.0)
        meaning = (
            "by default the cube root of the machine epsilon; error of the meta-gradient at worst "
            f"{bound:.2g} |v|"
        )
        rows.append(("probing radius h", f"{settings.probe_radius:.3g}", meaning))
    return rows


def _implied_by(rule: Rule, constants: Constants, settings: Settings) -> list[tuple[str, str, str]]:
    """Return the meta-stepsize of ``rule``, and the batches that estimate it."""
    source = _EQUATION[rule]
    beta = stepsize(rule, theory.paper_scale(rule, judged_as(settings)), constants, settings)
    needed = _stepsize_batches(rule, constants, settings)
    samples = ""
    if rule != "finite_sum":  # whose stepsize takes the whole query set
        is_known = not math.isnan(constants.sample_sigma)
        samples = f" of {count(needed.samples) if is_known else 'not known'} samples"
    return [
        (f"beta, {source}", f"{beta:.3g}", "meta-stepsize with the papers' constant"),
        (f"B', {source}", count(needed.tasks), f"tasks{samples}, for its estimate"),
    ]


def aligned(rows: list[tuple[str, str, str]]) -> str:
    """Return rows as lines, with their columns below each other."""
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    return "\n".join(f"  {row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows)
