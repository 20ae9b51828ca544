"""Which theorem of the papers covers which algorithm, and what is known where none does.

Fallah et al. 2020 treat one inner step, and batches for the inner step, the curvature and the query
that are drawn independently of each other from one distribution per task. Ji et al. 2022 treat
exact MAML alone, with any number of steps, for batches drawn like that (resampling) and for support
and query sets that a task keeps (finite-sum). (``regime="resampling"`` of the datamodules draws the
batches of a task without common images, so they are independent only nearly, where classes are
large.)
"""

from typing import Literal, NamedTuple

from lightning_maml.core.hvp import CurvatureName
from lightning_maml.errors import UserValueError
from lightning_maml.theory.arguments import Rule, check_curvature

Data = Literal["finite_sum", "resampling"]
"""Tasks as :class:`lightning_maml.Episodes` or as :class:`lightning_maml.ResampledEpisodes`."""

ALGORITHMS: dict[CurvatureName, str] = {
    "exact": "MAML",
    "none": "FO-MAML",
    "finite_difference": "HF-MAML",
}


class Theorem(NamedTuple):
    """A convergence theorem.

    Attributes:
        name: Paper and number.
        corollary: The corollary that puts numbers into it.
        rule: The meta-stepsize that it is about.

    Examples:
        >>> from lightning_maml.theory.coverage import theorems
        >>> theorems("exact", 5, "finite_sum")[0].corollary
        'Ji, Corollary 10'
    """

    name: str
    corollary: str
    rule: Rule


_ONE_STEP: dict[CurvatureName, Theorem] = {
    "exact": Theorem("Fallah, Theorem 4.12", "Fallah, Corollary 4.13", "one_step"),
    "none": Theorem("Fallah, Theorem 4.15", "Fallah, Corollary 4.16", "one_step"),
}
"""Theorem 4.17, for HF-MAML, is missing on purpose: its delta is not the one used here, and with it
the theorem does not hold as printed."""
_SEVERAL_STEPS: dict[Data, Theorem] = {
    "resampling": Theorem("Ji, Theorem 5", "Ji, Corollary 6", "resampling"),
    "finite_sum": Theorem("Ji, Theorem 9", "Ji, Corollary 10", "finite_sum"),
}


def theorems(curvature: CurvatureName, steps: int, data: Data) -> list[Theorem]:
    """Return the theorems that cover an algorithm on a kind of tasks; there may be none.

    That a theorem covers it does not mean that its conditions hold.

    Args:
        curvature: Tells which algorithm it is.
        steps: N.
        data: The kind of tasks.

    Raises:
        ValueError: If there is no ``curvature`` or ``data`` of that name.

    Examples:
        >>> from lightning_maml.theory.coverage import theorems
        >>> [theorem.name for theorem in theorems("exact", 1, "resampling")]
        ['Fallah, Theorem 4.12', 'Ji, Theorem 5']
        >>> theorems("finite_difference", 1, "resampling")
        []
    """
    check_curvature(curvature)
    if data not in _SEVERAL_STEPS:
        raise UserValueError(
            f"Expected `data` to be 'finite_sum' or 'resampling' but got {data!r}."
        )
    found = []
    if steps == 1 and data == "resampling" and curvature in _ONE_STEP:
        found.append(_ONE_STEP[curvature])
    if steps > 0 and curvature == "exact":
        found.append(_SEVERAL_STEPS[data])
    return found


def described(curvature: CurvatureName, steps: int, data: Data) -> str:
    """Return an algorithm and its kind of tasks in words.

    Examples:
        >>> from lightning_maml.theory.coverage import described
        >>> described("none", 5, "finite_sum")
        'FO-MAML, N = 5, on Episodes'
    """
    kind = "Episodes" if data == "finite_sum" else "ResampledEpisodes"
    return f"{ALGORITHMS[curvature]}, N = {steps}, on {kind}"


def known_instead(curvature: CurvatureName, steps: int, data: Data) -> str:
    """Return why no theorem covers an algorithm, and what is known instead, as a sentence.

    Empty where a theorem does.

    Args:
        curvature: Tells which algorithm it is.
        steps: N.
        data: The kind of tasks.

    Examples:
        >>> from lightning_maml.theory.coverage import known_instead
        >>> known_instead("none", 5, "resampling").split("; ")[0]
        'Fallah et al. treat one step, and Ji et al. exact MAML alone'
        >>> known_instead("exact", 5, "resampling")
        ''
    """
    if theorems(curvature, steps, data):
        return ""
    if steps == 0:
        return "without inner steps F is the mean query loss, to which the theory of SGD applies"
    if curvature == "finite_difference":
        why = "Ji et al. treat exact MAML alone"
        if steps == 1 and data == "resampling":
            why = (
                "Fallah's Theorem 4.17 is about another delta, with which it does not hold as "
                f"printed, and {why}"
            )
        return (
            f"{why}; known instead: besides rounding, its meta-gradient is expected to be within "
            "the error of its finite differences, theory.hessian_free_error, of MAML's"
        )
    why = (
        "Fallah et al. treat one step"
        if steps > 1
        else "Fallah's Theorem 4.15 is about support and query batches drawn afresh from one "
        "distribution per task (ResampledEpisodes)"
    )
    return (
        f"{why}, and Ji et al. exact MAML alone; known instead: with full batches it comes to rest "
        "where |grad F| is at most first_order_floor"
    )
