"""Small tasks of points, a plain network for them, and its gradient by autograd."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.random_numbers import drawn_on_cpu
from lightning_maml import Episodes
from lightning_maml.core.params import Params

RATE, STEPS, WAYS = 0.4, 2, 5


def points(tasks: int = 4) -> Episodes:
    random = torch.Generator().manual_seed(1)
    x = drawn_on_cpu(torch.randn, 2, tasks, 2 * WAYS, 8, dtype=torch.float64, generator=random)
    labels = torch.arange(WAYS).repeat(tasks, 2)
    return Episodes(x[0], labels, x[1], labels)


def unrolled(
    network: nn.Module, loss: Any = F.cross_entropy, names: list[str] | None = None
) -> Params:
    """Return the gradient by autograd through the unrolled loop, on a network that plain torch can
    call with other parameters."""
    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    values = []
    for support_x, support_y, query_x, query_y in zip(*points(), strict=True):
        w = {name: p.view_as(p) for name, p in start.items()}
        for _ in range(STEPS):
            at = names or [*w]
            value = loss(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(value, [w[name] for name in at], create_graph=True)
            w = w | {name: w[name] - RATE * g for name, g in zip(at, gradient, strict=True)}
        values.append(loss(functional_call(network, w, (query_x,)), query_y))
    return dict(
        zip(start, torch.autograd.grad(torch.stack(values).mean(), [*start.values()]), strict=True)
    )


def seeded(network: type[nn.Module], *arguments: Any) -> Any:
    torch.manual_seed(0)
    return network(*arguments).double()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.body(x)))


class Several(NamedTuple):
    logits: Tensor
    other: Tensor


def images() -> Episodes:
    random = torch.Generator().manual_seed(2)
    x = drawn_on_cpu(torch.rand, 2, 2, WAYS, 1, 8, 8, dtype=torch.float64, generator=random)
    return Episodes(x[0], torch.arange(WAYS).repeat(2, 1), x[1], torch.arange(WAYS).repeat(2, 1))


def fewer_queries() -> Episodes:
    return points()._replace(query_x=points().query_x[:, :7], query_y=points().query_y[:, :7])
