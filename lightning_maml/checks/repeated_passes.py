"""Check that a pass through a network can be repeated, as derivatives need."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.trees import Inputs, detached
from lightning_maml.checks.first_pass import first_support, floats, shifted
from lightning_maml.core.rng import generator_states, generators_drawn_from, set_generator_states
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import held_tensors, put_back
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.stacking_trial import first_difference


def check_writes(functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Find out what a forward pass changes in the network, and refuse what would not be restored.

    It must be the first check, because any other pass changes the network too.

    Raises:
        ValueError: If a pass writes to its inputs or to a trainable parameter, or remembers
            something in a plain tensor.
    """
    # some layers write in training with gradients only
    with first_support(functional, episodes) as x, torch.enable_grad():
        once, twice = functional.find_writes(x)
    # on the CPU: MPS has no float64
    before = {name: tensor.cpu().double() for name, tensor in once.items()}
    after = {name: tensor.cpu().double() for name, tensor in twice.items()}
    # a tensor that is computed anew in each pass is the same again; one that remembers is not
    attribute = first_difference(before, after)
    if attribute is not None:
        raise UserValueError(
            "Expected a network that keeps what it remembers between calls in buffers but it has "
            f"the attribute {attribute!r}, a plain tensor, for it; make it a buffer, "
            "`register_buffer`, so that it is updated once per step and saved."
        )


def check_modes(network: nn.Module, functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Refuse a network whose copies read the training mode of the original.

    Adaptation may run a copy in another mode than the original.

    Args:
        network: The original; its modes are reversed for a pass of a copy.
        functional: The network, or a copy of it, as a function.
        episodes: The meta-batch; its first task is used.

    Raises:
        ValueError: If the outputs of the copy change with the modes of the original.
    """
    with_modes = [
        module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    copied = FunctionalNetwork(functional.network, functional.batch_norm)
    device = episodes.support_y.device
    before = generator_states(device)
    with first_support(functional, episodes) as x, torch.no_grad():
        once = floats(copied(copied.params, x))
        set_generator_states(before, device)
        try:
            for module in with_modes:
                module.training = not module.training
            again = floats(copied(copied.params, x))
        finally:
            for module in with_modes:
                module.training = not module.training
    if first_difference(once, again, 1e-5) is not None:
        raise UserValueError(
            "Expected a network that reads its mode from its own modules but its outputs change "
            "with a mode that it reads from elsewhere (a function in a named tuple, a deque or "
            "another object), which copies cannot be given; make such functions methods."
        )


def generators_of(
    functional: FunctionalNetwork, episodes: AnyEpisodes, losses: Sequence[FunctionalLoss]
) -> tuple[str, ...]:
    """Return the names of the random generators that the network and the losses draw from.

    Raises:
        ValueError: If a loss writes to its tensors, or if an evaluation from the same random
            state gives another result after one with other parameters: derivatives need
            evaluations that can be repeated.
    """
    fresh = FunctionalNetwork(functional.network, functional.batch_norm)
    used = FunctionalNetwork(functional.network, functional.batch_norm)
    device = episodes.support_y.device
    before = generator_states(device)
    y = detached(support_set(first_task(episodes))[1])

    def evaluated(functional: FunctionalNetwork, x: Inputs) -> list[dict[str, Tensor]]:
        set_generator_states(before, device)
        outputs = functional(functional.params, x)
        values = []
        for loss in losses:
            try:
                values.append(loss({}, outputs, y))
            except Exception:  # noqa: BLE001 # the checks of the loss will say what is wrong
                values.append(None)
        return [floats(outputs), floats(values)]

    held = [held for loss in losses for held in held_tensors(loss.loss)]
    with first_support(functional, episodes) as x, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first step will give the same warnings
        once = evaluated(fresh, x)
        written = put_back(held)
        draws = tuple(generators_drawn_from(before, device))
        try:
            used(shifted(used.params), x)
        except Exception:  # noqa: BLE001 # with other parameters a network may raise anything
            used = FunctionalNetwork(functional.network, functional.batch_norm)
            used(used.params, x)
        again = evaluated(used, x)
        put_back(held)
    if written:
        raise UserValueError(
            f"Expected a loss that leaves its tensors as they are but it writes to {written}, and "
            "would do so several times a step; put what writes into evaluation mode (a frozen "
            "teacher's batch norm), or into the network, whose buffers are written once a step."
        )
    outputs = first_difference(once[0], again[0], 1e-5)
    value = first_difference(once[1], again[1], 1e-5)
    if outputs is not None or value is not None:
        raise UserValueError(
            f"Expected a {'loss' if outputs is None else 'network'} that returns the same for the "
            "same inputs, parameters and random state but got another result the second time; "
            "let it draw from the global random generators of torch, numpy or Python, not from "
            "one of its own, keep what it remembers between calls in buffers, and compute anew "
            "what depends on its parameters (no functools.lru_cache, no results in nested dicts "
            "or other objects)."
        )
    return draws
