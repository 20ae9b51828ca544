"""Stacked tasks give what each of them gives alone, or they are not stacked."""

import copy
import random
from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.networks import build, make_episodes
from helpers.random_numbers import drawn_on_cpu
from lightning_maml import FOMAML, HFMAML, MAML, Episodes, ProtoNet
from lightning_maml.core.params import Params, norm, subtract
from lightning_maml.execution.auto import Execution
from lightning_maml.execution.compilation import _check_program
from lightning_maml.networks.kinks import weight_normed

RATE, STEPS = 0.2, 2


def unrolled(network: nn.Module, episodes: Episodes) -> Params:
    """The meta-gradient by autograd through the inner loop of one task after the other."""
    w_0 = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        w = w_0
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(loss, [*w.values()], create_graph=True)
            w = {name: p - RATE * g for (name, p), g in zip(w.items(), gradient, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, w, (query_x,)), query_y))
    return dict(
        zip(w_0, torch.autograd.grad(torch.stack(losses).mean(), [*w_0.values()]), strict=True)
    )


def difference(one: Params, other: Params) -> float:
    return float(norm(subtract(other, one)) / norm(one))


class Words(nn.Module):
    """Token ids to logits, with a padding row."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.head = nn.Linear(6, 3)
        self.functional = functional

    def forward(self, ids: Tensor) -> Tensor:
        embed = (
            partial(F.embedding, weight=self.embedding.weight, padding_idx=0)
            if self.functional
            else self.embedding
        )
        return self.head(torch.tanh(embed(ids).mean(1)))


def sentences(tasks: int = 5, padded: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    x = drawn_on_cpu(torch.randint, 1, 9, (tasks, 6, 7), generator=generator)
    for task in padded:
        x[task, :, 4:] = 0
    y = torch.arange(3).repeat(tasks, 2)
    return Episodes(x, y, x.flip(1), y)


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads"])
@pytest.mark.parametrize("algorithm", [MAML, HFMAML])
def test_sparse_gradients_of_embeddings_are_taken(tasks: str, algorithm: type[MAML]) -> None:
    torch.manual_seed(0)
    sparse, dense = (
        nn.Sequential(nn.Embedding(9, 6, sparse=flag), nn.Flatten(), nn.Linear(42, 3)).double()
        for flag in (True, False)
    )
    dense.load_state_dict(sparse.state_dict())
    episodes = sentences()
    assert (
        difference(
            unrolled(dense, episodes),
            algorithm(sparse, RATE, STEPS, tasks=tasks).meta_gradient(episodes),
        )
        < 1e-6
    )


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap", "threads"])
def test_the_padding_row_of_an_embedding_has_no_gradient_in_any_task(tasks: str) -> None:
    torch.manual_seed(0)
    network, episodes = Words().double(), sentences()
    model = MAML(network, RATE, STEPS, tasks=tasks)
    assert difference(unrolled(network, episodes), model.meta_gradient(episodes)) < 1e-12


def test_a_padded_embedding_as_a_function_is_not_stacked_even_without_padding_in_the_trial() -> (
    None
):
    torch.manual_seed(0)
    network, episodes = Words(functional=True).double(), sentences(padded=(2,))
    model = MAML(network, RATE, STEPS)
    assert difference(unrolled(network, episodes), model.meta_gradient(episodes)) < 1e-12
    with pytest.raises(
        ValueError, match="an embedding with `padding_idx` is wrong for stacked tasks"
    ):
        MAML(network, RATE, STEPS, tasks="vmap").meta_gradient(episodes)


class Reversed(nn.Module):
    """Turns gradients around, as in domain adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x.flatten(1)))
        if features.requires_grad:
            features.register_hook(lambda g: -g)
        return self.head(features)


class Clipped(Reversed):
    """Scales gradients to norm 1, over whatever the hook takes for the batch."""

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x.flatten(1)))
        if features.requires_grad:
            features.register_hook(lambda g: g / g.norm())
        return self.head(features)


def test_networks_with_hooks_on_tensors_give_the_gradients_of_the_unrolled_loop() -> None:
    torch.manual_seed(0)
    made, episodes = Reversed().double(), make_episodes(tasks=5)
    right = unrolled(made, episodes)
    assert difference(right, MAML(made, RATE, STEPS).meta_gradient(episodes)) < 1e-12
    assert difference(right, MAML(made, RATE, STEPS, tasks="loop").meta_gradient(episodes)) < 1e-12


