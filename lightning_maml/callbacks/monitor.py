"""The base of callbacks that measure a model during training, on tasks of their own."""

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.callbacks.independent_tasks import IndependentTasks, as_maml
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.params import Params
from lightning_maml.core.rng import random_state, set_random_state
from lightning_maml.errors import UserValueError
from lightning_maml.networks.kinks import weight_normed


class Monitor(Callback):
    """Base of the callbacks that measure something every ``n`` optimizer steps.

    A subclass defines ``purpose`` and :meth:`look`. Measuring does not change the training: the
    random generators are set back afterwards.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        tasks: Tasks per meta-batch and process, where the datamodule draws them.
        episodes: Meta-batches like those trained on, drawn independently of them; by default the
            datamodule's, if it is one of this package.

    Raises:
        ValueError: If ``every_n_steps`` or ``tasks`` is below 1.

    Examples:
        >>> from lightning_maml.callbacks.monitor import Monitor
        >>> class WeightNorm(Monitor):
        ...     purpose = "weight norm"
        ...
        ...     def look(self, trainer, module):
        ...         norm = sum(weight.square().sum() for weight in module.parameters()) ** 0.5
        ...         module.log("train/weight_norm", norm)
        >>> monitor = WeightNorm(every_n_steps=10, tasks=4, episodes=None)
    """

    purpose: ClassVar[str]
    """Seeds the tasks, so that each callback has others."""

    def __init__(
        self, every_n_steps: int, tasks: int, episodes: Iterable[AnyEpisodes] | None
    ) -> None:
        if every_n_steps < 1:
            raise UserValueError(
                f"Expected `every_n_steps` to be at least 1 but got {every_n_steps}."
            )
        self._every_n_steps = every_n_steps
        self._tasks = IndependentTasks(self.purpose, tasks, episodes)
        self._last_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a fit anew; a checkpoint, if there is one, is read after this."""
        if stage == "fit":
            self._last_step = 0
            self._tasks.start_at(0)

    def look(self, trainer: Trainer, module: MAML) -> None:
        """Measure, and log the result."""
        raise NotImplementedError(f"{type(self).__name__} must define look(trainer, module).")

    def meta_gradient(
        self, trainer: Trainer, module: MAML, episodes: AnyEpisodes, curvature: CurvatureName
    ) -> Params:
        """Return the meta-gradient, averaged over the tasks of all processes.

        Args:
            trainer: The trainer.
            module: The model.
            episodes: This process's tasks.
            curvature: ``"exact"``, ``"none"`` (FO-MAML) or ``"finite_difference"`` (HF-MAML).
        """
        gradient = module.meta_gradient(episodes, curvature)
        if trainer.world_size == 1:
            return gradient
        return {name: trainer.strategy.reduce(g, reduce_op="mean") for name, g in gradient.items()}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are tasks to draw, with the batches that exact meta-gradients need."""
        model = as_maml(self, pl_module)
        # exact MAML warns by itself, when its network is looked at
        if model.curvature != "exact" and (layers := weight_normed(model.network)):
            rank_zero_warn(
                f"{type(self).__name__} measures the exact meta-gradient, which is wrong through "
                f"{layers}, as torch's second derivative of weight norm is; do not judge by it."
            )
        self._tasks.check(trainer)
        if self._tasks.are_given:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "regime", None) == "resampling" and data.hessian_shots == 0:
            raise UserValueError(
                f"Expected `hessian_shots` to be at least 1 for {type(self).__name__}, which "
                "takes the exact meta-gradient, but got 0."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every ``every_n_steps`` optimizer steps."""
        step = trainer.global_step
        # with accumulated batches, several batches end at the same step
        if step % self._every_n_steps or step == self._last_step:
            return
        self._last_step = step
        before = random_state(pl_module.device)
        self.look(trainer, as_maml(self, pl_module))
        set_random_state(before, pl_module.device)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many meta-batches were drawn, and the step of the last measurement."""
        return {"drawn": self._tasks.drawn, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the stream of tasks where the saved run stopped."""
        self._tasks.start_at(state_dict["drawn"])
        self._last_step = state_dict["last_step"]
