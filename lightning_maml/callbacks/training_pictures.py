"""Pictures of how a run learns, drawn anew after every validation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.callbacks.gradient_comparison import Fidelity, MetaGradientMonitor


class Validation(NamedTuple):
    """The results of a validation, and of training before it.

    Attributes:
        step: Optimizer steps until then.
        mean: Accuracy on the validation tasks after adaptation, or for regression their loss.
        ci95: Half-width of its 95 % confidence interval.
        before: The same figure before adaptation.
        train: Its mean in training, after N steps, since the previous validation, over all
            processes; nan if there was none.
    """

    step: int
    mean: float
    ci95: float
    before: float
    train: float


class TrainingPictures(Callback):
    """Draws, after every validation, how the run has gone so far.

    ``learning.png`` shows the accuracy (for regression the loss) on the validation tasks, of the
    first loader, with its 95 % confidence interval, before adaptation, and in training; with a
    :class:`lightning_maml.callbacks.MetaGradientMonitor` beside it, ``fidelity.png`` shows how
    close first-order and Hessian-free meta-gradients are to the exact one. They are written to the
    logger's folder, or to the trainer's ``default_root_dir`` without one.

    Raises:
        TypeError: If the module is not one of this package.
    """

    def __init__(self) -> None:
        self.history: list[Validation] = []
        self._sum: float | Tensor = 0.0
        self._steps = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there will be something to draw."""
        if not isinstance(pl_module, EpisodicModule):
            raise TypeError(
                "Expected a module of lightning_maml for TrainingPictures but got "
                f"{type(pl_module).__name__}."
            )
        if not trainer.is_global_zero:  # what a checkpoint has belongs to process 0
            self._sum, self._steps = 0.0, 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up this process's training figures, on the device; skipped steps have none."""
        if outputs:
            figure = "accuracy" if "train/accuracy" in trainer.callback_metrics else "loss"
            self._sum = self._sum + trainer.callback_metrics[f"train/{figure}"].detach()
            self._steps += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and save."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        folder = cast(EpisodicModule, pl_module).run_folder
        found = trainer.callback_metrics
        of_loader = "" if "val/loss" in found else "/dataloader_idx_0"
        # a subclass evaluates in its own way, or there was nothing to evaluate
        if f"val/loss_ci95{of_loader}" not in found:
            return
        name = "accuracy" if f"val/accuracy{of_loader}" in found else "loss"
        mean, ci95, before = (
            float(found[f"val/{name}{kind}{of_loader}"]) for kind in ("", "_ci95", "_before")
        )
        of_all = torch.tensor([float(self._sum), float(self._steps)], device=pl_module.device)
        total, steps = trainer.strategy.reduce(of_all, reduce_op="sum").tolist()
        train = total / steps if steps else float("nan")
        self.history.append(Validation(trainer.global_step, mean, ci95, before, train))
        self._sum, self._steps = 0.0, 0
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        draw_learning(self.history, name).savefig(folder / "learning.png")
        for monitor in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(monitor, MetaGradientMonitor) and monitor.history:
                draw_fidelity(monitor.history).savefig(folder / "fidelity.png")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {
            "history": [tuple(found) for found in self.history],
            "sum": float(self._sum),
            "steps": self._steps,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        self.history = [Validation(*found) for found in state_dict["history"]]
        self._sum, self._steps = state_dict["sum"], state_dict["steps"]


def draw_learning(history: Sequence[Validation], figure_name: str) -> Figure:
    """Draw the validation figure over meta-iterations with its 95 % confidence interval, beside those before adaptation and in training."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, mean, ci95, before, train = torch.tensor(history, dtype=torch.float64).T
    axes.plot(steps, mean, marker="o", label="validation tasks, after K steps")
    axes.fill_between(
        steps, mean - ci95.nan_to_num(), mean + ci95.nan_to_num(), alpha=0.25, label="95 % interval"
    )
    axes.plot(steps, train, marker=".", linestyle="--", label="training tasks, after N steps")
    axes.plot(
        steps, before, marker=".", color="tab:gray", label="validation tasks, before adaptation"
    )
    axes.set(xlabel="meta-iterations", ylabel=f"query {figure_name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_fidelity(history: Mapping[int, Mapping[str, Fidelity]]) -> Figure:
    """Draw the cosine with the exact meta-gradient, and the relative error, of each approximation over meta-iterations."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    angle, error = figure.subplots(1, 2)
    for name in next(iter(history.values())):
        found = [of_step[name] for of_step in history.values()]
        angle.plot(
            list(history), [each.cosine for each in found], marker="o", label=name.replace("_", " ")
        )
        error.semilogy(
            list(history), [each.error for each in found], marker="o", label=name.replace("_", " ")
        )
    angle.set(xlabel="meta-iterations", ylabel="cosine with the exact meta-gradient")
    error.set(xlabel="meta-iterations", ylabel="relative error")
    for axes in (angle, error):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
