"""The predictions of both papers: one table and one page of plots.

Each is given as the claim, a formula and a measurement.

    python benchmarks/theory.py

That takes 11 minutes on 2 cores of an older EPYC (Zen 3), prints the table, and writes
docs/theory.png.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from bounds import BOUNDS
from predictions import PREDICTIONS, Finding

ALL = (*PREDICTIONS, *BOUNDS)
"""The longest-running, P12, first: it takes as long as the rest on another core."""

DOCS = Path(__file__).resolve().parent.parent / "docs"


def draw(findings: Sequence[Finding]) -> Figure:
    """Draw one page, a plot for each finding."""
    figure = Figure(figsize=(15, 3.4 * math.ceil(len(findings) / 3)), layout="constrained")
    for axes, finding in zip(
        figure.subplots(math.ceil(len(findings) / 3), 3, squeeze=False).flat, findings, strict=False
    ):
        for series in finding.panel.series:
            axes.plot(
                series.x, series.y, series.style, markersize=3, linewidth=1, label=series.label
            )
        axes.set(
            xlabel=finding.panel.xlabel,
            ylabel=finding.panel.ylabel,
            xscale=finding.panel.scales[0],
            yscale=finding.panel.scales[1],
        )
        axes.set_title(
            f"{finding.number}: {finding.title}{'' if finding.holds else ' (does not hold)'}",
            fontsize=10,
        )
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        points = sorted({x for series in finding.panel.series for x in series.x})
        if len(points) <= 5:
            axes.set_xticks(points, [f"{x:g}" for x in points])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    return figure


def table(findings: Sequence[Finding]) -> str:
    """Return the table in Markdown."""
    rows = [
        (f.number, f.claim, f.formula, f.measured, "yes" if f.holds else "no") for f in findings
    ]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(
        f"| {line} |"
        for line in [
            " | claim | prediction | measured | holds",
            "---|---|---|---|---",
            *lines,
        ]
    )


def run(prediction: Callable[[], Finding]) -> Finding:
    """Check one prediction on one core."""
    torch.set_num_threads(1)
    return prediction()


def main() -> None:
    """Check all predictions, two at a time, and print the table and save the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS)
    out = parser.parse_args().out
    with ProcessPoolExecutor(2) as pool:
        finished = as_completed([pool.submit(run, prediction) for prediction in ALL])
        findings = [future.result() for future in tqdm(finished, total=len(ALL), unit="prediction")]
    findings.sort(key=lambda finding: int(finding.number[1:]))
    out.mkdir(parents=True, exist_ok=True)
    draw(findings).savefig(out / "theory.png", dpi=110)
    print(table(findings))
    others = [finding.number for finding in findings if finding.holds != finding.expected]
    if others:
        sys.exit(f"Not as found before: {', '.join(others)}.")


if __name__ == "__main__":
    main()
