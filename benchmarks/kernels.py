"""What each kernel of lightning_maml/kernels gains.

A meta-gradient is computed with it and without it, in turns.

.venv/bin/python benchmarks/kernels.py            # prints the table of docs/quality.md; six minutes
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lightning_maml import FOMAML, MAML, keep_freed_memory
from lightning_maml.execution.auto import TasksName
from lightning_maml.kernels import grouped_conv, layers
from speed import WORKLOADS

ALGORITHMS = {"MAML": MAML, "FO-MAML": FOMAML}
NAMES = ("omniglot_5w1s_q1", "omniglot_5w1s_q15", "omniglot_20w1s", "mini_5w1s")


class TorchConvolution:
    """In place of the convolution whose second derivatives are written out: torch's own."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        """Return x * W + b."""
        stride, padding, dilation, groups = geometry
        tasks = len(weight) if weight.ndim > x.ndim else 1
        kernels = grouped_conv.as_groups(weight, x)
        bias = None if bias is None else bias.flatten()
        of_dimensions = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        return of_dimensions(x, kernels, bias, stride, padding, dilation, tasks * groups)


class TorchBatchNorm:
    """In place of the batch norm whose second derivatives are written out: torch's own."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return the normalised x."""
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


class TorchMaxPooling:
    """In place of the max pooling whose second derivative is written out: torch's own."""

    @staticmethod
    def apply(x: Tensor, windows: Any) -> Tensor:
        """Return the largest number of each window."""
        return F.max_pool2d(x, *windows)


def no(*_: Any) -> None:
    """Stand for a function that answers no, or that finds nothing."""


WITHOUT: dict[str, tuple[Any, str, Any]] = {
    "convolution twice differentiated (`double_backward.py`)": (
        layers,
        "Convolution",
        TorchConvolution,
    ),
    "batch norm twice differentiated (`double_backward.py`)": (layers, "BatchNorm", TorchBatchNorm),
    "max pooling twice differentiated (`max_pooling.py`)": (layers, "MaxPooling", TorchMaxPooling),
    "one weight for all tasks (`grouped_conv.py`)": (grouped_conv, "_without_groups", no),
    "tasks side by side in a layer (`layers.py`)": (layers, "_is_side_by_side", no),
    "channels last (`layers.py`)": (layers.TaskConvolution, "_wants_channels_last", no),
}


@contextmanager
def without(kernel: str) -> Iterator[None]:
    """Leave a kernel out meanwhile."""
    where, name, instead = WITHOUT[kernel]
    with patch.object(where, name, instead):
        yield


def seconds(step: Callable[[], object], least: float) -> float:
    """Return the time of one of the calls that fill a turn."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or not calls:
        step()
        calls += 1
    return passed / calls


def ratios(
    name: str, algorithm: type[MAML], kernel: str, tasks: TasksName, turns: int, least: float
) -> list[float]:
    """Return the time without the kernel over that with it, for each pair of turns."""
    workload = WORKLOADS[name]
    episodes = workload.episodes("cpu")
    torch.manual_seed(0)
    models = [
        algorithm(workload.network(), workload.rate, workload.steps, tasks=tasks) for _ in range(2)
    ]

    def step(model: MAML) -> None:
        model.zero_grad()
        model.meta_loss(episodes).backward()  # type: ignore[no-untyped-call]

    step(models[0])
    with without(kernel):
        step(models[1])  # which also decides how its tasks are run
    found = []
    for _ in range(turns):
        own = seconds(lambda: step(models[0]), least)
        with without(kernel):
            found.append(seconds(lambda: step(models[1]), least) / own)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a turn")
    parser.add_argument("--workloads", nargs="+", default=NAMES, choices=[*WORKLOADS])
    parser.add_argument("--tasks", default="auto", help="how tasks are run")
    arguments = parser.parse_args()
    keep_freed_memory()
    cells = [
        (kernel, name, algorithm)
        for kernel in WITHOUT
        for name in arguments.workloads
        for algorithm in ALGORITHMS
    ]
    medians: dict[tuple[str, str, str], str] = {}
    for kernel, name, algorithm in tqdm(cells, desc="Kernels"):
        chosen = ALGORITHMS[algorithm]
        found = ratios(name, chosen, kernel, arguments.tasks, arguments.turns, arguments.seconds)
        low, median, high = statistics.quantiles(found, n=4)
        medians[kernel, name, algorithm] = f"{median:.2f} ({low:.2f} to {high:.2f})"
    columns = [(name, algorithm) for name in arguments.workloads for algorithm in ALGORITHMS]
    print("| without | " + " | ".join(f"{name}, {algorithm}" for name, algorithm in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for kernel in WITHOUT:
        row = [medians[kernel, name, algorithm] for name, algorithm in columns]
        print(f"| {kernel} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
