"""Families of tasks with known constants, on which the theory's predictions can be checked.

Losses are functions ``loss(params, x, y)`` of ``params["w"]``.
"""

from functools import partial

import torch
from torch import Tensor, nn

from helpers.random_numbers import drawn_on_cpu
from lightning_maml import Episodes
from lightning_maml.core.params import Params
from lightning_maml.functional.losses import Loss

DOUBLE = torch.float64


def finite_sum(x: Tensor, y: Tensor | None = None) -> Episodes:
    """Return tasks whose support and query losses are the same exact loss; ``x`` is ``[T, 1,
    ...]``."""
    y = torch.zeros(len(x), 1, dtype=DOUBLE) if y is None else y
    return Episodes(x, y, x, y)


def here(constant: Tensor) -> Tensor:
    """Return a constant of this file, which was made on the CPU, on the device of the test."""
    return constant.to(torch.get_default_device())


def meta_objective(w: Tensor, loss: Loss, tasks: Episodes, alpha: float, steps: int) -> Tensor:
    """Return F(w) through the unrolled inner loop, differentiable any number of times.

    It is the reference for the package's own derivatives.
    """
    values = []
    for task in (Episodes(*task) for task in zip(*tasks, strict=True)):
        u = w
        for _ in range(steps):
            u = u - alpha * torch.func.grad(
                lambda w, task=task: loss({"w": w}, task.support_x, task.support_y)
            )(u)
        values.append(loss({"w": u}, task.query_x, task.query_y))
    return torch.stack(values).mean()


# Quadratic tasks in the plane: f_i(w) = (w - c_i)' A_i (w - c_i) / 2, so L = 1 and rho = 0.

QUADRATIC_CURVATURES = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)
QUADRATIC_CENTRES = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=DOUBLE)


def quadratic_tasks(spread: float = 1.0) -> Episodes:
    """Return two tasks whose centres lie ``spread`` times as far apart."""
    return finite_sum(
        here(spread * QUADRATIC_CENTRES[:, None]), here(QUADRATIC_CURVATURES[:, None])
    )


def quadratic_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a quadratic task, with ``x = c_i`` and ``y = diag A_i``."""
    return (y * (params["w"] - x) ** 2).sum() / 2


def quadratic_meta_gradient(w: Tensor, alpha: float, steps: int, spread: float = 1.0) -> Tensor:
    """Return grad F in closed form: F = mean_i sum_d A (1 - alpha A)^(2N) (w - c)^2 / 2."""
    a, centres = here(QUADRATIC_CURVATURES), here(QUADRATIC_CENTRES)
    return (a * (1 - alpha * a) ** (2 * steps) * (w - spread * centres)).mean(0)


def quadratic_sigma(w: Tensor, spread: float = 1.0) -> float:
    """Return the standard deviation of the task gradients at ``w``."""
    gradients = here(QUADRATIC_CURVATURES) * (w - spread * here(QUADRATIC_CENTRES))
    return float((gradients - gradients.mean(0)).square().sum(-1).mean().sqrt())


# Nonconvex tasks on the line: f_i(w) = w^2 / 4 - b_i w + cos(w + phi_i), so L = 1.5 and rho = 1
# everywhere.

NONCONVEX_L, NONCONVEX_RHO = 1.5, 1.0
_SLOPES = torch.tensor([1.0, -0.5, -0.5], dtype=DOUBLE)
_PHASES = torch.tensor([0.3, 1.3, -1.2], dtype=DOUBLE)


def nonconvex_tasks(which: Tensor | None = None) -> Episodes:
    """Return the three tasks, or those whose numbers are given."""
    both = here(torch.stack([_SLOPES, _PHASES], -1)[:, None])
    return finite_sum(both if which is None else both[which])


def nonconvex_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a nonconvex task, with ``x = (b_i, phi_i)``."""
    w, (slope, phase) = params["w"], x[0]
    return (w**2 / 4 - slope * w + torch.cos(w + phase)).sum()


