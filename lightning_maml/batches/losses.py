"""Losses that torch does not have."""

import torch
from torch import Tensor


def one_hot_mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean-squared error between outputs and one-hot labels.

    As in Ji et al. 2022, Appendix A.2, the squared distance ``|e_y - outputs|^2`` is a sum over the
    classes, and the loss is its mean over the examples. ``torch.nn.functional.mse_loss`` also
    averages over the classes and so is smaller by a factor of ``ways``.

    Args:
        outputs: The network's outputs, ``[B, ways]``, or ``[B, ways, ...]`` of pixels or tokens.
        labels: Classes ``0 .. ways - 1``, ``[B]`` or ``[B, ...]``; those of -100 are left out.

    Returns:
        The loss, a scalar; nan if every example is left out.

    Examples:
        >>> import torch
        >>> from lightning_maml import one_hot_mse
        >>> one_hot_mse(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 1]))
        tensor(0.1250)
    """
    classes = torch.arange(outputs.shape[1], device=outputs.device)
    one_hot = (labels.unsqueeze(-1) == classes).movedim(-1, 1).to(outputs.dtype)
    counts = labels != -100
    distances = (outputs - one_hot).square().sum(1)
    return torch.where(counts, distances, 0).sum() / counts.sum()
