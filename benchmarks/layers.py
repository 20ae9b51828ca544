"""Every layer of tests/layer_catalogue.py in every way of running tasks, against autograd through the unrolled loop."""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from unrolled import cell, error, reference, write_between

from lightning_maml import FOMAML, HFMAML, MAML, Episodes

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from layer_catalogue import CASES, Case, episodes_of, network_of

RATE, STEPS = 0.2, 2
WAYS: dict[str, dict[str, object]] = {
    "auto": {"tasks": "auto"},
    "loop": {"tasks": "loop"},
    "threads": {"tasks": "threads"},
    "vmap": {"tasks": "vmap"},
    "chunked": {"tasks": "loop", "chunk_size": 2},
}


def adapted_apart(network: nn.Module, episodes: Episodes, evaluated: bool) -> float:
    """Return how far tasks adapted to together, or evaluated, are from tasks adapted to one by one."""
    model = MAML(network, inner_lr=RATE, train_steps=STEPS).eval()
    alone = torch.stack([model.adapt(x, y)(query) for x, y, query, _ in zip(*episodes, strict=True)])
    together = model.evaluate(episodes).aux[:, -1] if evaluated else model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    return float((together - alone).norm() / alone.norm())


def row(case: Case) -> dict[str, str]:
    """Return the cells of one layer."""
    episodes = episodes_of(case)

    def gradient(algorithm: type[MAML], way: str) -> dict[str, Tensor]:
        model = algorithm(network_of(case), inner_lr=RATE, train_steps=STEPS, **WAYS[way])
        torch.manual_seed(3)
        return model.meta_gradient(episodes)

    if case.random:  # the exact one in the loop, which finite differences must meet with the same numbers drawn
        right = gradient(MAML, "loop")
        return {
            "MAML auto": cell(lambda: error(gradient(MAML, "auto"), right), 1e-6),
            "HFMAML loop": cell(lambda: error(gradient(HFMAML, "loop"), right), 1e-4),
        }
    cells = {}
    exact, first = reference(network_of(case), episodes, RATE, STEPS)
    for algorithm, right, most in ((MAML, exact, 1e-6), (FOMAML, first, 1e-6), (HFMAML, exact, 1e-4)):
        if algorithm is HFMAML and (not case.smooth or exact is None):
            continue
        for way in WAYS:
            off = lambda a=algorithm, w=way, r=right: error(gradient(a, w), r)
            cells[f"{algorithm.__name__} {way}"] = cell(off, most)
    for name, evaluated in (("adapt of many", False), ("evaluate", True)):
        off = lambda e=evaluated: adapted_apart(network_of(case), episodes, e)
        cells[name] = cell(off, 1e-6)
    return cells


def main() -> None:
    """Print the table; write its sums into docs/quality.md with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="layers; by default all")
    parser.add_argument("--write", action="store_true", help="write the sums between the markers of docs/quality.md")
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
        f"{len(arguments.names or CASES)} layers and functions: {counts['equal']} cells equal, {counts['refused']} refused, {wrong} wrong."
    )
    print(sums)
    if arguments.write:
        write_between("layers", sums)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
