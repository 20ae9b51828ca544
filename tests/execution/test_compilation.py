"""Compiled meta-gradients equal eager ones, in every curvature.

Programs that would be wrong are refused.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import RATE, autograd_meta_gradient, build, make_episodes, relative_error
from lightning_maml import ANIL, FOMAML, HFMAML, LSLR, MAML, Episodes, InnerAdam, Reptile


def test_a_compiled_gradient_is_autograds() -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    compiled = MAML(network, RATE, 2, compiled=True).meta_gradient(episodes)
    assert (
        relative_error(compiled, autograd_meta_gradient(network, episodes, 2, F.cross_entropy))
        < 1e-12
    )


@pytest.mark.parametrize(
    ("algorithm", "bound"),
    [
        (HFMAML, 1e-7),
        *(
            pytest.param(algorithm, 1e-12, marks=pytest.mark.slow)
            for algorithm in (FOMAML, ANIL, LSLR)
        ),
    ],
)
def test_every_algorithm_compiles(algorithm: type[MAML], bound: float) -> None:
    network, episodes = build("mlp"), make_episodes(tasks=4)
    plain = algorithm(network, RATE, 2, tasks="loop")
    compiled = algorithm(copy.deepcopy(network), RATE, 2, compiled=True, chunk_size=2)
    for model in (plain, compiled):
        model.meta_loss(episodes).backward()
    gradients = [
        {name: p.grad for name, p in model.named_parameters()} for model in (plain, compiled)
    ]
    assert relative_error(*gradients) < bound


def test_inner_optimizers_compile() -> None:
    network, episodes = build("mlp"), make_episodes()
    settings = {"train_steps": 2, "inner_optimizer": InnerAdam(eps=1e-3)}
    compiled = MAML(network, RATE, compiled=True, **settings).meta_gradient(episodes)
    plain = MAML(network, RATE, **settings).meta_gradient(episodes)
    assert relative_error(compiled, plain) < 1e-12


def test_a_program_is_made_once_for_each_kind_of_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = MAML(build("mlp"), RATE, compiled=True)
    plain = MAML(model.network, RATE)
    with caplog.at_level(logging.INFO):
        for seed in range(3):
            episodes = make_episodes(seed=seed)
            with torch.no_grad():
                next(model.network.parameters()).mul_(1.1)
            assert (
                relative_error(model.meta_gradient(episodes), plain.meta_gradient(episodes)) < 1e-12
            )
        assert caplog.text.count("Compiled the meta-gradient in") == 1
        model.meta_gradient(make_episodes(tasks=2))
        assert caplog.text.count("Compiled the meta-gradient in") == 2
        model.inner_lr = 2 * RATE
        plain.inner_lr = 2 * RATE
        assert relative_error(model.meta_gradient(episodes), plain.meta_gradient(episodes)) < 1e-12
        assert caplog.text.count("Compiled the meta-gradient in") == 3
    assert not copy.deepcopy(model)._compiler._programs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reptile(build("mlp"), RATE, compiled=True), "Reptile"),
        (lambda: MAML(build("mlp"), RATE, tasks="threads", compiled=True), "'threads'"),
        (lambda: MAML(build("mlp"), RATE, tasks="loop", compiled=True), "'loop'"),
        (
            lambda: MAML(build("conv_batch_norm"), RATE, batch_norm="per_step", compiled=True),
            "per_step",
        ),
        (
            lambda: MAML(nn.Sequential(build("mlp"), nn.Dropout(0.1)), RATE, compiled=True),
            "random numbers",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"with `compiled=True` but got .*{message}"):
        make()


class Difference(nn.Module):
    """Has two inputs, which it tells apart by name or by place."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build("mlp")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a - b / 3)


class Pair(tuple):
    """A tuple of one's own, which torch's trees count as a leaf."""


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    "trees",
    [
        [lambda a, b: {"a": a, "b": b}, lambda a, b: {"b": b, "a": a}],
        [lambda a, b: Pair((a, b)), lambda a, b: Pair((b, a))],
    ],
)
def test_inputs_in_another_order_are_not_mixed_up(trees: list) -> None:
    model = MAML(Difference(), RATE, compiled=True)
    plain = MAML(model.network, RATE, tasks="loop")
    support_x, support_y, query_x, query_y = make_episodes()
    for tree in trees:
        episodes = Episodes(
            tree(support_x, support_x.flip(1)), support_y, tree(query_x, query_x.flip(1)), query_y
        )
        assert relative_error(model.meta_gradient(episodes), plain.meta_gradient(episodes)) < 1e-12


class Noisy(nn.Module):
    """Random in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build("mlp")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + torch.randn_like(x))


def test_a_network_that_draws_in_its_own_way_is_refused() -> None:
    with pytest.raises(ValueError, match="draw no random numbers with `compiled=True`"):
        MAML(Noisy(), RATE, compiled=True).meta_loss(make_episodes())


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is right elsewhere; here it counts what is traced and when."""
    monkeypatch.setattr(torch, "compile", lambda program: program)


@pytest.mark.usefixtures("traced_only")
def test_a_program_is_not_used_for_another_network_loss_or_tensor() -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    network[1].eval()
    model, plain = (
        MAML(network, RATE, batch_norm="running", **given)
        for given in ({"compiled": True}, {"tasks": "loop"})
    )

    def is_right() -> None:
        assert relative_error(model.meta_gradient(episodes), plain.meta_gradient(episodes)) < 1e-12

    is_right()
    network[2] = nn.Tanh()
    is_right()
    network[1].running_mean = torch.full_like(network[1].running_mean, 0.3)
    is_right()
    network[1].running_mean.add_(0.3)  # in place: the program has the same tensor
    is_right()
    model.loss = plain.loss = nn.CrossEntropyLoss(label_smoothing=0.3)
    is_right()
    network.load_state_dict(
        {name: tensor * 1.1 for name, tensor in network.state_dict().items()}, assign=True
    )
    is_right()
    assert len(model._compiler._programs) == 5


@pytest.mark.usefixtures("traced_only")
def test_finite_differences_stay_out_of_autocast() -> None:
    network, episodes = build("mlp").float(), make_episodes()
    episodes = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    of_float32 = HFMAML(network, RATE).meta_gradient(episodes)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = [
            HFMAML(network, RATE, compiled=compiled).meta_gradient(episodes)
            for compiled in (False, True)
        ]
    errors = [relative_error(gradient, of_float32) for gradient in gradients]
    assert errors[1] < 2 * errors[0]
