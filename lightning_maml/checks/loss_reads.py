"""Finds losses that read what a network's forward pass leaves in its attributes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.trees import call, detached, map_tensors
from lightning_maml.checks.first_pass import first_support, shifted
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import raise_if_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import OF_EVERY_MODULE, held_tensors, put_back
from lightning_maml.networks.copies import structural_copy
from lightning_maml.networks.facts import MISSING, facts_of
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.places import holding, places

Left = dict[tuple[str, str], Any]
"""What a pass has left in a network, by the names of module and attribute or buffer."""


def check_loss_reads_no_attributes(
    of_outputs: FunctionalLoss,
    network: nn.Module,
    functional: FunctionalNetwork,
    episodes: AnyEpisodes,
) -> None:
    """Refuse a loss that reads what a forward pass leaves in the network.

    Each pass runs in a copy of the network, so the loss would read what was there before. Such a
    loss is another one for the same outputs, depending on which pass was the last.

    Args:
        of_outputs: The loss.
        network: The user's network, which a loss may know.
        functional: The network or a copy of it.
        episodes: The meta-batch.

    Raises:
        ValueError: If the loss reads an attribute or a buffer that depends on the pass.
    """
    if _is_of_torch(of_outputs.loss):
        return
    task = detached(first_task(episodes))
    with first_support(functional, episodes) as x, torch.no_grad():
        with torch.enable_grad():  # some layers write with gradients only
            passes = _of_two_passes(functional, x, task.query_x)
        if passes is None:
            return
        outputs = functional(functional.params, x)
        value = partial(_value_with, network, of_outputs, outputs, support_set(task)[1])
        one, other = passes
        right = value(one)
        if not _differ(right, value(other)) or _differ(right, value(one)):
            return  # one that is another in each call says nothing
        changed = [key for key in {**one, **other} if _is_other(one, other, key)]
        each = [key for key in changed if _differ(right, value(_exchanged(one, other, key)))]
    names = [f"{module}.{key}".lstrip(".") for module, key in sorted(each or changed)]
    raise UserValueError(
        "Expected a loss of outputs and labels but it reads an attribute that the network's "
        f"forward pass sets ({', '.join(names)}), which holds what another pass has left; let "
        "the network return what the loss needs, in a dict with `logits` for instance."
    )


def _is_other(one: Left, other: Left, key: tuple[str, str]) -> bool:
    return one.get(key, MISSING) is not other.get(key, MISSING)


def _exchanged(one: Left, other: Left, key: tuple[str, str]) -> Left:
    """Return what one pass left, but for a key what the other did."""
    both = {**one, key: other.get(key, MISSING)}
    return {name: value for name, value in both.items() if value is not MISSING}


def _is_of_torch(loss: Any) -> bool:
    """Return whether a loss is torch's own or this library's, which know no network."""
    while isinstance(loss, partial):
        loss = loss.func
    parts = [*loss.modules()] if isinstance(loss, nn.Module) else [loss]
    own = ("torch.", "lightning_maml.")
    return all((getattr(part, "__module__", None) or "").startswith(own) for part in parts)


def _of_two_passes(functional: FunctionalNetwork, x: Any, queries: Any) -> tuple[Left, Left] | None:
    """Return what two passes leave of which nothing is the same, or None if the network fails."""
    left_by = partial(_left_by_a_pass, functional.network)
    try:
        one = left_by(functional.params, x)
    except Exception as error:  # noqa: BLE001 # of which other checks tell
        raise_if_out_of_memory(error)
        return None
    for params in (shifted(functional.params), functional.params):
        try:
            return one, left_by(params, map_tensors(torch.clone, queries))
        except Exception as error:  # noqa: BLE001 # with other parameters it may raise anything
            raise_if_out_of_memory(error)
    return None


def _left_by_a_pass(network: nn.Module, params: Params, x: Any) -> Left:
    copied = structural_copy(network)
    written = facts_of(network).written
    values = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    values |= {  # frozen parameters may be written to as well
        name: p.detach().clone()
        for name, p in copied.named_parameters()
        if name not in params and (written is None or name in written.tensors)
    }
    values |= {name: p.detach() for name, p in params.items()}
    with holding(places(copied), values):
        call(copied, x)
        return {
            (name, key): value.detach().clone() if isinstance(value, Tensor) else value
            for name, module in copied.named_modules()
            for holder in (module._buffers, vars(module))
            for key, value in holder.items()
            if key not in OF_EVERY_MODULE
        }


def _value_with(
    network: nn.Module, of_outputs: FunctionalLoss, outputs: Any, y: Tensor, left: Left
) -> Any:
    """Return the loss as it is after a pass that left this, or the type of its error."""
    before, held = generator_states(y.device), held_tensors(of_outputs.loss)
    try:
        with _put_into(network, left):
            try:
                # not a copy of the loss, which would know a copy of the network
                return of_outputs.loss(of_outputs.given(outputs), y)
            except Exception as error:  # noqa: BLE001 # a loss may fail in any way
                raise_if_out_of_memory(error)
                return type(error)
    finally:
        put_back(held)
        set_generator_states(before, y.device)


@contextmanager
def _put_into(network: nn.Module, left: Left) -> Iterator[None]:
    """Put attributes and buffers into a network for a while."""
    modules, undo = dict(network.named_modules()), list[Callable[[], Any]]()
    try:
        for (name, key), value in left.items():
            if name in modules:
                buffers = modules[name]._buffers
                holder = buffers if key in buffers else modules[name].__dict__
                undo.append(_put(holder, key, value))
        yield
    finally:
        for put_one_back in reversed(undo):
            put_one_back()


def _put(holder: dict[str, Any], key: str, value: Any) -> Callable[[], Any]:
    """Put a value there, and return what undoes it."""
    now = holder[key] if key in holder else MISSING  # noqa: SIM401 # TorchScript's have no get
    if type(now) in (list, dict) and type(now) is type(value):  # others may know it too
        undo = partial(_fill, now, copy.copy(now))
        _fill(now, value)
        return undo
    holder[key] = value
    return partial(holder.pop, key, None) if now is MISSING else partial(_set, holder, key, now)


def _set(holder: dict[str, Any], key: str, value: Any) -> None:
    holder[key] = value


def _fill(container: Any, content: Any) -> None:
    if container is content:
        return
    container.clear()
    if isinstance(container, dict):
        container.update(content)
    else:
        container.extend(content)


def _differ(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return value is not other
    same_shape = value.shape == other.shape
    return not (same_shape and torch.allclose(value, other, rtol=1e-6, equal_nan=True))
