"""Check that a network returns logits that fit the labels."""

from typing import Any

from torch import Tensor

from lightning_maml.batches.outputs import are_tensors
from lightning_maml.errors import UserValueError


def check_logits(outputs: Any, labels: Tensor | None) -> None:
    """Check the logits that were taken from a network's outputs.

    Args:
        outputs: The logits, or the outputs for a regression.
        labels: Labels of the same examples, ``[S]``, or ``[S, ...]`` with one for each pixel or
            token; None for a regression.

    Raises:
        ValueError: If the logits are no tensor ``[S, ways]``, or ``[S, ways, ...]`` with the
            dimensions of the labels, or if the outputs for a regression are made of other things
            than tensors.
    """
    got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    cure = (
        "wrap it in a module that does, or let a subclass of the model take them from its "
        "outputs, in a static method `logits(outputs)`"
    )
    if labels is not None:
        positions = labels.shape[1:]
        is_tensor = isinstance(outputs, Tensor) and outputs.ndim > 1
        if not is_tensor or outputs.shape[2:] != positions or len(outputs) != len(labels):
            shape = ", ".join(["examples", "ways", *map(str, positions)])
            of_labels = f" for labels {list(labels.shape)}" if is_tensor else ""
            raise UserValueError(
                f"Expected `network` to return logits [{shape}]{of_labels}, as a tensor or as the "
                f"attribute or entry `logits` of its outputs, but got {got}; "
                f"{_cure_of_positions(outputs, labels) or cure}."
            )
    if not are_tensors(outputs):
        raise UserValueError(
            "Expected `network` to return tensors, alone or in a dict, tuple or list, or outputs "
            f"with `logits`, but got {got}; {cure}."
        )


def _cure_of_positions(outputs: Any, labels: Tensor) -> str:
    """Return what to do about logits that do not fit labels of more than one dimension."""
    if labels.ndim == 1 or not isinstance(outputs, Tensor):
        return ""
    if outputs.shape == labels.shape:
        return (
            "for several labels per example give floats, y.float(), with a loss such as "
            "binary_cross_entropy_with_logits"
        )
    if labels.ndim == outputs.ndim and labels.shape[1] == 1 != outputs.shape[1]:
        return "leave the labels' channel out, y.squeeze(1)"
    if outputs.shape[:-1] == labels.shape:
        return (
            "torch's losses take the classes second: let the network, or a static method "
            "`logits(outputs)` of a subclass of the model, return outputs.movedim(-1, 1)"
        )
    return "give a label for each position that the network has outputs for"
