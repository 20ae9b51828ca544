"""A loop with clone() and adapt(), one task after another, on images in an HDF5 file."""

from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

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


class Learner:
    def __init__(self, network: nn.Module, lr: float) -> None:
        self.network, self.lr = network, lr
        self.w = {name: p.clone() for name, p in network.named_parameters()}

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.network, self.w, x)

    def adapt(self, loss: Tensor) -> None:
        gradient = torch.autograd.grad(loss, [*self.w.values()], create_graph=True)
        for name, g in zip([*self.w], gradient, strict=True):
            self.w[name] = self.w[name] - self.lr * g


def fast_adapt(task: tuple[Tensor, Tensor], learner: Learner) -> tuple[Tensor, Tensor]:
    support_x, support_y, query_x, query_y = split(*task)
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(support_x), support_y))
    predictions = learner(query_x)
    accuracy = (predictions.argmax(1) == query_y).double().mean()
    return F.cross_entropy(predictions, query_y), accuracy


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
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    random = np.random.default_rng(1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(META_BATCH):
            learner = Learner(network, lr=0.4)
            error, _ = fast_adapt(sample_task(images, random), learner)
            (error / META_BATCH).backward()
        optimizer.step()
    tests = [fast_adapt(sample_task(images, random), Learner(network, 0.4)) for _ in range(5)]
    losses, accuracies = (torch.stack(figures).detach() for figures in zip(*tests, strict=True))
    return {**dict(network.named_parameters()), "loss": losses, "accuracy": accuracies}
