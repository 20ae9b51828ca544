"""YAML of bounded size, for configs that nobody vouches for."""

from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import YAMLError

_MOST_VALUES = 100_000
_jsonargparse_yaml = get_loader("yaml")  # a safe loader: YAML can name no Python object


def bound_configs() -> None:
    """Have jsonargparse, and so LightningCLI, report YAML that is too deep or unfolds to too much, where it would break off or never end."""
    set_loader("yaml", load_yaml, (YAMLError, ValueError))


def load_yaml(text: str) -> Any:
    """Return what YAML says, as jsonargparse reads it.

    Raises:
        ValueError: If, with what aliases repeat, there are more than 100,000 values, or more than Python can nest.
        YAMLError: If it is no YAML, or asks for Python objects.
    """
    try:
        value = _jsonargparse_yaml(text)
        values = _unfolded(value, {})
    except RecursionError as error:
        raise ValueError("Expected YAML of values that hold no more than some hundred others in each other but got deeper ones.") from error
    if values > _MOST_VALUES:
        raise ValueError(
            f"Expected YAML of at most {_MOST_VALUES} values but its aliases (*) repeat them to more; write out what is meant."
        )
    return value


def _unfolded(value: Any, counted: dict[int, int]) -> int:
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        inside = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_unfolded(item, counted) for item in inside)
    return counted[id(value)]