@pytest.mark.parametrize(
    "asked",
    [
        {"tasks": "vmap"},
        {"chunk_size": 2},
        {"tasks": "threads", "chunk_size": 2},
        {"compiled": True},
    ],
)
def test_stacking_that_was_asked_for_is_refused_where_it_gives_other_numbers(
    asked: dict[str, object],
) -> None:
    torch.manual_seed(0)
    episodes = make_episodes(tasks=5)
    model = MAML(Clipped().double(), RATE, STEPS, **asked)
    uses: list[Callable[[], object]] = [
        lambda: model.meta_loss(episodes),
        lambda: model.evaluate(episodes),
    ]
    if asked == {"tasks": "vmap"}:
        uses.append(lambda: model.adapt(*episodes[:2]))
    for use in uses:
        with pytest.raises(
            ValueError,
            match=r"Expected a network and a loss whose tasks can be stacked .* use tasks='loop'",
        ):
            use()


def test_many_tasks_are_adapted_one_by_one_where_stacking_gives_other_numbers() -> None:
    torch.manual_seed(0)
    episodes = make_episodes(tasks=5)
    model = MAML(Clipped().double(), RATE, STEPS)
    of_many = model.adapt(*episodes[:2])(episodes.query_x)
    of_each = [model.adapt(x, y)(queries) for x, y, queries in zip(*episodes[:3], strict=True)]
    torch.testing.assert_close(of_many, torch.stack(of_each), rtol=0, atol=1e-12)


def test_prototypes_are_compared_too() -> None:
    torch.manual_seed(0)
    network, episodes = Clipped().double(), make_episodes(tasks=5)
    model = ProtoNet(network)
    model.meta_loss(episodes).backward()
    of_auto = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    ProtoNet(network, tasks="loop").meta_loss(episodes).backward()
    assert (
        difference(
            {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, of_auto
        )
        < 1e-12
    )
    with pytest.raises(
        ValueError, match="Expected a network and a loss whose tasks can be stacked"
    ):
        ProtoNet(network, tasks="vmap").meta_loss(episodes)


class LayerDrop(nn.Module):
    """Leaves a layer out at random, by a generator that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.first(x.flatten(1)))
        if self.draw() < 0.5:
            features = features + torch.tanh(self.second(features))
        return self.head(features)


def from_numpy() -> float:
    return np.random.rand()


@pytest.mark.parametrize("draw", [random.random, from_numpy])
@pytest.mark.parametrize("tasks", ["auto", "loop"])
def test_finite_differences_draw_the_same_numbers_from_numpy_and_python(
    draw: Callable[[], float], tasks: str
) -> None:
    def seeded() -> None:
        random.seed(3)
        np.random.seed(3)  # the global generator is what such networks draw from

    torch.manual_seed(0)
    network, episodes = LayerDrop(draw).double(), make_episodes(tasks=8)
    seeded()
    exact = MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)
    seeded()
    assert (
        difference(exact, HFMAML(network, RATE, STEPS, tasks=tasks).meta_gradient(episodes)) < 1e-6
    )
    with pytest.raises(
        ValueError, match=r"they draw random numbers from (numpy|python), which they would share"
    ):
        MAML(network, RATE, STEPS, tasks="vmap").meta_gradient(episodes)


class Noisy(nn.Module):
    """Draws noise, in a way that no list of layers knows, from its ``start``-th call on."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.head, self.calls, self.start = build("mlp"), count(), start

    def __deepcopy__(self, memo: dict[int, object]) -> "Noisy":
        copied = Noisy(self.start)
        copied.head, copied.calls = copy.deepcopy(self.head, memo), self.calls
        return copied.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.randn_like(x) if next(self.calls) >= self.start else x)


