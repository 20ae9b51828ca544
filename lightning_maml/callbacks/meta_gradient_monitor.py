"""Compare first-order and Hessian-free meta-gradients with the exact one during training."""

from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.callbacks.gradient_comparison import GradientComparison, compare
from lightning_maml.callbacks.monitor import Monitor
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.params import Params
from lightning_maml.core.rng import random_state, set_random_state

APPROXIMATIONS: dict[str, CurvatureName] = {
    "first_order": "none",
    "hessian_free": "finite_difference",
}


class MetaGradientMonitor(Monitor):
    """Compares first-order and Hessian-free meta-gradients with the exact one during training.

    This works whichever algorithm trains the network: for FO-MAML or HF-MAML it shows whether they
    hold on this network, for MAML what they would cost. Logged: ``train/first_order_cosine``,
    ``train/first_order_error``, ``train/hessian_free_cosine`` and ``train/hessian_free_error``, the
    error relative to the norm of the exact meta-gradient. All are kept by step in ``history``,
    which :class:`lightning_maml.callbacks.TrainingPictures` draws.

    One comparison costs some five meta-gradients. All three are those of plain MAML with N steps,
    all query weight on the last, in the precision of the parameters: without autocast, and without
    what :class:`lightning_maml.Reptile` or :class:`lightning_maml.MAMLPlusPlus` change. For
    :class:`lightning_maml.IMAML` the exact one is the implicit gradient. On a network with kinks
    the Hessian-free meta-gradient is off (Fallah et al. 2020 assume a smooth network), and this
    shows by how much; a precision below float32 shows too.

    Args:
        every_n_steps: Optimizer steps between two comparisons.
        tasks: Tasks per comparison and process.
        episodes: Meta-batches like those trained on, drawn independently of them. By default the
            datamodule's, if it is one of this package.

    Raises:
        ValueError: If an argument is out of range; when training starts, if there is nothing to
            draw tasks from, or no Hessian batches.
        TypeError: If the module is not a :class:`lightning_maml.MAML`.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import FOMAML, MLP, Episodes
        >>> from lightning_maml.callbacks import MetaGradientMonitor
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)
        >>> batches = [Episodes(x, y, x, y)]
        >>> monitor = MetaGradientMonitor(every_n_steps=1, episodes=batches)
        >>> trainer = Trainer(callbacks=[monitor], max_epochs=1, barebones=True)
        >>> trainer.fit(FOMAML(MLP(4, 3)), DataLoader(batches, batch_size=None))
        >>> sorted(monitor.history[1])
        ['first_order', 'hessian_free']
    """

    purpose = "fidelity"

    def __init__(
        self,
        every_n_steps: int = 100,
        tasks: int = 32,
        episodes: Iterable[AnyEpisodes] | None = None,
    ) -> None:
        super().__init__(every_n_steps, tasks, episodes)
        self.history: dict[int, dict[str, GradientComparison]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.history = {}

    @override
    def look(self, trainer: Trainer, module: MAML) -> None:
        """Compare the meta-gradients on the next tasks."""
        episodes = self._tasks.draw(trainer)
        before = random_state(module.device)

        def gradient(curvature: CurvatureName) -> Params:
            # the same dropout in all three
            set_random_state(before, module.device)
            return self.meta_gradient(trainer, module, episodes, curvature)

        exact = gradient("exact")
        found = {}
        for name, curvature in APPROXIMATIONS.items():
            found[name] = compare(gradient(curvature), exact)
            module.log(f"train/{name}_cosine", found[name].cosine)
            module.log(f"train/{name}_error", found[name].error)
        self.history[trainer.global_step] = found

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many meta-batches were drawn, and the comparisons so far."""
        # as plain tuples: checkpoints are read without our classes
        history = {}
        for step, found in self.history.items():
            history[step] = {name: tuple(figures) for name, figures in found.items()}
        return {**super().state_dict(), "history": history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved run stopped."""
        super().load_state_dict(state_dict)
        self.history = {}
        for step, found in state_dict["history"].items():
            self.history[step] = {
                name: GradientComparison(*figures) for name, figures in found.items()
            }
