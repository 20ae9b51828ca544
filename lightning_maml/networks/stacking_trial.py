"""Compares two tasks under ``vmap`` with the same tasks alone.

Only the forward pass of stacked tasks runs under ``vmap``; autograd runs outside of it. An
operation that keeps an index into the batch, or has a hook, then takes all tasks for one. No list
of such operations is ever complete, so numbers decide: the losses, gradients and Hessian-vector
products of two different tasks at two different points.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import detached
from lightning_maml.core.objective import Objective, twice_differentiable
from lightning_maml.core.params import Params
from lightning_maml.core.precision import full_precision
from lightning_maml.core.rng import generator_states, generators_drawn_from, set_generator_states
from lightning_maml.core.task_axis import SINGLE_TASK, Randomness, TaskAxis
from lightning_maml.core.tensors import is_out_of_memory

TaskLoss = Callable[[Params, Any], Tensor]
"""``loss(params, task)`` of one task; it returns a scalar."""

Evaluations = dict[str, Tensor]
"""Results for two tasks by name, each ``[2, ...]``."""

HOOKED = "the network has hooks on tensors, which would see all tasks as one"
"""Why a network with hooks on tensors is refused without a trial: hooks may depend on values."""

_SHIFT = 0.05
"""Distance of a point from the parameters, in standard deviations of each tensor."""

_ATTEMPTS = 3
"""Pairs of points at which results must differ: at a single one it may be a tie in a maximum."""


class Verdict(NamedTuple):
    """Whether tasks can be stacked.

    Attributes:
        wrong: Why stacked tasks would fail or give other numbers; empty if they would not.
        slow: Why stacking would not pay, though it is right; empty if it does.
        no_memory: Whether that is for lack of memory.
    """

    wrong: str = ""
    slow: str = ""
    no_memory: bool = False


def compare(
    alone: Callable[[int], Evaluations],
    together: Callable[[int, Randomness], Evaluations],
    device: torch.device,
    *,
    curved: bool = False,
    only_runs: bool = False,
) -> Verdict:
    """Compare two tasks alone with the same tasks under ``vmap``.

    Args:
        alone: Evaluates two tasks one after the other, each from the random state at the start; its
            argument is the number of the attempt.
        together: Evaluates both under ``vmap`` with this ``randomness``, ``"same"`` or
            ``"different"`` random numbers for the tasks.
        device: The network's device.
        curved: Whether second derivatives are taken, which attention has another implementation
            for: that which is tried is to be that which will run.
        only_runs: Only find out whether they run, in a precision that rounds too much to compare.

    Returns:
        The verdict. The state of the random generators is restored.

    Raises:
        Exception: Whatever ``alone`` raises, except for lack of memory.
    """
    before = generator_states(device)
    watch = _DependsOnValues()
    drawn_from: list[str] = []
    difference: str | None = None
    with (
        torch.inference_mode(False),
        warnings.catch_warnings(record=True) as caught,
        twice_differentiable() if curved else nullcontext(),
        full_precision(),
    ):
        warnings.simplefilter("always")
        try:
            for attempt in range(_ATTEMPTS):
                right = alone(attempt)
                set_generator_states(before, device)
                try:
                    found = together(attempt, "same")
                    drawn_from = generators_drawn_from(before, device)
                    # a second run, because attention has another implementation under a watch
                    with watch:
                        # random numbers as in training: some ways to draw fail only here
                        together(attempt, "different")
                except Exception as error:  # noqa: BLE001 # vmap may make it raise anything
                    return _failed(error)
                difference = None if only_runs else first_difference(right, found)
                if difference is None:
                    break
                set_generator_states(before, device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return _failed(error)
            raise
        finally:
            set_generator_states(before, device)
    if watch.found:
        return Verdict(
            f"{watch.found} is wrong for stacked tasks, if certain values are in the batch"
        )
    # vmap gives each task random numbers of torch only
    if shared := {"numpy", "python"}.intersection(drawn_from):
        return Verdict(
            f"they draw random numbers from {' and '.join(sorted(shared))}, which they would share"
        )
    if difference is not None:
        return Verdict(f"as one, their {difference} differs from what each gives alone")
    return Verdict(slow=_loops_of_vmap([str(warning.message) for warning in caught]))


def _loops_of_vmap(warned: list[str]) -> str:
    """Return why stacking would not pay if ``vmap`` has warned that it loops over the tasks."""
    for message in warned:
        if "batching rule" not in message:
            continue
        operation = re.search(r"aten::\w+", message)
        named = message.splitlines()[0] if operation is None else operation[0]
        if "as_strided_" not in named:  # pooling to 1 x 1 is cheap in a loop too
            return f"vmap would loop over them in {named}"
    return ""


def _failed(error: Exception) -> Verdict:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        slow = f"memory does not suffice for two of them ({reason})"
        return Verdict(slow=slow, no_memory=True)
    return Verdict(f"vmap does not take them ({reason})")


def first_difference(right: Evaluations, found: Evaluations, relative: float = 1e-2) -> str | None:
    """Return the name of the first result that differs by more than rounding, or None.

    Args:
        right: The right results.
        found: Those to compare; one that is missing or has another shape differs.
        relative: The largest relative error that is taken for rounding below float64, where
            derivatives of large networks have few digits, or four roundings if these are more. In
            float64 it is 1e-6.
    """
    for name, values in right.items():
        if name not in found or found[name].shape != values.shape:
            return name
        # equal infinities and nans are no difference, though their difference is nan
        same = torch.isclose(found[name], values, rtol=0, atol=0, equal_nan=True)
        error = torch.where(same, 0.0, found[name] - values)
        size = torch.linalg.vector_norm(torch.where(values.isfinite(), values, 0.0))
        digits = torch.finfo(values.dtype).eps
        tolerance = 1e-6 if values.dtype == torch.float64 else max(relative, 4 * digits)
        # for what is nearly zero; of half precision 100 roundings would be outputs of usual size
        nothing = 100 * min(digits, torch.finfo(torch.float32).eps)
        # "not <=" rather than ">", so that an error of nan is a difference
        if not torch.linalg.vector_norm(error) <= tolerance * size + nothing:
            return name
    return None


def compare_losses(
    single: TaskLoss,
    stacked: TaskLoss,
    params: Params,
    episodes: AnyEpisodes,
    *,
    curved: bool,
    only_runs: bool = False,
) -> Verdict:
    """Compare a loss and its derivatives for two tasks, each at parameters of its own.

    Args:
        single: The loss of one task.
        stacked: The same loss, to be called under ``vmap``.
        params: Parameters near which both are evaluated.
        episodes: A meta-batch; its first and last task are compared.
        curved: Whether to compare Hessian-vector products too.
        only_runs: See :func:`compare`.
    """
    device = next(iter(params.values())).device
    tasks = two_tasks(episodes)
    states = generator_states(device)

    def alone(attempt: int) -> Evaluations:
        each = []
        for w, task in zip(_two_points(params, attempt), tasks, strict=True):
            set_generator_states(states, device)
            objective = Objective(partial(without_aux, single, task), SINGLE_TASK)
            each.append(_evaluations(objective, w, curved))
        return {name: torch.stack([of_task[name] for of_task in each]) for name in each[0]}

    def together(attempt: int, randomness: Randomness) -> Evaluations:
        axis = TaskAxis(2, randomness)
        points = _two_points(params, attempt)
        w = {name: torch.stack([point[name] for point in points]) for name in params}
        task = tree_map(lambda *tensors: torch.stack(tensors), *tasks)
        objective = Objective(partial(without_aux, axis.vmap(stacked), task), axis)
        return _evaluations(objective, w, curved)

    def without_aux(loss: TaskLoss, task: Any, w: Params) -> tuple[Tensor, tuple[()]]:
        return loss(w, task), ()

    return compare(alone, together, device, curved=curved, only_runs=only_runs)


def two_tasks(episodes: AnyEpisodes) -> list[Any]:
    """Return the first and the last task of a meta-batch, without the task dimension."""
    episodes = detached(episodes)
    last = len(tree_leaves(episodes)[0]) - 1
    return [
        tree_map(lambda tensor, number=number: tensor[number], episodes) for number in (0, last)
    ]


def _evaluations(objective: Objective, w: Params, curved: bool) -> Evaluations:
    dim = objective.axis.size

    def as_rows(params: Params) -> Tensor:
        rows = [tensor.reshape(*tensor.shape[:dim], -1) for tensor in params.values()]
        return torch.cat(rows, -1)

    value, _, gradient = objective.value_and_gradient(w)
    found = {"loss": value, "gradient": as_rows(gradient)}
    if curved:
        found["Hessian-vector product"] = as_rows(objective.hessian_vector_product(w, w))
    return found


def _two_points(params: Params, attempt: int) -> list[Params]:
    # a generator of its own, so that the run's random numbers stay what they are
    random = torch.Generator().manual_seed(attempt)
    points: list[Params] = []
    for _ in range(2):
        point = {}
        for name, tensor in params.items():
            spread = _SHIFT * (tensor.detach().std(correction=0) + 0.01)
            noise = torch.randn(tensor.shape, generator=random, device="cpu").to(tensor)
            point[name] = tensor.detach() + spread * noise
        points.append(point)
    return points


class _DependsOnValues(TorchFunctionMode):
    """Finds operations that are wrong under ``vmap`` for values that the two tasks may lack."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            names = (
                "input",
                "weight",
                "padding_idx",
                "max_norm",
                "norm_type",
                "scale_grad_by_freq",
            )
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            for name in ("padding_idx", "scale_grad_by_freq"):
                value = given.get(name)
                if value is not None and value is not False:  # row 0 may well be the padding
                    self.found = f"an embedding with `{name}`"
        return func(*args, **(kwargs or {}))
