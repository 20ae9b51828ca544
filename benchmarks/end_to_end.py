"""Whole training on real Omniglot, 5-way 1-shot, here and with learn2learn.

Trainer.fit with loading and logging is measured against learn2learn's loop and data pipeline.

    make learn2learn
    .venv/bin/python benchmarks/end_to_end.py --root DATA

That takes some minutes on 2 cores; DATA/omniglot-py is as in torchvision.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import learn2learn as l2l
import torch
import torch.nn.functional as F
import torchvision
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from learn2learn.vision.transforms import RandomClassRotation
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL.Image import LANCZOS
from torchvision.transforms import Compose, Resize, ToTensor
from tqdm import tqdm

from lightning_maml import MAML, keep_freed_memory
from lightning_maml.algorithms.base import StepResult
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.datamodules import OmniglotDataModule

WAYS, TASKS, RATE, META_RATE = 5, 32, 0.4, 0.003
WARM = 5
"""Iterations before the clock starts."""


class Timed(MAML):
    """MAML that adds up the seconds of its meta-gradients and their checks."""

    seconds = 0.0

    def _run_step(self, episodes: AnyEpisodes) -> Callable[[], StepResult]:
        start = time.perf_counter()
        finish = super()._run_step(episodes)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return finish


class Clock(Callback):
    """Callback that times the iterations after the first few, including everything between them."""

    start = seconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock after the first iterations, and read it after each later one."""
        if batch_idx == WARM - 1:
            self.start, pl_module.seconds = time.perf_counter(), 0.0
        self.seconds = time.perf_counter() - self.start


def ours(root: str, iterations: int, accelerator: str) -> tuple[float, float]:
    """Return the seconds of an iteration of ``Trainer.fit``, and those of its meta-gradient."""
    data = OmniglotDataModule(root, meta_batch_size=TASKS, download=False)
    model = Timed(
        l2l.vision.models.OmniglotCNN(WAYS),
        RATE,
        optimizer=lambda params: torch.optim.Adam(params, META_RATE),
    )
    clock = Clock()
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=1,
            limit_train_batches=WARM + iterations,
            limit_val_batches=0,
            log_every_n_steps=10,
            callbacks=[clock],
            logger=CSVLogger(folder),
            enable_model_summary=False,
        )
        trainer.fit(model, data)
    return clock.seconds / iterations, model.seconds / iterations


def learn2learns_tasks(root: str) -> l2l.data.TaskDataset:
    """Return the tasks of learn2learn's ``examples/vision/maml_omniglot.py``.

    They decode and resize images whenever one is drawn.
    """
    scaled = Compose([Resize(28, interpolation=LANCZOS), ToTensor(), lambda x: 1.0 - x])
    # it checks archives; the folders are there
    with patch.object(torchvision.datasets.Omniglot, "_check_integrity", lambda self: True):
        dataset = l2l.data.MetaDataset(l2l.vision.datasets.FullOmniglot(root, transform=scaled))
    steps = [
        FusedNWaysKShots(dataset, n=WAYS, k=2),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
        RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0]),
    ]
    return l2l.data.TaskDataset(dataset, task_transforms=steps, num_tasks=20000)


def theirs(tasks: l2l.data.TaskDataset, iterations: int, device: str) -> float:
    """Return the seconds of an iteration of learn2learn's loop, without its validation."""
    maml = l2l.algorithms.MAML(l2l.vision.models.OmniglotCNN(WAYS), lr=RATE).to(device)
    optimizer = torch.optim.Adam(maml.parameters(), META_RATE)
    support = torch.arange(2 * WAYS) % 2 == 0
    start = 0.0
    for iteration in range(WARM + iterations):
        if iteration == WARM:
            start = time.perf_counter()
        optimizer.zero_grad()
        for _ in range(TASKS):
            functional = maml.clone()
            x, y = (tensor.to(device) for tensor in tasks.sample())
            functional.adapt(F.cross_entropy(functional(x[support]), y[support]))
            outputs = functional(x[~support])
            loss = F.cross_entropy(outputs, y[~support])
            loss.backward()
            loss.item()
            (outputs.argmax(1) == y[~support]).float().mean().item()
        for p in maml.parameters():
            p.grad.mul_(1.0 / TASKS)
        optimizer.step()
    return (time.perf_counter() - start) / iterations


def main() -> None:
    """Time both in turns, print the table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Omniglot")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--iterations",
        type=int,
        default=40,
        help="of each round; learn2learn's loop does a quarter of them",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    OmniglotDataModule(arguments.root).prepare_data()
    tasks = learn2learns_tasks(arguments.root)
    rounds = []
    for _ in tqdm(range(arguments.rounds), desc="Rounds"):
        iteration, gradient = ours(
            arguments.root, arguments.iterations, arguments.device.replace("cuda", "gpu")
        )
        rounds.append(
            (
                iteration,
                gradient,
                theirs(tasks, max(1, arguments.iterations // 4), arguments.device),
            )
        )
    print(
        f"\nOmniglot, 5-way 1-shot, {TASKS} tasks, OmniglotCNN, {arguments.device}, "
        f"{os.cpu_count()} CPU cores, medians of {len(rounds)} rounds\n"
    )
    columns = {
        "Trainer.fit, ms": [1000 * iteration for iteration, _, _ in rounds],
        "of it not the meta-gradient, %": [
            100 * (1 - gradient / iteration) for iteration, gradient, _ in rounds
        ],
        "learn2learn's loop, ms": [1000 * their for _, _, their in rounds],
        "times as long": [their / iteration for iteration, _, their in rounds],
    }
    print("| an iteration | median | least | most |\n|---|---|---|---|")
    for name, values in columns.items():
        print(
            f"| {name} | {statistics.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |"
        )


if __name__ == "__main__":
    main()
