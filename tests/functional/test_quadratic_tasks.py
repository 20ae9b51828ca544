"""Where the three algorithms end up on a family of quadratic tasks, by closed form.

Fallah et al. 2020, Theorems 4.12, 4.15, 4.17.
"""

import pytest
import torch

from helpers.families import quadratic_loss, quadratic_meta_gradient, quadratic_tasks
from lightning_maml import meta_gradient


@pytest.mark.parametrize(("steps", "alpha", "floor"), [(1, 0.05, 1.139e-2), (5, 0.01, 1.106e-2)])
def test_first_order_stalls_and_the_others_do_not(steps: int, alpha: float, floor: float) -> None:
    reached = {}
    for curvature in ("exact", "none", "finite_difference"):
        w = torch.tensor([4.0, 3.0], dtype=torch.float64)
        for _ in range(200):
            w = (
                w
                - 0.5
                * meta_gradient(
                    quadratic_loss,
                    {"w": w},
                    quadratic_tasks(),
                    inner_lr=alpha,
                    steps=steps,
                    curvature=curvature,
                ).grad["w"]
            )
        reached[curvature] = float(quadratic_meta_gradient(w, alpha, steps).norm())
    assert reached["exact"] < 1e-7
    assert reached["finite_difference"] < 1e-7
    assert reached["none"] == pytest.approx(floor, rel=1e-3)
