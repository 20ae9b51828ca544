"""Checks that labels and targets fit the outputs of a network."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml.episodes import AnyEpisodes

_ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
"""torch's losses that broadcast."""


def check_labels(episodes: AnyEpisodes, ways: int) -> None:
    """Check that labels are from 0 to ``ways - 1``.

    Raises:
        ValueError: If one is not.
    """
    labels = torch.cat([y.flatten() for y in episodes[1::2]])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= ways:
        raise ValueError(f"Expected labels from 0 to {ways - 1}, the outputs of `network`, but got {low} to {high}.")


def check_targets(targets: Tensor, shape: torch.Size | None, loss: Any) -> None:
    """Refuse targets that torch's losses accept but get wrong: they broadcast them, or always return zero.

    Args:
        targets: Regression targets, ``[B, ...]``.
        shape: The network's outputs for one example, None if they are no tensor.
        loss: The loss of outputs and targets.

    Raises:
        ValueError: If they are such targets.
    """
    while isinstance(loss, partial):
        loss = loss.func
    if (loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)) and targets.shape[1:] in ((), (1,)):
        raise ValueError(
            "Expected a loss for regression but got the cross-entropy, which of one output is always 0; give the model "
            "`loss=torch.nn.functional.mse_loss`."
        )
    if (loss in _ELEMENTWISE or type(loss) in _ELEMENTWISE) and shape not in (None, targets.shape[1:]):
        raise ValueError(
            f"Expected targets of the shape of the network's outputs, [examples, {', '.join(map(str, shape))}], but got "
            f"{list(targets.shape)}; reshape them, y[..., None] for instance, or the outputs."
        )
