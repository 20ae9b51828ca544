"""What a network writes, draws, normalises by, and where it has kinks."""

from collections.abc import Iterator

import torch

from lightning_maml.batches.episodes import first_task
from lightning_maml.batches.trees import cat
from lightning_maml.batches.trees import count as count_of
from lightning_maml.checks.batch_norm_checks import sees_others
from lightning_maml.checks.first_pass import first_support
from lightning_maml.networks.batch_norm import batch_norms
from lightning_maml.networks.facts import Written, facts_of
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import weight_normed
from lightning_maml.verification.agreement import named
from lightning_maml.verification.case import Case
from lightning_maml.verification.report import Look


def of_network(case: Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Say what the network does besides mapping inputs to outputs."""
    model = case.model
    written = _written(case)
    policy = (
        f"batch norm's averages follow batch_norm={model.batch_norm!r}"
        if batch_norms(model.network)
        else ""
    )
    yield Look(
        "buffers written",
        "; ".join(filter(None, [named(written) if written else "none", policy])),
        "note",
    )
    yield Look(
        "random numbers", f"drawn from {' and '.join(draws)}" if draws else "none are drawn", "note"
    )
    others = "change with" if _sees_others(case) else "do not depend on"
    yield Look(
        "normalisation",
        f"outputs {others} the other "
        f"{'queries' if model.batch_norm == 'support' else 'inputs of the batch'}",
        "note",
    )
    bent = kinks_of(case)
    yield Look(
        "kinks",
        f"in {named(bent)}: HFMAML needs a network without them" if bent else "none found",
        "note",
    )
    if layers := weight_normed(model.network):
        found = (
            "torch's second derivative of weight norm is wrong, and so is the exact "
            f"meta-gradient through {named(layers)}"
        )
        yield Look("weight norm", found, "wrong" if model.curvature == "exact" else "note")


def _written(case: Case) -> list[str]:
    """Return the buffers that the checks saw a pass write to, without those of batch norm."""
    network = case.model.network
    of_norms = {
        f"{layer}.{name}"
        for layer, module in batch_norms(network).items()
        for name, _ in module.named_buffers()
    }
    written = (facts_of(network).written or Written()).tensors - of_norms
    return [name for name, _ in network.named_buffers() if name in written]


def _sees_others(case: Case) -> bool:
    functional = FunctionalNetwork(case.model.network, case.model.batch_norm)
    with first_support(functional, case.episodes) as support, torch.no_grad():
        queries = first_task(case.episodes).query_x
        x = queries if count_of(queries) > 1 else cat([queries, queries])
        return sees_others(functional, x, support if functional.uses_support_statistics else None)


def kinks_of(case: Case) -> list[str]:
    """Return the layers with kinks, or where there are none, the functions with kinks."""
    return case.model.kinks(case.episodes)
