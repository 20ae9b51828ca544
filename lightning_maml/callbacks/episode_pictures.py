"""Pictures of one episode and of adaptation, drawn at the end of a test."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.algorithms.metrics import Estimate
from lightning_maml.batches.episodes import Episodes
from lightning_maml.callbacks.first_task_pictures import FirstTaskPictures
from lightning_maml.errors import UserValueError

_ARROW = "\N{RIGHTWARDS ARROW}"


class EpisodePictures(FirstTaskPictures):
    """Draws one episode and the adaptation curve at the end of a test.

    ``episode.png`` shows the support set and the query set of the first test task with the
    predicted classes before and after adaptation; ``adaptation.png`` the accuracy over all test
    tasks, with several loaders those of the first, after 0 .. K steps with its 95 % confidence
    interval. Images of one channel are drawn as ink on paper, with 1 as black. The pictures are
    written to the logger's folder, or to the trainer's ``default_root_dir`` without a logger. For
    :class:`lightning_maml.MAML` and its variants, on images; on regression with one number in and
    one out, ``episode.png`` shows the function of the first test task and what is predicted.

    Args:
        max_classes: Most classes of the episode that are drawn.
        max_images: Most support images, and most query images, per class that are drawn.

    Raises:
        ValueError: If an argument is below 1.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import EpisodePictures
        >>> x, y = torch.rand(2, 3, 1, 8, 8), torch.tensor([[0, 1, 2]] * 2)
        >>> tasks = DataLoader([Episodes(x, y, x, y)], batch_size=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         callbacks=[EpisodePictures()],
        ...         default_root_dir=folder,
        ...         logger=False,
        ...         enable_progress_bar=False,
        ...     )
        ...     _ = trainer.test(MAML(MLP(64, 3)), tasks, verbose=False)
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['adaptation.png', 'episode.png']
    """

    def __init__(self, max_classes: int = 5, max_images: int = 5) -> None:
        super().__init__()
        if max_classes < 1 or max_images < 1:
            raise UserValueError(
                f"Expected `max_classes` and `max_images` to be at least 1 but got {max_classes} "
                f"and {max_images}."
            )
        self._max_classes = max_classes
        self._max_images = max_images

    @override
    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw both pictures."""
        has_labels = not task.query_y.is_floating_point()
        if module.adaptation is not None:
            figure_name = "accuracy" if has_labels else "loss"
            draw_adaptation(module.adaptation, figure_name).savefig(folder / "adaptation.png")
        is_classified = has_labels and task.query_y.ndim == 2
        if isinstance(task.query_x, Tensor) and task.query_x.ndim == 5 and is_classified:
            predictions = module.evaluate(task).aux[0].argmax(-1).cpu()
            picture = draw_episode(_first(task), predictions, self._max_classes, self._max_images)
            picture.savefig(folder / "episode.png")
        elif not has_labels and _is_curve(task):
            outputs = module.evaluate(task).aux
            # not with several outputs, as of a mean and a variance
            if isinstance(outputs, Tensor) and outputs[0, 0].numel() == task.query_y.numel():
                picture = draw_curve(_first(task), outputs[0].flatten(1).float().cpu())
                picture.savefig(folder / "episode.png")


