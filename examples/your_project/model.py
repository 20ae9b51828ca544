"""A model of one's own: MAML with one more figure in the logs, and predictions in a file."""

import csv
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml import MAML


class MyMAML(MAML):
    """MAML that logs the norm of the meta-gradient."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm, after the checks of the base class."""
        super().on_before_optimizer_step(optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
        self.log("train/gradient_norm", norm)


class WritePredictions(BasePredictionWriter):
    """Writes the predicted class of every query into a CSV file.

    Args:
        path: The file.
    """

    def __init__(
        self, path: str = "predictions.csv", write_interval: Literal["epoch"] = "epoch"
    ) -> None:
        super().__init__(write_interval)
        self.path = Path(path)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: list[Tensor],
        batch_indices: Any,
    ) -> None:
        """Write one row for each task; predictions are logits, ``[T, Q, ways]`` of each batch."""
        with self.path.open("w", newline="") as file:
            rows = csv.writer(file)
            for logits in predictions:
                rows.writerows(logits.argmax(-1).tolist())
