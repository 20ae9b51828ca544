"""Which networks draw random numbers."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import DropBlock2d


def is_random(network: nn.Module) -> bool:
    """Return whether a layer draws random numbers: dropout, DropBlock, attention or recurrence with dropout, or RReLU, in training mode."""
    return drops_blocks(network) or any(module.training and _draws(module) for module in network.modules())


def drops_blocks(network: nn.Module) -> bool:
    """Return whether DropBlock is active, which fills its mask in place, as ``vmap`` cannot."""
    return any(module.training and isinstance(module, DropBlock2d) for module in network.modules())


def _draws(module: nn.Module) -> bool:
    inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    return inside or isinstance(module, (_DropoutNd, nn.RReLU))
