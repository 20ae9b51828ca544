"""Statistics of what enters a network's batch-norm layers, and running averages of them at each point of the inner loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml.batches.trees import Inputs, call
from lightning_maml.core.params import Params
from lightning_maml.networks.places import holding, places

_KINDS = ("running_mean", "running_var")


class StepStatistics(nn.Module):
    """Running averages for each inner step (Antoniou et al. 2019, section 4, "Per-Step Batch Normalization Running Statistics").

    The activations of adapted parameters differ from those of the meta-parameters, so each of
    ``w_0 .. w_N`` has averages of its own; all further steps use those of ``w_N``.

    Args:
        network: Its batch-norm layers give the sizes and the momentum, 0.1 where they have none.
        steps: N.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        norms = batch_norms(network)
        self._momenta = {
            name: 0.1 if norm.momentum is None else norm.momentum for name, norm in norms.items()
        }
        self._last = steps
        for number, norm in enumerate(norms.values()):
            for kind in _KINDS:
                self.register_buffer(
                    f"{kind}_{number}", getattr(norm, kind).expand(steps + 1, -1).clone()
                )

    def forward(self, step: int) -> dict[str, Tensor]:
        """Return the running averages at ``w_step``, by their names in the network."""
        step = min(step, self._last)
        return {
            f"{name}.{kind}": self.get_buffer(f"{kind}_{number}")[step]
            for number, name in enumerate(self._momenta)
            for kind in _KINDS
        }

    @torch.no_grad()
    def update(self, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Move the averages towards the means and variances ``[N + 1, C]`` of the given layers."""
        for number, (name, momentum) in enumerate(self._momenta.items()):
            for kind, now in zip(_KINDS, found.get(name, ()), strict=False):
                average = self.get_buffer(f"{kind}_{number}")
                average.lerp_(now.to(average), momentum)


def batch_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch-norm layers by name."""
    return {
        name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)
    }


def forget_running_averages(norm: _BatchNorm) -> None:
    """Make ``norm`` use the statistics of each batch, in evaluation mode too."""
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


@contextmanager
def averages_kept(network: nn.Module) -> Iterator[None]:
    """Let the batch-norm layers of ``network`` normalise by the batch at hand for a while, in any mode, and leave their averages alone."""
    buffers = [norm._buffers for norm in batch_norms(network).values()]
    before = [dict(of_norm) for of_norm in buffers]
    try:
        for of_norm in buffers:
            of_norm.update(dict.fromkeys(of_norm.keys() & {*_KINDS, "num_batches_tracked"}))
        yield
    finally:
        for of_norm, tensors in zip(buffers, before, strict=True):
            of_norm.update(tensors)


def entering_statistics(
    network: nn.Module, params: Params, x: Inputs, *, correction: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance ``[C]`` of what enters each batch norm of ``network`` for the inputs ``x`` of one task.

    With ``correction`` 0 the variance is the one that a batch is normalised by, with 1 the one that
    running averages are taken of. Buffers stay unchanged.

    Raises:
        ValueError: If a batch-norm layer is called more than once.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, entering: Tensor) -> None:
        if name in found:
            raise ValueError(
                f"Expected each batch norm to be called once but {name!r} is called again, and "
                "can keep one set of statistics only; give each call a layer of its own, or use "
                "`batch_norm='batch'`."
            )
        variance, mean = torch.var_mean(
            entering, [0, *range(2, entering.ndim)], correction=correction
        )
        found[name] = mean, variance

    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, norm in batch_norms(network).items()
    ]
    try:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        with holding(places(network), {**buffers, **params}):
            call(network, x)
    finally:
        for handle in handles:
            handle.remove()
    return found
