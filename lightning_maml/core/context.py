"""What layers must know of the evaluation that they are part of.

A user's network is called with its inputs alone, so this cannot be handed on as an argument. It is
one value, set where a loss is evaluated (:class:`lightning_maml.core.objective.Objective`,
:class:`lightning_maml.core.task_axis.TaskAxis`) and read by :mod:`lightning_maml.kernels`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Evaluation(NamedTuple):
    """An evaluation of a network.

    Attributes:
        stacked: Whether it is of several tasks as one, under ``vmap``.
        derivatives: How many times ``torch.autograd`` will differentiate it; 0 if that was not
            said, in which case layers may use nothing that ``torch.func`` does not accept.
    """

    stacked: bool = False
    derivatives: int = 0


_NOTHING_SAID = Evaluation()
_CURRENT: ContextVar[Evaluation] = ContextVar("evaluation", default=_NOTHING_SAID)


def evaluation() -> Evaluation:
    """Return what is known of the evaluation that this thread is in."""
    return _CURRENT.get()


@contextmanager
def evaluating(*, stacked: bool | None = None, derivatives: int | None = None) -> Iterator[None]:
    """State something of what this thread evaluates meanwhile.

    Args:
        stacked: See :class:`Evaluation`; by default as it was before.
        derivatives: See there; by default as it was before.
    """
    before = _CURRENT.get()
    now = Evaluation(
        before.stacked if stacked is None else stacked,
        before.derivatives if derivatives is None else derivatives,
    )
    token = _CURRENT.set(now)
    try:
        yield
    finally:
        _CURRENT.reset(token)
