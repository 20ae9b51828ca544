"""Check every layer of tests/helpers/layer_catalogue.py in every way of running tasks.

The reference is autograd through the unrolled loop.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from lightning_maml import FOMAML, HFMAML, MAML, Episodes
from unrolled import adapted, cell, error, reference, seed, tasks_of, write_between

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.layer_catalogue import CASES, Case, episodes_of, network_of

RATE, STEPS = 0.2, 2
WAYS: dict[str, dict[str, object]] = {
    "auto": {"tasks": "auto"},
    "loop": {"tasks": "loop"},
    "threads": {"tasks": "threads"},
    "vmap": {"tasks": "vmap"},
    "chunked": {"tasks": "loop", "chunk_size": 2},
}


def adapted_apart(case: Case, episodes: Episodes, way: str) -> float:
    """Return how far adapted tasks are from plain torch.

    Tasks are adapted to together, one by one and in an evaluation.
    """
    model = MAML(network_of(case), inner_lr=RATE, train_steps=STEPS).eval()
    if way == "evaluate":
        outputs = model.evaluate(episodes).aux[:, -1]
    elif way == "adapt of many":
        outputs = model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    else:
        outputs = torch.stack(
            [model.adapt(x, y)(query) for x, y, query, _ in zip(*episodes, strict=True)]
        )
    network = network_of(case)
    right = torch.stack([adapted(network, task, RATE, STEPS) for task in tasks_of(episodes)])
    return float((outputs - right).norm() / right.norm())


def row(case: Case) -> dict[str, str]:
    """Return the cells of one layer."""
    episodes = episodes_of(case)

    def gradient(algorithm: type[MAML], way: str) -> dict[str, Tensor]:
        model = algorithm(network_of(case), inner_lr=RATE, train_steps=STEPS, **WAYS[way])
        seed()
        return model.meta_gradient(episodes)

    cells = {}
    exact, first = reference(network_of(case), episodes, RATE, STEPS)
    ways = ("auto", "loop", "threads") if case.random else WAYS  # stacked tasks draw other numbers
    for algorithm, right, most in (
        (MAML, exact, 1e-6),
        (FOMAML, first, 1e-6),
        (HFMAML, exact, 1e-4),
    ):
        if algorithm is HFMAML and (not case.smooth or exact is None):
            continue
        for way in ways:
            off = lambda a=algorithm, w=way, r=right: error(gradient(a, w), r)
            cells[f"{algorithm.__name__} {way}"] = cell(off, most)
    if not case.random:  # an evaluation draws in an order of its own
        for way in ("adapt", "adapt of many", "evaluate"):
            off = lambda w=way: adapted_apart(case, episodes, w)
            cells[way] = cell(off, 1e-6)
    return cells


def main() -> None:
    """Print the table; write its sums into docs/quality.md with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="layers; by default all")
    parser.add_argument(
        "--write", action="store_true", help="write the sums between the markers of docs/quality.md"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name in arguments.names or CASES:
        try:
            cells = row(CASES[name])
        except Exception as failure:  # noqa: BLE001 # the reference or the network itself
            cells = {"reference": f"CRASH {type(failure).__name__}: {str(failure)[:80]!r}"}
        found = Counter(value.split()[0] for value in cells.values())
        counts += found
        bad = [f"{key}: {value}" for key, value in cells.items() if value[0] in "WC"]
        print(f"{name:32s} {dict(found)} {'; '.join(bad)}", flush=True)
    wrong = counts["WRONG"] + counts["CRASH"]
    sums = (
        f"{len(arguments.names or CASES)} layers and functions: {counts['equal']} cells equal, "
        f"{counts['refused']} refused, {wrong} wrong."
    )
    print(sums)
    if arguments.write:
        write_between("layers", sums)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
