"""A map of a task's losses around the meta-parameters, with the path that adaptation takes."""

import math
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
from lightning_maml.callbacks.first_task_pictures import FirstTaskPictures
from lightning_maml.core.params import Params, add_scaled, dot, norm, scale, subtract
from lightning_maml.errors import UserValueError


class LossMap(NamedTuple):
    """The losses of one task on a plane through w_0 and w_K.

    Attributes:
        along: Positions on the first axis, from w_0 towards w_K, ``[R]``, in units of their
            distance.
        across: Positions on the second axis, in the same units, along the part of the query
            gradient at w_0 that is orthogonal to the first, ``[R]``.
        support: Support loss at each point, ``[R (across), R (along)]``.
        query: Query loss there.
        path: Where w_0 .. w_K are, projected on the plane, ``[K + 1, 2]``.
        in_plane: Fraction of the path's length that lies in the plane.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import loss_map
        >>> x, y = torch.rand(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> found = loss_map(MAML(MLP(4, 3)), Episodes(x, y, x, y), resolution=5)
        >>> found.along.tolist()
        [-0.5, 0.0, 0.5, 1.0, 1.5]
    """

    along: Tensor
    across: Tensor
    support: Tensor
    query: Tensor
    path: Tensor
    in_plane: float


class LossMapPicture(FirstTaskPictures):
    """Draws the losses of the first test task around w, and its inner path, at the end of a test.

    ``loss_map.png`` has two maps of the plane through w_0 = w and the adapted w_K that also
    contains the query gradient at w: the support loss, which the path descends, and the query loss,
    which it is meant to lower. It is written to the logger's folder, or to the trainer's
    ``default_root_dir`` without a logger. For :class:`lightning_maml.MAML` and its variants.

    Args:
        resolution: Points on each axis; their square is how many times the losses are computed.

    Raises:
        ValueError: If ``resolution`` is below 2.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import LossMapPicture
        >>> x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
        >>> tasks = DataLoader([Episodes(x, y, x, y)], batch_size=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         callbacks=[LossMapPicture(resolution=5)],
        ...         default_root_dir=folder,
        ...         logger=False,
        ...         enable_progress_bar=False,
        ...     )
        ...     _ = trainer.test(MAML(MLP(4, 3)), tasks, verbose=False)
        ...     print([path.name for path in Path(folder).iterdir()])
        ['loss_map.png']
    """

    def __init__(self, resolution: int = 25) -> None:
        super().__init__()
        if resolution < 2:
            raise UserValueError(f"Expected `resolution` to be at least 2 but got {resolution}.")
        self._resolution = resolution

    @override
    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw the map, or warn if there is none."""
        try:
            draw_loss_map(loss_map(module, task, self._resolution)).savefig(folder / "loss_map.png")
        # the results of the test are still to be printed, so it must not end here
        except (ValueError, RuntimeError) as error:  # a network may have no such derivative
            rank_zero_warn(f"LossMapPicture draws nothing: {error}")


def loss_map(module: MAML, task: Episodes, resolution: int) -> LossMap:
    """Compute the losses of a task on the plane of its inner path and its query gradient.

    Args:
        module: The model.
        task: ``Episodes`` with one task.
        resolution: R, points on each axis.

    Raises:
        ValueError: If adaptation does not move the parameters, so that there is no plane, or each
            step has a loss of its own.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import loss_map
        >>> x, y = torch.rand(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> loss_map(MAML(MLP(4, 3)), Episodes(x, y, x, y), resolution=5).support.shape
        torch.Size([5, 5])
    """
    path, support, query = module.inner_path(task)
    way = subtract(path[-1], path[0])
    length = float(norm(way))
    if not length:
        raise UserValueError(
            "Expected adaptation to move the parameters but it does not; use `test_steps` and an "
            "`inner_lr` above 0."
        )
    if not math.isfinite(length):
        raise UserValueError(
            "Expected parameters that stay finite in adaptation but they do not; lower `inner_lr`."
        )
    first = scale(1 / length, way)
    gradient = torch.func.grad(query)(path[0])
    second = add_scaled(gradient, -float(dot(gradient, first)), first)
    # the query gradient may lie along the first axis; then there is no second
    second = scale(1 / max(float(norm(second)), 1e-12), second)

    along = torch.linspace(-0.5, 1.5, resolution, device="cpu")
    across = torch.linspace(-1.0, 1.0, resolution, device="cpu")
    losses = torch.zeros(2, resolution, resolution, device="cpu")
    with torch.no_grad():
        for row, y in enumerate(across.tolist()):
            start = add_scaled(path[0], y * length, second)
            for column, x in enumerate(along.tolist()):
                point = add_scaled(start, x * length, first)
                losses[0, row, column] = support(point)
                losses[1, row, column] = query(point)

    coordinates = [_coordinates(point, path[0], first, second) for point in path]
    projected = torch.tensor(coordinates, device="cpu")
    projected /= length
    steps = [float(norm(subtract(after, before))) / length for before, after in pairwise(path)]
    seen = torch.linalg.vector_norm(projected.diff(dim=0), dim=1)
    in_plane = float(seen.sum()) / sum(steps)
    return LossMap(along, across, losses[0], losses[1], projected, in_plane)


def _coordinates(
    point: Params, origin: Params, first: Params, second: Params
) -> tuple[float, float]:
    offset = subtract(point, origin)
    return float(dot(offset, first)), float(dot(offset, second))


def draw_loss_map(found: LossMap) -> Figure:
    """Draw both losses, darker where they are smaller, with the path from w_0 to w_K.

    Args:
        found: What :func:`loss_map` computed.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import draw_loss_map, loss_map
        >>> x, y = torch.rand(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> found = loss_map(MAML(MLP(4, 3)), Episodes(x, y, x, y), resolution=5)
        >>> draw_loss_map(found).axes[0].get_title()
        'support loss'
    """
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, name in (
        (left, found.support, "support"),
        (right, found.query, "query"),
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
