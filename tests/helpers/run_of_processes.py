"""What tests/algorithms/test_processes.py runs in several processes.

Every algorithm runs in both regimes, on four tasks per step that the processes share.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from helpers.runs import Noise, network
from lightning_maml import FOMAML, HFMAML, MAML
from lightning_maml.callbacks import TrainingPictures

TASKS, STEPS = 4, 2
CASES = [
    (algorithm, regime)
    for algorithm in (MAML, FOMAML, HFMAML)
    for regime in ("finite_sum", "resampling")
]


class Seen(Callback):
    """Keeps the tasks and the gradients that are stepped on."""

    def __init__(self) -> None:
        self.tasks: list[torch.Tensor] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.tasks.append(batch.support_x.clone())

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})


def run(folder: Path, processes: int, **arguments: Any) -> None:
    """Train each case for some steps, test it, and write down what this process saw."""
    for number, (algorithm, regime) in enumerate(CASES):
        torch.manual_seed(0)
        seen, pictures = Seen(), TrainingPictures()
        model = algorithm(
            network(), 0.1, STEPS, optimizer=partial(torch.optim.SGD, lr=0.1), tasks="loop"
        )
        sizes = {
            "meta_batch_size": TASKS // processes,
            "train_batches": 3,
            "val_tasks": 5,
            "test_tasks": 7,
        }
        data = Noise(regime=regime, train_steps=STEPS, **sizes)
        trainer = Trainer(
            accelerator="cpu",
            devices=processes,
            precision="64-true",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seen, pictures],
            default_root_dir=folder,
            **arguments,
        )
        trainer.fit(model, data)
        tested = trainer.test(model, data, verbose=False)[0]
        found = {
            "tasks": seen.tasks,
            "gradients": seen.gradients,
            "end": model.state_dict(),
            "tested": tested,
        }
        found["history"] = [list(validation) for validation in pictures.history]
        torch.save(found, folder / f"case_{number}_rank_{trainer.global_rank}_of_{processes}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), strategy="ddp")
