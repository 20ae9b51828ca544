"""Compare an approximate meta-gradient with the exact one."""

from typing import NamedTuple

from lightning_maml.core.params import Params, dot, norm, subtract


class GradientComparison(NamedTuple):
    """How an approximate meta-gradient ``v`` compares with the exact one ``g``.

    Attributes:
        cosine: Cosine of the angle between them, ``<v, g> / |v| |g|``.
        error: ``|v - g| / |g|``.

    Examples:
        >>> from lightning_maml.callbacks import GradientComparison
        >>> GradientComparison(cosine=0.99, error=0.1).cosine
        0.99
    """

    cosine: float
    error: float


def compare(approximate: Params, exact: Params) -> GradientComparison:
    """Return how ``approximate`` compares with ``exact``.

    Args:
        approximate: A gradient by parameter name.
        exact: The exact gradient, with the same names.

    Returns:
        Cosine and relative error, computed in float64; nan where either gradient is zero.

    Examples:
        >>> import torch
        >>> from lightning_maml.callbacks import compare
        >>> exact = {"weight": torch.tensor([0.0, 2.0])}
        >>> compare({"weight": torch.tensor([0.0, 1.0])}, exact)
        GradientComparison(cosine=1.0, error=0.5)
    """
    v = _in_float64(approximate)
    g = _in_float64(exact)
    v_norm, g_norm = float(norm(v)), float(norm(g))
    if not v_norm or not g_norm:
        return GradientComparison(float("nan"), float("nan"))
    cosine = float(dot(v, g)) / (v_norm * g_norm)
    error = float(norm(subtract(v, g))) / g_norm
    return GradientComparison(cosine, error)


def _in_float64(params: Params) -> Params:
    return {name: tensor.cpu().double() for name, tensor in params.items()}
