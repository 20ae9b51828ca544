"""A network whose losses have the L and rho of both papers, for all parameters, and known.

cd examples/linear_classifier
lightning-maml fit --config given.yaml       # L and rho given to AdaptiveMetaStepsize
lightning-maml fit --config measured.yaml    # measured by it
lightning-maml fit --config resampling.yaml  # batches drawn afresh
lightning-maml measure --config given.yaml --epsilon 0.1
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

L = 0.5
"""Smoothness of the cross-entropy of this network, for all parameters and tasks: its Hessian is the
mean of (diag p - p p') times x x', the first has norms of at most 1/2, the second of |x|^2 = 1."""

RHO = 0.2722
"""Lipschitz constant of its Hessian, likewise: the third derivative of log-sum-exp along a unit
vector is largest for two classes, sqrt(2)^3 max p (1 - p) (1 - 2 p) = 2^1.5 / (6 sqrt 3)."""


class UnitLinear(nn.Module):
    """A linear classifier, without bias, of inputs scaled to length 1.

    Args:
        ways: Classes.
        inputs: Numbers in an input; an image counts with all its pixels.
    """

    def __init__(self, ways: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ways, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, ways]`` of inputs ``[B, ...]``."""
        return F.normalize(x.flatten(1), dim=1) @ self.weight.T
