"""Run learn2learn's Lightning example with other imports, against learn2learn's own loop.

Both have the same tasksets of real Omniglot and the same first weights.

Training is in float64, where both must take the same path; ``--single`` is float32, where rounding
separates them within some fifty iterations.

    make learn2learn
    .venv/bin/python benchmarks/learn2learn_example.py --root DATA

That takes a quarter of an hour on 2 cores.
"""

import argparse
import copy
import os
import random
import time

import learn2learn as l2l
import numpy as np
import torch
import torch.nn.functional as F
from learn2learn.data import MetaDataset, TaskDataset
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from lightning_maml.compat.learn2learn import EpisodicBatcher, LightningANIL, LightningMAML
from lightning_maml.datamodules import OmniglotDataModule

Task = tuple[Tensor, Tensor]
WAYS, SHOTS, QUERIES = 5, 1, 1
META_BATCH, EPOCHS, ITERATIONS_PER_EPOCH, TEST_TASKS = 16, 6, 100, 600
RATE, META_RATE, ADAPTATION_STEPS = 0.4, 0.003, {"maml": 1, "anil": 5}


def taskset(data: OmniglotDataModule, split: str) -> TaskDataset:
    """Return learn2learn's taskset over the characters of a split."""
    images, members, _ = data.class_images(split)
    labels = torch.arange(len(members)).repeat_interleave(
        torch.tensor([len(rows) for rows in members])
    )
    dataset = MetaDataset(
        TensorDataset(images[np.concatenate(members)].to(torch.get_default_dtype()) / 255, labels)
    )
    steps = [
        NWays(dataset, WAYS),
        KShots(dataset, SHOTS + QUERIES),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
    ]
    return TaskDataset(dataset, task_transforms=steps, num_tasks=-1)


def halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a task as learn2learn's examples do."""
    support = torch.arange(len(x)) % (SHOTS + QUERIES) < SHOTS
    return x[support], y[support], x[~support], y[~support]


def adapt_as_learn2learn(
    name: str, network: nn.Module, maml: l2l.algorithms.MAML, task: Task
) -> tuple[Tensor, float]:
    """Return a task's query loss and accuracy.

    This is the ``fast_adapt`` of learn2learn's ``maml_omniglot.py`` and ``anil_fc100.py``.
    """
    functional, (data, labels) = maml.clone(), task
    support_x, support_y, query_x, query_y = halves(
        network.features(data) if name == "anil" else data, labels
    )
    for _ in range(ADAPTATION_STEPS[name]):
        functional.adapt(F.cross_entropy(functional(support_x), support_y))
    outputs = functional(query_x)
    return F.cross_entropy(outputs, query_y), (outputs.argmax(-1) == query_y).float().mean().item()


def their_loop(name: str, network: nn.Module, tasks: list[TaskDataset]) -> None:
    """Train with learn2learn's own loop."""
    maml = l2l.algorithms.MAML(network.classifier if name == "anil" else network, lr=RATE)
    optimizer = torch.optim.Adam(network.parameters(), META_RATE)
    for _ in tqdm(range(EPOCHS * ITERATIONS_PER_EPOCH), desc=f"learn2learn's loop, {name}"):
        optimizer.zero_grad()
        for _ in range(META_BATCH):
            adapt_as_learn2learn(name, network, maml, tasks[0].sample())[0].backward()
        for p in network.parameters():
            p.grad.mul_(1 / META_BATCH)
        optimizer.step()


def our_script(name: str, network: nn.Module, tasks: list[TaskDataset]) -> None:
    """Train as learn2learn's ``examples/vision/lightning/main.py`` does.

    Only its imports and its Trainer are changed.
    """
    arguments = {
        f"{split}_{key}": value
        for split in ("train", "test")
        for key, value in (("ways", WAYS), ("shots", SHOTS), ("queries", QUERIES))
    }
    arguments |= {
        "adaptation_lr": RATE,
        "adaptation_steps": ADAPTATION_STEPS[name],
        "lr": META_RATE,
    }
    episodic_data = EpisodicBatcher(*tasks, epoch_length=META_BATCH * ITERATIONS_PER_EPOCH)
    algorithm = (
        LightningMAML(network, **arguments)
        if name == "maml"
        else LightningANIL(network.features, network.classifier, **arguments)
    )
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    precision = "64-true" if torch.get_default_dtype() == torch.float64 else "32-true"
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=META_BATCH,
        max_epochs=EPOCHS,
        **quiet,
    )
    trainer.fit(model=algorithm, datamodule=episodic_data)


def main() -> None:
    """Train both ways, test both on the same tasks with the same code, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Omniglot")
    parser.add_argument("--single", action="store_true", help="float32")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float32 if arguments.single else torch.float64)
    data = OmniglotDataModule(arguments.root)
    data.prepare_data()
    tasks = [taskset(data, split) for split in ("train", "val", "test")]
    rows = []
    for name in ("maml", "anil"):
        seed_everything(0, verbose=False)
        first = l2l.vision.models.OmniglotCNN(WAYS)
        test_tasks = [tasks[2].sample() for _ in range(TEST_TASKS)]
        for label, train in (
            ("learn2learn's loop", their_loop),
            ("the example, ported", our_script),
        ):
            network = copy.deepcopy(first)
            random.seed(1)
            np.random.seed(1)
            start = time.perf_counter()
            train(name, network, tasks)
            minutes = (time.perf_counter() - start) / 60
            maml = l2l.algorithms.MAML(network.classifier if name == "anil" else network, lr=RATE)
            accuracies = torch.tensor(
                [adapt_as_learn2learn(name, network, maml, task)[1] for task in test_tasks]
            )
            ci95 = 1.96 * accuracies.std() / TEST_TASKS**0.5
            rows.append(
                f"| {name} | {label} | {100 * accuracies.mean():.2f} ± {100 * ci95:.2f} | "
                f"{minutes:.1f} |"
            )
    print(
        f"\n{EPOCHS * ITERATIONS_PER_EPOCH} iterations of {META_BATCH} tasks, tested on "
        f"{TEST_TASKS}, {torch.get_default_dtype()}; {os.cpu_count()} CPU cores"
    )
    print(
        "\n| algorithm | training | test accuracy, % | minutes |\n|---|---|---|---|",
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()
