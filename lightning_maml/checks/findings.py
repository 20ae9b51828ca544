"""Results of the checks of a network and a loss, remembered for each kind of batch."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import shapes
from lightning_maml.networks.attributes import modes

Found = TypeVar("Found")

Kind = tuple[Hashable, ...]
"""A network with its modes and the kinds of its parameters, and the kinds of a batch's tensors."""

KINDS = 64
"""How many findings of one check are remembered; then the oldest is forgotten."""


def kind_of_batch(network: nn.Module, own: nn.Module, episodes: AnyEpisodes) -> Kind:
    """Return a key that is the same for batches that need no new check.

    Args:
        network: The model's network, or a copy of it in another mode.
        own: The model's network.
        episodes: The batch.
    """
    parameters = tuple((p.shape, p.dtype, p.requires_grad) for p in network.parameters())
    return own, network is own, modes(network), parameters, shapes(episodes)


class Findings:
    """Remembers what checks found.

    Examples:
        >>> from lightning_maml.checks.findings import Findings
        >>> findings = Findings()
        >>> kind, losses = (), ()
        >>> findings.once("a check", kind, losses, lambda: "found first")
        'found first'
        >>> findings.once("a check", kind, losses, lambda: "not called")
        'found first'
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type["Findings"], tuple[()]]:
        return Findings, ()  # what is known of a network is not copied either

    def __len__(self) -> int:
        """Return how many findings are remembered."""
        return len(self._found)

    def forget(self, check: str) -> None:
        """Forget what a check found."""
        self._found = {key: found for key, found in self._found.items() if key[0] != check}

    def once(
        self,
        check: str,
        kind: Kind,
        read: tuple[Any, ...],
        find: Callable[[], Found],
        *,
        again: bool = False,
    ) -> Found:
        """Run a check once for each kind of batch and what else it reads; return what it found.

        Args:
            check: Name of the check.
            kind: The kind of batch.
            read: The losses and whatever else decides; a module whose mode has changed is checked
                anew.
            find: Runs the check and returns what it found.
            again: Whether to check even if it is remembered.
        """
        of_modules = (modes(part) for part in read if isinstance(part, nn.Module))
        key = (check, kind, *map(id, read), *of_modules)
        if again or key not in self._found:
            found = find()
            of_check = [other for other in self._found if other[0] == check]
            if len(of_check) >= KINDS:
                del self._found[of_check[0]]  # the oldest one
            self._found[key] = found, read  # held, so that their ids stay unique keys
        value: Found = self._found[key][0]
        return value
