"""Peak memory of the meta-gradient of one task against the number of inner steps.

Each method, ours and learn2learn's, and each N has a process of its own.

make learn2learn && .venv/bin/python benchmarks/memory.py     # a few minutes on 2 cores
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from speed import OURS, WARM, WORKLOADS, method, peak_mb, repeated, without_averages

STEPS = (1, 2, 5, 10, 20)
ALLOCATORS = {"as it is": {}, "returning": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
"""glibc keeps freed memory, in pieces that may fit later requests; with the threshold it returns it
at once: only memory in use counts."""
METHODS = ("ours-exact", "ours-never", "ours-hf", "ours-fo", "learn2learn", "learn2learn-fo")


def measure(name: str, workload: str, steps: int, device: str) -> float:
    """Return the memory in MB that meta-gradients in a row add at their peak.

    There are two or, on a GPU, one more than it takes to capture them.
    """
    chosen = WORKLOADS[workload]._replace(steps=steps, tasks=1)
    network = without_averages(chosen.network()).to(device)
    function = method(name, network, F.cross_entropy, chosen, chosen.episodes(device))
    function()  # with checks, which take memory of their own
    return peak_mb(partial(repeated, function, WARM[torch.device(device).type] + 1), device)


def in_its_own_process(environment: dict[str, str], *arguments: str) -> float:
    """Return what this file prints for one method and N."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", *arguments]
    return float(
        subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="mini_5w5s")
    parser.add_argument("--method", nargs="+", choices=[*OURS, *METHODS], default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the peaks")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("METHOD", "WORKLOAD", "STEPS", "DEVICE"),
        help="measure one in this process",
    )
    arguments = parser.parse_args()
    if arguments.one:
        name, workload, steps, device = arguments.one
        print(measure(name, workload, int(steps), device))
        return
    allocators = ["as it is"] if arguments.device == "cuda" else [*ALLOCATORS]
    rows = []
    for allocator, name, steps in tqdm([*itertools.product(allocators, arguments.method, STEPS)]):
        peak = in_its_own_process(
            ALLOCATORS[allocator], name, arguments.workload, str(steps), arguments.device
        )
        rows.append(
            {
                "workload": arguments.workload,
                "allocator": allocator,
                "method": name,
                "steps": steps,
                "peak_mb": peak,
            }
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    kind = (
        "allocated on CUDA"
        if arguments.device == "cuda"
        else f"resident, {os.cpu_count()} CPU cores"
    )
    print(
        f"\nMB beyond the imports, network and tasks ({kind}), {arguments.workload}, torch "
        f"{torch.__version__}\n"
    )
    print(
        "| allocator | method |"
        + "".join(f" N = {n} |" for n in STEPS)
        + f" N = {STEPS[-1]} over N = {STEPS[0]} |"
    )
    print("|---|---|" + "---|" * (len(STEPS) + 1))
    for allocator, name in itertools.product(allocators, arguments.method):
        row = [
            found["peak_mb"]
            for found in rows
            if (found["allocator"], found["method"]) == (allocator, name)
        ]
        print(
            f"| {allocator} | {name} |"
            + "".join(f" {peak:.0f} |" for peak in row)
            + f" {row[-1] / row[0]:.2f} |"
        )


if __name__ == "__main__":
    main()
