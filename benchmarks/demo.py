"""Train MAML, FO-MAML and HF-MAML on generated characters, and print one table.

``make demo`` runs it.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer

from lightning_maml.algorithms.metrics import Estimate
from lightning_maml.callbacks import LossMapPicture, MetaGradientMonitor
from lightning_maml.cli import run

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("maml", "fomaml", "hfmaml")


class Row(NamedTuple):
    """The result of one algorithm, its time per meta-iteration, and the folder of its logs."""

    algorithm: str
    accuracy: Estimate
    milliseconds: float
    folder: str


class IterationTimer(Callback):
    """Callback that takes the wall time of every meta-iteration.

    It counts from one batch's end to the next one's, so that loading counts.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out."""
        self._last = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time since the previous batch."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def train_and_test(name: str) -> Row:
    """Meta-train one shipped config and test its best checkpoint."""
    print(f"\n=== {name} ===", flush=True)
    timer = IterationTimer()
    watching = [timer, MetaGradientMonitor(), LossMapPicture()]
    cli = run(["fit", f"--config={ROOT / 'configs' / f'glyphs_{name}.yaml'}"], callbacks=watching)
    cli.trainer.test(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=cli.trainer.checkpoint_callback.best_model_path,
        verbose=False,
    )
    return Row(
        type(cli.model).__name__,
        cli.model.adaptation,
        1000 * statistics.median(timer.seconds),
        cli.trainer.log_dir,
    )


def main() -> None:
    """Print the table of the three algorithms."""
    rows = [train_and_test(name) for name in ALGORITHMS]
    tasks, steps = rows[0].accuracy.tasks, len(rows[0].accuracy.mean) - 1
    print(
        f"\nGenerated characters, 5-way 1-shot, 1 query per class, {steps} adaptation steps, "
        f"{tasks} test tasks, batch statistics (transductive), 95 % intervals; {os.cpu_count()} "
        "CPU cores\n"
    )
    print(f"{'':8}{'before':>16}{'after adaptation':>20}{'ms / meta-iteration':>22}   pictures")
    for row in rows:
        before, after = (
            f"{100 * row.accuracy.mean[end]:.1f} ± {100 * row.accuracy.ci95[end]:.1f} %"
            for end in (0, -1)
        )
        print(
            f"{row.algorithm:8}{before:>16}{after:>20}{row.milliseconds:>22.0f}   "
            f"{row.folder}/*.png"
        )


if __name__ == "__main__":
    main()
