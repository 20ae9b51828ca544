"""Hessian-vector products, in which MAML, FO-MAML and HF-MAML differ.

One signature, and three ways to compute the product.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_maml.core.objective import Objective
from lightning_maml.core.params import Params, add_scaled, norm, scale, subtract
from lightning_maml.errors import UserValueError

CurvatureName = Literal["exact", "none", "finite_difference"]


class HessianVectorProduct(Protocol):
    """The Hessian of ``objective`` at ``w`` times ``v``, or what takes its place."""

    def __call__(self, objective: Objective, w: Params, v: Params) -> Params:
        """Return the product for all parameters; ``v`` counts as zero in those that it lacks."""


def exact(objective: Objective, w: Params, v: Params) -> Params:
    """MAML: the product with the Hessian itself, which is never formed.

    Fallah et al. 2020, eq. 5; Ji et al. 2022, eqs. 7 and 12.

    Args:
        objective: The loss of the batch whose Hessian is meant.
        w: The point at which the Hessian is taken.
        v: Direction.

    Returns:
        ``H v``, by differentiating the gradient once more.
    """
    return objective.hessian_vector_product(w, v)


def none(objective: Objective, w: Params, v: Params) -> Params:
    """FO-MAML: the Hessian counts as zero (Fallah et al. 2020, eq. 8). Nothing is computed."""
    return {}


def finite_difference(
    objective: Objective, w: Params, v: Params, *, probe_radius: float | None = None
) -> Params:
    """HF-MAML: a central difference of gradients along ``v`` (Fallah et al. 2020, eqs. 9-11).

    ``H v = [grad l(w + delta v) - grad l(w - delta v)] / (2 delta)`` with ``delta = h / |v|``, here
    at each of N steps: the two points lie at the probing radius ``h`` from ``w`` whatever the scale
    of the loss. Both use the same batch and the same random numbers. The paper's own ``delta``
    (Theorem 4.17) fixes a radius that does not shrink with the error wanted, so that the bias
    remains; it is not used here.

    Args:
        objective: The loss of the batch whose Hessian is meant.
        w: The point at which the Hessian is taken.
        v: Direction; for ``v = 0`` the product is 0.
        probe_radius: h, in units of the parameters; by default the cube root of the dtype's machine
            epsilon, which balances truncation (h^2) against rounding (1/h): 4.9e-3 in float32,
            6.1e-6 in float64.

    Returns:
        The product, with an error of the order of ``h^2``.
    """
    like = next(iter(w.values()))
    h = default_probe_radius(w.values()) if probe_radius is None else probe_radius
    objective.draw(w)  # it is next evaluated beside w
    unit, size = objective.axis.vmap(_unit)(v)
    # a difference of nearby gradients has no digits to spare
    with torch.autocast(like.device.type, enabled=False):
        ahead = objective.gradient(add_scaled(w, h, unit))
        behind = objective.gradient(add_scaled(w, -h, unit))
    product: Params = objective.axis.vmap(scale)(size / (2 * h), subtract(ahead, behind))
    return product


def _unit(v: Params) -> tuple[Params, Tensor]:
    size = norm(v)
    return scale(1 / torch.where(size > 0, size, 1), v), size


def default_probe_radius(params: Iterable[Tensor]) -> float:
    """Return the cube root of the machine epsilon of the coarsest type among parameters.

    There a central difference errs least on smooth functions of unit scale.
    """
    radius: float = max(torch.finfo(dtype).eps for dtype in {p.dtype for p in params}) ** (1 / 3)
    return radius


def hessian_vector_product(
    curvature: CurvatureName, probe_radius: float | None = None
) -> HessianVectorProduct:
    """Return the product that ``curvature`` names.

    Args:
        curvature: ``"exact"``, ``"none"`` or ``"finite_difference"``.
        probe_radius: See :func:`finite_difference`; only with that curvature.

    Raises:
        ValueError: If ``curvature`` is not one of the three, or ``probe_radius`` is not positive or
            not used by it.
    """
    if probe_radius is not None and not (curvature == "finite_difference" and probe_radius > 0):
        raise UserValueError(
            "Expected `probe_radius` to be None, or a positive number with "
            f"`curvature='finite_difference'`, but got {probe_radius} with {curvature!r}."
        )
    if curvature == "exact":
        return exact
    if curvature == "finite_difference":
        return partial(finite_difference, probe_radius=probe_radius)
    if curvature == "none":
        return none
    raise UserValueError(
        f"Expected `curvature` to be 'exact', 'none' or 'finite_difference' but got {curvature!r}."
    )
