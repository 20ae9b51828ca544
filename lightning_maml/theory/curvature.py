"""The curvature of a loss at one point: the norms of its second and of its third derivative.

They are the local L and rho, by Lanczos' method and by the symmetric power method.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_maml.core.objective import Objective
from lightning_maml.core.params import Params, add_scaled, dot, norm, scale, subtract

PlainLoss = Callable[[Params], Tensor]
"""Maps parameters to the loss of a fixed batch, a scalar."""

HESSIAN_PRODUCT = 2
"""Gradient evaluations that one Hessian-vector product counts as."""

_CONFIRMATIONS = 3
"""Hessian-vector products in a row whose residual must be small before Lanczos' method may stop.

A small residual says that an eigenvalue was found, which need not be the largest: where nearly all
are equal, or of few values, the first direction hardly has the others in it. The product after
those have been found brings out what is left.
"""


class Measured(NamedTuple):
    """A constant and what it cost.

    Attributes:
        value: The constant.
        gradient_evaluations: Gradients of one batch that were taken for it; a Hessian-vector
            product counts as two.
        direction: The unit vector in parameter space for which it is attained.

    Examples:
        >>> import torch
        >>> from lightning_maml.theory.curvature import Measured
        >>> Measured(2.0, gradient_evaluations=5, direction={"w": torch.ones(1)}).value
        2.0
    """

    value: float
    gradient_evaluations: int
    direction: Params


def smoothness(
    loss: PlainLoss, w: Params, *, tolerance: float = 1e-3, iterations: int = 50, seed: int = 0
) -> Measured:
    """Return the spectral norm of the Hessian at ``w``, the local L [loss / parameter^2].

    Lanczos' method finds it from Hessian-vector products. Unlike power iteration, it remembers the
    earlier products, so it needs fewer of them and does not settle on the second eigenvalue where
    two are close.

    Args:
        loss: Maps parameters to a scalar; twice differentiable.
        w: The parameters at which to measure.
        tolerance: Stop when the residual ``|H v - lambda v|`` is below this fraction of
            ``|lambda|``, for three products in a row.
        iterations: Most products that are taken, and copies of the parameters that are kept.
        seed: Seed of the first direction.

    Returns:
        The norm, with the leading eigenvector; nan where a product is not finite.

    Examples:
        >>> import torch
        >>> from lightning_maml.theory.curvature import smoothness
        >>> def loss(params):
        ...     return (params["w"] ** 2 * torch.tensor([0.5, 1.5])).sum()
        >>> round(smoothness(loss, {"w": torch.ones(2)}).value, 3)
        3.0
    """
    hessian = _objective(loss).hessian(w)
    basis = [random_direction(w, seed)]
    iterations = min(iterations, sum(tensor.numel() for tensor in w.values()))
    small_residuals = 0
    # the Hessian in this basis, which is tridiagonal
    matrix = torch.zeros(iterations + 1, iterations + 1, dtype=torch.float64, device="cpu")
    for k in range(1, iterations + 1):
        evaluations = 1 + k * HESSIAN_PRODUCT
        rest, along_last = _orthogonalized(hessian(basis[-1]), basis)
        # fetched together, as each fetch waits for an accelerator
        matrix[k - 1, k - 1], rest_norm = torch.stack([along_last, norm(rest)]).tolist()
        if not math.isfinite(rest_norm):
            return Measured(math.nan, evaluations, basis[0])
        values, vectors = torch.linalg.eigh(matrix[:k, :k])
        leading = int(values.abs().argmax())
        value = abs(float(values[leading]))
        residual = rest_norm * abs(float(vectors[-1, leading]))
        small_residuals = small_residuals + 1 if residual <= tolerance * value else 0
        if k == iterations or small_residuals == _CONFIRMATIONS:
            break
        matrix[k, k - 1] = matrix[k - 1, k] = rest_norm
        if rest_norm <= _epsilon(w) * value:  # rounding alone: look where none has looked yet
            rest, _ = _orthogonalized(random_direction(w, seed + k), basis)
            rest_norm = float(norm(rest))
        basis.append(scale(1 / rest_norm, rest))
    direction = scale(0.0, basis[0])
    for weight, q in zip(vectors[:, leading].tolist(), basis, strict=True):
        direction = add_scaled(direction, weight, q)
    return Measured(value, evaluations, scale(1 / norm(direction), direction))


def _orthogonalized(v: Params, basis: list[Params]) -> tuple[Params, Tensor]:
    """Return ``v`` without its components in ``basis``, and the component along the last."""
    overlaps = []
    # a second pass removes what rounding left in the first
    for q in [*basis, *basis]:
        overlaps.append(dot(q, v))
        v = add_scaled(v, -overlaps[-1], q)
    return v, overlaps[len(basis) - 1] + overlaps[-1]


def hessian_lipschitz(
    loss: PlainLoss,
    w: Params,
    *,
    leading: Measured | None = None,
    restarts: int = 8,
    iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Measured:
    """Return the norm of the third derivative at ``w``, the local rho [loss / parameter^3].

    The norm of a symmetric tensor is attained at a single vector (Banach), so the symmetric power
    method climbs ``|D^3 l[u, u, .]|`` over unit vectors ``u``, each value from two Hessian-vector
    products, ``t = (H(w + h u) u - H(w - h u) u) / (2 h)``. It starts from the Hessian's leading
    eigenvector, then from random directions, and may stop at a local maximum each time. (Random
    directions alone, without the climb, give values that are too small by orders of magnitude in
    high dimension.)

    The radius h is found anew for every direction whose value counts: the one around which
    another radius changes the vector least. (Derivatives by autograd would need none, but torch has
    none of batch norm, and wrong ones of layer norm.)

    Args:
        loss: Maps parameters to a scalar; three times differentiable: with ReLU rho does not exist.
        w: The parameters at which to measure.
        leading: What :func:`lightning_maml.theory.curvature.smoothness` returned there; computed if
            None.
        restarts: Number of starts; the largest value counts.
        iterations: Most steps of a climb; a start has up to four, each with a radius of its own.
        tolerance: Stop when the norm changes by less than this, relative to itself.
        seed: Seed of the random directions.

    Returns:
        The norm; nan where a product is not finite.

    Examples:
        >>> import torch
        >>> from lightning_maml.theory.curvature import hessian_lipschitz
        >>> def loss(params):
        ...     return (params["w"] ** 3).sum()
        >>> w = {"w": torch.ones(1, dtype=torch.float64)}
        >>> round(hessian_lipschitz(loss, w).value, 3)
        6.0
    """
    spent = 0
    if leading is None:
        leading = smoothness(loss, w, tolerance=1e-2, seed=seed)
        spent = leading.gradient_evaluations
    third = _ThirdDerivative(loss, w)
    best = leading._replace(value=0.0)
    for restart in range(restarts):
        u = leading.direction if restart == 0 else random_direction(w, seed + restart)
        third.find_radius(u)
        for _ in range(_MOST_CLIMBS):
            u, climbed_to = _climb(third, u, iterations, tolerance)
            # where the climb has come to, the Hessian may change within another length
            third.find_radius(u)
            value = float(norm(third.twice_along(u)))
            if abs(value - climbed_to) <= _SAME * value:
                break
        if math.isnan(value):
            best = Measured(value, 0, u)
            break
        if value > best.value:
            best = Measured(value, 0, u)
    return best._replace(gradient_evaluations=spent + third.gradient_evaluations)


_MOST_CLIMBS = 4
"""Climbs from one start, each with a radius of its own."""

_SAME = 0.05
"""The relative difference up to which two radii give the same value."""


def _climb(
    third: "_ThirdDerivative", u: Params, iterations: int, tolerance: float
) -> tuple[Params, float]:
    """Return the direction that the symmetric power method comes to, and its last value."""
    value = 0.0
    for _ in range(iterations):
        before = value
        t = third.twice_along(u)
        # fetched together, as each fetch waits for an accelerator
        value, along = torch.stack([norm(t), dot(t, u)]).tolist()
        is_noise = not third.is_resolved and value < 1.5 * before
        if not value > 0 or abs(value - before) <= tolerance * value or is_noise:
            break
        # the shift makes every step climb; without it the power method may alternate
        shift = value if along >= 0 else -value
        climbed = add_scaled(t, shift, u)
        u = scale(1 / norm(climbed), climbed)
    return u, value


class _ThirdDerivative:
    """The third derivative at a point, by central differences of Hessian-vector products.

    Args:
        loss: Maps parameters to a scalar.
        w: The point.
    """

    def __init__(self, loss: PlainLoss, w: Params) -> None:
        self.gradient_evaluations = 0
        self.is_resolved = False
        """Whether two radii gave nearly the same, so that it is not rounding alone."""
        self._objective, self._w = _objective(loss), w
        # the last two, as the search for a radius and the climb take the same
        self._found: deque[tuple[Params, float, Params]] = deque(maxlen=2)
        self._epsilon = _epsilon(w)
        length = float(norm(w))
        self._most = max(length, 1.0) / 10  # further away is another place
        self._radius = self._epsilon ** (1 / 3) * (min(length, 1.0) or 1.0)

    def twice_along(self, u: Params) -> Params:
        """Return ``D^3 l(w)[u, u, .]`` with the radius that was found last."""
        return self._difference(u, self._radius)

    def find_radius(self, u: Params) -> None:
        """Find a radius for ``D^3 l(w)[u, u, .]``: the last one, if a smaller one gives the same.

        Otherwise it is the one around which another radius changes it least.
        """
        last, smaller = (self._difference(u, h) for h in (self._radius, self._radius / _FACTOR))
        self.is_resolved = _relative_change(last, smaller) < _EQUAL
        if not self.is_resolved:
            self._search(u)

    def _search(self, u: Params) -> None:
        moved = {name: self._w[name] * tensor for name, tensor in u.items()}
        # with a smaller radius, w + h u would be rounded too much
        least = self._epsilon ** (2 / 3) * float(norm(moved)) or self._epsilon
        h = self._radius = self._most
        least_change, before = math.inf, self._difference(u, h)
        while h > least:
            h /= _FACTOR
            t = self._difference(u, h)
            change = _relative_change(before, t)
            if math.isnan(change):  # the loss overflowed further away
                self._radius = h
            elif change < least_change:
                # between the two, the error is smaller than at either
                self._radius, least_change = h * _FACTOR**0.5, change
            elif least_change < _SAME < change:
                break  # rounding begins
            before = t
        self.is_resolved = least_change < 0.5

    def _difference(self, u: Params, h: float) -> Params:
        for direction, radius, t in self._found:
            if direction is u and radius == h:
                return t
        self.gradient_evaluations += 2 * HESSIAN_PRODUCT
        ahead = self._objective.hessian_vector_product(add_scaled(self._w, h, u), u)
        behind = self._objective.hessian_vector_product(add_scaled(self._w, -h, u), u)
        t = scale(1 / (2 * h), subtract(ahead, behind))
        self._found.append((u, h, t))
        return t


_FACTOR = 8
"""The ratio of the radii that are tried."""

_EQUAL = 3e-3
"""The relative difference up to which two radii are as good as each other."""


def _relative_change(before: Params, t: Params) -> float:
    """Return ``|t - before| / |t|``, infinite where t is 0, and nan where one is not finite."""
    size, change = torch.stack([norm(t), norm(subtract(t, before))]).tolist()
    if not math.isfinite(change):
        return math.nan
    return change / size if size > 0 else math.inf


def _objective(loss: PlainLoss) -> Objective:
    return Objective(lambda w: (loss(w), ()))


def _epsilon(w: Params) -> float:
    """Return the machine epsilon of the parameters, where they are kept the least exactly."""
    return max(torch.finfo(tensor.dtype).eps for tensor in w.values())


def random_direction(like: Params, seed: int) -> Params:
    """Return a unit vector like the parameters, drawn from a seed."""
    random = torch.Generator().manual_seed(seed)
    v = {
        name: torch.randn(p.shape, generator=random, device="cpu", dtype=p.dtype).to(p)
        for name, p in like.items()
    }
    return scale(1 / norm(v), v)
