"""Where the three algorithms end up on a family of quadratic tasks, by closed form (Fallah et al. 2020, Theorems 4.12, 4.15, 4.17)."""

import pytest
import torch
from torch import Tensor

from lightning_maml import Episodes, meta_gradient
from lightning_maml.functional import Params

CURVATURES = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
CENTRES = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """f_i(w) = (w - c_i)' A_i (w - c_i) / 2 with x = c_i and y = diag A_i."""
    return (y * (params["w"] - x) ** 2).sum() / 2


def meta_gradient_norm(w: Tensor, alpha: float, steps: int) -> float:
    """|grad F| by closed form: F = mean_i sum_d A (1 - alpha A)^{2N} (w - c)^2 / 2."""
    return float((CURVATURES * (1 - alpha * CURVATURES) ** (2 * steps) * (w - CENTRES)).mean(0).norm())


@pytest.mark.parametrize(("steps", "alpha", "floor"), [(1, 0.05, 1.139e-2), (5, 0.01, 1.106e-2)])
def test_first_order_stalls_and_the_others_do_not(steps: int, alpha: float, floor: float) -> None:
    x, y = CENTRES[:, None], CURVATURES[:, None]
    episodes = Episodes(x, y, x, y)
    reached = {}
    for curvature in ("exact", "none", "finite_difference"):
        w = torch.tensor([4.0, 3.0], dtype=torch.float64)
        for _ in range(200):
            w = w - 0.5 * meta_gradient(loss, {"w": w}, episodes, inner_lr=alpha, steps=steps, curvature=curvature).grad["w"]
        reached[curvature] = meta_gradient_norm(w, alpha, steps)
    assert reached["exact"] < 1e-7
    assert reached["finite_difference"] < 1e-7
    assert reached["none"] == pytest.approx(floor, rel=1e-3)
