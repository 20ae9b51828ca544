"""The constants, stepsize rules, conditions and bounds of the two papers, as functions of numbers.

Sources: "Fallah" is Fallah, Mokhtari, Ozdaglar, AISTATS 2020; "Ji" is Ji, Yang, Liang, JMLR 23,
2022. Fallah covers one inner step with fresh samples, Ji N steps: with fresh samples for every step
(resampling), and with one support set and one query set per task (finite-sum).

Arguments have the papers' letters and mean the same everywhere, in units of the loss per power of
the parameters' unit:

- ``L``: smoothness of the task losses, the largest spectral norm of a Hessian [loss / parameter^2];
- ``rho``: Lipschitz constant of their Hessians [loss / parameter^3];
- ``alpha``: the inner learning rate [parameter^2 / loss], so that ``alpha L`` has no unit;
- ``steps``: N, the number of inner steps;
- ``sigma``: standard deviation of the task gradients over tasks [loss / parameter];
- ``sample_sigma``: standard deviation of the gradients of single samples within a task (Fallah:
  sigma-tilde, Ji: sigma_g) [loss / parameter];
- ``hessian_sigma``: standard deviation of their Hessians (sigma_H) [loss / parameter^2];
- ``b``: mean over tasks of the distance between the gradients of support and query loss [loss /
  parameter].

Every function takes numpy's numbers and tensors without dimensions too, and raises a ``ValueError``
if an argument is negative, not finite, or 0 where it must be positive, or if there is no result.

Some printed formulas cannot be right: their units do not fit, they contradict the paper's own
corollaries, or a step of the proof does not hold. There the function follows the proof, and its
docstring says so.
"""

import math
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from lightning_maml.core.hvp import CurvatureName
from lightning_maml.errors import UserError, UserValueError

