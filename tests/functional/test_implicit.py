"""iMAML's meta-gradient against autograd through the inner loop, and a dense solve.

The inner loop goes the whole way to the minimum.
"""

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import IMAML, MLP, Episodes, ResampledEpisodes
from lightning_maml.core.params import Params
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.functional.implicit import implicit_gradient, proximal, solve_implicitly
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.head_body import adapting

STRENGTH, RATE, UNTIL_CONVERGED = 2.0, 0.1, 200


def task_loss(
    functional: FunctionalNetwork, params: Params, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = functional(params, x)
    return F.cross_entropy(outputs, y), outputs


def gradient_of(
    network_name: str, part: str = "all", steps: int = UNTIL_CONVERGED, **arguments
) -> tuple[Params, Params]:
    """The meta-gradient, and the parameters that adapt."""
    network = build(network_name)
    functional = FunctionalNetwork(
        network, vectorised=are_stacked(arguments.get("tasks", "loop"), arguments.get("chunk_size"))
    )
    anchor = {name: p.detach() for name, p in adapting(network, part).items()}
    loss = proximal(partial(task_loss, functional), anchor, STRENGTH)
    chosen = {
        "inner_lr": dict.fromkeys(anchor, RATE),
        "steps": steps,
        "strength": STRENGTH,
        "cg_steps": 60,
    } | arguments
    query_loss = lambda params, task: task_loss(functional, params, task.query_x, task.query_y)
    return implicit_gradient(
        loss, functional.params, make_episodes(), query_loss=query_loss, has_aux=True, **chosen
    ).grad, anchor


@pytest.mark.parametrize("part", ["all", "head", "body"])
@pytest.mark.parametrize("network_name", ["mlp", "conv_batch_norm"])
def test_gradient_equals_autograd_through_the_inner_loop_to_the_minimum(
    network_name: str, part: str
) -> None:
    gradient, anchor = gradient_of(network_name, part)
    w, plain, episodes = (
        leaves(build(network_name)),
        plain_loss(build(network_name)),
        make_episodes(),
    )
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        here = {name: p.view_as(p) for name, p in w.items()}
        for _ in range(UNTIL_CONVERGED):
            value = plain(here, support_x, support_y) + STRENGTH / 2 * sum(
                ((here[name] - w[name]) ** 2).sum() for name in anchor
            )
            step = torch.autograd.grad(value, [here[name] for name in anchor], create_graph=True)
            here = here | {
                name: here[name] - RATE * g for name, g in zip(anchor, step, strict=True)
            }
        total = total + plain(here, query_x, query_y) / len(episodes.support_x)
    expected = dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))
    assert relative_error(gradient, expected) < 1e-9


def test_few_steps_of_conjugate_gradients_near_the_dense_solve() -> None:
    """(I + H / lambda)^-1 v, at a point that is no minimum."""
    network = build("mlp")
    w, loss, episodes = leaves(network), plain_loss(build("mlp")), make_episodes(tasks=1)
    sizes = {name: p.numel() for name, p in w.items()}

    def of_vector(vector: Tensor) -> Tensor:
        pieces = dict(zip(sizes, vector.split(list(sizes.values())), strict=True))
        return loss(
            {name: piece.view_as(w[name]) for name, piece in pieces.items()},
            episodes.support_x[0],
            episodes.support_y[0],
        )

    vector = torch.cat([p.detach().flatten() for p in w.values()])
    H = torch.func.hessian(of_vector)(vector)
    v = {
        name: drawn_on_cpu(
            torch.randn, p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        for name, p in w.items()
    }
    as_vector = torch.cat([tensor.flatten() for tensor in v.values()])
    eye = torch.eye(len(vector), dtype=torch.float64)
    expected = torch.linalg.solve(eye + H / STRENGTH, as_vector)

    def curved(p: Params) -> Params:
        product = (H + STRENGTH * eye) @ torch.cat([tensor.flatten() for tensor in p.values()])
        return {
            name: piece.view_as(w[name])
            for (name, piece) in zip(sizes, product.split(list(sizes.values())), strict=True)
        }

    errors = []
    for cg_steps in (0, 2, 5, 60):
        found = solve_implicitly(v, curved, list(v), STRENGTH, cg_steps)
        errors.append(
            float(
                (torch.cat([tensor.flatten() for tensor in found.values()]) - expected).norm()
                / expected.norm()
            )
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * errors[0]
    assert errors[3] < 1e-12


def test_curvature_that_is_not_positive_ends_the_solve() -> None:
    v = {"a": torch.tensor([1.0, 2.0])}
    concave = solve_implicitly(v, lambda p: {"a": -p["a"]}, ["a"], STRENGTH, 5)
    torch.testing.assert_close(concave, v)
    none = solve_implicitly({"a": torch.zeros(2)}, lambda p: p, ["a"], STRENGTH, 5)
    assert not none["a"].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"tasks": "vmap"},
        {"tasks": "vmap", "chunk_size": 2},
        {"tasks": "threads"},
        {"tasks": "threads", "chunk_size": 2},
    ],
)
def test_all_ways_to_run_tasks_agree(arguments: dict) -> None:
    of = partial(gradient_of, "conv_batch_norm", steps=20)
    assert relative_error(of(**arguments)[0], of()[0]) < 1e-10


