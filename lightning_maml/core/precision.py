"""The precision of float32 products and convolutions on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: tuple[tuple[Any, str], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
)
_OFF: Any = False
if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9, which refuses to mix both kinds of settings
    _SETTINGS = (
        (torch.backends.cuda.matmul, "fp32_precision"),
        (torch.backends.cudnn.conv, "fp32_precision"),
        (torch.backends.cudnn.rnn, "fp32_precision"),
    )
    _OFF = "ieee"


def precision() -> tuple[Any, ...]:
    """Return the present settings, to compare."""
    return tuple(getattr(holder, name) for holder, name in _SETTINGS)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let GPUs compute in float32 what is float32, and not in TF32.

    TF32 keeps 10 bits after the point. It is the default of convolutions, and good enough for
    gradients, but not for differences of nearby ones.
    """
    before = precision()
    for holder, name in _SETTINGS:
        setattr(holder, name, _OFF)
    try:
        yield
    finally:
        for (holder, name), value in zip(_SETTINGS, before, strict=True):
            setattr(holder, name, value)
