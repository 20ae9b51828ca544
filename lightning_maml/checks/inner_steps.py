"""Checks of an inner optimizer: that its steps can be taken again, and taken back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_maml.checks.shared_state import share_state
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.rng import generator_states, generators_drawn_from, set_generator_states
from lightning_maml.core.tensors import memory, raise_if_out_of_memory
from lightning_maml.errors import UserError, UserTypeError, UserValueError
from lightning_maml.networks.versions import Versions


def check_inner_steps(optimizer: InnerOptimizer, w: Tensor, rate: float, *, curved: bool) -> None:
    """Take two steps of an inner optimizer on copies, and look at what it does.

    Args:
        optimizer: The optimizer.
        w: A parameter that adapts; it is not changed.
        rate: Its inner rate.
        curved: Whether meta-gradients are taken through the steps.

    Raises:
        TypeError: If a step does not return the parameter and its state.
        ValueError: If it writes to its arguments, draws random numbers, starts from a state that
            depends on the parameter, or cannot be differentiated though it has to be.
    """
    before = generator_states(w.device)
    noise = torch.Generator().manual_seed(0)  # so that the run's random numbers stay what they are
    with torch.inference_mode(False), torch.enable_grad():
        # on the CPU as its generator is, whatever the default device
        draws = [torch.randn(w.shape, generator=noise, device="cpu").to(w) for _ in range(3)]
        leaves = [
            (w.detach().clone() + scale * draw).detach()
            for scale, draw in zip((0.0, 1.0, 1.0), draws, strict=True)
        ]
        point, *gradients = [leaf.requires_grad_() * 1 for leaf in leaves]  # may be written to
        start = point
        point = _after_steps(optimizer, start, gradients, rate)

        def step_of_another(number: int) -> None:
            slots = optimizer.start(gradients[0])
            optimizer.step(gradients[0], gradients[1], rate, slots, number)

        beside = _after_steps(optimizer, start, gradients, rate, step_of_another)
        depends = point.requires_grad and torch.autograd.grad(
            point.sum(), leaves[1:], allow_unused=True
        )
    drawn = generators_drawn_from(before, w.device)
    set_generator_states(before, w.device)
    if drawn:
        raise UserValueError(
            f"Expected inner steps without random numbers but {_name(optimizer)} draws from "
            f"{' and '.join(drawn)}: the backward pass would draw others; draw in the network or "
            "the loss, whose draws are repeated."
        )
    if not torch.allclose(point, beside, equal_nan=True):
        raise UserValueError(
            f"Expected inner steps that can be taken again but {_name(optimizer)} gives another "
            "parameter after a step of another; keep what it remembers in its state, the tuple "
            "that `start` and `step` return, which each parameter of each task has for itself."
        )
    if not curved:
        return
    if not depends or any(found is None for found in depends):
        raise UserValueError(
            "Expected inner steps that autograd can follow but what the `step` of "
            f"{_name(optimizer)} returns does not depend on its gradient; leave out torch.no_grad, "
            ".detach() and .data, or train with FOMAML."
        )


def _after_steps(
    optimizer: InnerOptimizer,
    w: Tensor,
    gradients: list[Tensor],
    rate: float,
    after_each: Callable[[int], None] = lambda number: None,
) -> Tensor:
    slots = _started(optimizer, w)
    for number, gradient in enumerate(gradients):
        w, slots = _stepped(optimizer, w, gradient, rate, slots, number)
        after_each(number)
    return w


def _started(optimizer: InnerOptimizer, w: Tensor) -> tuple[Tensor, ...]:
    slots = _slots(optimizer, optimizer.start(w), "start")
    if any(slot.requires_grad or memory(slot) == memory(w) for slot in slots):
        raise UserValueError(
            f"Expected the `start` of {_name(optimizer)} to return constants but they depend on "
            "the parameter, and the meta-gradient would lack that part; put what pulls towards the "
            "start into the support loss (IMAML has such a term), or detach a clone of it."
        )
    return slots


def _stepped(
    optimizer: InnerOptimizer,
    w: Tensor,
    gradient: Tensor,
    rate: float,
    slots: tuple[Tensor, ...],
    number: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    arguments = Versions(enumerate((w, gradient, *slots)))
    try:
        found: Any = optimizer.step(w, gradient, rate, slots, number)
    except UserError:
        raise
    except Exception as error:
        raise UserValueError(
            f"Expected the `step` of {_name(optimizer)} to run but step {number} fails: {error}"
        ) from error
    if arguments.changed():
        raise UserValueError(
            f"Expected the `step` of {_name(optimizer)} to leave its arguments as they are but it "
            "writes to them; return new tensors."
        )
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
        raise UserTypeError(
            f"Expected the `step` of {_name(optimizer)} to return the parameter and a tuple, its "
            f"state, but got {type(found).__name__}; without state return (w, ())."
        )
    point, state = found
    if point.shape != w.shape or point.dtype != w.dtype:
        raise UserValueError(
            f"Expected the `step` of {_name(optimizer)} to return a parameter of shape "
            f"{list(w.shape)} and {w.dtype} but got {list(point.shape)} and {point.dtype}."
        )
    return point, _slots(optimizer, state, "step")


def _slots(optimizer: InnerOptimizer, slots: Any, where: str) -> tuple[Tensor, ...]:
    are_floats = isinstance(slots, tuple) and all(
        isinstance(slot, Tensor) and slot.is_floating_point() for slot in slots
    )
    if not are_floats:
        raise UserTypeError(
            f"Expected the state that the `{where}` of {_name(optimizer)} returns to be a tuple of "
            f"tensors of floats but got {slots!r}; a count of the steps is given as `number`."
        )
    found: tuple[Tensor, ...] = slots
    return found


def moves_by_itself(optimizer: InnerOptimizer) -> bool:
    """Return whether the first step moves a parameter that has no gradient, by weight decay say."""
    w = torch.ones(2)
    moved, _ = optimizer.step(w, torch.zeros(2), 0.1, optimizer.start(w), 0)
    return not torch.equal(moved, w)


def steps_share_state(optimizer: InnerOptimizer, w: Tensor, rate: float) -> bool:
    """Return whether a step comes out otherwise if another is taken in the middle of it.

    Threads take them so.

    Args:
        optimizer: The optimizer.
        w: A parameter that adapts.
        rate: Its inner rate.
    """

    def stepped(size: float) -> Callable[[], Tensor]:
        start = w.detach().clone()
        gradient = torch.full_like(start, size)
        return lambda: optimizer.step(start, gradient, rate, optimizer.start(start), 0)[0]

    with torch.inference_mode(False):
        return share_state(stepped(1.0), stepped(2.0))


def fails_stacked(optimizer: InnerOptimizer, w: Tensor, rate: float) -> str:
    """Return why a step of several tasks as one fails, or nothing if it runs.

    Args:
        optimizer: The optimizer.
        w: A parameter that adapts.
        rate: Its inner rate.
    """

    def step(w: Tensor) -> Tensor:
        return optimizer.step(w, w, rate, optimizer.start(w), 0)[0]

    try:
        with torch.inference_mode(False):
            torch.func.vmap(step)(torch.stack([w.detach()] * 2))
    except Exception as error:  # noqa: BLE001 # a step may raise anything
        raise_if_out_of_memory(error)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{_name(optimizer)} fails there ({reason})"
    return ""


def _name(optimizer: InnerOptimizer) -> str:
    return type(optimizer).__name__
