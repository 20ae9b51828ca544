"""Adapted parameters and the way to them, against gradient descent written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.networks import build, leaves, make_episodes, plain_loss
from lightning_maml.core.params import Params
from lightning_maml.functional.adaptation import Loss, adaptation_curve, adapted_parameters
from lightning_maml.networks.functional_network import FunctionalNetwork

RATES = [0.3, 0.2, 0.1]
TASKS = 7


def of_threads(tasks: str) -> Loss:
    """A loss that several threads may call at once, as ``plain_loss`` may not be."""
    functional = FunctionalNetwork(build("mlp"), vectorised=tasks == "vmap")
    return lambda w, x, y: F.cross_entropy(functional(w, x), y)


def descended(w: Params, x: Tensor, y: Tensor, steps: int) -> Params:
    loss = plain_loss(build("mlp"))
    for rate in RATES[:steps]:
        gradient = torch.autograd.grad(loss(w, x, y), list(w.values()))
        w = {
            name: (p - rate * g).detach().requires_grad_()
            for (name, p), g in zip(w.items(), gradient, strict=True)
        }
    return w


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(
    ("tasks", "chunk_size"),
    [("loop", None), ("loop", 3), ("threads", 3), ("vmap", None), ("vmap", 3), ("vmap", 2)],
)
def test_adapted_parameters_are_those_of_gradient_descent(
    steps: int, tasks: Any, chunk_size: int | None
) -> None:
    network, episodes = build("mlp"), make_episodes(TASKS)
    rates = [
        dict.fromkeys(dict(network.named_parameters()), rate) for rate in RATES[: max(steps, 1)]
    ]
    adapted = adapted_parameters(
        of_threads(tasks),
        leaves(network),
        *episodes[:2],
        inner_lr=rates,
        steps=steps,
        tasks=tasks,
        chunk_size=chunk_size,
    )
    for t in range(TASKS):
        expected = descended(leaves(network), episodes.support_x[t], episodes.support_y[t], steps)
        for name, tensor in expected.items():
            torch.testing.assert_close(adapted[name][t], tensor.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("tasks", "chunk_size"), [("loop", None), ("threads", 3), ("vmap", None), ("vmap", 3)]
)
def test_the_curve_is_the_query_loss_along_gradient_descent(
    tasks: Any, chunk_size: int | None
) -> None:
    network, episodes = build("mlp"), make_episodes(TASKS)
    rates = [dict.fromkeys(dict(network.named_parameters()), rate) for rate in RATES]
    curve = adaptation_curve(
        of_threads(tasks),
        leaves(network),
        episodes,
        inner_lr=rates,
        steps=3,
        tasks=tasks,
        chunk_size=chunk_size,
    )
    for t, (s_x, s_y, q_x, q_y) in enumerate(zip(*episodes, strict=True)):
        for step in range(4):
            expected = plain_loss(network)(descended(leaves(network), s_x, s_y, step), q_x, q_y)
            torch.testing.assert_close(
                curve.loss[t, step], expected.detach(), rtol=1e-11, atol=1e-13
            )


def test_parameters_without_a_rate_are_not_returned_and_stay() -> None:
    network, episodes = build("mlp"), make_episodes(2)
    name = [*dict(network.named_parameters())][-1]
    arguments = {"inner_lr": {name: 0.5}, "steps": 2}
    adapted = adapted_parameters(plain_loss(network), leaves(network), *episodes[:2], **arguments)
    assert [*adapted] == [name]
    w, loss = leaves(network), plain_loss(network)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(
            loss(w, episodes.support_x[1], episodes.support_y[1]), [w[name]]
        )
        w |= {name: (w[name] - 0.5 * gradient).detach().requires_grad_()}
    torch.testing.assert_close(adapted[name][1], w[name].detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_chunk_size_limits_the_tasks_adapted_at_once(chunk_size: int | None) -> None:
    network, episodes = build("mlp"), make_episodes(TASKS)
    calls, loss = [], plain_loss(network)

    def counted(params: Params, x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return loss(params, x, y)

    arguments = {"inner_lr": 0.1, "steps": 2, "tasks": "vmap", "chunk_size": chunk_size}
    adapted_parameters(counted, leaves(network), *episodes[:2], **arguments)
    chunks = -(-TASKS // (chunk_size or TASKS))
    assert len(calls) == 2 * chunks
    calls.clear()
    adaptation_curve(counted, leaves(network), episodes, **arguments)
    assert len(calls) == (2 + 3) * chunks


def test_one_by_one_is_the_default() -> None:
    network, episodes, calls = build("mlp"), make_episodes(TASKS), []
    loss = plain_loss(network)

    def counted(params: Params, x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return loss(params, x, y)

    adapted_parameters(counted, leaves(network), *episodes[:2], inner_lr=0.1, steps=1)
    assert len(calls) == TASKS


def test_rates_of_no_more_steps_than_there_are_serve() -> None:
    network, episodes = build("mlp"), make_episodes(2)
    rates = [dict.fromkeys(dict(network.named_parameters()), 0.1)]
    adapted_parameters(plain_loss(network), leaves(network), *episodes[:2], inner_lr=rates, steps=0)
