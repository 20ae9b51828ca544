"""Peak memory of one meta-gradient against the number of inner steps: a process for each method and N, of ours and of learn2learn.

make learn2learn && .venv/bin/python benchmarks/memory.py     # a few minutes on 2 cores
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from speed import OURS, WORKLOADS, method, peak_mb, without_averages
from torch.nn import functional as F
from tqdm import tqdm

STEPS = (1, 2, 5, 10, 20)
METHODS = ("ours-exact", "ours-hf", "ours-fo", "learn2learn", "learn2learn-fo")


def measure(name: str, workload: str, steps: int, device: str) -> float:
    """Return the peak, in MB, of the second meta-gradient of a process beyond what there was before the first."""
    chosen = WORKLOADS[workload]._replace(steps=steps)
    network = without_averages(chosen.network()).to(device)
    function = method(name, network, F.cross_entropy, chosen, chosen.episodes(device))

    def twice() -> None:
        function()
        function()

    return peak_mb(twice, device)


def in_its_own_process(*arguments: str) -> float:
    """Return what this file prints for one method and N."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="mini_5w5s")
    parser.add_argument("--method", nargs="+", choices=[*OURS, *METHODS], default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the peaks")
    parser.add_argument("--one", nargs=4, metavar=("METHOD", "WORKLOAD", "STEPS", "DEVICE"), help="measure one in this process")
    arguments = parser.parse_args()
    if arguments.one:
        name, workload, steps, device = arguments.one
        print(measure(name, workload, int(steps), device))
        return
    cases = tqdm([(name, steps) for name in arguments.method for steps in STEPS])
    peaks = {(name, n): in_its_own_process(name, arguments.workload, str(n), arguments.device) for name, n in cases}
    if arguments.json is not None:
        rows = [{"workload": arguments.workload, "method": name, "steps": n, "peak_mb": peak} for (name, n), peak in peaks.items()]
        arguments.json.write_text(json.dumps(rows, indent=1))
    kind = "allocated on CUDA" if arguments.device == "cuda" else f"resident, {os.cpu_count()} CPU cores"
    print(f"\nMB beyond the imports, network and tasks ({kind}), {arguments.workload}, torch {torch.__version__}\n")
    print("| method |" + "".join(f" N = {n} |" for n in STEPS) + f" N = {STEPS[-1]} over N = {STEPS[0]} |")
    print("|---|" + "---|" * (len(STEPS) + 1))
    for name in arguments.method:
        row = [peaks[name, n] for n in STEPS]
        print(f"| {name} |" + "".join(f" {peak:.0f} |" for peak in row) + f" {row[-1] / row[0]:.2f} |")


if __name__ == "__main__":
    main()
