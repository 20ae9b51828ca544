"""Sinusoids, trained as the MAML paper trains them: mean squared error after each inner step.

python benchmarks/sinusoid.py             # some quarter of an hour per row on one core
python benchmarks/sinusoid.py --iterations 7000 --rows sinusoid_10shot_maml
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from lightning_maml.algorithms.metrics import TaskMean
from lightning_maml.cli import run

HERE = Path(__file__).resolve().parent
CONFIGS, FOUND = HERE.parent / "configs", HERE / "sinusoid.json"
ALGORITHMS = {
    "maml": [],
    "hfmaml_smooth": [],
    # to tell what HF-MAML does from what its network does
    "maml_smooth": ["--model=MAML"],
    "fomaml": [],
}
"""The algorithms with what changes the config of that name; ``maml_smooth`` has HF-MAML's."""
ROWS = [f"sinusoid_{shots}shot_{algorithm}" for shots in (5, 10) for algorithm in ALGORITHMS]
STEPS = (0, 1, 5, 10)
EPOCH = 500
"""Iterations of an epoch in the configs."""


def train_and_test(row: str, iterations: int, seed: int) -> dict[str, Any]:
    """Train a row, and return the mean squared errors on 600 new tasks, with 95 % intervals."""
    algorithm = row.partition("shot_")[2]
    config = row.replace("shot_maml_smooth", "shot_hfmaml_smooth")
    trained = run(
        [
            "fit",
            f"--config={CONFIGS / config}.yaml",
            *ALGORITHMS[algorithm],
            f"--seed_everything={seed}",
            f"--data.seed={seed}",
            f"--trainer.max_epochs={iterations // EPOCH}",
            f"--trainer.default_root_dir=runs/sinusoid/{row}_{iterations}_{seed}",
            "--model.compiled=true",
            "--model.test_steps=10",
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
    )
    model, errors, diverged = trained.model.eval(), TaskMean(), 0
    for tasks in trained.datamodule.test_dataloader():
        loss = model.evaluate(tasks).loss
        errors.update(loss)
        diverged += int((~loss.isfinite()).any(1).sum())
    mean, interval, _ = errors.compute()
    return {
        "iterations": iterations,
        "seed": seed,
        "mse": [_or_none(value) for value in mean.tolist()],
        "interval": [_or_none(value) for value in interval.tolist()],
        "diverged": diverged,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no nan


def draw(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the error after each inner step, a plot for each number of shots."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    every = [shots for shots in (5, 10) if any(f"sinusoid_{shots}shot" in row for row in found)]
    panels = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axes, shots in zip(panels, every, strict=True):
        for row, runs in found.items():
            if not row.startswith(f"sinusoid_{shots}shot"):
                continue
            for number, each in enumerate(runs):
                label = row.partition("shot_")[2] if number == 0 else None
                # where some tasks diverge, a mean over all says nothing after the first step
                steps = range(2 if each["diverged"] else 11)
                mean, interval = (
                    [math.nan if value is None else value for value in each[key][: len(steps)]]
                    for key in ("mse", "interval")
                )
                axes.errorbar(steps, mean, interval, label=label, capsize=2)
        axes.set(title=f"{shots} points", xlabel="inner steps", ylim=(0, 4))
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("mean squared error")
    return figure


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| row | iterations | seed | " + " | ".join(f"{k} steps" for k in STEPS) + " |",
        "|---|---|---|" + "---|" * len(STEPS),
    ]
    for row, runs in found.items():
        for each in runs:
            cells = [
                f"{each['diverged']} tasks diverge"
                if each["mse"][k] is None or (k > 1 and each["diverged"])
                else f"{each['mse'][k]:.3f} ± {each['interval'][k]:.3f}"
                for k in STEPS
            ]
            lines.append(
                f"| `{row}` | {each['iterations']} | {each['seed']} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _run_of(result: dict[str, Any]) -> tuple[int, int]:
    return result["iterations"], result["seed"]


def main() -> None:
    """Train the rows, add them to sinusoid.json, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--iterations", type=int, default=70_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    if arguments.iterations < EPOCH or arguments.iterations % EPOCH:
        parser.error(f"expected --iterations in multiples of {EPOCH}")
    torch.set_num_threads(1)
    for row in tqdm(arguments.rows, unit="row"):
        for seed in arguments.seeds:
            result = train_and_test(row, arguments.iterations, seed)
            # read again, as another process may have written meanwhile
            found = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
            others = [each for each in found.get(row, []) if _run_of(each) != _run_of(result)]
            found[row] = sorted([*others, result], key=_run_of)
            found = {row: found[row] for row in ROWS if row in found}
            FOUND.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(f"{os.cpu_count()} CPU cores, 600 tasks, 100 queries each\n\n{table(found)}")
    draw(found).savefig(HERE / "sinusoid.png", dpi=110)


if __name__ == "__main__":
    main()
