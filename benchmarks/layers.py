"""Every layer of tests/layer_catalogue.py in every way of running tasks, against autograd through the unrolled loop."""

import argparse
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

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
SENTENCE = re.compile("Expected (`|a |tensors |stacked |layers |outputs |.* but )")
"""How the sentences of this package begin with which something is refused."""

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
START, END = "<!-- layers: start -->", "<!-- layers: end -->"


def unrolled(network: nn.Module, episodes: Episodes, first_order: bool) -> dict[str, Tensor]:
    """Return the meta-gradient by autograd, or the mean gradient at the adapted parameters."""
    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in start.items()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return F.cross_entropy(functional_call(network, {**buffers, **w}, (x,)), y)

    for task in zip(*episodes, strict=True):
        support_x, support_y, query_x, query_y = task
        w = dict(start)
        for _ in range(STEPS):
            gradient = torch.autograd.grad(
                loss(w, support_x, support_y), [*w.values()], create_graph=not first_order, materialize_grads=True
            )
            w = {name: p - RATE * g.to_dense() for (name, p), g in zip(w.items(), gradient, strict=True)}
            if first_order:
                w = {name: p.detach().requires_grad_() for name, p in w.items()}
        leaves = w if first_order else start
        found = torch.autograd.grad(loss(w, query_x, query_y), [*leaves.values()], materialize_grads=True)
        total = {name: total[name] + g.to_dense() for name, g in zip(leaves, found, strict=True)}
    return {name: tensor / len(episodes.support_x) for name, tensor in total.items()}


def reference(case: Case, episodes: Episodes, first_order: bool) -> dict[str, Tensor] | None:
    """Return the right gradient, or None where torch has no second derivative or cannot differentiate so: the package must refuse that."""
    network = network_of(case)
    seed()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return unrolled(network, episodes, first_order)
    except RuntimeError:
        return None


def error(found: dict[str, Tensor], right: dict[str, Tensor] | None) -> float:
    """Return the relative error of the whole gradient."""
    if right is None:
        return float("nan")
    difference = sum((found[name] - right[name]).square().sum() for name in right)
    return float((difference / sum(tensor.square().sum() for tensor in right.values())).sqrt())


def cell(found: Callable[[], float], most: float) -> str:
    """Return whether a result is equal, refused with a sentence or neither."""
    try:
        off = found()
    except (ValueError, TypeError, RuntimeError) as failure:
        if SENTENCE.match(str(failure)):
            return "refused"
        return f"CRASH {type(failure).__name__}: {str(failure)[:60]!r}"
    except Exception as failure:  # noqa: BLE001 # any is a finding
        return f"CRASH {type(failure).__name__}: {str(failure)[:60]!r}"
    return "equal" if off <= most else f"WRONG {off:.0e}"


def seed() -> None:
    """Let all generators begin anew, so that a random layer draws the same in the package as in plain torch."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def adapted_outputs(network: nn.Module, episodes: Episodes) -> Tensor:
    """Return the outputs for the queries after plain steps in evaluation mode, where batch norm has the statistics of each batch."""
    network.eval()
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean = norm.running_var = None
    found = []
    for support_x, support_y, query_x, _ in zip(*episodes, strict=True):
        w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(loss, [*w.values()], materialize_grads=True)
            w = {name: (p - RATE * g.to_dense()).detach().requires_grad_() for (name, p), g in zip(w.items(), gradient, strict=True)}
        with torch.no_grad():
            found.append(functional_call(network, w, (query_x,)))
    return torch.stack(found)


def adapted_apart(case: Case, episodes: Episodes, way: str) -> float:
    """Return how far tasks that are adapted to together, one by one or in an evaluation are from plain torch."""
    model = MAML(network_of(case), inner_lr=RATE, train_steps=STEPS).eval()
    if way == "evaluate":
        outputs = model.evaluate(episodes).aux[:, -1]
    elif way == "adapt of many":
        outputs = model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    else:
        outputs = torch.stack([model.adapt(x, y)(query) for x, y, query, _ in zip(*episodes, strict=True)])
    right = adapted_outputs(network_of(case), episodes)
    return float((outputs - right).norm() / right.norm())


def row(case: Case) -> dict[str, str]:
    """Return the cells of one layer."""
    episodes = episodes_of(case)

    def gradient(algorithm: type[MAML], way: str) -> dict[str, Tensor]:
        model = algorithm(network_of(case), inner_lr=RATE, train_steps=STEPS, **WAYS[way])
        seed()
        return model.meta_gradient(episodes)

    cells = {}
    exact, first = (reference(case, episodes, first_order) for first_order in (False, True))
    ways = ("auto", "loop", "threads") if case.random else WAYS  # stacked tasks draw other numbers
    for algorithm, right, most in ((MAML, exact, 1e-6), (FOMAML, first, 1e-6), (HFMAML, exact, 1e-4)):
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
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}\n{sums}\n{END}{rest.split(END)[1]}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
