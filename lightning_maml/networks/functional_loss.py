"""A loss as a pure function of its trainable parameters."""

import threading
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from lightning_maml.batches.outputs import takes_logits
from lightning_maml.core.params import Params
from lightning_maml.errors import UserTypeError
from lightning_maml.networks.copies import structural_copy
from lightning_maml.networks.places import holding, places

LOSS_PREFIX = "(loss)."
SUPPORT_LOSS_PREFIX = "(support loss)."
"""Prefixes of the names of a loss's parameters among those of the network.

No module can have these names.
"""


class FunctionalLoss:
    """A loss as a function of its trainable parameters, which several threads may call at once.

    A loss without trainable parameters is called as it is.

    Args:
        loss: Maps outputs and labels to a scalar, their mean loss. Torch's own losses get the
            logits alone, others the outputs as the network returned them.
        logits: Takes the logits from what the network returned.
        prefix: What the names of its parameters start with.

    Examples:
        >>> import torch
        >>> from lightning_maml.batches.outputs import logits_in
        >>> from lightning_maml.networks.functional_loss import FunctionalLoss
        >>> class Scaled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor(1.0))
        ...
        ...     def forward(self, outputs, y):
        ...         return self.scale * (outputs - y).square().mean()
        >>> loss = FunctionalLoss(Scaled(), logits_in)
        >>> loss({"(loss).scale": torch.tensor(3.0)}, torch.ones(2), torch.zeros(2))
        tensor(3.)
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        logits: Callable[[Any], Any],
        prefix: str = LOSS_PREFIX,
    ) -> None:
        self.loss = loss
        self.prefix = prefix
        self.given: Callable[[Any], Any] = logits if takes_logits(loss) else _as_they_are
        """Takes from the network's outputs what the loss is called with."""
        self.params: Params = {}
        """The loss's trainable parameters, by names that start with ``prefix``."""
        if isinstance(loss, nn.Module):
            self.params = {
                f"{prefix}{name}": p for name, p in loss.named_parameters() if p.requires_grad
            }
        self._own = threading.local()

    def __call__(self, params: Params, outputs: Any, y: Any) -> Any:
        """Return the loss of ``outputs`` and ``y``.

        Args:
            params: Values for the loss's parameters, by their prefixed names. A missing one keeps
                its value in the loss; other names are ignored.
            outputs: What the network returned.
            y: Labels or targets.

        Raises:
            TypeError: If the loss returns no tensor.
        """
        value = self._value(params, self.given(outputs), y)
        if not isinstance(value, Tensor):
            raise UserTypeError(
                "Expected the loss of a task to be a scalar tensor but got "
                f"{type(value).__name__}; return the loss alone, without .item()."
            )
        return value

    def _value(self, params: Params, outputs: Any, y: Any) -> Any:
        if not self.params:
            return self.loss(outputs, y)
        # each thread has a copy, in which it replaces the parameters
        if not hasattr(self._own, "loss"):
            self._own.loss = structural_copy(cast("nn.Module", self.loss))
            self._own.places = {
                f"{self.prefix}{name}": where for name, where in places(self._own.loss).items()
            }
        given = {name: params[name] for name in self.params if name in params}
        with holding(self._own.places, given):
            return self._own.loss(outputs, y)


def _as_they_are(outputs: Any) -> Any:
    return outputs