def test_finite_differences_and_first_order() -> None:
    of = partial(gradient_of, "conv_batch_norm", steps=20)
    exact = of()[0]
    assert relative_error(of(curvature="finite_difference")[0], exact) < 1e-7
    first_order = of(curvature="none")[0]
    assert relative_error(first_order, exact) > 0.01
    assert relative_error(of(cg_steps=0)[0], first_order) == 0


@pytest.mark.parametrize("batch_norm", ["batch", "support"])
def test_the_module_trains_by_it_and_adapts_with_the_proximal_term(
    tmp_path: Path, batch_norm: str
) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = IMAML(
        network,
        RATE,
        20,
        proximal_strength=STRENGTH,
        cg_steps=60,
        batch_norm=batch_norm,
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    expected = model.meta_gradient(episodes)
    if batch_norm == "batch":
        assert relative_error(expected, gradient_of("conv_batch_norm", steps=20)[0]) < 1e-12
    here, plain = leaves(build("conv_batch_norm")), plain_loss(build("conv_batch_norm"))
    for _ in range(20):
        value = plain(here, episodes.support_x[0], episodes.support_y[0])
        value = value + STRENGTH / 2 * sum(
            ((here[name] - before[name]) ** 2).sum() for name in here
        )
        gradient = torch.autograd.grad(value, list(here.values()))
        here = {
            name: (p - RATE * g).detach().requires_grad_()
            for (name, p), g in zip(here.items(), gradient, strict=True)
        }
    adapted = model.adapt(episodes.support_x[0], episodes.support_y[0])
    assert relative_error(dict(adapted.named_parameters()), here) < 1e-12
    losses = model.evaluate(episodes).loss
    trainer(tmp_path).fit(model, DataLoader([episodes], batch_size=None))
    moved = {name: before[name] - p for name, p in network.named_parameters()}
    assert relative_error(moved, expected) < 1e-12
    assert losses.shape == (3, 21)


def test_a_curvature_that_is_asked_for_is_the_implicit_gradients() -> None:
    model, episodes = IMAML(build("mlp"), RATE, UNTIL_CONVERGED, cg_steps=30), make_episodes()
    for curvature in ("exact", "finite_difference"):
        assert (
            relative_error(model.meta_gradient(episodes, curvature), model.meta_gradient(episodes))
            < 1e-7
        )
    with pytest.raises(
        ValueError,
        match="Expected MAML, FOMAML or HFMAML, which the theory is about, but got IMAML",
    ):
        model.probe(episodes)


def test_no_point_of_the_way_is_kept() -> None:
    points: list[weakref.ref[Tensor]] = []
    most = []

    def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        points.append(weakref.ref(params["3.bias"]))
        most.append(sum(point() is not None for point in points))
        return plain_loss(build("mlp"))(params, x, y), y

    implicit_gradient(
        loss,
        leaves(build("mlp")),
        make_episodes(1),
        inner_lr=0.1,
        steps=30,
        strength=STRENGTH,
        cg_steps=0,
        has_aux=True,
    )
    assert max(most) < 10


def test_reported_query_losses_have_no_proximal_term() -> None:
    model, episodes = IMAML(build("mlp"), RATE, 3, proximal_strength=STRENGTH), make_episodes()
    outputs = model.evaluate(episodes).aux
    expected = torch.stack([F.cross_entropy(outputs[t, -1], episodes.query_y[t]) for t in range(3)])
    torch.testing.assert_close(model.evaluate(episodes).loss[:, -1], expected)


def test_what_does_not_fit_is_refused() -> None:
    episodes = make_episodes()
    resampled = ResampledEpisodes(*(tensor[:, None] for tensor in episodes[:2] * 2), *episodes[2:])
    with pytest.raises(TypeError, match="whose one support set has a minimum"):
        IMAML(build("mlp"), train_steps=1).meta_loss(resampled)
    for arguments, message in (
        ({"train_steps": 0}, "Expected `train_steps` to be at least 1"),
        (
            {"proximal_strength": 0.0},
            "Expected `proximal_strength` to be a finite number above 0 but got 0.0",
        ),
        ({"cg_steps": -1}, "Expected `cg_steps` to be at least 0 but got -1"),
        ({"inner_rates": "per_layer"}, "'fixed' with IMAML, which cannot learn them"),
    ):
        with pytest.raises(ValueError, match=message):
            IMAML(build("mlp"), **arguments)
    with pytest.raises(ValueError, match="Expected `steps` to be at least 1"):
        gradient_of("mlp", steps=0)


def test_a_layer_whose_rate_is_0_stays_as_it_is() -> None:
    network, episodes = build("mlp"), make_episodes()
    settings = {"train_steps": 20, "proximal_strength": 0.5, "cg_steps": 9}
    still = IMAML(network, inner_lr={"1": 0.0, "3": 0.2}, **settings)
    head = IMAML(network, inner_lr=0.2, adapt="head", **settings)
    assert relative_error(still.meta_gradient(episodes), head.meta_gradient(episodes)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_a_solve_that_has_converged_ends(seed: int) -> None:
    """In float32 the squared remainder is 0 then."""
    torch.manual_seed(seed)
    x, y = torch.rand(4, 6, 4), torch.arange(3).repeat(4, 2)
    model = IMAML(MLP(4, 3, [16]), 0.1, 20, proximal_strength=10.0, cg_steps=30)
    gradient = model.meta_gradient(Episodes(x, y, x, y))
    assert all(tensor.isfinite().all() for tensor in gradient.values())
