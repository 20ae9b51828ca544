"""The labels that a batch had on the CPU, so that reading them does not wait for a GPU."""

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_maml.batches.episodes import AnyEpisodes


class KnownLabels:
    """Remembers what integer tensors on a device hold, as long as these exist. Copies start anew.

    Examples:
        >>> import torch
        >>> from lightning_maml.batches.known_labels import KnownLabels
        >>> known = KnownLabels()
        >>> known.on_cpu(torch.tensor([0, 1]))
        tensor([0, 1])
    """

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type["KnownLabels"], tuple[()]]:
        return KnownLabels, ()

    def note(self, before: Any, moved: Any) -> None:
        """Remember the labels of a batch that was moved to a device.

        Args:
            before: The batch on the CPU, in any form.
            moved: The same on the device.
        """
        for there, here in zip(tree_leaves(moved), tree_leaves(before), strict=False):
            both = isinstance(there, Tensor) and isinstance(here, Tensor)
            if not both or there is here or there.is_inference():  # those count no versions
                continue
            if _holds_labels(here) and here.shape == there.shape:
                self._known[there] = here.clone(), there._version  # a loader may use it again

    def on_cpu(self, labels: Tensor) -> Tensor:
        """Return labels on the CPU, which waits for a device only if they are not known."""
        if labels.device.type == "cpu" or labels.is_inference():
            return labels.cpu()
        known = self._known.get(labels)
        if known is None or known[1] != labels._version:
            known = labels.cpu(), labels._version
            self._known[labels] = known
        on_cpu: Tensor = known[0]
        return on_cpu

    def of(self, episodes: AnyEpisodes, names: Collection[str]) -> AnyEpisodes:
        """Return episodes with the labels ``names`` on the CPU."""
        return episodes._replace(**{name: self.on_cpu(getattr(episodes, name)) for name in names})


def _holds_labels(tensor: Tensor) -> bool:
    is_integer = not tensor.is_floating_point() and not tensor.is_complex()
    return tensor.device.type == "cpu" and is_integer
