"""What all formulas do with their arguments: take any kind of number, and refuse wrong ones."""

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, Literal, ParamSpec, TypeVar

from lightning_maml.core.hvp import CurvatureName
from lightning_maml.errors import UserError, UserValueError

Rule = Literal["one_step", "resampling", "finite_sum"]
"""The meta-stepsize of Fallah eq. 17, of Ji eq. 14 or of Ji eq. 22."""


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def of_plain_numbers(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function take numpy's numbers and tensors, and refuse what it has no result for.

    Small integers and short floats would overflow without a word.
    """

    @wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
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

    return checked


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _check_is_number(result: Any) -> None:
    parts = result if isinstance(result, tuple) else (result,)
    if any(isinstance(part, float) and math.isnan(part) for part in parts):
        raise ValueError


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


def check(**numbers: float) -> None:
    """Refuse numbers that are not finite, are negative or, where their name says so, 0.

    Raises:
        ValueError: If one is.
    """
    for name, number in numbers.items():
        check_number(name, number, may_be_zero=name not in _POSITIVE)
        if name in ("steps", "step") and number != int(number):
            raise UserValueError(f"Expected `{name}` to be a whole number but got {number}.")


def check_number(name: str, number: float, *, may_be_zero: bool) -> None:
    """Refuse one number that is not finite, is negative or, unless it may be, 0.

    Raises:
        ValueError: If it is.
    """
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


def check_rule(rule: Rule, steps: int = 1) -> None:
    """Check the name of the rule for the meta-stepsize, and that it is for so many inner steps.

    Raises:
        ValueError: If there is none of that name, or it is for one step only.
    """
    if rule not in ("one_step", "resampling", "finite_sum"):
        raise UserValueError(
            f"Expected `rule` to be 'one_step', 'resampling' or 'finite_sum' but got {rule!r}."
        )
    if rule == "one_step" and steps != 1:
        raise UserValueError(
            f"Expected one inner step with rule 'one_step' but got {steps}; use 'resampling' or "
            "'finite_sum'."
        )
