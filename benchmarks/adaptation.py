"""What adapting to many tasks costs.

One call of ``model.adapt`` is measured against a loop over learn2learn's clones.

make learn2learn && .venv/bin/python benchmarks/adaptation.py     # a minute or two; prints a table
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import learn2learn as l2l
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lightning_maml import MAML, Conv4, keep_freed_memory

WAYS, RATE = 5, 0.4


def noise(tasks: int, shots: int) -> tuple[Tensor, Tensor]:
    """Return support sets of Omniglot's size."""
    return torch.rand(tasks, WAYS * shots, 1, 28, 28), torch.arange(WAYS).repeat_interleave(
        shots
    ).repeat(tasks, 1)


def seconds(function: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Time the methods in turns, and print medians and ranges over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    arguments = parser.parse_args()
    keep_freed_memory()
    network = Conv4(1, WAYS, 28, channels=arguments.channels)
    model = MAML(network, inner_lr=RATE, test_steps=arguments.steps)
    support_x, support_y = noise(arguments.tasks, shots=1)
    peers = {
        name: l2l.algorithms.MAML(network, lr=RATE, first_order=name == "first order")
        for name in ("second order", "first order")
    }

    def loop(maml: l2l.algorithms.MAML) -> list[torch.nn.Module]:
        learners = []
        for x, y in zip(support_x, support_y, strict=True):
            functional = maml.clone()
            for _ in range(arguments.steps):
                functional.adapt(F.cross_entropy(functional(x), y))
            learners.append(functional)
        return learners

    ratios: dict[str, list[float]] = {name: [] for name in peers}
    ours = []
    for _ in tqdm(range(arguments.rounds), desc="Rounds"):
        ours.append(seconds(lambda: model.adapt(support_x, support_y)))
        for name, maml in peers.items():
            ratios[name].append(seconds(lambda maml=maml: loop(maml)) / ours[-1])
    print(
        f"\n{arguments.tasks} tasks, 5-way 1-shot, {arguments.steps} steps, "
        f"Conv4-{arguments.channels}, {os.cpu_count()} CPU cores"
    )
    print(
        f"model.adapt: median {statistics.median(ours):.2f} s ({min(ours):.2f} to {max(ours):.2f})"
    )
    for name, values in ratios.items():
        print(
            f"learn2learn's clones, {name}: {statistics.median(values):.1f} times as long "
            f"({min(values):.1f} to {max(values):.1f})"
        )


if __name__ == "__main__":
    main()
