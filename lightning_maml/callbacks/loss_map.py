"""A map of a task's losses around the meta-parameters, with the path that adaptation takes."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import Episodes
from lightning_maml.callbacks.pictures import FirstTaskPictures
from lightning_maml.core.params import axpy, dot, norm, scaled


class LossMap(NamedTuple):
    """The losses of one task on a plane through w_0 and w_K.

    Attributes:
        along: Positions on the first axis, from w_0 towards w_K, ``[R]``, in units of their
            distance.
        across: Positions on the second axis, in the same units, along the part of the query
            gradient at w_0 that is orthogonal to the first, ``[R]``.
        support: Support loss at each, ``[R (across), R (along)]``.
        query: Query loss there.
        path: Where w_0 .. w_K are, projected on the plane, ``[K + 1, 2]``.
        in_plane: Share of the path's length that lies in the plane.
    """

    along: Tensor
    across: Tensor
    support: Tensor
    query: Tensor
    path: Tensor
    in_plane: float


class LossMapPicture(FirstTaskPictures):
    """Draws, at the end of a test, the losses of the first test task around the meta-parameters w, and its inner path on them.

    ``loss_map.png`` has two maps of the plane through w_0 = w and the adapted w_K that also
    contains the query gradient at w: the support loss, which the path descends, and the query loss,
    which it is meant to lower. It is written to the logger's folder, or to the trainer's
    ``default_root_dir`` without one. For :class:`lightning_maml.MAML` and its variants.

    Args:
        resolution: Points on each axis; their square is how many times the losses are computed.
    """

    def __init__(self, resolution: int = 25) -> None:
        super().__init__()
        if resolution < 2:
            raise ValueError(f"Expected `resolution` to be at least 2 but got {resolution}.")
        self._resolution = resolution

    @override
    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw the map, if there is one to draw."""
        try:
            draw_loss_map(loss_map(module, task, self._resolution)).savefig(folder / "loss_map.png")
        except ValueError as error:  # at the end of a test, whose results are yet to be printed
            rank_zero_warn(f"LossMapPicture draws nothing: {error}")


def loss_map(module: MAML, task: Episodes, resolution: int) -> LossMap:
    """Compute the losses of a task, given as ``Episodes`` with one task, on the plane.

    Raises:
        ValueError: If adaptation does not move the parameters, so that there is no plane, or each
            step has a loss of its own.
    """
    path, support, query = module.inner_path(task)
    way = axpy(-1.0, path[0], path[-1])
    length = float(norm(way))
    if not length:
        raise ValueError(
            "Expected adaptation to move the parameters but it does not; use `test_steps` and an "
            "`inner_lr` above 0."
        )
    first = scaled(1 / length, way)
    gradient = torch.func.grad(query)(path[0])
    second = axpy(-float(dot(gradient, first)), first, gradient)
    second = scaled(1 / max(float(norm(second)), 1e-12), second)

    along, across = torch.linspace(-0.5, 1.5, resolution), torch.linspace(-1.0, 1.0, resolution)
    rows = [axpy(float(y) * length, second, path[0]) for y in across]
    with torch.no_grad():
        values = [
            [
                torch.stack(
                    [loss(axpy(float(x) * length, first, row)) for loss in (support, query)]
                )
                for x in along
            ]
            for row in rows
        ]
    maps = torch.stack([torch.stack(row) for row in values]).float().cpu()
    offsets = [axpy(-1.0, path[0], point) for point in path]
    projected = torch.tensor(
        [[float(dot(offset, axis)) / length for axis in (first, second)] for offset in offsets]
    )
    steps = [float(norm(axpy(-1.0, before, after))) / length for before, after in pairwise(path)]
    seen = torch.linalg.vector_norm(projected.diff(dim=0), dim=1)
    return LossMap(
        along, across, maps[..., 0], maps[..., 1], projected, float(seen.sum()) / sum(steps)
    )


def draw_loss_map(found: LossMap) -> Figure:
    """Draw both losses, darker where they are smaller, with the path from w_0 to w_K."""
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    for axes, values, name in zip(
        figure.subplots(1, 2), (found.support, found.query), ("support", "query"), strict=True
    ):
        levels = axes.contourf(found.along, found.across, values, levels=24, cmap="viridis")
        axes.plot(*found.path.T, color="white", marker="o", markersize=4)
        axes.annotate(
            "w", found.path[0], color="white", textcoords="offset points", xytext=(-12, -4)
        )
        axes.set(
            title=f"{name} loss",
            xlabel="towards the adapted parameters",
            ylabel="along the rest of the query gradient",
        )
        figure.colorbar(levels, ax=axes)
    figure.suptitle(
        f"one task around w, and its inner path ({100 * found.in_plane:.0f} % of it in this "
        "plane); 1 = the distance moved",
        fontsize=10,
    )
    return figure
