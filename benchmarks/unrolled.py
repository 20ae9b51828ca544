"""What the sweeps over layers and networks share.

That is autograd through the unrolled loop in plain torch, and the cells of their tables.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml import Episodes

Params = dict[str, Tensor]

SENTENCE = re.compile("Expected (`|a |tensors |stacked |layers |outputs |.* but )")
"""How the sentences of this package begin with which something is refused."""

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"


class Right(NamedTuple):
    """What autograd through the unrolled loop gives.

    None is what torch cannot differentiate, which the package must refuse.

    Attributes:
        exact: The mean gradient of the query losses at the start.
        first_order: Their mean gradient at the adapted parameters.
    """

    exact: Params | None
    first_order: Params | None


def outputs_of(network: nn.Module, tensors: Params, x: Any) -> Tensor:
    """Return the logits of a network that is given other tensors in place of its own.

    Inputs are a tensor, a tuple or a dict.
    """
    arguments = () if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
    outputs = functional_call(network, tensors, arguments, x if isinstance(x, dict) else {})
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def loss_of(network: nn.Module, w: Params, x: Any, y: Tensor) -> Tensor:
    """Return the loss at ``w``; what the forward pass writes to buffers is dropped."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return F.cross_entropy(outputs_of(network, {**buffers, **w}, x), y)


def start_of(network: nn.Module) -> Params:
    """Return copies of the trainable parameters."""
    return {
        name: p.detach().clone().requires_grad_()
        for name, p in network.named_parameters()
        if p.requires_grad
    }


def tasks_of(episodes: Episodes) -> Iterator[Episodes]:
    """Give the tasks one by one."""
    for number in range(len(tree_leaves(episodes)[0])):
        yield tree_map(lambda tensor, number=number: tensor[number], episodes)


def step(network: nn.Module, w: Params, x: Any, y: Tensor, rate: float, *, graph: bool) -> Params:
    """Return the parameters after one inner step."""
    gradient = torch.autograd.grad(
        loss_of(network, w, x, y), [*w.values()], create_graph=graph, materialize_grads=True
    )
    return {name: p - rate * g.to_dense() for (name, p), g in zip(w.items(), gradient, strict=True)}


def unrolled(
    network: nn.Module, episodes: Episodes, rate: float, steps: int, *, exact: bool = True
) -> Right:
    """Return the meta-gradients by autograd.

    The exact one is left out if it is not wanted.
    """
    start = start_of(network)
    exactly, at_the_end = (
        {name: torch.zeros_like(p) for name, p in start.items()} for _ in range(2)
    )
    for task in tasks_of(episodes):
        w = dict(start)
        for _ in range(steps):
            w = step(network, w, task.support_x, task.support_y, rate, graph=exact)
            if not exact:
                w = {name: p.detach().requires_grad_() for name, p in w.items()}
        wanted = [(at_the_end, w), *([(exactly, start)] if exact else [])]
        leaves = [p for _, point in wanted for p in point.values()]
        found = iter(
            torch.autograd.grad(
                loss_of(network, w, task.query_x, task.query_y), leaves, materialize_grads=True
            )
        )
        for total, point in wanted:
            for name in point:
                total[name] += next(found).to_dense() / len(episodes.support_y)
    return Right(exactly if exact else None, at_the_end)


def seed() -> None:
    """Set all generators back, so that the package draws the same as plain torch."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def reference(network: nn.Module, episodes: Episodes, rate: float, steps: int) -> Right:
    """Return the right meta-gradients; None stands for those that torch cannot differentiate."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        for exact in (True, False):
            seed()
            try:
                return unrolled(network, episodes, rate, steps, exact=exact)
            except RuntimeError:
                continue
    return Right(None, None)


def error(found: Params, right: Params | None) -> float:
    """Return the relative error of the whole gradient."""
    if right is None:
        return float("nan")
    difference = sum((found[name] - right[name]).square().sum() for name in right)
    return float((difference / sum(tensor.square().sum() for tensor in right.values())).sqrt())


def in_evaluation(network: nn.Module) -> nn.Module:
    """Return the network in evaluation mode, but with each batch's own statistics.

    Training mode comes first: some networks keep in evaluation what they computed from their
    parameters, until they train again.
    """
    network.train().eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
    return network


def adapted(network: nn.Module, task: Episodes, rate: float, steps: int) -> Tensor:
    """Return the query outputs of plain gradient descent on the support set, in evaluation mode."""
    w = start_of(network)
    for _ in range(steps):
        w = step(in_evaluation(network), w, task.support_x, task.support_y, rate, graph=False)
        w = {name: p.detach().requires_grad_() for name, p in w.items()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        return outputs_of(in_evaluation(network), {**buffers, **w}, task.query_x)


class Outcome(NamedTuple):
    """What came of a comparison.

    Attributes:
        word: "equal", "refused", "WRONG" or "CRASH".
        detail: The relative error, or what was said.
    """

    word: str
    detail: str


def outcome(found: Callable[[], float], most: float) -> Outcome:
    """Return whether a result is equal, refused with a sentence of this package or neither."""
    try:
        off = found()
    except Exception as failure:  # noqa: BLE001 # any is a finding
        said = str(failure)
        refused = isinstance(failure, ValueError | TypeError | RuntimeError) and SENTENCE.match(
            said
        )
        return (
            Outcome("refused", said)
            if refused
            else Outcome("CRASH", f"{type(failure).__name__}: {said!r}")
        )
    return Outcome("equal" if off <= most else "WRONG", f"{off:.0e}")


def cell(found: Callable[[], float], most: float) -> str:
    """Return the outcome as the cell of a table."""
    word, detail = outcome(found, most)
    return word if word in ("equal", "refused") else f"{word} {detail[:90]}"


def write_between(mark: str, text: str) -> None:
    """Write what a sweep found between its two markers in docs/quality.md."""
    start, end = f"<!-- {mark}: start -->", f"<!-- {mark}: end -->"
    before, rest = PAGE.read_text().split(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")
