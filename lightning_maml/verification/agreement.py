"""How far gradients may differ, and how to say so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml.batches.episodes import first_task, support_set
from lightning_maml.batches.outputs import tensors_in
from lightning_maml.batches.trees import call
from lightning_maml.core.params import Params, norm, subtract
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.verification.case import Case

ROUNDING, LOW, AT_KINKS = 1e-6, 1e-2, 0.1
"""Largest relative errors of gradients that count as rounding: in float64, below, and where
rounding may cross a kink."""


def tolerated_error(case: Case) -> float:
    """Return the largest relative error that counts as rounding."""
    return LOW if case.dtype != torch.float64 or _rounds(case) else ROUNDING


def _rounds(case: Case) -> bool:
    """Return whether the network or the loss rounds to less than float64 on its way."""
    first = first_task(case.episodes)
    sets = [support_set(first), (first.query_x, first.query_y)]
    with torch.no_grad(), case.precision(), _Types() as seen:
        for loss, (x, y) in zip(case.plain_losses(), sets, strict=True):
            loss(call(case.plain_network(), x), y)
    return bool(seen.found - {torch.float64})


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the floating-point types of what operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {
            leaf.dtype
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        return result


def relative_error(gradient: Params, right: Params) -> float:
    """Return the distance of a gradient from the right one, relative to the norm of the right one.

    Only the parameters that both have are compared.
    """
    both = [name for name in gradient if name in right]
    gradient, right = (
        {name: each[name].detach().double() for name in both} for each in (gradient, right)
    )
    size, distance = float(norm(right)), float(norm(subtract(gradient, right)))
    return distance / size if size else distance


def named(names: list[str], most: int = 4) -> str:
    """Return some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_sentence(error: BaseException) -> str:
    """Return what an error says in its first line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def draws_alike(case: Case) -> bool:
    """Return whether the network draws the same random numbers in the library as alone."""
    functional = FunctionalNetwork(case.model.network, case.model.batch_norm)
    task = first_task(case.episodes)

    def outputs(network: Callable[[Any], Any]) -> Tensor:
        case.start()
        rows: list[Tensor] = []
        for x in (support_set(task)[0], task.query_x):
            floats = (t for t in tensors_in(network(x)) if t.is_floating_point())
            rows += [tensor.flatten() for tensor in floats]
        return torch.cat(rows)

    with torch.no_grad(), case.precision():
        return torch.allclose(
            outputs(partial(functional, functional.params)),
            outputs(partial(call, case.plain_network())),
            rtol=1e-4,
        )
