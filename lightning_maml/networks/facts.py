"""Facts that forward passes have shown about a network, kept as long as the network lives."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

MISSING: Any = object()
"""Stands for an attribute that does not exist."""


class Written(NamedTuple):
    """What a forward pass of a network changes in it.

    Attributes:
        tensors: Names of buffers and frozen parameters.
        numbers: Attributes that are plain numbers, each as the names of its module and its own.
        kept: Other attributes, and lists and dicts whose content changes, named in the same way.
        empty: Those of them that were missing (:data:`MISSING`), None or empty at first. What a
            pass of the user's own leaves there later is not for copies of the network.
    """

    tensors: frozenset[str] = frozenset()
    numbers: frozenset[tuple[str, str]] = frozenset()
    kept: frozenset[tuple[str, str]] = frozenset()
    empty: Mapping[tuple[str, str], Any] = MappingProxyType({})


@dataclass
class NetworkFacts:
    """What is known about a network.

    Attributes:
        written: What a forward pass changes in it; None before that was checked.
        caches_parametrizations: Whether it computes parametrisations under
            ``torch.nn.utils.parametrize.cached``, a cache that all threads share.
        hooks_tensors: Whether its forward pass registers hooks on tensors.
        views_images: Whether its images must stay channels-first in memory, because ``.view``
            fails on channels-last tensors.
        runs_channels_last: Whether it ran on channels-last images.
        modes_keep_tensors: Whether its ``train()`` and ``eval()`` were seen to change no tensors.
    """

    written: Written | None = None
    caches_parametrizations: bool = False
    hooks_tensors: bool = False
    views_images: bool = False
    runs_channels_last: bool = False
    modes_keep_tensors: bool = False


_FACTS: WeakKeyDictionary[nn.Module, NetworkFacts] = WeakKeyDictionary()


def facts_of(network: nn.Module) -> NetworkFacts:
    """Return what is known about a network; the caller may add to it."""
    return _FACTS.setdefault(network, NetworkFacts())


def share_facts(copied: nn.Module, network: nn.Module) -> None:
    """Let a copy of a network have the network's facts, those found later too."""
    _FACTS[copied] = facts_of(network)


def writes(network: nn.Module) -> bool | None:
    """Return whether a forward pass changes buffers, frozen parameters or plain numbers.

    Running averages of batch norm do not count: its policy says what becomes of them.

    Returns:
        None if the network has not been checked yet.
    """
    written = facts_of(network).written
    return None if written is None else bool(written.tensors or written.numbers)


def writes_in(network: nn.Module, part: str) -> bool:
    """Return whether a forward pass changes anything in a submodule, as far as is known."""
    written = facts_of(network).written or Written()
    names = [*written.tensors, *(module for module, _ in written.numbers | written.kept)]
    return any(f"{name}.".startswith(f"{part}.") for name in names)
