"""Meta-gradients may be written to, whatever memory autograd gave them."""

import torch
from torch import Tensor

from lightning_maml import Episodes, meta_gradient
from lightning_maml.core.params import Params


def test_the_gradients_of_one_task_have_memory_of_their_own() -> None:
    x = torch.rand(1, 4, 3, dtype=torch.float64)
    batch = Episodes(x, x[..., :1], x.clone(), x[..., :1].clone())

    def loss(w: Params, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ (w["v"] + w["w"])) - y).square().mean() + w["shift"].sum()

    params = {name: torch.ones(3, 1, dtype=torch.float64) for name in ("v", "w", "shift")}
    arguments = {"inner_lr": 0.1, "steps": 1, "curvature": "none"}
    found = meta_gradient(loss, params, batch, **arguments).grad
    before = {name: tensor.clone() for name, tensor in found.items()}
    found["v"].mul_(0.5)
    found["shift"].mul_(2.0)
    assert torch.equal(found["w"], before["w"])
    assert torch.equal(found["v"], 0.5 * before["v"])
    assert torch.equal(found["shift"], 2.0 * before["shift"])
