"""What a network writes to its buffers while it trains, written once per meta-batch."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, support_set
from lightning_maml.batches.trees import Inputs, call, cat, count, map_tensors, shapes, tensors
from lightning_maml.core.params import Params
from lightning_maml.core.rng import set_torch_random_state, torch_random_state
from lightning_maml.networks.batch_norm import (
    averages_kept,
    batch_norms,
    entering_statistics,
    forget_running_averages,
)
from lightning_maml.networks.functional_network import (
    BatchNormPolicy,
    deep_copy,
    structural_copy,
    writes,
)


class BufferUpdate:
    """Runs the network on a meta-batch at the parameters before adaptation, and keeps what it writes.

    These are batch norm's running averages, if the policy uses them, and what any other layer
    keeps. The next step starts from there.

    Args:
        batch_norm: The batch-norm policy.
    """

    def __init__(self, batch_norm: BatchNormPolicy) -> None:
        self._uses_averages = batch_norm == "running"
        self._takes_all_at_once: bool | None = None

    def __call__(self, network: nn.Module, episodes: AnyEpisodes) -> None:
        """Run the network on a meta-batch, unless it writes nothing."""
        averages = self._uses_averages and bool(batch_norms(network))
        if not writes(network) and not averages:
            return
        keeping = nullcontext() if self._uses_averages else averages_kept(network)
        with torch.enable_grad(), keeping, _same_buffers(network):
            for x in self._batches(network, episodes):
                call(network, x)

    def _batches(self, network: nn.Module, episodes: AnyEpisodes) -> list[Any]:
        """Return the inputs of all tasks as one batch or, if the network takes no such, set by set."""
        per_step = episodes.support_y.ndim - episodes.query_y.ndim
        sets = [*_sets(episodes.support_x, per_step), *_sets(episodes.query_x)]
        if len({shapes(x) for x in sets}) > 1:
            return sets
        whole = cat(sets)
        if self._takes_all_at_once is None:
            self._takes_all_at_once = _accepts(network, whole)
        return [whole] if self._takes_all_at_once else sets


def statistics_in_training(
    network: nn.Module, params: Params, task: AnyEpisodes
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the statistics of what enters each batch norm in training mode, beside a loss of zero.

    They are those of support and query set together.
    """
    network = structural_copy(network)
    in_training = {name: norm for name, norm in batch_norms(network).items() if norm.training}
    for norm in in_training.values():
        forget_running_averages(norm)
    both_sets = cat([support_set(task)[0], task.query_x])
    found = entering_statistics(network, params, both_sets, correction=1)
    zero = next(iter(params.values())).new_zeros(())
    return zero, {name: found[name] for name in in_training}


def _sets(x: Inputs, batches: int = 0) -> list[Any]:
    """Return the inputs of each task from ``[T, B, ...]``, or of each of its batches from ``[T, N, B, ...]``."""
    flat = map_tensors(lambda tensor: tensor.flatten(0, batches), x)
    return [
        map_tensors(lambda tensor, number=number: tensor[number], flat)
        for number in range(count(flat))
    ]


def _accepts(network: nn.Module, x: Inputs) -> bool:
    """Return whether a network runs on inputs ``x``, which may be more than usual; it stays as it is."""
    device = tensors(x)[0].device
    before = torch_random_state(device)
    try:
        call(deep_copy(network), x)
    except Exception:  # noqa: BLE001 # made for a certain number of examples, it may raise anything
        return False
    finally:
        set_torch_random_state(before, device)
    return True


@contextmanager
def _same_buffers(network: nn.Module) -> Iterator[None]:
    """Keep the buffers' tensors, which compiled programs refer to, where a network replaces them.

    The new values are copied into the old tensors.
    """
    before = [(module._buffers, dict(module._buffers)) for module in network.modules()]
    yield
    for buffers, originals in before:
        for name, tensor in originals.items():
            now = dict(buffers).get(name)  # those of TorchScript are no dict
            if now is None:
                continue
            if tensor is not None and now is not tensor and now.shape == tensor.shape:
                buffers[name] = tensor.detach().copy_(now.detach())
            elif now.grad_fn is not None:
                buffers[name] = now.detach()
