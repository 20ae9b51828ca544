"""Episodes of the images that were drawn for them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes


class Drawn(NamedTuple):
    """The images of a meta-batch, by number.

    First come the support images of all tasks, then the Hessian images if there are any, then the
    query images: of task after task, step after step and label after label.

    Attributes:
        rows: Number of each image among those that they are taken from, ``[n]``, int64.
        turns: The quarter turns that each is turned by, from 0 to 3, ``[n]``, int64.
    """

    rows: Tensor
    turns: Tensor


def gathered(images: Tensor, drawn: Drawn) -> Tensor:
    """Return the images that were drawn, turned.

    Args:
        images: The images that they are taken from, ``[M, ...]``, on the CPU.
        drawn: Which of them, and how they are turned.

    Returns:
        ``[n, ...]``.
    """
    if not drawn.turns.any():
        return torch.index_select(images, 0, drawn.rows)
    found = torch.empty((len(drawn.rows), *images.shape[1:]), dtype=images.dtype, device="cpu")
    # numpy turns and copies bytes in less time, and in less memory, than torch
    there, here = _array(images), _array(found)
    rows, turns = drawn.rows.numpy(), drawn.turns.numpy()
    for quarters in range(4):
        places = np.flatnonzero(turns == quarters)
        here[places] = np.rot90(there[rows[places]], quarters, (-2, -1))
    return found


def _array(images: Tensor) -> np.ndarray:
    """Return the memory of images as an array; of bfloat16, which numpy lacks, as integers."""
    return images.view(torch.int16 if images.dtype == torch.bfloat16 else images.dtype).numpy()


def as_episodes(images: Tensor, labels: Sequence[Tensor]) -> AnyEpisodes:
    """Return a meta-batch of images that are in the order of :class:`Drawn`, without copies.

    Args:
        images: The images of T tasks, ``[n, ...]``.
        labels: Labels of the support, Hessian (if there are any) and query images, each
            ``[T, examples]`` or ``[T, N, examples]``.

    Returns:
        The meta-batch, with images ``[T, examples, ...]`` or ``[T, N, examples, ...]``.

    Examples:
        >>> import torch
        >>> from lightning_maml.datamodules.gathering import as_episodes
        >>> labels = torch.tensor([[0, 1], [0, 1]])
        >>> as_episodes(torch.arange(8), [labels, labels]).query_x
        tensor([[4, 5],
                [6, 7]])
    """
    parts = torch.split(images, [of_part.numel() for of_part in labels])
    tensors = []
    for part, of_part in zip(parts, labels, strict=True):
        tensors += [torch.unflatten(part, 0, of_part.shape), of_part]
    return Episodes(*tensors) if len(tensors) == 4 else ResampledEpisodes(*tensors)