Rule = Literal["one_step", "resampling", "finite_sum"]
"""The meta-stepsize of Fallah eq. 17, of Ji eq. 14 or of Ji eq. 22."""


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _of_plain_numbers(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function take numpy's numbers and tensors, and refuse what it has no result for.

    Small integers and short floats would overflow without a word.
    """

    @wraps(function)
    def of_plain_numbers(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        plain: Any = [_plain(value) for value in args]
        named: Any = {name: _plain(value) for name, value in kwargs.items()}
        try:
            result = function(*plain, **named)
            _check_is_number(result)
        except UserError:
            raise
        except (OverflowError, ZeroDivisionError, ValueError) as error:
            given = dict(zip(signature(function).parameters, plain, strict=False)) | named
            raise UserValueError(
                f"Expected arguments for which {function.__name__} is a number but got "
                f"{', '.join(f'{name}={value}' for name, value in given.items())}."
            ) from error
        return result

    return of_plain_numbers


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _check_is_number(result: Any) -> None:
    """Refuse a result that is nan, but for a constant that Theorem 9 does not have."""
    parts = result[:3] if isinstance(result, Convergence) else result
    parts = parts if isinstance(parts, tuple) else (parts,)
    if any(isinstance(part, float) and math.isnan(part) for part in parts):
        raise ValueError


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


@_of_plain_numbers
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
    _check(rho=rho, alpha=alpha, steps=steps)
    a, growth = _growth(L, alpha, steps)
    grown = _grown(alpha * L, steps)
    spread = rho * a ** (steps - 1) * _grown_per_L(L, alpha, steps)
    return SmoothnessConstants(growth, c_l=spread * a**steps, c_b=spread * grown)


@_of_plain_numbers
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
    _check(L=L, rho=rho, alpha=alpha, steps=steps)
    a, growth = _growth(L, alpha, steps)
    both = (alpha * rho + rho / L * a ** (steps - 1)) * growth
    return SmoothnessConstants(growth, c_l=both, c_b=both)


def _growth(L: float, alpha: float, steps: int) -> tuple[float, float]:
    """Return ``a`` and ``a^(2N)``."""
    _check_number("L", L, may_be_zero=True)
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


def _grown(x: float, exponent: int) -> float:
    """Return ``(1 + x)^exponent - 1``, to all digits where x is small; infinite if it overflows."""
    try:
        return math.expm1(exponent * math.log1p(x))
    except OverflowError:
        return math.inf


def _grown_per_L(L: float, alpha: float, steps: int) -> float:
    """Return ``((1 + alpha L)^N - 1) / L``, which goes to ``alpha N`` as L goes to 0."""
    return _grown(alpha * L, steps) / L if L else alpha * steps


@_of_plain_numbers
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
    _check(gradient_norm=gradient_norm, b=b)
    _check_rule(rule, steps)
    constants = smoothness_constants(L, rho, alpha, steps)
    if rule == "one_step":
        return 4 * L + 2 * rho * alpha * gradient_norm
    if rule == "resampling":
        return constants.growth * L + constants.c_l * gradient_norm
    return constants.growth * L + constants.c_b * b + constants.c_l * gradient_norm


@_of_plain_numbers
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
    _check_rule(rule)
    check_curvature(curvature)
    if rule == "one_step":
        return {"exact": 1 / 12, "none": 1 / 18, "finite_difference": 1 / 25}[curvature]
    return 1 / 100 if rule == "resampling" else 1 / 80


@_of_plain_numbers
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
    _check(smoothness=smoothness, scale=scale)
    beta = scale / smoothness
    if math.isinf(beta):
        raise UserValueError(
            "Expected scale / L-hat to be a number but got "
            f"{scale:.3g} / {smoothness:.3g}; lower scale."
        )
    return beta


@_of_plain_numbers
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
    _check(steps=steps)
    _check_number("L", L, may_be_zero=True)
    return math.expm1(math.log(2) / (2 * steps)) / L if steps and L else math.inf


@_of_plain_numbers
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
    _check(steps=steps)
    _check_number("L", L, may_be_zero=True)
    return 1 / (8 * steps * L) if steps and L else math.inf


@_of_plain_numbers
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
    _check_number("L", L, may_be_zero=True)
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


@_of_plain_numbers
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
    _check(L=L, sigma=sigma, sample_sigma=sample_sigma, b=b)
    _check_rule(rule, steps)
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


@_of_plain_numbers
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
    _check(alpha=alpha, hessian_sigma=hessian_sigma)
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


@_of_plain_numbers
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
    _check(L=L, rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma)
    support = 15 * (rho * sample_sigma) ** 2 / L**4
    hessian = (hessian_sigma / L) ** 2
    return ResamplingBatches(_at_least(support), _at_least(hessian))


@_of_plain_numbers
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
    _check(rho=rho, alpha=alpha)
    return 1 / (6 * rho * alpha) if rho * alpha > 0 else math.inf


@_of_plain_numbers
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
    _check(epsilon=epsilon)
    error_per_radius = hessian_free_error(L, rho, alpha, steps, 1.0, query_gradient_norm)
    if math.isinf(error_per_radius):
        raise UserValueError(
            f"Expected an error that is a number but it overflows with alpha = {alpha:.3g} and "
            f"N = {steps}; lower alpha."
        )
    wanted = epsilon / (2 * error_per_radius) if error_per_radius > 0 else math.inf
    return min(printed_probe_radius(rho, alpha), wanted)


@_of_plain_numbers
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
    _check(
        L=L,
        rho=rho,
        alpha=alpha,
        radius=radius,
        query_gradient_norm=query_gradient_norm,
        steps=steps,
    )
    grown = 1 + _grown(alpha * L, max(steps - 1, 0))
    without_growth = steps * alpha * rho * radius / 2 * query_gradient_norm
    return grown * without_growth if without_growth else 0.0


@_of_plain_numbers
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
    _check(L=L, alpha=alpha, sigma=sigma, b=b, steps=steps)
    gap = 1 - _grown(alpha * L, 2 * steps)
    if gap <= 0:
        return math.inf
    grown = _grown(alpha * L, steps)  # a^N - 1
    c = (grown + 1) * grown / gap
    if c >= 1:
        return math.inf
    from_sets = grown * ((grown + 1) ** 2 / gap + 1) * b
    return (c * sigma + grown * from_sets) / (1 - c)


@_of_plain_numbers
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
    _check(
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


@_of_plain_numbers
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
    _check(L=L, alpha=alpha, sample_sigma=sample_sigma, support=support)
    return alpha * L * sample_sigma / math.sqrt(support)


@_of_plain_numbers
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
    _check(
        L=L, alpha=alpha, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, samples=samples
    )
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


@_of_plain_numbers
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
    _check(alpha=alpha, step=step, sample_sigma=sample_sigma, support=support)
    _check_number("L", L, may_be_zero=True)
    if sample_sigma == 0:
        return PathError(0.0, 0.0)
    x = alpha * L
    mean = _grown_per_L(L, alpha, step) * sample_sigma / math.sqrt(support)
    grown_per_L = _grown(2 * x * (1 + x), step) / L if L else 2 * alpha * step
    mean_square = grown_per_L * alpha * sample_sigma * sample_sigma / ((1 + x) * support)
    return PathError(mean, mean_square)


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


@_of_plain_numbers
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
    _check(rho=rho, sample_sigma=sample_sigma, hessian_sigma=hessian_sigma, hessian=hessian)
    a, gap = _gap(L, alpha, steps)
    x = alpha * L
    factors = 1 + _grown(alpha**2 * hessian_sigma**2 / hessian + a**2 - 1, steps)
    squ1 = 3 * factors * sample_sigma**2
    squ3 = 6 * factors * a ** (2 * steps) / gap**2
    # the formula has the exponent N - 1, which would make something of no steps at all
    err2 = 0.0
    if steps:
        grown_per_L = _grown_per_L(L, alpha, steps - 1)
        err2 = a ** (2 * steps - 1) * grown_per_L**2 * rho * sample_sigma / gap
    return MomentConstants(
        err1=a**steps * _grown(x, steps) * sample_sigma,
        err2=err2,
        squ1=squ1,
        squ2=squ1 * _grown(2 * x * (1 + x), steps) * x / (1 + x),
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

    Examples:
        >>> from lightning_maml.theory import Convergence
        >>> Convergence(theta=0.5, phi=1.0, xi=2.0).chi
        nan
    """

    theta: float
    phi: float
    xi: float
    chi: float = math.nan


@_of_plain_numbers
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
    _check(L=L, sigma=sigma, tasks=tasks, support=support, query=query, c_beta=c_beta)
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


@_of_plain_numbers
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

    Examples:
        >>> from lightning_maml.theory import Convergence, resampling_bound
        >>> constants = Convergence(theta=1.0, phi=1.0, xi=1.0, chi=0.0)
        >>> resampling_bound(constants, gap=1.0, iterations=2, tasks=4, support=4)
        1.0
    """
    _check(gap=gap, iterations=iterations, tasks=tasks, support=support)
    theta, phi, xi, chi = convergence
    return _root(theta, chi, gap / iterations + xi / support + phi / tasks)


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


@_of_plain_numbers
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
    _check(sigma=sigma, b=b, mean_square_b=mean_square_b)
    a, gap = _gap(L, alpha, steps)
    growth = a ** (2 * steps)
    squ1 = 4 * growth**2 / gap**2
    over_tasks = squ1 * _grown(alpha * L, 2 * steps) ** 2 * (sigma + b) ** 2
    return FiniteSumMoments(squ1, over_tasks + 2 * growth**2 * (sigma**2 + mean_square_b))


@_of_plain_numbers
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
    _check(L=L, tasks=tasks, c_beta=c_beta)
    a_1, a_2 = finite_sum_moments(L, alpha, steps, sigma=sigma, b=b, mean_square_b=mean_square_b)
    a, gap = _gap(L, alpha, steps)
    growth, c_l, c_b = smoothness_constants(L, rho, alpha, steps)
    _check_curved(c_l)
    return Convergence(
        theta=gap / c_l * (1 / c_beta - (a_1 / tasks + 1) / c_beta**2),
        phi=a_2 / (L * c_beta**2),
        xi=gap / c_l * (growth * L + c_b * b) + sigma + a**steps * _grown(alpha * L, steps) * b,
    )


@_of_plain_numbers
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
    _check(gap=gap, iterations=iterations, tasks=tasks)
    return _root(convergence.theta, convergence.xi, gap / iterations + convergence.phi / tasks)


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


@_of_plain_numbers
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
    _check(epsilon=epsilon, gap=gap, L=L)
    _check_number("steps", steps, may_be_zero=False)
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

    theta, _, xi, chi = constants(least_support)
    third = _allowed(theta, chi, epsilon) / 3
    support = max(least_support, _whole(xi, third))
    # phi falls as the support and query batches grow, so take it at their final size
    tasks = max(least_tasks, _whole(constants(support).phi, third))
    return Sizes(_whole(gap, third), tasks, support, support, hessian)


@_of_plain_numbers
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
    _check(epsilon=epsilon, gap=gap, L=L)
    _check_number("steps", steps, may_be_zero=False)
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


def _root(theta: float, offset: float, d: float) -> float:
    """Return the positive root of ``theta x^2 = d (offset + x)``.

    Infinite where theta is not positive, that is, where the theorem does not hold.
    """
    if theta <= 0:
        return math.inf
    return d / (2 * theta) + math.sqrt(offset * d / theta + (d / (2 * theta)) ** 2)


def _gap(L: float, alpha: float, steps: int) -> tuple[float, float]:
    """Return ``a`` and ``2 - a^(2N)``, positive where the theorems hold."""
    _check(alpha=alpha, steps=steps)
    _check_number("L", L, may_be_zero=True)
    largest = largest_inner_lr(L, steps)
    if alpha >= largest:
        raise UserValueError(
            f"Expected alpha < (2^(1/2N) - 1) / L = {largest:.3g} but got {alpha:.3g}; lower alpha."
        )
    # just below that limit, rounding may make it 0
    gap = max(1 - _grown(alpha * L, 2 * steps), sys.float_info.epsilon)
    return 1 + alpha * L, gap


def _at_least(number: float) -> int:
    return max(1, math.ceil(number))


def _check_curved(c_l: float) -> None:
    if c_l == 0:
        raise UserValueError(
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
        _check_number(name, number, may_be_zero=name not in _POSITIVE)
        if name in ("steps", "step") and number != int(number):
            raise UserValueError(f"Expected `{name}` to be a whole number but got {number}.")


def _check_number(name: str, number: float, *, may_be_zero: bool) -> None:
    if not (math.isfinite(number) and (number >= 0 if may_be_zero else number > 0)):
        raise UserValueError(
            f"Expected `{name}` to be a finite number "
            f"{'of at least' if may_be_zero else 'above'} 0 but got {number}."
        )


def check_curvature(curvature: CurvatureName) -> None:
    """Check the name of the Hessian-vector products, which tells the algorithm.

    Raises:
        ValueError: If there is none of that name.
    """
    if curvature not in ("exact", "none", "finite_difference"):
        raise UserValueError(
            "Expected `curvature` to be 'exact', 'none' or 'finite_difference' but got "
            f"{curvature!r}."
        )


def _check_rule(rule: Rule, steps: int = 1) -> None:
    if rule not in ("one_step", "resampling", "finite_sum"):
        raise UserValueError(
            f"Expected `rule` to be 'one_step', 'resampling' or 'finite_sum' but got {rule!r}."
        )
    if rule == "one_step" and steps != 1:
        raise UserValueError(
            f"Expected one inner step with rule 'one_step' but got {steps}; use 'resampling' or "
            "'finite_sum'."
        )