def nonconvex_sigma(w: Tensor) -> float:
    """Return the standard deviation of the task gradients at ``w``."""
    gradients = w / 2 - here(_SLOPES) - torch.sin(w + here(_PHASES))
    return float(gradients.var(correction=0).sqrt())


# Sampled tasks on the line: l(w; theta, zeta) = cos(w) + (G + theta) w + zeta w^2 / 2 with noise
# theta and zeta: L = rho = 1 in the mean.


def cosine_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a sampled task, with a batch ``x`` ``[S, 2]`` of ``(theta, zeta)`` and the
    slope G in ``y`` ``[S]``."""
    w, (theta, zeta) = params["w"], x.mean(0)
    return (torch.cos(w) + (y.mean() + theta) * w + zeta * w**2 / 2).sum()


# Quartic tasks in R^4: f_i(w) = 0.05 |w|^2 + |w - c_i|^4 / 4: smooth on every ball, but not on the
# whole space.

QUARTIC_RADIUS = 20.0
QUARTIC_CENTRES = nn.functional.normalize(
    torch.randn(3, 1, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(2)), dim=-1
)


class Quartic(nn.Module):
    """The quartic tasks as a network that starts at the radius.

    It maps a centre ``[S, 4]`` to ``w`` and ``w - centre``, ``[S, 8]``.
    """

    def __init__(self) -> None:
        super().__init__()
        start = drawn_on_cpu(
            torch.randn, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)
        )
        self.w = nn.Parameter(QUARTIC_RADIUS * start / start.norm())

    def forward(self, centre: Tensor) -> Tensor:
        """Return what :func:`quartic_outputs_loss` takes."""
        return torch.cat([self.w.expand_as(centre), self.w - centre], -1)


def quartic_outputs_loss(outputs: Tensor, _: Tensor) -> Tensor:
    """Return the loss of the network's outputs."""
    w, distance = outputs.split(4, -1)
    return (0.05 * w.square().sum(-1) + distance.square().sum(-1).square() / 4).mean()


def quartic_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a quartic task, with ``x = c_i``."""
    return quartic_outputs_loss(torch.cat([params["w"].expand_as(x), params["w"] - x], -1), y)


def quartic_tasks() -> Episodes:
    """Return three tasks whose centres lie on the unit sphere."""
    return finite_sum(here(QUARTIC_CENTRES))


def quartic_inner_lr(steps: int) -> float:
    """Return 1 / (8 N L), with the L of the ball of the starting radius."""
    return 1 / (8 * steps * (0.1 + 3 * (QUARTIC_RADIUS + 1) ** 2))


def quartic_curvature(w: Tensor) -> tuple[float, float]:
    """Return the largest L and rho of the tasks at ``w``, in closed form."""
    distance = float((w - here(QUARTIC_CENTRES)[:, 0]).norm(dim=-1).max())
    return 0.1 + 3 * distance**2, 6 * distance


def quartic_meta_objective(w: Tensor, steps: int) -> Tensor:
    """Return F(w) of the quartic tasks."""
    return meta_objective(w, quartic_loss, quartic_tasks(), quartic_inner_lr(steps), steps)


def quartic_minimum(steps: int) -> Tensor:
    """Return the minimum of F, found by Newton's method."""
    objective = partial(quartic_meta_objective, steps=steps)
    w = Quartic().w.detach()
    for _ in range(60):
        gradient = torch.func.grad(objective)(w)
        if gradient.norm() < 1e-12:
            return w
        w = w - torch.linalg.solve(torch.func.hessian(objective)(w), gradient)
    raise ArithmeticError("Expected Newton's method to reach the minimum but it did not.")


def quartic_smoothness(w: Tensor, steps: int) -> float:
    """Return the spectral norm of the Hessian of F at ``w``."""
    hessian = torch.func.hessian(partial(quartic_meta_objective, steps=steps))(w)
    return float(torch.linalg.matrix_norm(hessian, 2))