def draw_episode(task: Episodes, predictions: Tensor, max_classes: int, max_images: int) -> Figure:
    """Draw one task: a row per class with its support images and its classified query images.

    Args:
        task: One task, ``Episodes`` without the leading ``T``, on the CPU; images in 0 .. 1, or
            normalised.
        predictions: Predicted classes of the query images after 0 .. K steps, ``[K + 1, Q]``.
        max_classes: Most rows.
        max_images: Most support images, and most query images, per row.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.callbacks import draw_episode
        >>> images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
        >>> task = Episodes(images, labels, images, labels)
        >>> figure = draw_episode(task, torch.zeros(2, 3), max_classes=5, max_images=5)
        >>> len(figure.axes)  # three rows of one support and one query image
        6
    """
    classes = min(int(task.support_y.max()) + 1, max_classes)
    supports = [(task.support_y == c).nonzero().flatten()[:max_images] for c in range(classes)]
    queries = [(task.query_y == c).nonzero().flatten()[:max_images] for c in range(classes)]
    support_columns = max(len(indices) for indices in supports)
    columns = support_columns + max(len(indices) for indices in queries)
    size = (1.15 * columns + 1.2, 1.35 * classes + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(classes, columns, squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for c in range(classes):
        for column, index in enumerate(supports[c]):
            _show(axes[c, column], task.support_x[index], f"class {c}")
        for column, index in enumerate(queries[c], start=support_columns):
            before, after = int(predictions[0, index]), int(predictions[-1, index])
            color = "tab:green" if after == c else "tab:red"
            _show(axes[c, column], task.query_x[index], f"{before} {_ARROW} {after}", color)
    figure.suptitle(
        f"left: support set; right: query set,\npredicted before {_ARROW} after "
        f"{len(predictions) - 1} steps",
        fontsize=10,
    )
    return figure


def draw_curve(task: Episodes, outputs: Tensor) -> Figure:
    """Draw one task of regression with one number in and one out.

    Support points are triangles. Through the query points go their targets, and the predictions
    before adaptation, after one step and after the last.

    Args:
        task: One task, ``Episodes`` without the leading ``T``, on the CPU: inputs and targets
            ``[S, 1]`` and ``[Q, 1]``.
        outputs: Predictions for the query points after 0 .. K steps, ``[K + 1, Q]``.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.callbacks import draw_curve
        >>> x = torch.linspace(-5, 5, 20)[:, None]
        >>> task = Episodes(x[:5], x[:5].sin(), x, x.sin())
        >>> figure = draw_curve(task, torch.zeros(4, 20))
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['target', 'before', 'after 1 step', 'after 3 steps']
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    # matplotlib knows no bf16
    support_x, support_y, query_x, query_y = (tensor.flatten().float() for tensor in task)
    x, order = query_x.sort()
    axes.plot(x, query_y[order], color="black", label="target")
    last = len(outputs) - 1
    for steps, style in zip(sorted({0, min(1, last), last}), (":", "--", "-"), strict=False):
        name = f"after {steps} step{'s' * (steps > 1)}" if steps else "before"
        axes.plot(x, outputs[steps, order], style, marker=".", label=name)
    axes.scatter(support_x, support_y, marker="^", color="tab:red", zorder=3, label="support set")
    axes.set(xlabel="x", ylabel="y")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_adaptation(adaptation: Estimate, figure_name: str) -> Figure:
    """Draw a figure's mean over tasks after 0 .. K steps with its 95 % confidence interval.

    Args:
        adaptation: The estimate, with a mean of ``[K + 1]``.
        figure_name: What it is, ``"accuracy"`` or ``"loss"``.

    Examples:
        >>> import torch
        >>> from lightning_maml.algorithms.metrics import Estimate
        >>> from lightning_maml.callbacks import draw_adaptation
        >>> estimate = Estimate(torch.tensor([0.2, 0.6]), torch.tensor([0.1, 0.1]), 100)
        >>> draw_adaptation(estimate, "accuracy").axes[0].get_ylabel()
        'query accuracy'
    """
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    mean = adaptation.mean.cpu()
    ci95 = adaptation.ci95.cpu().nan_to_num()
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


def _first(task: Episodes) -> Episodes:
    """Return the first task, without its dimension, on the CPU."""
    return Episodes(*(tensor[0].cpu() for tensor in task))


def _is_curve(task: Episodes) -> bool:
    """Return whether inputs and targets are one number each."""
    return all(isinstance(part, Tensor) and part.shape[2:].numel() == 1 for part in task)


def _show(axes: Axes, image: Tensor, title: str, color: str = "black") -> None:
    image = image.float().cpu()
    if len(image) != 3:
        # one channel is ink on paper; other numbers of channels have no colours of their own
        image = 1 - image.mean(0).expand(3, -1, -1)
    # normalised images go beyond 0 .. 1
    low, high = min(float(image.min()), 0.0), max(float(image.max()), 1.0)
    axes.imshow((image.permute(1, 2, 0) - low) / (high - low))
    axes.set_title(title, fontsize=9, color=color)
