"""YAML of bounded size, for configs."""

from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import CollectionNode, Node, SafeLoader, SequenceNode, YAMLError, compose

from lightning_maml.errors import UserValueError

_MOST_VALUES = 100_000
_jsonargparse_yaml = get_loader("yaml")  # a safe loader: YAML can name no Python object


def bound_configs() -> None:
    """Make jsonargparse, and so LightningCLI, report YAML that is too large or too deep.

    Without this, YAML whose aliases unfold to too much never ends, and YAML that is too deep fails
    with a ``RecursionError``.
    """
    set_loader("yaml", load_yaml, (YAMLError, ValueError))


def load_yaml(text: str) -> Any:
    """Return the content of YAML, as jsonargparse reads it.

    Args:
        text: The YAML.

    Raises:
        ValueError: If there are more than 100,000 values, including those that aliases repeat, or
            if they are nested too deeply for Python.
        YAMLError: If it is not YAML, or asks for Python objects.

    Examples:
        >>> from lightning_maml.io.yaml_configs import load_yaml
        >>> load_yaml("{ways: 5, lr: 1e-3}")
        {'ways': 5, 'lr': 0.001}
    """
    try:
        values = _unfolded(compose(text, Loader=SafeLoader), {})
        if values > _MOST_VALUES:
            raise UserValueError(
                f"Expected YAML of at most {_MOST_VALUES} values but its aliases (*) repeat them "
                "to more; write out what is meant."
            )
        return _jsonargparse_yaml(text)
    except RecursionError as error:
        raise UserValueError(
            "Expected YAML of values that hold no more than some hundred others in each other "
            "but got deeper ones."
        ) from error


def _unfolded(node: Node | None, counted: dict[int, int]) -> int:
    """Return how many nodes there are with aliases followed, before merges become values.

    ``counted`` has the nodes that were counted before, so that aliases take no time.
    """
    if not isinstance(node, CollectionNode):
        return 1
    if id(node) not in counted:
        parts = node.value
        if not isinstance(node, SequenceNode):  # a mapping has pairs of a key and a value
            parts = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_unfolded(part, counted) for part in parts)
    return counted[id(node)]
