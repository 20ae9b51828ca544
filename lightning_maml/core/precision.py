"""The precision in which devices compute products and convolutions of float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    """A setting of torch's.

    Attributes:
        get: Returns it; raises a ``RuntimeError`` where newer settings contradict it.
        put: Changes it.
        full: The value for full precision.
    """

    get: Callable[[], Any]
    put: Callable[[Any], None]
    full: Any


def _attribute(holder: Any, name: str, full: Any) -> _Setting:
    return _Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value), full)


_OLDER = (
    _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, full="highest"
    ),
    _attribute(torch.backends.cudnn, "allow_tf32", full=False),
)
"""Settings of every torch. They change the newer ones too, and torch raises where the two differ
and something reads the older ones."""

_NEWER: tuple[_Setting, ...] = ()
if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9
    _BACKENDS: Any = torch.backends
    _HOLDERS = (
        _BACKENDS.cuda.matmul,
        _BACKENDS.cudnn.conv,
        _BACKENDS.cudnn.rnn,
        _BACKENDS.mkldnn.matmul,
        _BACKENDS.mkldnn.conv,
        _BACKENDS.mkldnn.rnn,
    )
    _NEWER = tuple(_attribute(holder, "fp32_precision", full="ieee") for holder in _HOLDERS)


def precision() -> tuple[Any, ...]:
    """Return the present settings, to compare."""
    return tuple(map(_read, (*_OLDER, *_NEWER)))


def _read(setting: _Setting) -> Any:
    """Return a setting; None of an older one if only newer ones were changed."""
    try:
        return setting.get()
    except RuntimeError:
        return None


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 what is float32: on GPUs not in TF32, on CPUs not in bf16.

    TF32 keeps 10 bits after the point. It is the default of convolutions on GPUs, and good enough
    for gradients, but not for differences of nearby ones.
    """
    lowered = [(setting, _read(setting)) for setting in _OLDER]
    # one that says full precision already is left alone, as setting it would change newer ones
    lowered = [(setting, value) for setting, value in lowered if value not in (None, setting.full)]
    before = [(setting, setting.get()) for setting in _NEWER]
    for setting, _ in (*lowered, *before):
        setting.put(setting.full)
    try:
        yield
    finally:
        for setting, value in (*lowered, *before):
            setting.put(value)
