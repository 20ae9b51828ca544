"""Mini-batches of the support set, a fresh one for each inner step."""

from typing import Any

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.meta_batch import MetaBatch, UnevenEpisodes, as_meta_batch
from lightning_maml.batches.trees import map_tensors
from lightning_maml.errors import UserTypeError, UserValueError


def mini_batches(
    batch: Any, size: int, steps: int, generator: torch.Generator | None = None
) -> MetaBatch:
    """Draw a mini-batch of the support set for each inner step.

    Each task goes through its support set in random order, in a new one when fewer than ``size``
    examples are left, like a ``DataLoader`` with ``shuffle=True`` and ``drop_last=True``. The
    Hessian of a step is taken on its own batch, so that the exact meta-gradient is that of autograd
    through such a loop. (In the papers' resampling case it is on another, independent batch.) The
    example is for plain loaders; with a datamodule of this package, its hook is the one to
    override.

    Args:
        batch: A meta-batch with support sets ``[T, S, ...]``, in any form that a model takes:
            ``Episodes``, four parts, or a list of tasks, which may differ in size.
        size: Examples of a mini-batch, at most S.
        steps: N, inner steps; the model's ``train_steps`` or, in evaluation, ``test_steps``.
        generator: Draws the order; by default torch's global one.

    Returns:
        A meta-batch with support and Hessian batches ``[T, N, size, ...]``; without inner steps the
        batch as it was.

    Raises:
        TypeError: If ``batch`` is no meta-batch, or its tasks have batches for each step already.
        ValueError: If there are fewer than ``size`` examples, or a number is out of range.

    Examples:
        >>> import torch
        >>> from lightning_maml import FOMAML, MLP, Episodes, mini_batches
        >>> class OnMiniBatches(FOMAML):
        ...     def on_after_batch_transfer(self, batch, dataloader_idx):
        ...         steps = self.train_steps if self.training else self.test_steps
        ...         return mini_batches(batch, size=2, steps=steps)
        >>> x, y = torch.rand(3, 6, 4), torch.tensor([[0, 1, 2] * 2] * 3)  # three tasks
        >>> mini_batches(Episodes(x, y, x, y), size=2, steps=5).support_x.shape
        torch.Size([3, 5, 2, 4])
    """
    found = as_meta_batch(batch)
    if isinstance(found, UnevenEpisodes):
        parts = [_of_one_size(part, size, steps, generator) for part in found.parts]
        return found._replace(parts=parts)
    return _of_one_size(found, size, steps, generator)


def _of_one_size(
    episodes: Any, size: int, steps: int, generator: torch.Generator | None
) -> AnyEpisodes:
    if not isinstance(episodes, Episodes):
        raise UserTypeError(
            f"Expected `batch` to be Episodes or a list of tasks but got {type(episodes).__name__}"
            "; draw mini-batches of tasks that have one support set."
        )
    check_episodes(episodes)
    tasks, examples = episodes.support_y.shape[:2]
    whole = isinstance(size, int) and isinstance(steps, int)
    if not whole or not 0 < size <= examples or steps < 0:
        raise UserValueError(
            f"Expected `size` to be 1 .. {examples}, the examples of a support set, and `steps` to "
            f"be a whole number of at least 0, but got {size} and {steps}."
        )
    if steps == 0:
        return episodes
    orders = torch.stack([_order(examples, size, steps, generator) for _ in range(tasks)])

    def drawn(tensor: Tensor) -> Tensor:
        each = zip(tensor, orders.to(tensor.device), strict=True)
        return torch.stack([of_task[order] for of_task, order in each])

    x, y = map_tensors(drawn, (episodes.support_x, episodes.support_y))
    return ResampledEpisodes(x, y, x, y, episodes.query_x, episodes.query_y)


def _order(examples: int, size: int, steps: int, generator: torch.Generator | None) -> Tensor:
    """Return the examples of each step's batch, ``[N, size]``."""
    in_a_pass = examples // size
    passes = -(-steps // in_a_pass)
    device = "cpu" if generator is None else generator.device
    orders = [
        torch.randperm(examples, generator=generator, device=device)[: in_a_pass * size]
        for _ in range(passes)
    ]
    return torch.cat(orders).view(-1, size)[:steps]
