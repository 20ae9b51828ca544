"""How far meta-gradients without curvature, or with finite differences in its place, are from the exact one during training."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning import Trainer
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.callbacks.gradient_monitor import Monitor
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.params import Params, axpy, dot, norm
from lightning_maml.core.rng import random_state, set_random_state

APPROXIMATIONS: dict[str, CurvatureName] = {
    "first_order": "none",
    "hessian_free": "finite_difference",
}


class Fidelity(NamedTuple):
    """How an approximate meta-gradient ``v`` compares with the exact one ``g``.

    Attributes:
        cosine: Cosine of the angle between them, ``<v, g> / |v| |g|``.
        error: ``|v - g| / |g|``.
    """

    cosine: float
    error: float


class MetaGradientMonitor(Monitor):
    """Compares the first-order and the Hessian-free meta-gradient with the exact one, on the network as it is being trained.

    This works whichever algorithm trains the network: for FO-MAML or HF-MAML it shows whether they
    hold on this network, for MAML what they would cost. Logged: ``train/first_order_cosine``,
    ``train/first_order_error``, ``train/hessian_free_cosine`` and ``train/hessian_free_error``, the
    error relative to the norm of the exact meta-gradient. All are kept by step in ``history``,
    which :class:`lightning_maml.callbacks.TrainingPictures` draws.

    One look costs some five meta-gradients. All three are those of plain MAML with N steps, all
    query weight on the last, in the precision of the parameters: without autocast, and without what
    :class:`lightning_maml.Reptile` or :class:`lightning_maml.MAMLPlusPlus` change. For
    :class:`lightning_maml.IMAML` the exact one is the implicit gradient. On a network with kinks
    the Hessian-free meta-gradient is off (Fallah et al. 2020 assume a smooth one), and this shows
    by how much; a precision below float32 shows too.

    Args:
        every_n_steps: Optimizer steps between two looks.
        tasks: Tasks per look and process.
        episodes: Meta-batches like those trained on, drawn independently of them. By default the
            datamodule's, if it is one of this package.

    Raises:
        ValueError: If an argument is out of range; when training starts, if there is nothing to
            draw tasks from, or no Hessian batches.
        TypeError: If the module is not a :class:`lightning_maml.MAML`.
    """

    purpose = "fidelity"

    def __init__(
        self,
        every_n_steps: int = 100,
        tasks: int = 32,
        episodes: Iterable[AnyEpisodes] | None = None,
    ) -> None:
        super().__init__(every_n_steps, tasks, episodes)
        self.history: dict[int, dict[str, Fidelity]] = {}

    @override
    def look(self, trainer: Trainer, module: MAML) -> None:
        """Compare them on the next tasks."""
        episodes = self._tasks.draw(trainer)
        where_it_stands = random_state(module.device)

        def gradient(curvature: CurvatureName) -> Params:
            set_random_state(where_it_stands, module.device)  # the same dropout in all three
            return self.meta_gradient(trainer, module, episodes, curvature)

        exact = gradient("exact")
        found = {
            name: compare(gradient(curvature), exact) for name, curvature in APPROXIMATIONS.items()
        }
        self.history[trainer.global_step] = found
        figures = {
            f"train/{name}_{figure}": value
            for name, of_name in found.items()
            for figure, value in of_name._asdict().items()
        }
        module.log_dict(figures)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many meta-batches were drawn, and what was found."""
        history = {
            step: {name: tuple(figures) for name, figures in found.items()}
            for step, found in self.history.items()
        }
        return {**super().state_dict(), "history": history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        super().load_state_dict(state_dict)
        self.history = {
            step: {name: Fidelity(*pair) for name, pair in found.items()}
            for step, found in state_dict["history"].items()
        }


def compare(approximate: Params, exact: Params) -> Fidelity:
    """Return how ``approximate`` compares with ``exact``; nan where either is zero."""
    approximate, exact = (
        {name: tensor.cpu().double() for name, tensor in each.items()}
        for each in (approximate, exact)
    )
    sizes = float(norm(approximate)), float(norm(exact))
    if not all(sizes):
        return Fidelity(float("nan"), float("nan"))
    return Fidelity(
        float(dot(approximate, exact)) / (sizes[0] * sizes[1]),
        float(norm(axpy(-1.0, exact, approximate))) / sizes[1],
    )