@pytest.mark.usefixtures("two_threads")
def test_random_networks_are_run_in_a_loop_where_threads_were_not_asked_for() -> None:
    large = Episodes(*(tensor.repeat_interleave(400, 1) for tensor in make_episodes(tasks=4)))
    model = MAML(Noisy().double(), RATE)
    assert model._execution(large) == Execution("loop", None)
    model.meta_loss(large)
    assert MAML(build("mlp"), RATE)._execution(large).tasks == "threads"
    with pytest.raises(
        RuntimeError,
        match="draw from torch, and threads share one random generator; use tasks='loop'",
    ):
        MAML(Noisy().double(), RATE, tasks="threads").meta_loss(large)


@pytest.mark.usefixtures("two_threads")
def test_a_network_that_begins_to_draw_later_is_run_in_a_loop_from_then_on() -> None:
    large = Episodes(*(tensor.repeat_interleave(400, 1) for tensor in make_episodes(tasks=4)))
    model = MAML(Noisy(start=40).double(), RATE)
    for _ in range(5):
        model.meta_loss(large)
    assert next(model.network.calls) > 40
    assert model._execution(large) == Execution("loop", None)


class OwnGenerator(nn.Module):
    """Draws from a generator that nobody else can set back."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.generator = build("mlp"), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.generator.random()


def test_a_network_with_a_random_generator_of_its_own_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="the same for the same inputs, parameters and random state but got another result",
    ):
        MAML(OwnGenerator(), RATE).meta_loss(make_episodes())


def test_a_program_that_gives_something_else_than_it_was_compiled_from_is_refused() -> None:
    w = torch.linspace(-1, 1, 5)
    _check_program(lambda w: [w.sin() * (1 + 1e-6)], lambda w: [w.sin()], [w])
    with pytest.raises(
        ValueError,
        match="the compiled meta-gradient to be what it was compiled from but it differs",
    ):
        _check_program(lambda w: [w.sin() * 1.1], lambda w: [w.sin()], [w])


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_layers_without_a_second_derivative_are_named_with_the_algorithms_that_need_none(
    tasks: str,
) -> None:
    network = nn.Sequential(build("mlp"), nn.Hardsigmoid(), nn.Linear(3, 3).double())
    episodes = make_episodes(tasks=5)
    with pytest.raises(
        ValueError,
        match=r"one of their operations has none \(.*hardsigmoid.*train with FOMAML or HFMAML",
    ):
        MAML(network, RATE, tasks=tasks).meta_loss(episodes)
    for algorithm in (FOMAML, HFMAML):
        algorithm(network, RATE, tasks=tasks).meta_loss(episodes).backward()


class Attention(nn.Module):
    """In evaluation mode and under ``vmap``, torch takes a way through attention that has no
    derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1).unflatten(1, (8, 8))
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


def test_attention_adapts_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    episodes = make_episodes(tasks=5)
    model = MAML(Attention().double(), RATE, STEPS).eval()
    curve = model.evaluate(episodes).aux[:, -1]
    of_many = model.adapt(*episodes[:2])(episodes.query_x)
    of_each = [model.adapt(x, y)(queries) for x, y, queries in zip(*episodes[:3], strict=True)]
    torch.testing.assert_close(curve, torch.stack(of_each), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_many, torch.stack(of_each), rtol=0, atol=1e-12)


def test_wrong_second_derivatives_of_weight_norm_are_warned_of_and_hfmaml_is_right() -> None:
    class WrittenOut(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.bias = nn.Parameter(layer.bias.detach().clone())
            self.g, self.v = (
                nn.Parameter(
                    getattr(layer.parametrizations.weight, f"original{k}").detach().clone()
                )
                for k in (0, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)

    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)).double()
    head, episodes = nn.Linear(8, 3).double(), make_episodes(tasks=5)
    right = unrolled(nn.Sequential(nn.Flatten(), WrittenOut(layer), nn.Tanh(), head), episodes)
    network = nn.Sequential(nn.Flatten(), layer, nn.Tanh(), head)
    found = HFMAML(network, RATE, STEPS).meta_gradient(episodes)
    names = {
        "1.v": "1.parametrizations.weight.original1",
        "1.g": "1.parametrizations.weight.original0",
    }
    assert difference(right, {name: found[names.get(name, name)] for name in right}) < 1e-6
    if weight_normed(network):  # until torch mends it
        with pytest.warns(
            UserWarning,
            match=r"Torch's second derivative of weight norm is wrong, .* through \['1'\]",
        ):
            MAML(network, RATE, STEPS).meta_gradient(episodes)
