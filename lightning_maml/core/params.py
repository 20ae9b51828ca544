"""Points and directions in parameter space, ``dict[str, Tensor]``, and arithmetic with them."""

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""A point w in parameter space, or a direction v: one tensor per parameter name."""

Diagonal = Mapping[str, Tensor | float]
"""A diagonal matrix: for each parameter a number, or a tensor that broadcasts to it.

Parameters that are not named have zeros there.
"""


def add(x: Params, y: Params) -> Params:
    """Return ``x + y``, where ``y`` counts as zero in the parameters that it lacks."""
    return add_scaled(x, 1, y)


def subtract(x: Params, y: Params) -> Params:
    """Return ``x - y``, where ``y`` counts as zero in the parameters that it lacks."""
    return add_scaled(x, -1, y)


def add_scaled(x: Params, a: float | Tensor, y: Params) -> Params:
    """Return ``x + a y``, where ``y`` counts as zero in the parameters that it lacks.

    With a number this is one pass over each tensor, and on an accelerator few launches for all.
    """
    if isinstance(a, Tensor):
        return {name: tensor + a * y[name] if name in y else tensor for name, tensor in x.items()}
    # one kernel takes all that lie in memory alike; a single pair that does not would end that
    alike = {name: x[name].stride() == y[name].stride() for name in x if name in y}
    result = dict(x)
    for wanted in (True, False):
        names = [name for name, is_alike in alike.items() if is_alike is wanted]
        if names:
            both = [x[name] for name in names], [y[name] for name in names]
            result |= zip(names, torch._foreach_add(*both, alpha=a), strict=True)
    return result


def number_on(diagonal: Diagonal) -> float | None:
    """Return the number that stands everywhere on a diagonal; None if they differ."""
    first, *others = diagonal.values()
    if isinstance(first, Tensor) or any(
        isinstance(other, Tensor) or other != first for other in others
    ):
        return None
    return float(first)


def scale(a: float | Tensor | Diagonal, x: Params) -> Params:
    """Return ``a x``; if ``a`` is a diagonal matrix, without the parameters where it is zero."""
    if isinstance(a, Mapping):
        return {name: of_name * x[name] for name, of_name in a.items()}
    if isinstance(a, Tensor):
        return {name: a * tensor for name, tensor in x.items()}
    return dict(zip(x, torch._foreach_mul([*x.values()], a), strict=True))


def dot(x: Params, y: Params) -> Tensor:
    """Return the inner product of ``x`` and ``y`` as long vectors, a scalar tensor."""
    product: Tensor = torch.stack([(x[name] * y[name]).sum() for name in x]).sum()
    return product


def norm(x: Params) -> Tensor:
    """Return the 2-norm of ``x`` as one long vector, a scalar tensor."""
    norms: list[Tensor] = [torch.linalg.vector_norm(tensor) for tensor in x.values()]
    size: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return size
