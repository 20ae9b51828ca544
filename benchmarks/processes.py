r"""How training scales with processes.

This is measured on this machine, and modelled for up to a thousand processes.

    .venv/bin/python benchmarks/processes.py
    .venv/bin/python benchmarks/processes.py --step-ms 40 --spread 0.03 \
        --latency-us 8 --gigabytes-per-second 40 --parameters 112997

The first measures on the CPU, in a minute.

Each process computes the meta-gradient of its own tasks. Then all average the gradients, 4 bytes
per parameter, in a ring: each of R processes sends 2 (R - 1) messages of 1/R of the gradients. A
step takes as long as the slowest of R computations plus this sum. The model draws the times of
computations from measured ones, and takes that of the sum from a line fitted to measured ones. What
it cannot know is a network of many machines and its other users: for these there are the second
command's arguments.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing
from tqdm import tqdm

from speed import WORKLOADS, method, without_averages

SIZES = [4**power for power in range(5, 13)]
"""How many numbers are in the buffers whose sum is timed: 4 kB to 67 MB."""

TOGETHER = 1024
"""Tasks of a step of all processes together, where that number is fixed."""


class Ring(NamedTuple):
    """The cost of a sum over processes.

    Attributes:
        latency: Latency of a message, in seconds.
        bandwidth: Bandwidth, in bytes per second.
    """

    latency: float
    bandwidth: float

    def seconds(self, processes: int, size: float) -> float:
        """Return how long the sum of ``size`` bytes takes, in seconds."""
        return 2 * (processes - 1) * (self.latency + size / processes / self.bandwidth)


def times(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each call but the first."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found[1:]


def _in_process(rank: int, processes: int, folder: str, name: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{processes}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    network = without_averages(WORKLOADS[name].network())
    gradient = method(
        "ours-exact", network, F.cross_entropy, WORKLOADS[name], WORKLOADS[name].episodes("cpu")
    )

    def step() -> None:
        found = torch.cat([tensor.flatten() for tensor in gradient().values()])
        dist.all_reduce(found)

    buffers = [torch.zeros(size) for size in SIZES]
    found = {"compute": times(gradient, rounds), "steps": times(step, rounds)}
    found["sums"] = [
        statistics.median(times(lambda b=buffer: dist.all_reduce(b), 20)) for buffer in buffers
    ]
    torch.save(found, f"{folder}/{processes}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(processes: int, name: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of meta-gradients, steps and sums of each size.

    They are those of the first of ``processes`` processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_in_process, (processes, folder, name, rounds), processes)
        found: dict[str, list[float]] = torch.load(
            Path(folder) / f"{processes}_0.pt", weights_only=True
        )
    return found


def fit(sums: Sequence[float], processes: int) -> Ring:
    """Return the ring that best explains how long sums of :data:`SIZES` took.

    All sizes are weighted alike.
    """
    share = 2 * (processes - 1)
    columns = (
        np.stack([np.full(len(SIZES), share), share / processes * 4 * np.array(SIZES)], 1)
        / np.array(sums)[:, None]
    )
    latency, per_byte = np.linalg.lstsq(columns, np.ones(len(SIZES)), rcond=None)[0]
    return Ring(max(latency, 0.0), 1 / per_byte)


def slowest(computations: Sequence[float], processes: int) -> float:
    """Return the expected time of the slowest of ``processes`` computations.

    Each is drawn from ``computations``.
    """
    drawn = np.random.RandomState(0).choice(computations, (1000, processes))
    return float(drawn.max(1).mean())


def table(computations: Sequence[float], tasks: int, ring: Ring, size: int) -> list[str]:
    """Return what the model predicts, for fixed tasks per process and for fixed tasks in all.

    Args:
        computations: Seconds of a process's meta-gradient.
        tasks: Number of tasks of that meta-gradient.
        ring: The ring that sums the gradients.
        size: Size of the gradients, in bytes.
    """
    lines = [
        (
            f"| processes | a step of {tasks} tasks each, ms | of this the sum | tasks per second "
            f"| efficiency | a step of {TOGETHER} tasks, ms | efficiency |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    alone = statistics.mean(computations)
    for processes in (1, 2, 4, 8, 64, 256, 1000):
        wait, most = ring.seconds(processes, size), slowest(computations, processes)
        whole = most * -(-TOGETHER // processes) / tasks + wait
        lines.append(
            f"| {processes} | {1000 * (most + wait):.1f} | {1000 * wait:.2f} | "
            f"{processes * tasks / (most + wait):,.0f} | {alone / (most + wait):.2f} | "
            f"{1000 * whole:.1f} | {alone * TOGETHER / tasks / processes / whole:.2f} |"
        )
    return lines


def main() -> None:
    """Measure, or take the given figures, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="omniglot_5w1s_q15")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--measured",
        type=int,
        nargs="+",
        default=[2],
        help="numbers of processes, at most one per core",
    )
    parser.add_argument("--step-ms", type=float, help="given: a process's meta-gradient")
    parser.add_argument(
        "--spread", type=float, default=0.0, help="its standard deviation, as a part of it"
    )
    parser.add_argument("--latency-us", type=float)
    parser.add_argument("--gigabytes-per-second", type=float)
    parser.add_argument("--parameters", type=int)
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    if given.step_ms is not None:
        if None in (given.latency_us, given.gigabytes_per_second, given.parameters):
            parser.error(
                "Expected --latency-us, --gigabytes-per-second and --parameters beside --step-ms "
                "but got not all of them."
            )
        draws = np.random.RandomState(0).lognormal(0.0, given.spread, 1000) * given.step_ms / 1000
        ring = Ring(given.latency_us / 1e6, given.gigabytes_per_second * 1e9)
        print(*table(draws.tolist(), workload.tasks, ring, 4 * given.parameters), sep="\n")
        return
    size = 4 * sum(p.numel() for p in workload.network().parameters())
    found = {
        count: measure(count, given.workload, given.rounds)
        for count in tqdm([1, *given.measured], desc="measuring", unit="run")
    }
    ring, alone = fit(found[given.measured[0]]["sums"], given.measured[0]), found[1]["compute"]
    print(
        f"\n{given.workload}: gradients of {size / 1e6:.2f} MB; a message "
        f"{1e6 * ring.latency:.0f} us, {ring.bandwidth / 1e9:.2f} GB/s"
    )
    print("\n| processes | step, measured, ms | step, by the model, ms |\n|---|---|---|")
    for count in given.measured:
        modelled = slowest(found[count]["compute"], count) + ring.seconds(count, size)
        print(
            f"| {count} | {1000 * statistics.mean(found[count]['steps']):.1f} | "
            f"{1000 * modelled:.1f} |"
        )
    print("\n", *table(alone, workload.tasks, ring, size), sep="\n")


if __name__ == "__main__":
    main()
