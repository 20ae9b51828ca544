"""How the time of a meta-gradient depends on inner steps, tasks and CPU cores.

make learn2learn && .venv/bin/python benchmarks/scaling.py     # some minutes on 2 cores
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lightning_maml import keep_freed_memory
from speed import OURS, WARM, WORKLOADS, method, repeated, seconds, without_averages

STEPS, TASKS = (1, 2, 5, 10, 20), (1, 2, 4, 8, 16, 32, 64)


def of(name: str, workload: str, device: str, **changes: int) -> Callable[[], Any]:
    """Return a function that computes a meta-gradient with other numbers of steps or tasks."""
    chosen = WORKLOADS[workload]._replace(**changes)
    network: nn.Module = without_averages(chosen.network()).to(device)
    return method(name, network, F.cross_entropy, chosen, chosen.episodes(device))


def with_cores(function: Callable[[], Any], cores: int) -> Any:
    """Call the function with ``cores`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def medians(
    functions: Sequence[Callable[[], Any]], device: str, rounds: int, description: str
) -> list[float]:
    """Return the median milliseconds of each function, called in turns."""
    for function in functions:
        repeated(function, WARM[torch.device(device).type])
    times = [
        [1000 * seconds(function, device, 1) for function in functions]
        for _ in tqdm(range(rounds), desc=description)
    ]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def line(values: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return start and slope of the line with the least relative errors."""
    slope, start = np.polyfit(values, times, 1, w=1 / np.array(times))
    return float(start), float(slope)


def main() -> None:
    """Measure and print the tables."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--method", nargs="+", choices=OURS, default=["ours-exact", "ours-hf", "ours-fo"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device, cores = arguments.device, os.cpu_count() or 1
    lines = []
    for what, workload, values in (
        ("steps", "mini_5w1s", STEPS),
        ("tasks", "omniglot_5w1s_q1", TASKS),
        ("tasks", "omniglot_20w1s", TASKS),
    ):
        lines += [
            "",
            f"{workload}, ms",
            "",
            f"| {what} |"
            + "".join(f" {value} |" for value in values)
            + " line, ms | furthest from it, % | slope of the first half, of the second |",
        ]
        lines += ["|---|" + "---|" * (len(values) + 3)]
        middle = len(values) // 2
        for name in arguments.method:
            functions = [of(name, workload, device, **{what: value}) for value in values]
            times = medians(functions, device, arguments.rounds, f"{workload}, {what}, {name}")
            start, slope = line(values, times)
            off = 100 * max(abs((start + slope * np.array(values)) / times - 1))
            few, many = (
                line(values[: middle + 1], times[: middle + 1])[1],
                line(values[middle:], times[middle:])[1],
            )
            lines.append(
                f"| {name} |"
                + "".join(f" {t:.3g} |" for t in times)
                + f" {start:.3g} + {slope:.3g} x | {off:.0f} | {few:.3g}, {many:.3g} "
                f"({100 * (many / few - 1):+.0f} %) |"
            )
    if device == "cpu":
        numbers = [2**k for k in range(cores.bit_length()) if 2**k <= cores]
        lines += [
            "",
            "omniglot_5w1s_q1, ms",
            "",
            "| cores |" + "".join(f" {n} |" for n in numbers) + " most over 1 |",
        ]
        lines += ["|---|" + "---|" * (len(numbers) + 1)]
        for name in ("ours-exact", "ours-fo", "learn2learn"):
            function = of(name, "omniglot_5w1s_q1", device)
            times = medians(
                [partial(with_cores, function, n) for n in numbers],
                device,
                arguments.rounds,
                f"cores, {name}",
            )
            lines.append(
                f"| {name} |"
                + "".join(f" {t:.3g} |" for t in times)
                + f" {times[0] / times[-1]:.1f} times as fast |"
            )
    print(
        f"\ntorch {torch.__version__}, {device}, {cores} CPU cores; lines are fitted to relative "
        "errors",
        *lines,
        sep="\n",
    )


if __name__ == "__main__":
    main()
