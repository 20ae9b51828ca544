"""Every algorithm on the same budget: real Omniglot, 20-way 1-shot, one table of accuracy and time.

    python benchmarks/algorithms.py --root DATA

That takes about 40 minutes on 2 cores, and goes on where it was interrupted.

The times are taken at the end, with all algorithms in turns, so they are comparable even if other
work ran during the trainings.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from lightning_maml import (
    ANIL,
    BOIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Conv4,
    MAMLPlusPlus,
    MetaSGD,
    ProtoNet,
    Reptile,
)
from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.datamodules import OmniglotDataModule

WAYS, STEPS, RATE, EPOCHS = 20, 3, 0.4, 5
ROUNDS, STEPS_TIMED = 3, 12
EPISODES = {
    "ways": WAYS,
    "shots": 1,
    "queries": 1,
    "rotations": "classes",
    "meta_batch_size": 4,
    "train_batches": 120,
}
IMPLICIT_STEPS, IMPLICIT_RATE = 16, 0.1
"""iMAML needs its inner problem solved: its paper's 16 steps, at a rate with which the proximal
term of strength 2 does not diverge."""


def network(ways: int | None = WAYS) -> Conv4:
    """Return the MAML papers' network for Omniglot with GELU in place of ReLU."""
    return Conv4(1, ways, 28, channels=64, activation="gelu")


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Return the meta-optimizer of all runs."""
    return torch.optim.Adam(parameters, lr=2e-3)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Return its schedule, one step per epoch."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)


def gradient_based(
    algorithm: type[MAML], rate: float = RATE, steps: int = STEPS, **arguments: Any
) -> Callable[[], MAML]:
    """Return a function that builds the model."""
    chosen = {"optimizer": optimizer, "lr_scheduler": schedule, **arguments}
    return lambda: algorithm(network(), inner_lr=rate, train_steps=steps, **chosen)


MODELS: dict[str, Callable[[], EpisodicModule]] = {
    "MAML": gradient_based(MAML),
    "HFMAML": gradient_based(HFMAML),
    "FOMAML": gradient_based(FOMAML),
    "ANIL": gradient_based(ANIL),
    "BOIL": gradient_based(BOIL),
    "LSLR": gradient_based(LSLR),
    "MetaSGD": gradient_based(MetaSGD),
    "MAMLPlusPlus": gradient_based(MAMLPlusPlus, multi_step_epochs=2),
    "Reptile": gradient_based(Reptile),
    "IMAML": gradient_based(IMAML, IMPLICIT_RATE, IMPLICIT_STEPS),
    "ProtoNet": lambda: ProtoNet(network(None), optimizer=optimizer, lr_scheduler=schedule),
}


class Run(NamedTuple):
    """The accuracy of one algorithm on the test tasks.

    It is that of the best checkpoint and, as ``untrained``, of the initial weights.
    """

    name: str
    steps: str
    accuracy: float
    ci95: float
    untrained: float


class Clock(Callback):
    """Callback that times every training step, with its data and its optimizer."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time."""
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Return the median time of a step."""
        return statistics.median(
            later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)
        )


QUIET = {
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}


def train(name: str, data: OmniglotDataModule, folder: Path) -> Run:
    """Meta-train one algorithm, from the seed that all share, and test its best checkpoint."""
    seed_everything(0, verbose=False)
    model = MODELS[name]()
    best = ModelCheckpoint(folder / name, monitor="val/accuracy", mode="max")
    trainer = Trainer(max_epochs=EPOCHS, callbacks=[best], **QUIET)
    untrained = trainer.test(model, data, verbose=False)[0]["test/accuracy"]
    trainer.fit(model, data)
    figures = trainer.test(
        model, data, ckpt_path=best.best_model_path, weights_only=True, verbose=False
    )[0]
    steps = f"{model.train_steps}, {model.inner_lr:g}" if isinstance(model, MAML) else "-"
    return Run(name, steps, figures["test/accuracy"], figures["test/accuracy_ci95"], untrained)


def seconds_per_iteration(names: list[str], data: OmniglotDataModule) -> dict[str, float]:
    """Return each algorithm's median time over some rounds.

    In each round every algorithm takes some steps.
    """
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(ROUNDS), desc="Timing"):
        for name, seconds in rounds.items():
            clock = Clock()
            trainer = Trainer(
                max_steps=STEPS_TIMED,
                callbacks=[clock],
                limit_val_batches=0,
                enable_progress_bar=False,
                enable_checkpointing=False,
                **QUIET,
            )
            trainer.fit(MODELS[name](), data)
            seconds.append(clock.median())
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Omniglot")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    finished = arguments.out / "runs.json"
    runs = [Run(**row) for row in json.loads(finished.read_text())] if finished.exists() else []
    data = OmniglotDataModule(arguments.root, **EPISODES)
    for name in arguments.only:
        if name not in [run.name for run in runs]:
            runs.append(train(name, data, arguments.out))
            finished.write_text(json.dumps([run._asdict() for run in runs]))
    seconds = seconds_per_iteration([run.name for run in runs], data)
    print(
        f"\n{os.cpu_count()} CPU cores\n\n| algorithm | N, inner rate | test accuracy, % | "
        "untrained, % | seconds per iteration |\n|---|---|---|---|---|"
    )
    for run in runs:
        accuracy = f"{100 * run.accuracy:.1f} ± {100 * run.ci95:.1f}"
        print(
            f"| `{run.name}` | {run.steps} | {accuracy} | {100 * run.untrained:.1f} | "
            f"{seconds[run.name]:.2f} |"
        )


if __name__ == "__main__":
    main()
