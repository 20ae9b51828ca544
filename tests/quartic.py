"""Quartic tasks f_i(w) = 0.05 |w|^2 + |w - c_i|^4 / 4 in R^4: smooth on every ball and on no larger set, as the adaptive stepsize is for."""

import torch
from torch import Tensor, nn

from lightning_maml import Episodes

RADIUS = 20.0
CENTRES = nn.functional.normalize(torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1)


class Quartic(nn.Module):
    """As a network: from a task's centre ``[S, 4]`` to ``w`` and ``w - centre``, ``[S, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.w = nn.Parameter(RADIUS * start / start.norm())

    def forward(self, centre: Tensor) -> Tensor:
        return torch.cat([self.w.expand_as(centre), self.w - centre], -1)


def quartic_loss(outputs: Tensor, _: Tensor) -> Tensor:
    w, distance = outputs.split(4, -1)
    return (0.05 * w.square().sum(-1) + distance.square().sum(-1).square() / 4).mean()


def quartic_tasks() -> Episodes:
    """Three tasks whose centres lie on the unit sphere."""
    y = torch.zeros(3, 1, dtype=torch.float64)
    return Episodes(CENTRES, y, CENTRES, y)


def inner_lr(steps: int) -> float:
    """1 / (8 N L) with the L of the ball of the starting radius."""
    return 1 / (8 * steps * (0.1 + 3 * (RADIUS + 1) ** 2))


def curvature_at(w: Tensor) -> tuple[float, float]:
    """The largest L and rho of the tasks at ``w``, by closed form."""
    distance = float((w - CENTRES[:, 0]).norm(dim=-1).max())
    return 0.1 + 3 * distance**2, 6 * distance


def meta_objective(w: Tensor, steps: int) -> Tensor:
    """F(w), differentiable as often as wanted: the oracle."""
    rate, total = inner_lr(steps), torch.zeros((), dtype=torch.float64)
    for centre in CENTRES[:, 0]:
        u = w
        for _ in range(steps):
            distance = u - centre
            u = u - rate * (0.1 * u + distance.square().sum() * distance)
        total = total + 0.05 * u.square().sum() + (u - centre).square().sum().square() / 4
    return total / 3
