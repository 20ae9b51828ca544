"""Check that a loss is one number that depends on the outputs, and only on what is trained.

Also find where it is not twice differentiable.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import detached
from lightning_maml.checks.first_pass import first_support
from lightning_maml.core.tensors import is_out_of_memory, leaves_of, nodes_of
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import held_tensors, put_back
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import kinked_operations
from lightning_maml.networks.watching import reading


def check_loss_value(
    of_outputs: FunctionalLoss,
    functional: FunctionalNetwork,
    episodes: AnyEpisodes,
    trained: Iterable[nn.Parameter],
) -> None:
    """Check that the loss of a task is a scalar, and that its gradient misses no parameters.

    The loss must not read parameters of the network, nor its own past its modules, because adapted
    values cannot be put there.

    Args:
        of_outputs: The loss.
        functional: The network.
        episodes: The meta-batch.
        trained: The parameters that the meta-optimizer trains.

    Raises:
        ValueError: If the loss is no scalar, reads parameters in one of these ways, depends on a
            trainable tensor that would get no gradient, or fails where no gradients are taken.
    """
    read: list[str] = []
    y = detached(support_set(first_task(episodes))[1])
    with first_support(functional, episodes) as x, torch.no_grad():
        leaves = {
            name: p.detach().clone().requires_grad_() for name, p in functional.params.items()
        }
        outputs = functional(leaves, x)
        with reading(functional.params, read):
            _call_without_gradients(partial(of_outputs, {}), outputs, y)
    if read:
        raise UserValueError(
            "Expected a loss of outputs and labels but it reads the network's parameters "
            f"{sorted(set(read))} from outside, where adapted values cannot be put; let the "
            "network return what the loss needs of them."
        )
    with first_support(functional, episodes), torch.enable_grad():
        outputs = map_outputs(_leaf, outputs)
        own_values = {name: p.detach() for name, p in of_outputs.params.items()}
        value = of_outputs(own_values, outputs, y)
    if value.ndim:
        raise UserValueError(
            "Expected the loss of a task to be a scalar but got shape "
            f"{list(value.shape)}; use reduction='mean'."
        )
    leaf_ids = leaves_of(value)
    # the call was given copies, so a loss with a leaf of its own has read it past its modules
    own = {id(p): name.removeprefix(of_outputs.prefix) for name, p in of_outputs.params.items()}
    if past_modules := sorted(own[leaf] for leaf in leaf_ids & own.keys()):
        raise UserValueError(
            "Expected a loss that reaches its parameters through its modules but it reads "
            f"{past_modules} from elsewhere (a tuple, a closure, a global), where adapted values "
            "cannot be put; read them from the module's attributes."
        )
    # trained parameters without a gradient are refused elsewhere, by their names
    known = (*tensors_in(outputs), *trained)
    if leaf_ids - {id(tensor) for tensor in known}:
        raise UserValueError(
            "Expected a loss whose trainable parameters are those of an nn.Module but it depends "
            "on one from elsewhere (a closure, a global), which would get no gradient; make the "
            "loss a module that has it as a parameter, or detach it."
        )


def _call_without_gradients(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor
) -> None:
    """Call a loss as evaluation does, and explain why one that differentiates fails."""
    try:
        loss(outputs, targets)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        with torch.enable_grad():
            differentiates = takes(loss, map_outputs(_leaf, outputs), targets)
        if not differentiates:
            raise
        raise UserValueError(
            "Expected a loss that can be called where no gradients are taken, as evaluation does, "
            f"but it differentiates there ({error}); let it do so under `torch.enable_grad()`, and "
            "with respect to outputs.detach().requires_grad_() where the outputs have no graph."
        ) from error


def takes(loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor) -> bool:
    """Return whether a loss can be called on these outputs and targets."""
    try:
        loss(outputs, targets)
    except Exception:  # noqa: BLE001 # a loss may raise anything
        return False
    return True


def find_kinks_of_losses(
    functional: FunctionalNetwork, episodes: AnyEpisodes, losses: Sequence[FunctionalLoss]
) -> list[str]:
    """Return the operations of losses that have kinks, such as the mean absolute error's.

    Those that give no gradient do not count, such as a maximum that is detached.

    Args:
        functional: The network.
        episodes: A meta-batch; the losses are taken on the first task's support set.
        losses: The losses.
    """
    found: list[str] = []
    y = detached(support_set(first_task(episodes))[1])
    with first_support(functional, episodes) as x, torch.inference_mode(False):
        with torch.no_grad():
            outputs = functional(functional.params, x)
        for loss in losses:
            # where it fails on support labels, the checks of the loss say so
            with suppress(Exception):
                found += _kinks_of_loss(loss, outputs, y)
    return [f"{name} (of the loss)" for name in dict.fromkeys(found)]


def _kinks_of_loss(loss: FunctionalLoss, outputs: Any, y: Tensor) -> list[str]:
    with torch.enable_grad():
        value = loss({}, map_outputs(_leaf, outputs), y)
    differentiated = [node.name().lower() for node in nodes_of(value)]

    def gives_a_gradient(name: str) -> bool:
        start = f"{name.replace('_', '')}backward"
        return any(node.startswith(start) for node in differentiated)

    return [*filter(gives_a_gradient, kinked_operations(partial(loss, {}, outputs, y)))]


def _leaf(output: Tensor) -> Tensor:
    return output.detach().requires_grad_(output.is_floating_point())


@contextmanager
def unchanged_buffers(loss: Any) -> Iterator[None]:
    """Restore the buffers and other tensors of a loss module at the end."""
    held = held_tensors(loss)
    try:
        yield
    finally:
        put_back(held)
