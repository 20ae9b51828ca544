"""Small float64 networks without kinks, tasks for them, and the reference for gradients.

That is autograd through the unrolled inner loop.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.random_numbers import drawn_on_cpu
from lightning_maml.batches.episodes import Episodes
from lightning_maml.core.inner_rates import Rates
from lightning_maml.core.params import Params
from lightning_maml.functional.losses import Loss

WAYS, IMAGE = 3, 8


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(IMAGE**2, 6), nn.Tanh(), nn.Linear(6, WAYS))


def conv_group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, WAYS),
    )


def conv_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, WAYS),
    )


def conv_max_pool() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, WAYS),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv_group_norm": conv_group_norm,
    "conv_batch_norm": conv_batch_norm,
    "conv_max_pool": conv_max_pool,
}


def one_hot_mse(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs, torch.eye(WAYS, dtype=outputs.dtype, device=y.device)[y])


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return drawn_on_cpu(NETWORKS[name]).double()


def make_episodes(tasks: int = 3, shots: int = 2, queries: int = 3, seed: int = 1) -> Episodes:
    """Noise images: gradients do not depend on whether anything can be learned."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS)

    def images(per_class: int) -> Tensor:
        size = (tasks, WAYS * per_class, 1, IMAGE, IMAGE)
        return drawn_on_cpu(torch.rand, size, dtype=torch.float64, generator=random)

    def repeated(per_class: int) -> Tensor:
        return labels.repeat_interleave(per_class).repeat(tasks, 1)

    return Episodes(images(shots), repeated(shots), images(queries), repeated(queries))


def plain_loss(
    network: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Loss:
    """The loss as a user would write it.

    Batch norm uses the batch's statistics because its buffers are left out.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(network, params, (x,)), y)

    return loss


def leaves(network: nn.Module) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}


def unrolled(
    loss: Loss, w: Params, episodes: Episodes, inner_lr: float | Sequence[Rates], steps: int
) -> Tensor:
    """The meta-objective with its whole graph; with rates of each step, those that they name
    adapt."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(episodes.support_x)):
        adapted = w
        for step in range(steps):
            rates = dict.fromkeys(w, inner_lr) if isinstance(inner_lr, float) else inner_lr[step]
            # or what adapted in no step so far would be the leaf itself
            adapted = {name: p.view_as(p) for name, p in adapted.items()}
            value = loss(adapted, episodes.support_x[t], episodes.support_y[t])
            gradient = torch.autograd.grad(
                value, [adapted[name] for name in rates], create_graph=True
            )
            adapted = adapted | {
                name: adapted[name] - rates[name] * g
                for name, g in zip(rates, gradient, strict=True)
            }
        total = total + loss(adapted, episodes.query_x[t], episodes.query_y[t])
    return total / len(episodes.support_x)


def flat(params: Params) -> Tensor:
    return torch.cat([tensor.detach().flatten() for _, tensor in sorted(params.items())])


def relative_error(actual: Params, expected: Params) -> float:
    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())


RATE = 0.3
"""The inner learning rate of most tests."""


def autograd_meta_gradient(
    network: nn.Module, episodes: Episodes, steps: int, criterion=F.cross_entropy
) -> Params:
    w = leaves(network)
    objective = unrolled(plain_loss(network, criterion), w, episodes, RATE, steps)
    return dict(zip(w, torch.autograd.grad(objective, list(w.values())), strict=True))
