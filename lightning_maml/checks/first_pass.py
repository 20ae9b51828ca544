"""Passes of a network on the first task of a meta-batch, for checks."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.outputs import tensors_in
from lightning_maml.batches.trees import Inputs, detached, map_tensors, tensors
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import kinked_operations, kinks


@contextmanager
def first_support(functional: FunctionalNetwork, episodes: AnyEpisodes) -> Iterator[Any]:
    """Give the first task's support inputs to a check, and explain why the network fails on them.

    Args:
        functional: The network.
        episodes: The meta-batch.

    Yields:
        A copy of the inputs, ``[S, ...]``.

    Raises:
        ValueError: If the network takes its inputs in another form or of another dtype, or fails
            where no gradients are taken.
    """
    device = episodes.support_y.device
    # restored at the end: a resumed run repeats the checks but must draw the same numbers
    before = generator_states(device)
    with torch.inference_mode(False):
        # a copy, in case the network writes to it
        x = map_tensors(torch.clone, detached(support_set(first_task(episodes))[0]))
        try:
            yield x
        except TypeError as error:
            if isinstance(x, Tensor) or _takes(functional.network, x):
                raise
            form = f"network(*x) with {len(x)} tensors"
            if isinstance(x, dict):
                form = "network(**x) with " + ", ".join(map(repr, x))
            raise UserValueError(
                f"Expected a network that takes its inputs as {form} but it does not: {error}; "
                "put a module around it that does."
            ) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _explain_a_failing_network(functional, x, error)
            raise
        finally:
            set_generator_states(before, device)


def _takes(network: nn.Module, x: Any) -> bool:
    """Return whether a network can be called with the entries of a dict, or the items of a list."""
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # some callables have no signature
        return True
    try:
        signature.bind(**x) if isinstance(x, dict) else signature.bind(*x)
    except TypeError:
        return False
    return True


def _explain_a_failing_network(
    functional: FunctionalNetwork, x: Inputs, error: RuntimeError
) -> None:
    """Find out why a network fails on its inputs, and say what to do.

    Raises:
        ValueError: If the network runs with gradients, or on inputs of its parameters' dtype.
    """
    if _runs(functional, x) and not _runs(functional, x, grad=False):
        raise UserValueError(
            "Expected a network and a loss that can be called where no gradients are taken, as "
            f"evaluation does, but they differentiate there ({error}); put `with "
            "torch.enable_grad():` around what they differentiate."
        ) from error
    given = {tensor.dtype for tensor in tensors(x)}
    dtype = next((p.dtype for p in functional.network.parameters()), None)
    others = sorted(str(other) for other in given if other != dtype)
    if dtype is None or not others or _runs(functional, x):
        return
    if _runs(functional, map_tensors(lambda tensor: tensor.to(dtype), x)):
        of_bytes = " / 255" if torch.uint8 in given else ""
        raise UserValueError(
            f"Expected inputs of the network's type, {dtype}, but it fails on "
            f"{' and '.join(others)}; give it x.to({dtype}){of_bytes}."
        ) from error


def _runs(functional: FunctionalNetwork, x: Inputs, *, grad: bool = True) -> bool:
    try:
        with torch.set_grad_enabled(grad):
            functional(functional.params, x)
    except Exception:  # noqa: BLE001 # a network may raise anything
        return False
    return True


def first_outputs(
    functional: FunctionalNetwork, episodes: AnyEpisodes, *, of_queries: bool = False
) -> Any:
    """Return the network's outputs for the first task's support set, or for its query set."""
    with first_support(functional, episodes) as x, torch.no_grad():
        if not of_queries:
            return functional(functional.params, x)
        queries = map_tensors(torch.clone, detached(first_task(episodes).query_x))
        statistics_of = x if functional.uses_support_statistics else None
        return functional(functional.params, queries, statistics_of=statistics_of)


def shifted(params: Params) -> Params:
    """Return ``params`` with normal noise of standard deviation 0.01, the same in each call."""
    # a generator of its own, so that the run's random numbers stay what they are
    noise = torch.Generator().manual_seed(0)
    return {
        name: p.detach() + 0.01 * torch.randn(p.shape, generator=noise, device="cpu").to(p)
        for name, p in params.items()
    }


def floats(outputs: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of ``outputs`` by their numbers."""
    return {
        str(number): tensor
        for number, tensor in enumerate(tensors_in(outputs))
        if tensor.is_floating_point()
    }


def find_kinks(functional: FunctionalNetwork, episodes: AnyEpisodes) -> list[str]:
    """Return the layers with kinks, or where there are none, the operations with kinks.

    Args:
        functional: The network.
        episodes: A meta-batch; the network runs on its first support set.
    """
    if layers := kinks(functional.network):
        return layers
    with first_support(functional, episodes) as x:
        operations: list[str] = kinked_operations(lambda: functional(functional.params, x))
    return operations
