"""Whether labels and targets fit what a network gives."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml.episodes import AnyEpisodes

_ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
"""Losses of torch's that broadcast."""


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
    """Check for targets that torch's losses would take, and give something else for: what broadcasts, or is always zero.

    Args:
        targets: Of regression, ``[B, ...]``.
        shape: The network's outputs for one example, None if they are no tensor.
        loss: Takes both.

    Raises:
        ValueError: If they are such.
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
