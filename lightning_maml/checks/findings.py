"""What was found out about a network and a loss, remembered for each kind of batch."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import shapes
from lightning_maml.networks.attributes import modes

Found = TypeVar("Found")

Kind = tuple[Hashable, ...]
"""A network with its modes and the shapes of its parameters, and the types and shapes of a
batch.
"""

KINDS = 64
"""How many findings are remembered."""


def kind_of_batch(network: nn.Module, own: nn.Module, episodes: AnyEpisodes) -> Kind:
    """Return what tells one kind of batch from another; each is checked anew.

    Args:
        network: The model's network, or a copy of it in another mode.
        own: The model's network.
        episodes: The batch.
    """
    parameters = tuple((p.shape, p.requires_grad) for p in network.parameters())
    return own, network is own, modes(network), parameters, shapes(episodes)


class Findings:
    """Remembers what checks found, by their name, the kind of batch, and the loss."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Any, Any]] = {}

    def __len__(self) -> int:
        """Return how many findings are remembered."""
        return len(self._found)

    def once(
        self,
        check: str,
        kind: Kind,
        loss: Any,
        find: Callable[[], Found],
        *,
        again: bool = False,
    ) -> Found:
        """Return what ``find`` returned when it was first called for this check, kind and loss.

        Args:
            check: Name of the check.
            kind: The kind of batch.
            loss: The loss; a module counts as another one in another mode.
            find: Checks, and returns what it found.
            again: Check in any case.
        """
        key = (check, kind, id(loss), modes(loss) if isinstance(loss, nn.Module) else ())
        if again or key not in self._found:
            found = find()
            if len(self._found) >= KINDS:
                self._found.clear()
            # the loss is kept, so that no other object gets its id
            self._found[key] = found, loss
        value: Found = self._found[key][0]
        return value
