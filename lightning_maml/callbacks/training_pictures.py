"""Pictures of how a run learns, redrawn after every validation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.callbacks.gradient_comparison import GradientComparison
from lightning_maml.callbacks.meta_gradient_monitor import MetaGradientMonitor
from lightning_maml.errors import UserTypeError


class Validation(NamedTuple):
    """The results of a validation, and of training before it.

    Attributes:
        step: Optimizer steps until then.
        mean: Accuracy on the validation tasks after adaptation, or for regression their loss.
        ci95: Half-width of its 95 % confidence interval.
        before: The same figure before adaptation.
        train: Its mean in training, after N steps, since the previous validation, over all
            processes; nan if there was none.

    Examples:
        >>> from lightning_maml.callbacks.training_pictures import Validation
        >>> Validation(step=100, mean=0.8, ci95=0.02, before=0.2, train=0.85).mean
        0.8
    """

    step: int
    mean: float
    ci95: float
    before: float
    train: float


class TrainingPictures(Callback):
    """Draws how the run has gone so far, after every validation.

    ``learning.png`` shows the accuracy (for regression the loss) on the validation tasks, of the
    first loader, with its 95 % confidence interval, before adaptation, and in training; with a
    :class:`lightning_maml.callbacks.MetaGradientMonitor` beside it, ``fidelity.png`` shows how
    close first-order and Hessian-free meta-gradients are to the exact one. They are written to the
    logger's folder, or to the trainer's ``default_root_dir`` without a logger.

    Raises:
        TypeError: If the module is not one of this package.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import TrainingPictures
        >>> x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
        >>> tasks = DataLoader([Episodes(x, y, x, y)], batch_size=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         callbacks=[TrainingPictures()],
        ...         max_epochs=1,
        ...         default_root_dir=folder,
        ...         logger=False,
        ...         enable_checkpointing=False,
        ...         enable_progress_bar=False,
        ...         enable_model_summary=False,
        ...     )
        ...     trainer.fit(MAML(MLP(4, 3)), tasks, tasks)
        ...     print([path.name for path in Path(folder).iterdir()])
        ['learning.png']
    """

    def __init__(self) -> None:
        self.history: list[Validation] = []
        self._sum: float | Tensor = 0.0
        self._steps = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a fit anew; a checkpoint, if there is one, is read after this."""
        if stage == "fit":
            self.history, self._sum, self._steps = [], 0.0, 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there will be something to draw."""
        _as_episodic(pl_module)
        # the sums in a checkpoint are those of process 0
        if not trainer.is_global_zero:
            self._sum, self._steps = 0.0, 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up this process's training figures, on the device; skipped steps have none."""
        metrics = trainer.callback_metrics
        name = "accuracy" if "train/accuracy" in metrics else "loss"
        # a bare-bones trainer logs nothing, and a subclass of the module may log other figures
        if outputs and f"train/{name}" in metrics:
            self._sum = self._sum + metrics[f"train/{name}"].detach()
            self._steps += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and save."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        loader = "" if "val/loss" in metrics else "/dataloader_idx_0"
        # a subclass of the module may log other figures, and no tasks give none
        if f"val/loss_ci95{loader}" not in metrics:
            return
        name = "accuracy" if f"val/accuracy{loader}" in metrics else "loss"
        found = Validation(
            trainer.global_step,
            mean=float(metrics[f"val/{name}{loader}"]),
            ci95=float(metrics[f"val/{name}_ci95{loader}"]),
            before=float(metrics[f"val/{name}_before{loader}"]),
            train=self._training_mean(trainer, pl_module),
        )
        self.history.append(found)
        self._sum, self._steps = 0.0, 0
        if trainer.is_global_zero:
            self._draw(trainer, _as_episodic(pl_module), name)

    def _training_mean(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Return the mean training figure of all processes, nan without a training step."""
        own = torch.tensor([float(self._sum), float(self._steps)], device=pl_module.device)
        total, steps = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        return total / steps if steps else float("nan")

    def _draw(self, trainer: Trainer, module: EpisodicModule, figure_name: str) -> None:
        folder = module.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        draw_learning(self.history, figure_name).savefig(folder / "learning.png")
        for monitor in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(monitor, MetaGradientMonitor) and monitor.history:
                draw_fidelity(monitor.history).savefig(folder / "fidelity.png")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the validations and training figures so far."""
        return {
            "history": [tuple(found) for found in self.history],
            "sum": float(self._sum),
            "steps": self._steps,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved run stopped."""
        self.history = [Validation(*found) for found in state_dict["history"]]
        self._sum, self._steps = state_dict["sum"], state_dict["steps"]


def _as_episodic(module: LightningModule) -> EpisodicModule:
    if not isinstance(module, EpisodicModule):
        raise UserTypeError(
            "Expected MAML, one of its variants or ProtoNet for TrainingPictures but got "
            f"{type(module).__name__}; leave the callback out."
        )
    return module


def draw_learning(history: Sequence[Validation], figure_name: str) -> Figure:
    """Draw the validation figure over meta-iterations with its 95 % confidence interval.

    Two more lines show the figure before adaptation and in training.

    Args:
        history: The validations, in order.
        figure_name: What the figure is, ``"accuracy"`` or ``"loss"``.

    Examples:
        >>> from lightning_maml.callbacks import draw_learning
        >>> from lightning_maml.callbacks.training_pictures import Validation
        >>> history = [Validation(100, 0.6, 0.02, 0.2, 0.7), Validation(200, 0.8, 0.02, 0.2, 0.9)]
        >>> draw_learning(history, "accuracy").axes[0].get_ylabel()
        'query accuracy'
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, mean, ci95, before, train = torch.tensor(history, dtype=torch.float64, device="cpu").T
    # with one task there is no interval
    half_width = ci95.nan_to_num()
    axes.plot(steps, mean, marker="o", label="validation tasks, after K steps")
    axes.fill_between(
        steps, mean - half_width, mean + half_width, alpha=0.25, label="95 % interval"
    )
    axes.plot(steps, train, marker=".", linestyle="--", label="training tasks, after N steps")
    axes.plot(
        steps, before, marker=".", color="tab:gray", label="validation tasks, before adaptation"
    )
    axes.set(xlabel="meta-iterations", ylabel=f"query {figure_name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_fidelity(history: Mapping[int, Mapping[str, GradientComparison]]) -> Figure:
    """Draw how close approximate meta-gradients are to the exact one over meta-iterations.

    Args:
        history: The comparisons by step and by name of the approximation, as
            :class:`lightning_maml.callbacks.MetaGradientMonitor` keeps them.

    Returns:
        Two panels, the cosine with the exact meta-gradient, and the relative error.

    Examples:
        >>> from lightning_maml.callbacks import GradientComparison, draw_fidelity
        >>> history = {100: {"first_order": GradientComparison(cosine=0.99, error=0.1)}}
        >>> [axes.get_ylabel() for axes in draw_fidelity(history).axes]
        ['cosine with the exact meta-gradient', 'relative error']
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    angle, error = figure.subplots(1, 2)
    steps = list(history)
    for name in history[steps[0]]:
        found = [comparisons[name] for comparisons in history.values()]
        label = name.replace("_", " ")
        angle.plot(steps, [each.cosine for each in found], marker="o", label=label)
        error.semilogy(steps, [each.error for each in found], marker="o", label=label)
    angle.set(xlabel="meta-iterations", ylabel="cosine with the exact meta-gradient")
    error.set(xlabel="meta-iterations", ylabel="relative error")
    for axes in (angle, error):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
