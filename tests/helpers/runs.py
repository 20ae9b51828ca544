"""A small network, a datamodule of noise and a model of each algorithm, for whole runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from helpers.random_numbers import drawn_on_cpu
from lightning_maml import (
    ANIL,
    BOIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoNet,
    Reptile,
)
from lightning_maml.datamodules import ClassImages, EpisodicDataModule

WAYS, STEPS = 3, 6


class Noise(EpisodicDataModule):
    """Twelve classes of noise, turned at random, in validation too.

    More noise is added to the support images.
    """

    def __init__(self, noise: float = 0.0, **options: Any) -> None:
        sizes = {
            "ways": WAYS,
            "meta_batch_size": 2,
            "train_batches": STEPS,
            "val_tasks": 6,
            "rotations": "augment",
        }
        super().__init__(**(sizes | options))
        self.noise = noise

    def class_images(self, split: str) -> ClassImages:
        """Return the same noise for all splits."""
        random = torch.Generator().manual_seed(0)
        images = torch.rand(12 * 6, 1, 8, 8, generator=random, device="cpu")
        return ClassImages(
            images, [torch.arange(6 * number, 6 * number + 6).numpy() for number in range(12)]
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add noise to the support images."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch._replace(
            support_x=batch.support_x + self.noise * torch.randn_like(batch.support_x)
        )


def network(outputs: int | None = WAYS, dropout: float = 0.0) -> nn.Module:
    """Return a small network."""
    return drawn_on_cpu(_network, outputs, dropout)


def _network(outputs: int | None, dropout: float) -> nn.Module:
    head = [] if outputs is None else [nn.Linear(64, outputs)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        *head,
    )


ADAM, SGD = partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=0.1)
MODELS: dict[str, Callable[[], LightningModule]] = {
    "MAML with dropout": lambda: MAML(network(dropout=0.3), 0.1, 2, optimizer=ADAM),
    "FO-MAML": lambda: FOMAML(network(), 0.1, optimizer=ADAM),
    "HF-MAML": lambda: HFMAML(network(), 0.1, 2, optimizer=ADAM, batch_norm="running"),
    "LSLR": lambda: LSLR(network(), 0.1, 2, optimizer=ADAM),
    "MAML++": lambda: MAMLPlusPlus(
        network(), 0.1, 2, optimizer=ADAM, batch_norm="per_step", multi_step_epochs=2
    ),
    "Reptile": lambda: Reptile(network(), 0.1, 2, optimizer=SGD),
    "ProtoNet": lambda: ProtoNet(network(None), optimizer=ADAM, batch_norm="running"),
    "ANIL": lambda: ANIL(network(), 0.1, 2, optimizer=ADAM),
    "BOIL": lambda: BOIL(network(), 0.1, 2, optimizer=ADAM),
    "MetaSGD": lambda: MetaSGD(network(), 0.1, 2, optimizer=ADAM),
    "iMAML": lambda: IMAML(network(), 0.1, 2, optimizer=ADAM),
    "MAML, adaptive meta-stepsize": lambda: MAML(network(), 0.1, optimizer=SGD),
}


def is_same(found: Any, expected: Any) -> bool:
    """Return whether two nested structures of tensors are the same bit for bit."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            is_same(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return bool(found == expected)
