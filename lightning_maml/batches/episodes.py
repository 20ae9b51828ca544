"""Meta-batches: T few-shot tasks, each with a support and a query batch.

In the resampling case each task also has a Hessian batch for every inner step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_maml.batches.trees import map_tensors
from lightning_maml.errors import UserTypeError, UserValueError


class Episodes(NamedTuple):
    """A meta-batch of T tasks in the finite-sum case.

    Each task has one support set and one query set (Ji et al. 2022, section 2.2).

    A NamedTuple of tensors, so Lightning moves it between devices, a DataLoader stacks and pins it,
    and ``torch.func.vmap`` maps over its tasks. A single task is the same type without the leading
    ``T``.

    Inputs may also be a dict of tensors (token ids and their mask, for instance), and the network
    is then called as ``network(**x)``; or a tuple or list of tensors, ``network(*x)``. Each of
    these tensors is ``[T, S, ...]``, and support and query inputs have the same names.

    Attributes:
        support_x: Inputs to adapt on, ``[T, S, ...]``; images are ``[T, S, C, H, W]``.
        support_y: Their labels, integers ``0 .. ways - 1``, ``[T, S]``, or ``[T, S, ...]`` with a
            label for each pixel or token; or targets of floats ``[T, S, ...]``, for regression and
            for several labels per example.
        query_x: Inputs on which the adapted parameters are evaluated, ``[T, Q, ...]``.
        query_y: Their labels or targets, ``[T, Q]`` or ``[T, Q, ...]``.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> x = torch.rand(2, 6, 4)  # two tasks of six examples
        >>> y = torch.tensor([[0, 1, 2] * 2] * 2)  # of three classes
        >>> Episodes(support_x=x, support_y=y, query_x=x, query_y=y).support_x.shape
        torch.Size([2, 6, 4])
    """

    support_x: Any
    support_y: Tensor
    query_x: Any
    query_y: Tensor


class ResampledEpisodes(NamedTuple):
    """A meta-batch of T tasks in the resampling case: fresh samples for every use.

    This is Algorithm 1 of Ji et al. 2022. Inner step j descends on its own support batch S_j. The
    Hessian of step j in the meta-gradient is computed on a Hessian batch D_j, which is independent
    of all other batches and may be smaller. With N = 1 the support, Hessian and query batches are
    D_in, D_h and D_o of Fallah et al. 2020, Algorithms 1-3.

    Attributes:
        support_x: S_0 .. S_{N-1}, ``[T, N, S, ...]``.
        support_y: Their labels or targets, ``[T, N, S]`` or ``[T, N, S, ...]``.
        hessian_x: D_0 .. D_{N-1}, ``[T, N, D, ...]``; D may be 0 where no curvature is taken
            (FO-MAML).
        hessian_y: Their labels or targets, ``[T, N, D]`` or ``[T, N, D, ...]``.
        query_x: The batch on which the adapted parameters are evaluated, ``[T, Q, ...]``.
        query_y: Its labels or targets, ``[T, Q]`` or ``[T, Q, ...]``.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, ResampledEpisodes
        >>> x = torch.rand(2, 3, 6, 4)  # two tasks, batches for three inner steps, six examples
        >>> y = torch.tensor([0, 1, 2] * 2).expand(2, 3, 6)
        >>> support, hessian, query = (x, y), (x, y), (x[:, 0], y[:, 0])
        >>> batches = ResampledEpisodes(*support, *hessian, *query)
        >>> MAML(MLP(4, 3), train_steps=3).meta_loss(batches).shape
        torch.Size([])
    """

    support_x: Any
    support_y: Tensor
    hessian_x: Any
    hessian_y: Tensor
    query_x: Any
    query_y: Tensor


AnyEpisodes = Episodes | ResampledEpisodes
"""A meta-batch of the finite-sum or of the resampling case."""


def first_task(episodes: AnyEpisodes) -> AnyEpisodes:
    """Return the first task of a meta-batch, without the task dimension."""
    first: AnyEpisodes = map_tensors(lambda tensor: tensor[0], episodes)
    return first


def queries_to_adapt_on(episodes: AnyEpisodes) -> Episodes:
    """Return a meta-batch with the query sets in place of the support sets too."""
    queries = episodes.query_x, episodes.query_y
    return Episodes(*queries, *queries)


def support_set(task: AnyEpisodes) -> tuple[Any, Tensor]:
    """Return inputs and labels of one task's support set, or of its first step's support batch."""
    if isinstance(task, Episodes):
        return task.support_x, task.support_y
    return map_tensors(lambda tensor: tensor[0], task.support_x), task.support_y[0]


def check_episodes(episodes: Any) -> None:
    """Check that ``episodes`` is a meta-batch whose tensors agree on tasks, steps and examples.

    Args:
        episodes: Anything; a valid meta-batch is :class:`Episodes` or :class:`ResampledEpisodes`.

    Raises:
        TypeError: If ``episodes`` is of another type, or a part of it is not made of tensors.
        ValueError: If labels are complex or have a last dimension of 1 too many, if a tensor lacks
            its task, step or example dimension, if sizes or the dtypes of inputs disagree, or if
            there is no task or no example.
    """
    if not isinstance(episodes, Episodes | ResampledEpisodes):
        raise UserTypeError(
            f"Expected a batch of `lightning_maml.Episodes` but got {_described(episodes)}; let "
            "the loader return Episodes(support_x, support_y, query_x, query_y), or just these "
            "four, whose tensors have the tasks in front."
        )
    dimensions = _leading_dimensions(episodes)
    parts = {name: _labelled_tensors(name, part) for name, part in episodes._asdict().items()}
    _check_dimensions(parts, dimensions)
    for name in episodes._fields[1::2]:
        _check_labels(name, getattr(episodes, name), dimensions[name])
    _check_number_of_tasks(parts)
    if isinstance(episodes, ResampledEpisodes):
        _check_number_of_steps(parts, episodes._fields[:4])
    for x, y in zip(episodes._fields[::2], episodes._fields[1::2], strict=True):
        # the examples are the last of the dimensions that every tensor must have
        labels = getattr(episodes, y).shape[len(dimensions[y]) - 1]
        for label, tensor in parts[x].items():
            examples = tensor.shape[len(dimensions[x]) - 1]
            if examples != labels:
                raise UserValueError(
                    f"Expected `{label}` and `{y}` to hold the same number of examples but got "
                    f"{examples} and {labels}."
                )
        # Hessian batches may be empty: FO-MAML takes no curvature
        if labels == 0 and x != "hessian_x":
            raise UserValueError(
                f"Expected `{x}` to hold at least one example per task but got none."
            )
    _check_that_inputs_are_alike(parts, episodes._fields[::2])


def _described(batch: Any) -> str:
    """Return the type of a batch, and how many parts it has."""
    name = type(batch).__name__
    return f"a {name} of {len(batch)}" if isinstance(batch, list | tuple) else name


def _leading_dimensions(episodes: AnyEpisodes) -> dict[str, list[str]]:
    """Return the dimensions that the tensors of each part must have in front."""
    dimensions = {name: ["tasks", "examples"] for name in episodes._fields}
    if isinstance(episodes, ResampledEpisodes):
        for name in episodes._fields:
            if not name.startswith("query"):
                dimensions[name] = ["tasks", "inner steps", "examples"]
    return dimensions


def _check_dimensions(
    parts: dict[str, dict[str, Tensor]], dimensions: dict[str, list[str]]
) -> None:
    for name, part in parts.items():
        for label, tensor in part.items():
            if tensor.ndim < len(dimensions[name]):
                raise UserValueError(
                    f"Expected `{label}` to have at least the dimensions "
                    f"[{', '.join(dimensions[name])}] but got shape {list(tensor.shape)}; add a "
                    "leading dimension for a single task."
                )


def _check_number_of_tasks(parts: dict[str, dict[str, Tensor]]) -> None:
    sizes = {label: len(tensor) for part in parts.values() for label, tensor in part.items()}
    if len({*sizes.values()}) > 1:
        raise UserValueError(
            f"Expected all tensors of `episodes` to hold the same number of tasks but got {sizes}."
        )
    if 0 in sizes.values():
        raise UserValueError("Expected `episodes` to hold at least one task but got none.")


def _check_number_of_steps(
    parts: dict[str, dict[str, Tensor]], support_and_hessian: tuple[str, ...]
) -> None:
    steps = {
        label: tensor.shape[1]
        for name in support_and_hessian
        for label, tensor in parts[name].items()
    }
    if len({*steps.values()}) > 1:
        raise UserValueError(
            "Expected support and Hessian batches for the same number of inner steps but got "
            f"{steps}."
        )


def _labelled_tensors(name: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors of one part of a meta-batch, each by its name in error messages."""
    if isinstance(value, Tensor):
        return {name: value}
    are_inputs = "_x" in name
    if are_inputs and isinstance(value, dict | tuple | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        labelled: dict[str, Tensor] = {}
        for key, part in parts:
            labelled |= _labelled_tensors(f"{name}[{key!r}]", part)
        return labelled
    if isinstance(value, Mapping) and not isinstance(value, dict):
        cure = "dict(...) of it is one"
    elif value is None:
        cure = "leave it out"
    else:
        cure = "make it one, torch.from_numpy(...) for an array"
    expected = "a tensor, or a dict, tuple or list of tensors," if are_inputs else "a tensor"
    raise UserTypeError(
        f"Expected `{name}` to be {expected} but got {type(value).__name__}; {cure}."
    )


def _check_that_inputs_are_alike(
    parts: dict[str, dict[str, Tensor]], names: tuple[str, ...]
) -> None:
    """Check that all inputs hold the same tensors, of the same dtypes."""
    first, *others = names
    dtypes = {label.removeprefix(first): tensor.dtype for label, tensor in parts[first].items()}
    for name in others:
        found = {label.removeprefix(name): tensor.dtype for label, tensor in parts[name].items()}
        if found.keys() != dtypes.keys():
            raise UserValueError(
                f"Expected the same tensors in `{first}` and `{name}` but got "
                f"{', '.join(parts[first])} and {', '.join(parts[name])}."
            )
        different = [
            (dtypes[label], dtype) for label, dtype in found.items() if dtype != dtypes[label]
        ]
        if different:
            types = " and ".join(sorted(map(str, different[0])))
            raise UserValueError(
                f"Expected all inputs of `episodes` to be of one type but got {types}; convert "
                "them."
            )


def _check_labels(name: str, y: Tensor, dimensions: list[str]) -> None:
    if y.is_complex():
        raise UserValueError(
            f"Expected `{name}` to hold integers or real floats but got {y.dtype}; give the real "
            "and the imaginary parts, torch.view_as_real(y), to a loss that joins them."
        )
    if not y.is_floating_point() and y.ndim == len(dimensions) + 1 and y.shape[-1] == 1:
        raise UserValueError(
            f"Expected `{name}` to hold one label per example, [{', '.join(dimensions)}], but got "
            f"shape {list(y.shape)}; leave the last dimension out, y[..., 0], or if these are "
            "targets of a regression, make them floats, y.float()."
        )
