"""Buffers that a network writes while it trains, updated once per meta-batch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, support_set
from lightning_maml.batches.trees import Inputs, call, cat, count, map_tensors, shapes, tensors
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import raise_if_out_of_memory
from lightning_maml.errors import UserRuntimeError
from lightning_maml.networks.batch_norm import (
    averages_kept,
    batch_norm_input_stats,
    batch_norms,
    forget_running_averages,
)
from lightning_maml.networks.copies import deep_copy, structural_copy
from lightning_maml.networks.facts import writes
from lightning_maml.networks.functional_network import BatchNormPolicy

Context = Callable[[], AbstractContextManager[None]]


class BufferUpdate:
    """Updates a network's buffers by one run on a meta-batch, at the parameters before adaptation.

    The buffers are batch norm's running averages, if the policy uses them, and whatever other
    layers write. The inner loop itself leaves them alone.

    Args:
        in_two_modes: Whether the network is put into training mode for the support sets alone.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.networks.buffers import BufferUpdate
        >>> network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1, momentum=0.5))
        >>> x, y = torch.ones(2, 3, 1), torch.zeros(2, 3)  # two tasks of three examples
        >>> BufferUpdate()(network, Episodes(x, y, x, y), "running")
        >>> network[1].running_mean
        tensor([0.5000])
    """

    def __init__(self, *, in_two_modes: bool = False) -> None:
        self._in_two_modes = in_two_modes
        self._is_tried = False
        self._at_once: Context | None = None
        """In which context the network takes all sets as one batch, once that was tried."""

    def __call__(
        self, network: nn.Module, episodes: AnyEpisodes, batch_norm: BatchNormPolicy
    ) -> None:
        """Run ``network`` on all tasks of a meta-batch, unless it writes no buffers."""
        with _training(network) if self._in_two_modes else nullcontext():
            moves_averages = batch_norm == "running" and any(
                norm.training for norm in batch_norms(network).values()
            )
            if not writes(network) and not moves_averages:
                return
            unused_averages = nullcontext() if batch_norm == "running" else averages_kept(network)
            # some layers write only where gradients are taken
            with torch.enable_grad(), unused_averages, _same_buffers(network):
                batches, context = self._batches(network, episodes)
                with context():
                    for x in batches:
                        call(network, x)

    def _batches(self, network: nn.Module, episodes: AnyEpisodes) -> tuple[list[Any], Context]:
        """Return the inputs of all tasks as one batch, or as sets if the network needs that.

        Also return the context to run them in.
        """
        # in the resampling case each inner step has a batch of its own
        step_dimensions = int(isinstance(episodes, ResampledEpisodes))
        sets = _sets(episodes.support_x, step_dimensions)
        if not self._in_two_modes:
            sets += _sets(episodes.query_x)
        if len({shapes(x) for x in sets}) > 1:
            return sets, nullcontext
        whole = cat(sets)
        if not self._is_tried:
            # a network that differentiates in its forward pass needs its graph
            contexts: list[Context] = [_without_graph, nullcontext]
            fitting = (context for context in contexts if _accepts(network, whole, context))
            self._at_once, self._is_tried = next(fitting, None), True
        return ([whole], self._at_once) if self._at_once else (sets, nullcontext)


def statistics_in_training(
    network: nn.Module, params: Params, task: AnyEpisodes
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the input statistics of each batch-norm layer in training mode, beside a loss of zero.

    It has the form of a loss with auxiliary results, so that it can be run like one for all tasks.

    Args:
        network: The network.
        params: Parameters to run it with.
        task: One task; the statistics are those of its support and query set together.

    Returns:
        Zero, and mean and variance ``[C]`` of each layer, as running averages are made of.
    """
    network = structural_copy(network)
    in_training = {name: norm for name, norm in batch_norms(network).items() if norm.training}
    for norm in in_training.values():
        forget_running_averages(norm)
    both_sets = cat([support_set(task)[0], task.query_x])
    found = batch_norm_input_stats(network, params, both_sets, correction=1)
    zero = next(iter(params.values())).new_zeros(())
    return zero, {name: found[name] for name in in_training}


def _sets(x: Inputs, step_dimensions: int = 0) -> list[Any]:
    """Split ``[T, B, ...]`` into the sets of tasks, ``[T, N, B, ...]`` into those of steps."""
    flat = map_tensors(lambda tensor: tensor.flatten(0, step_dimensions), x)
    return [
        map_tensors(lambda tensor, number=number: tensor[number], flat)
        for number in range(count(flat))
    ]


def _accepts(network: nn.Module, x: Inputs, context: Context) -> bool:
    """Return whether a copy of the network runs on ``x``, more examples than it usually gets."""
    device = tensors(x)[0].device
    before = generator_states(device)
    try:
        with context():
            call(deep_copy(network), x)
    except Exception as error:  # noqa: BLE001 # made for a certain number, it may raise anything
        raise_if_out_of_memory(error)
        return False
    finally:
        set_generator_states(before, device)
    return True


@contextmanager
def _without_graph() -> Iterator[None]:
    """Keep nothing for a backward pass: the graph of a whole meta-batch may fill the memory."""

    def refuse(_: None) -> Tensor:
        raise UserRuntimeError(
            "Expected a pass that updates buffers to take no derivative, as the first one did, but "
            "it takes one; let the network differentiate in each pass or in none."
        )

    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, refuse):
        yield


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    """Call the network's ``train()``, and put all modes back at the end."""
    before = [(module, module.training) for module in network.modules()]
    network.train()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _same_buffers(network: nn.Module) -> Iterator[None]:
    """Copy new values into the old tensors where a network replaces its buffers.

    Compiled programs refer to the old tensors.
    """
    before = [(module._buffers, dict(module._buffers)) for module in network.modules()]
    yield
    for buffers, originals in before:
        for name, tensor in originals.items():
            now = dict(buffers).get(name)  # TorchScript's buffers are not a dict
            if now is None:
                continue
            if tensor is not None and now is not tensor and now.shape == tensor.shape:
                # the same object, by which compiled programs and captured graphs are found again
                kept = tensor if tensor.grad_fn is None else tensor.detach()
                with torch.no_grad():
                    buffers[name] = kept.copy_(now)
            elif now.grad_fn is not None:
                # a graph would keep the activations of every step so far
                buffers[name] = now.detach()
