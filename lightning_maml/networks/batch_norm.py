"""Statistics of the inputs of batch-norm layers, and running averages for each inner step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml.batches.trees import Inputs, call
from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError
from lightning_maml.networks.places import holding, places

_KINDS = ("running_mean", "running_var")


class StepStatistics(nn.Module):
    """Running averages of batch norm for each inner step.

    These are the "Per-Step Batch Normalization Running Statistics" of MAML++ (Antoniou et al. 2019,
    section 4). Activations change as the parameters adapt, so each of ``w_0 .. w_N`` has averages
    of its own; steps after the N-th use those of ``w_N``.

    Args:
        network: The network. Averages start from those of its batch-norm layers and move by their
            momentum, or by 0.1 where that is None.
        steps: Number of inner steps in training, N.

    Examples:
        >>> from torch import nn
        >>> from lightning_maml.networks.batch_norm import StepStatistics
        >>> network = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> StepStatistics(network, steps=3)(step=0)
        {'1.running_mean': tensor([0., 0.]), '1.running_var': tensor([1., 1.])}
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        norms = batch_norms(network)
        self._momenta = {
            name: 0.1 if norm.momentum is None else norm.momentum for name, norm in norms.items()
        }
        self._last = steps
        # buffers are numbered, because names of layers may contain dots
        for number, norm in enumerate(norms.values()):
            for kind in _KINDS:
                of_each_step = getattr(norm, kind).expand(steps + 1, -1).clone()
                self.register_buffer(f"{kind}_{number}", of_each_step)

    def forward(self, step: int) -> dict[str, Tensor]:
        """Return the running averages ``[C]`` at ``w_step``, by their names in the network."""
        step = min(step, self._last)
        return {
            f"{name}.{kind}": self.get_buffer(f"{kind}_{number}")[step]
            for number, name in enumerate(self._momenta)
            for kind in _KINDS
        }

    @torch.no_grad()
    def update(self, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Move the averages towards new statistics.

        Args:
            found: Means and variances, each ``[N + 1, C]``, by the name of the layer. Layers that
                are missing keep their averages.
        """
        for number, (name, momentum) in enumerate(self._momenta.items()):
            # not strict: a missing layer has no statistics to pair
            for kind, now in zip(_KINDS, found.get(name, ()), strict=False):
                average = self.get_buffer(f"{kind}_{number}")
                average.lerp_(now.to(average), momentum)


def batch_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch-norm layers of ``network`` by name."""
    return {
        name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)
    }


def forget_running_averages(norm: _BatchNorm) -> None:
    """Make ``norm`` use the statistics of each batch, even in evaluation mode."""
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


@contextmanager
def averages_kept(network: nn.Module) -> Iterator[None]:
    """Let batch-norm layers use the statistics of the batch, in any mode, and keep their averages.

    Args:
        network: The network; its running averages are put back at the end.
    """
    buffers = [norm._buffers for norm in batch_norms(network).values()]
    before = [dict(of_norm) for of_norm in buffers]
    try:
        for of_norm in buffers:
            # a layer without averages normalises by the batch
            averages = of_norm.keys() & {*_KINDS, "num_batches_tracked"}
            of_norm.update(dict.fromkeys(averages))
        yield
    finally:
        for of_norm, tensors in zip(buffers, before, strict=True):
            of_norm.update(tensors)


def batch_norm_input_stats(
    network: nn.Module, params: Params, x: Inputs, *, correction: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute the statistics of the inputs of each batch-norm layer for one task.

    Args:
        network: The network; its buffers stay unchanged.
        params: Parameters to run it with.
        x: Inputs of the task, ``[B, ...]``.
        correction: 0 for the variance that batches are normalised by, divided by the number of
            values n; 1 for the one that running averages are made of, divided by n - 1.

    Returns:
        Mean and variance, each ``[C]``, by the name of the layer.

    Raises:
        ValueError: If a batch-norm layer is called more than once.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        if name in found:
            raise UserValueError(
                f"Expected each batch norm to be called once but {name!r} is called again, and "
                "can keep one set of statistics only; give each call a layer of its own, or use "
                "`batch_norm='batch'`."
            )
        all_but_channels = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x, all_but_channels, correction=correction)
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
