"""Every network of tests/helpers/zoo_catalogue.py, in training and adaptation.

The reference is autograd through the unrolled loop.
"""

import argparse
import copy
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml import FOMAML, MAML, Episodes
from unrolled import (
    Outcome,
    adapted,
    error,
    loss_of,
    outcome,
    reference,
    seed,
    start_of,
    tasks_of,
    write_between,
)

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.zoo_catalogue import HUGE, NETWORKS, Entry, episodes_of, network_of, size_of

LENGTH = 0.03
"""Of an inner step, in the units of the parameters: a rate that suits one network is nothing, or
far too much, for another."""

MOST = 1e-6
SMALL = 1e6
"""Networks with at most so many parameters take two inner steps and are adapted to both tasks
together; others one, and to one."""

TOLD_APART = 1e-4
"""By how much the exact meta-gradient must at least differ from the first-order one: else the first
would pass for the second."""


def rate_of(network: nn.Module, episodes: Episodes) -> float:
    """Return the inner rate with which the first step has its length."""
    task = next(tasks_of(episodes))
    start = start_of(network)
    loss = loss_of(network, start, task.support_x, task.support_y)
    gradient = torch.autograd.grad(loss, [*start.values()], materialize_grads=True)
    return LENGTH / float(torch.stack([g.norm() for g in gradient]).norm())


def row(entry: Entry) -> dict[str, Outcome]:
    """Return the outcomes of one network."""
    network = network_of(entry)
    episodes = episodes_of(entry, network)
    # of the largest memory holds no second one
    share = [*network.parameters(), *network.buffers()] if size_of(network) > HUGE else []
    plain = copy.deepcopy(network, {id(tensor): tensor for tensor in share})
    rate, small = rate_of(plain, episodes), size_of(network) <= SMALL
    steps = 2 if small else 1

    def gradient(algorithm: type[MAML]) -> dict[str, Tensor]:
        seed()  # as the reference does: some networks draw random numbers
        return algorithm(network, inner_lr=rate, train_steps=steps).meta_gradient(episodes)

    def adapted_apart() -> float:
        model = MAML(network, inner_lr=rate, train_steps=steps)
        tasks = episodes if small else next(tasks_of(episodes))
        found: Any = model.adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
        right = [
            adapted(plain, task, rate, steps) for task in (tasks_of(episodes) if small else [tasks])
        ]
        return float(
            (getattr(found, "logits", found) - torch.stack(right)).norm()
            / torch.stack(right).norm()
        )

    right = reference(plain, episodes, rate, steps)
    if right.exact is not None and error(right.first_order or {}, right.exact) < TOLD_APART:
        raise AssertionError(
            "Expected an exact meta-gradient that differs from the first-order one; take a "
            "larger rate."
        )
    cells = {
        "exact": outcome(lambda: error(gradient(MAML), right.exact), MOST),
        "first order": outcome(lambda: error(gradient(FOMAML), right.first_order), MOST),
        "adapt": outcome(adapted_apart, MOST),
    }
    left = plain.state_dict()
    changed = [
        name for name, tensor in network.state_dict().items() if not torch.equal(tensor, left[name])
    ]
    return cells | ({"network": Outcome("WRONG", f"changed: {changed[:3]}")} if changed else {})


def table(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return the outcomes as a table with a line for each library.

    Where a network was refused, it shows the message.
    """
    columns = ("exact", "first order", "adapt")
    lines = [f"| | networks | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    libraries: dict[str, list[Mapping[str, Outcome]]] = defaultdict(list)
    for name, cells in rows.items():
        library, network = name.split()
        libraries[library].append(cells)
        for column, found in cells.items():
            if found.word == "refused":
                refused[column, found.detail].append(network)
    for library, of_library in libraries.items():
        counts = [
            Counter(cells[column].word for cells in of_library if column in cells)
            for column in columns
        ]
        sums = [
            ", ".join(f"{number} {word}" for word, number in sorted(count.items()))
            for count in counts
        ]
        lines.append(f"| {library} | {len(of_library)} | {' | '.join(sums)} |")
    lines += [
        f"\nRefused ({column}): {', '.join(sorted(names))}: *{said}*"
        for (column, said), names in refused.items()
    ]
    if len(rows) < len(NETWORKS):
        lines.append(f"\nOf {len(NETWORKS)} networks {len(rows)} were run for this table.")
    return "\n".join(lines)


def main() -> None:
    """Print the outcomes; write their table into docs/quality.md with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks, or libraries; by default all")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the table between the markers of docs/quality.md",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Outcome]] = {}
    for name in NETWORKS:
        if arguments.names and not {name, *name.split()}.intersection(arguments.names):
            continue
        began = time.perf_counter()
        try:
            rows[name] = row(NETWORKS[name])
        except Exception as failure:  # noqa: BLE001 # the reference or the network itself
            rows[name] = {
                "exact": Outcome("CRASH", f"reference: {type(failure).__name__}: {failure}")
            }
        found = "; ".join(
            f"{key}: {word} {detail[:200]}" for key, (word, detail) in rows[name].items()
        )
        print(f"{name:44s} {time.perf_counter() - began:5.1f} s  {found}", flush=True)
    print(table(rows))
    if arguments.write:
        write_between("zoo", table(rows))
    sys.exit(
        any(found.word in ("WRONG", "CRASH") for cells in rows.values() for found in cells.values())
    )


if __name__ == "__main__":
    main()
