"""What a meta-batch is: T few-shot tasks, each with a support set and a query set."""

from typing import NamedTuple

from torch import Tensor


class Episodes(NamedTuple):
    """A meta-batch of T tasks in the finite-sum case (Ji et al. 2022, section 2.2): each task owns a fixed support set and a fixed query set.

    A NamedTuple of tensors, so Lightning moves it between devices, a DataLoader stacks and pins it, and
    ``torch.func.vmap`` maps over its tasks. One task is the same type without the leading ``T``.

    Attributes:
        support_x: Inputs to adapt on, ``[T, S, ...]``; images are ``[T, S, C, H, W]``.
        support_y: Their labels ``0 .. ways - 1``, ``[T, S]``, or targets ``[T, S, ...]`` for regression.
        query_x: Inputs on which the adapted parameters are judged, ``[T, Q, ...]``.
        query_y: Their labels or targets, ``[T, Q]`` or ``[T, Q, ...]``.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def check_episodes(episodes: Episodes) -> None:
    """Check that the four tensors of a meta-batch agree on its tasks and examples.

    Raises:
        ValueError: If a tensor lacks its task or example dimension, or if their sizes disagree.
    """
    for name, tensor in episodes._asdict().items():
        if tensor.ndim < 2:
            raise ValueError(
                f"Expected `{name}` to have at least the dimensions [tasks, examples] but got shape {list(tensor.shape)}; "
                "add a leading dimension for a single task."
            )
    if len({len(tensor) for tensor in episodes}) > 1:
        sizes = {name: len(tensor) for name, tensor in episodes._asdict().items()}
        raise ValueError(f"Expected all tensors of `episodes` to hold the same number of tasks but got {sizes}.")
    if len(episodes.support_x) == 0:
        raise ValueError("Expected `episodes` to hold at least one task but got none.")
    for kind, x, y in (("support", *episodes[:2]), ("query", *episodes[2:])):
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"Expected `{kind}_x` and `{kind}_y` to hold the same number of examples but got {x.shape[1]} and {y.shape[1]}."
            )
