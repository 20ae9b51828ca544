"""Pictures of what a run does, written beside its logs."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.algorithms.metrics import Estimate
from lightning_maml.batches.episodes import Episodes
from lightning_maml.batches.trees import map_tensors


class FirstTaskPictures(Callback):
    """Base of callbacks that draw the first test task at the end of a test, into the logger's folder or else ``default_root_dir``."""

    def __init__(self) -> None:
        self._task: Episodes | None = None

    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw ``task``, given as ``Episodes`` with one task, into files in ``folder``."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(module, task, folder).")

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first task."""
        if batch_idx == 0 and dataloader_idx == 0 and isinstance(batch, Episodes):
            self._task = map_tensors(lambda tensor: tensor[:1], batch)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw it."""
        if isinstance(pl_module, MAML) and self._task is not None and trainer.is_global_zero:
            pl_module.run_folder.mkdir(parents=True, exist_ok=True)
            self.draw(pl_module, self._task, pl_module.run_folder)
            self._task = None


class EpisodePictures(FirstTaskPictures):
    """Draws, at the end of a test, one episode and the adaptation curve.

    ``episode.png`` shows the support set and the query set of the first test task with the
    predicted classes before and after adaptation; ``adaptation.png`` the accuracy over all test
    tasks after 0 .. K steps with its 95 % confidence interval. They are written to the logger's
    folder, or to the trainer's ``default_root_dir`` without one. For :class:`lightning_maml.MAML`
    and its variants, on images.

    Args:
        max_classes: Most classes of the episode that are drawn.
        max_images: Most support images, and most query images, per class that are drawn.
    """

    def __init__(self, max_classes: int = 5, max_images: int = 5) -> None:
        super().__init__()
        if max_classes < 1 or max_images < 1:
            raise ValueError(
                f"Expected `max_classes` and `max_images` to be at least 1 but got {max_classes} "
                f"and {max_images}."
            )
        self._max_classes, self._max_images = max_classes, max_images

    @override
    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw both pictures."""
        are_labels = not task.query_y.is_floating_point()
        if module.adaptation is not None:
            draw_adaptation(module.adaptation, "accuracy" if are_labels else "loss").savefig(
                folder / "adaptation.png"
            )
        if isinstance(task.query_x, Tensor) and task.query_x.ndim == 5 and are_labels:
            outputs_per_step: Tensor = module.evaluate(task).aux[0]
            predictions = outputs_per_step.argmax(-1).cpu()
            picture = draw_episode(
                Episodes(*(tensor[0].cpu() for tensor in task)),
                predictions,
                self._max_classes,
                self._max_images,
            )
            picture.savefig(folder / "episode.png")


def draw_episode(task: Episodes, predictions: Tensor, max_classes: int, max_images: int) -> Figure:
    """Draw one task: a row per class with its support images, then its query images with the classes predicted for them.

    Args:
        task: One task, ``Episodes`` without the leading ``T``, on the CPU; images in 0 .. 1, or
            normalised.
        predictions: Predicted classes of the query images after 0 .. K steps, ``[K + 1, Q]``.
        max_classes: Most rows.
        max_images: Most support images, and most query images, per row.
    """
    classes = min(int(task.support_y.max()) + 1, max_classes)
    rows = [
        [
            (task.support_y == c).nonzero().flatten()[:max_images],
            (task.query_y == c).nonzero().flatten()[:max_images],
        ]
        for c in range(classes)
    ]
    shots, queries = (max(len(row[part]) for row in rows) for part in (0, 1))
    figure = Figure(
        figsize=(1.15 * (shots + queries) + 1.2, 1.35 * classes + 0.9), layout="constrained"
    )
    axes = figure.subplots(classes, shots + queries, squeeze=False)
    for c, (support, query) in enumerate(rows):
        for column in range(shots + queries):
            axes[c, column].axis("off")
        for column, index in enumerate(support):
            _show(axes[c, column], task.support_x[index], f"class {c}")
        for column, index in enumerate(query, start=shots):
            before, after = int(predictions[0, index]), int(predictions[-1, index])
            _show(
                axes[c, column],
                task.query_x[index],
                f"{before} \N{RIGHTWARDS ARROW} {after}",
                "tab:green" if after == c else "tab:red",
            )
    figure.suptitle(
        f"left: support set; right: query set,\npredicted before \N{RIGHTWARDS ARROW} after "
        f"{len(predictions) - 1} steps",
        fontsize=10,
    )
    return figure


def draw_adaptation(adaptation: Estimate, figure_name: str) -> Figure:
    """Draw the mean figure over tasks after 0 .. K steps with its 95 % confidence interval."""
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    mean, ci95 = adaptation.mean.cpu(), adaptation.ci95.cpu().nan_to_num()
    steps = range(len(mean))
    axes.plot(steps, mean, marker="o")
    axes.fill_between(steps, mean - ci95, mean + ci95, alpha=0.25)
    axes.set(
        xlabel="adaptation steps",
        ylabel=f"query {figure_name}",
        title=f"{adaptation.tasks} test tasks",
        xticks=list(steps),
    )
    axes.grid(alpha=0.3)
    return figure


def _show(axes: Axes, image: Tensor, title: str, color: str = "black") -> None:
    image = image.float()
    if len(image) != 3:  # one channel is ink on paper; others have no colours of their own
        image = 1 - image.mean(0).expand(3, -1, -1)
    # beyond 0 .. 1 where images were normalised
    low, high = min(float(image.min()), 0.0), max(float(image.max()), 1.0)
    axes.imshow((image.permute(1, 2, 0) - low) / (high - low))
    axes.set_title(title, fontsize=9, color=color)
