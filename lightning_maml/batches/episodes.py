"""What a meta-batch is: T few-shot tasks, each with its support, query and, in the resampling case, Hessian batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_maml.batches.trees import map_tensors


class Episodes(NamedTuple):
    """A meta-batch of T tasks in the finite-sum case: each task owns one support set and one query set (Ji et al. 2022, section 2.2).

    A NamedTuple of tensors, so Lightning moves it between devices, a DataLoader stacks and pins it,
    and ``torch.func.vmap`` maps over its tasks. One task is the same type without the leading
    ``T``.

    Inputs may also be a dict of tensors, with which the network is called as ``network(**x)``
    (token ids and their mask, for instance), or a tuple or list of tensors, ``network(*x)``. Then
    each of these tensors is ``[T, S, ...]``, and support and query inputs have the same names.

    Attributes:
        support_x: Inputs to adapt on, ``[T, S, ...]``; images are ``[T, S, C, H, W]``.
        support_y: Their labels, integers ``0 .. ways - 1``, ``[T, S]``; or targets of floats
            ``[T, S, ...]``, for regression, several labels per example and masks.
        query_x: Inputs on which the adapted parameters are evaluated, ``[T, Q, ...]``.
        query_y: Their labels or targets, ``[T, Q]`` or ``[T, Q, ...]``.
    """

    support_x: Any
    support_y: Tensor
    query_x: Any
    query_y: Tensor


class ResampledEpisodes(NamedTuple):
    """A meta-batch of T tasks in the resampling case (Ji et al. 2022, Algorithm 1): fresh samples for every use.

    Step j descends on its own support batch S_j, and its factor in the meta-gradient is taken on a
    Hessian batch D_j, which is independent of all others and may well be smaller. With N = 1 these
    are D_in, D_h and, as the query batch, D_o of Fallah et al. 2020, Algorithms 1-3.

    Attributes:
        support_x: S_0 .. S_{N-1}, ``[T, N, S, ...]``.
        support_y: Their labels or targets, ``[T, N, S]`` or ``[T, N, S, ...]``.
        hessian_x: D_0 .. D_{N-1}, ``[T, N, D, ...]``; D may be 0 where no curvature is taken
            (FO-MAML).
        hessian_y: Their labels or targets, ``[T, N, D]`` or ``[T, N, D, ...]``.
        query_x: The batch on which the adapted parameters are evaluated, ``[T, Q, ...]``.
        query_y: Its labels or targets, ``[T, Q]`` or ``[T, Q, ...]``.
    """

    support_x: Any
    support_y: Tensor
    hessian_x: Any
    hessian_y: Tensor
    query_x: Any
    query_y: Tensor


AnyEpisodes = Episodes | ResampledEpisodes
"""A meta-batch of either case."""


def first_task(episodes: AnyEpisodes) -> AnyEpisodes:
    """Return the first task of a meta-batch, without the dimension of tasks."""
    first: AnyEpisodes = map_tensors(lambda tensor: tensor[0], episodes)
    return first


def support_set(task: AnyEpisodes) -> tuple[Any, Tensor]:
    """Return the inputs and labels of one task's support set; if there is one per step, those of the first step."""
    if isinstance(task, Episodes):
        return task.support_x, task.support_y
    return map_tensors(lambda tensor: tensor[0], task.support_x), task.support_y[0]


