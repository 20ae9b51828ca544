"""The adaptive meta-stepsize against fixed ones, on real Omniglot with plain SGD.

Four scales and five fixed rates are compared, in one table and one picture.

python benchmarks/meta_stepsize.py --root DATA     # an hour or so on 2 cores
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure

from lightning_maml import FOMAML, HFMAML, MAML, AdaptiveMetaStepsize, Conv4
from lightning_maml.datamodules import OmniglotDataModule

FIXED = (0.03, 0.1, 0.3, 1.0, 3.0)
SCALES = (3e4, 1e5, 3e5, 1e6)
"""Multiples of 1 / L-hat. The papers' 1/80 is not among them: at alpha = 0.4 it means steps of
1e-9."""

EPISODES = {
    "ways": 5,
    "shots": 1,
    "queries": 1,
    "meta_batch_size": 32,
    "train_batches": 100,
    "val_tasks": 200,
    "test_tasks": 600,
}


class Run(NamedTuple):
    """One run: validation accuracy after every 100 iterations, and the stepsizes.

    It has the test accuracy too if the run got that far.
    """

    kind: str
    value: float
    val_accuracy: list[float]
    stepsizes: list[float]
    test_accuracy: float
    test_ci95: float
    stopped: str


class Curves(Callback):
    """Collects what a run's curves are drawn from."""

    def __init__(self) -> None:
        self.val_accuracy: list[float] = []
        self.stepsizes: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the validation accuracy."""
        self.val_accuracy.append(float(trainer.callback_metrics["val/accuracy"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the stepsize of the step."""
        self.stepsizes.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(data: OmniglotDataModule, kind: str, value: float, epochs: int) -> Run:
    """Meta-train from the same weights on the same tasks with one stepsize."""
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=value if kind == "fixed" else 0.0)
    model = MAML(
        Conv4(1, 5, 28, activation="gelu"),
        inner_lr=0.4,
        train_steps=1,
        test_steps=3,
        optimizer=optimizer,
    )
    curves = Curves()
    callbacks: list[Callback] = [
        curves,
        *([AdaptiveMetaStepsize(scale=value)] if kind == "adaptive" else []),
    ]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **quiet)
    try:
        trainer.fit(model, data)
    except FloatingPointError as error:
        return Run(
            kind,
            value,
            curves.val_accuracy,
            curves.stepsizes,
            float("nan"),
            float("nan"),
            str(error),
        )
    figures = trainer.test(model, data, verbose=False)[0]
    return Run(
        kind,
        value,
        curves.val_accuracy,
        curves.stepsizes,
        figures["test/accuracy"],
        figures["test/accuracy_ci95"],
        "",
    )


class Clock(Callback):
    """Takes the wall time of an epoch of training."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


def seconds_per_step(
    data: OmniglotDataModule, algorithm: type[MAML], callbacks: list[Callback]
) -> float:
    """Return the mean wall time of a step over 100 training steps.

    By default the callback measures once in them.
    """
    seed_everything(0, verbose=False)
    optimizer, clock = partial(torch.optim.SGD, lr=0.01), Clock()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(
        max_epochs=1, limit_val_batches=0, callbacks=[clock, *callbacks], accelerator="cpu", **quiet
    )
    trainer.fit(
        algorithm(Conv4(1, 5, 28, activation="gelu"), inner_lr=0.4, optimizer=optimizer), data
    )
    return clock.seconds / EPISODES["train_batches"]


def print_costs(data: OmniglotDataModule, repetitions: int = 3) -> None:
    """Print how much time the callback adds to a training step.

    Runs with and without it take turns.
    """
    for algorithm in (MAML, HFMAML, FOMAML):
        pairs = []
        for _ in range(repetitions):
            without = seconds_per_step(data, algorithm, [])
            pairs.append(
                (without, seconds_per_step(data, algorithm, [AdaptiveMetaStepsize(scale=1e5)]))
            )
        shares = sorted(100 * (adaptive / without - 1) for without, adaptive in pairs)
        steps = ", ".join(
            f"{1000 * without:.0f} -> {1000 * adaptive:.0f} ms" for without, adaptive in pairs
        )
        print(
            f"{algorithm.__name__:7} {statistics.median(shares):5.1f} % (of {repetitions}: "
            f"{shares[0]:.1f} .. {shares[-1]:.1f} %)   {steps}"
        )


def draw(runs: list[Run]) -> Figure:
    """Draw accuracy and stepsize over the iterations, fixed rates dashed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, stepsize = figure.subplots(1, 2)
    for run in runs:
        color = f"C{(FIXED if run.kind == 'fixed' else SCALES).index(run.value)}"
        style = {"color": color, "linestyle": "--" if run.kind == "fixed" else "-"}
        label = f"fixed {run.value:g}" if run.kind == "fixed" else f"adaptive, scale {run.value:g}"
        accuracy.plot(
            [100 * (k + 1) for k in range(len(run.val_accuracy))],
            run.val_accuracy,
            marker=".",
            label=label,
            **style,
        )
        stepsize.plot(range(1, len(run.stepsizes) + 1), run.stepsizes, linewidth=1, **style)
    accuracy.set(
        xlabel="meta-iterations",
        ylabel="validation accuracy, 200 tasks",
        title="Omniglot 5-way 1-shot, plain SGD",
    )
    stepsize.set(xlabel="meta-iterations", ylabel="meta-stepsize", yscale="log", title="stepsize")
    accuracy.legend(fontsize=7)
    for axes in (accuracy, stepsize):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Run both grids, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Omniglot")
    parser.add_argument("--cost", action="store_true", help="only time the callback")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/meta_stepsize"))
    arguments = parser.parse_args()
    data, finished = OmniglotDataModule(arguments.root, **EPISODES), arguments.out / "runs.json"
    if arguments.cost:
        print_costs(data)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    # goes on where it was interrupted
    runs = [Run(**row) for row in json.loads(finished.read_text())] if finished.exists() else []
    for kind, value in [
        *(("fixed", lr) for lr in FIXED),
        *(("adaptive", scale) for scale in SCALES),
    ]:
        if (kind, value) not in [run[:2] for run in runs]:
            runs.append(train(data, kind, value, arguments.iterations // EPISODES["train_batches"]))
        finished.write_text(json.dumps([run._asdict() for run in runs]))
        draw(runs).savefig(arguments.out / "meta_stepsize.png", dpi=120)
    print(
        "\n| stepsize | validation accuracy every 100 iterations, % | test accuracy, % | steps, "
        "first .. last |\n|---|---|---|---|"
    )
    for run in runs:
        curve = " ".join(f"{100 * accuracy:.1f}" for accuracy in run.val_accuracy)
        result = run.stopped or f"{100 * run.test_accuracy:.1f} ± {100 * run.test_ci95:.1f}"
        steps = f"{run.stepsizes[0]:.2g} .. {run.stepsizes[-1]:.2g}" if run.stepsizes else "none"
        print(f"| {run.kind} {run.value:g} | {curve} | {result} | {steps} |")


if __name__ == "__main__":
    main()
