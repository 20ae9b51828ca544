"""The same on the library's model."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from lightning_maml import MAML
from lightning_maml.datamodules import meta_batch

WAYS, SHOTS, QUERIES, META_BATCH = 3, 1, 2, 4


def write_images(file: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 8), dtype=np.uint8)
    with h5py.File(file, "w") as opened:
        opened["images"] = images  # ten classes


def sample_task(images: h5py.Dataset, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    chosen = random.choice(len(images), WAYS, replace=False)
    each = [images[c][random.permutation(6)[: SHOTS + QUERIES]] for c in chosen]
    x = torch.from_numpy(np.concatenate(each)[:, None] / 255.0)
    return x, torch.arange(WAYS).repeat_interleave(SHOTS + QUERIES)


def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    adapts = torch.arange(len(y)) % (SHOTS + QUERIES) < SHOTS
    return x[adapts], y[adapts], x[~adapts], y[~adapts]


def run(folder: Path) -> dict[str, Tensor]:
    write_images(folder / "images.h5")
    images = h5py.File(folder / "images.h5")["images"]
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(144, WAYS),
    ).double()
    model = MAML(network, inner_lr=0.4, train_steps=2)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    random = np.random.default_rng(1)
    for _ in range(3):
        optimizer.zero_grad()
        tasks = [split(*sample_task(images, random)) for _ in range(META_BATCH)]
        model.meta_loss(tasks).backward()
        optimizer.step()
    tests = meta_batch([split(*sample_task(images, random)) for _ in range(5)])
    losses, outputs = (figures[:, -1] for figures in model.evaluate(tests))
    accuracies = (outputs.argmax(-1) == tests.query_y).double().mean(1)
    return {**dict(network.named_parameters()), "loss": losses, "accuracy": accuracies}
