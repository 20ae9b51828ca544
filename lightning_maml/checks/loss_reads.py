"""Finds losses that read what a network's forward pass leaves in its attributes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.trees import detached
from lightning_maml.checks.network_checks import first_support
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import Kept
from lightning_maml.networks.facts import facts_of
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork


def check_loss_reads_no_attributes(
    of_outputs: FunctionalLoss,
    network: nn.Module,
    functional: FunctionalNetwork,
    episodes: AnyEpisodes,
) -> None:
    """Refuse a loss that reads an attribute which a forward pass sets.

    Each pass runs in a copy of the network, and its attributes are put back afterwards, so the loss
    would read what was there before.

    Args:
        of_outputs: The loss.
        network: The user's network, which a loss may know.
        functional: The network or a copy of it, whose writes have been found.
        episodes: The meta-batch.

    Raises:
        ValueError: If the loss reads one.
    """
    written = facts_of(functional.network).written
    set_in_a_pass = sorted(written.kept | written.numbers) if written else []
    if not set_in_a_pass:
        return
    y = detached(support_set(first_task(episodes))[1])
    with first_support(functional, episodes) as x, torch.no_grad():
        outputs = functional(functional.params, x)

        def fails() -> Exception | None:
            try:
                of_outputs({}, outputs, y)
            except Exception as error:  # a loss may fail in any way
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                return error
            return None

        with _unreadable(network, set_in_a_pass):
            error = fails()
        # one that fails in any case is for the other checks
        reads = isinstance(error, _ReadError) or (error is not None and fails() is None)
    if reads:
        names = [f"{module}.{key}".lstrip(".") for module, key in set_in_a_pass]
        raise UserValueError(
            "Expected a loss of outputs and labels but it reads an attribute that the network's "
            f"forward pass sets ({', '.join(names)}), which holds what another pass has left; let "
            "the network return what the loss needs, in a dict with `logits` for instance."
        )


class _ReadError(Exception):
    """An attribute was read that is unreadable."""


class _Unreadable:
    """Takes the place of an attribute, and fails at whatever a loss may do with it."""

    def _fail(self, *_: Any, **__: Any) -> NoReturn:
        raise _ReadError

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise _ReadError

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copies and the like ask for these
            raise AttributeError(name)
        raise _ReadError

    __getitem__ = __iter__ = __len__ = __call__ = __float__ = __bool__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _fail
    __eq__ = __ne__ = _fail
    __hash__ = None  # type: ignore[assignment]


@contextmanager
def _unreadable(network: nn.Module, names: list[tuple[str, str]]) -> Iterator[None]:
    """Let these attributes, each a module's name and its own, be unreadable for a while.

    What dicts and lists hold is unreadable, as others may know them too.
    """
    kept, modules = Kept(network, names), dict(network.named_modules())
    for name, key in names:
        holder = modules[name].__dict__ if name in modules else {}
        value = holder.get(key)
        if isinstance(value, list):
            value[:] = [_Unreadable()]
        elif isinstance(value, dict):
            value.update(dict.fromkeys([*value] or [""], _Unreadable()))
        else:
            holder[key] = _Unreadable()
    try:
        yield
    finally:
        kept.put_back()