def check_episodes(episodes: Any) -> None:
    """Check that this is a meta-batch, and that its tensors agree on its tasks, steps and examples.

    Raises:
        TypeError: If it is something else, or holds something else than tensors.
        ValueError: If labels of integers are not one per example, if a tensor lacks its task, step
            or example dimension, if their sizes or the inputs' types disagree, or if there is no
            task or no example.
    """
    if not isinstance(episodes, Episodes | ResampledEpisodes):
        raise TypeError(
            f"Expected a batch of `lightning_maml.Episodes` but got {type(episodes).__name__}; "
            "let the loader return Episodes(support_x, support_y, query_x, query_y), whose "
            "tensors have the tasks in front."
        )
    resampled = isinstance(episodes, ResampledEpisodes)
    dimensions = {name: ["tasks", "examples"] for name in episodes._fields}
    if resampled:
        dimensions |= {
            name: ["tasks", "inner steps", "examples"]
            for name in episodes._fields
            if not name.startswith("query")
        }
    held = {name: _tensors_of(name, value) for name, value in episodes._asdict().items()}
    for name, of_name in held.items():
        for label, tensor in of_name.items():
            if tensor.ndim < len(dimensions[name]):
                raise ValueError(
                    f"Expected `{label}` to have at least the dimensions "
                    f"[{', '.join(dimensions[name])}] but got shape {list(tensor.shape)}; add a "
                    "leading dimension for a single task."
                )
    for name in episodes._fields[1::2]:
        _check_one_label_per_example(name, getattr(episodes, name), dimensions[name])
    all_held = {label: tensor for of_name in held.values() for label, tensor in of_name.items()}
    sizes = {label: len(tensor) for label, tensor in all_held.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(
            f"Expected all tensors of `episodes` to hold the same number of tasks but got {sizes}."
        )
    if len(episodes.support_y) == 0:
        raise ValueError("Expected `episodes` to hold at least one task but got none.")
    if resampled:
        steps = {
            label: tensor.shape[1]
            for name in episodes._fields[:4]
            for label, tensor in held[name].items()
        }
        if len({*steps.values()}) > 1:
            raise ValueError(
                "Expected support and Hessian batches for the same number of inner steps but got "
                f"{steps}."
            )
    for x, y in zip(episodes._fields[::2], episodes._fields[1::2], strict=True):
        of_y = getattr(episodes, y).shape[len(dimensions[y]) - 1]
        for label, tensor in held[x].items():
            of_x = tensor.shape[len(dimensions[x]) - 1]
            if of_x != of_y:
                raise ValueError(
                    f"Expected `{label}` and `{y}` to hold the same number of examples but got "
                    f"{of_x} and {of_y}."
                )
        if of_y == 0 and x != "hessian_x":
            raise ValueError(f"Expected `{x}` to hold at least one example per task but got none.")
    _check_that_inputs_are_alike(held, episodes._fields[::2])


def _tensors_of(name: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors of one part of an episode, by the names that a message would give them."""
    if isinstance(value, Tensor):
        return {name: value}
    are_inputs = "_x" in name
    if are_inputs and isinstance(value, dict | tuple | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            label: tensor
            for key, part in parts
            for label, tensor in _tensors_of(f"{name}[{key!r}]", part).items()
        }
    if isinstance(value, Mapping) and not isinstance(value, dict):
        cure = "dict(...) of it is one"
    elif value is None:
        cure = "leave it out"
    else:
        cure = "make it one, torch.from_numpy(...) for an array"
    expected = "a tensor, or a dict, tuple or list of tensors," if are_inputs else "a tensor"
    raise TypeError(f"Expected `{name}` to be {expected} but got {type(value).__name__}; {cure}.")


def _check_that_inputs_are_alike(
    held: dict[str, dict[str, Tensor]], names: tuple[str, ...]
) -> None:
    first, *others = names
    kinds = {label.removeprefix(first): tensor.dtype for label, tensor in held[first].items()}
    for name in others:
        found = {label.removeprefix(name): tensor.dtype for label, tensor in held[name].items()}
        if found.keys() != kinds.keys():
            raise ValueError(
                f"Expected the same tensors in `{first}` and `{name}` but got "
                f"{', '.join(held[first])} and {', '.join(held[name])}."
            )
        if different := [
            (kinds[label], dtype) for label, dtype in found.items() if dtype != kinds[label]
        ]:
            types = " and ".join(sorted(map(str, different[0])))
            raise ValueError(
                f"Expected all inputs of `episodes` to be of one type but got {types}; convert "
                "them."
            )


def _check_one_label_per_example(name: str, y: Tensor, dimensions: list[str]) -> None:
    """Refuse integers that are more than one class per example: masks of classes, and several labels at once."""
    if y.is_floating_point() or y.ndim == len(dimensions):
        return
    if y.ndim > len(dimensions) + 1:
        cure = (
            "for masks give floats, y.float(), with a loss that takes them back, `lambda "
            "outputs, y: F.cross_entropy(outputs, y.long())`"
        )
    elif y.shape[-1] == 1:
        cure = "leave the last dimension out, y[..., 0]"
    else:
        cure = (
            "for several labels per example give floats, y.float(), with a loss such as "
            "binary_cross_entropy_with_logits"
        )
    raise ValueError(
        f"Expected `{name}` to hold one label per example, [{', '.join(dimensions)}], but got "
        f"shape {list(y.shape)}; {cure}."
    )
