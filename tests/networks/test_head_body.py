"""Which parameters adapt, and the named algorithms that differ in it or learn their inner rates,
under real trainers."""

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from helpers.networks import (
    IMAGE,
    WAYS,
    build,
    flat,
    leaves,
    make_episodes,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import (
    ANIL,
    BOIL,
    FOMAML,
    HFMAML,
    LSLR,
    MAML,
    MLP,
    AdaptiveMetaStepsize,
    Conv4,
    MetaSGD,
    ResNet12,
)
from lightning_maml.core.params import Params
from lightning_maml.networks.head_body import adapting

STEPS, RATE = 2, 0.3


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (Conv4(1, 5, 28), "head"),
        (ResNet12(3, 5, widths=(4, 4)), "head"),
        (MLP(4, 2), "layers.5"),
        (resnet18(num_classes=5), "fc"),
        (build("conv_batch_norm"), "5"),
    ],
)
def test_the_head_is_the_last_layer(network: nn.Module, head: str) -> None:
    names = [name for name, _ in network.named_parameters()]
    of_head = [f"{head}.weight", f"{head}.bias"]
    assert list(adapting(network, "head")) == of_head
    assert list(adapting(network, "body")) == [name for name in names if name not in of_head]
    assert list(adapting(network, "all")) == names


def test_the_head_may_be_named_and_frozen_parameters_adapt_in_no_part() -> None:
    network = Conv4(1, 5, 28)
    assert list(adapting(network, "head", "features.3")) == [
        name for name, _ in network.named_parameters() if name.startswith("features.3.")
    ]
    network.head.bias.requires_grad_(False)
    assert list(adapting(network, "head")) == ["head.weight"]
    assert not {"head.weight", "head.bias"} & adapting(network, "body").keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapt": "tail"}, "Expected `adapt` to be 'all', 'head', 'body' or a list .* 'tail'"),
        (
            {"adapt": "head", "head": "fc"},
            "has some of the trainable parameters, but not all, but got 'fc'",
        ),
        (
            {"adapt": "body", "head": "layers"},
            "has some of the trainable parameters, but not all, but got 'layers'",
        ),
        (
            {"inner_rates": "per_step"},
            "Expected `inner_rates` to be 'fixed', 'per_layer', .* but got 'per_step'",
        ),
    ],
)
def test_parts_and_rates_that_do_not_exist_are_refused(
    arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MAML(MLP(4, 2), **arguments)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.body.weight


def test_networks_that_cannot_be_parted_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"share no parameters but \['body.weight'\] are in the head 'head' too; use "
        "adapt='all'",
    ):
        ANIL(Tied())
    with pytest.raises(ValueError, match="with one alone there is no other part than 'all'"):
        BOIL(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="trainable parameters but all of them are frozen"):
        MAML(build("mlp").requires_grad_(False))


@pytest.mark.parametrize(
    ("algorithm", "of_head"),
    [
        (ANIL, MAML),
        (partial(HFMAML, adapt="head"), HFMAML),
        (partial(FOMAML, adapt="head"), FOMAML),
        (MAML, MAML),
    ],
)
def test_a_head_on_a_frozen_body_is_all_that_trains(algorithm, of_head: type[MAML]) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    network[:-1].requires_grad_(False)
    alone = copy.deepcopy(network[-1])
    algorithm(network, inner_lr=RATE, train_steps=STEPS).meta_loss(episodes).backward()
    with torch.no_grad():
        features = [
            torch.stack([network[:-1].train()(x) for x in xs])
            for xs in (episodes.support_x, episodes.query_x)
        ]
    of_head(alone, inner_lr=RATE, train_steps=STEPS).meta_loss(
        episodes._replace(support_x=features[0], query_x=features[1])
    ).backward()
    torch.testing.assert_close(network[-1].weight.grad, alone.weight.grad, rtol=1e-6, atol=1e-12)
    assert all(p.grad is None for p in network[:-1].parameters())


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.body = (
            nn.Linear(6, WAYS),
            nn.Sequential(nn.Flatten(), nn.Linear(IMAGE**2, 6)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


@pytest.mark.parametrize("algorithm", [ANIL, BOIL])
def test_a_head_that_is_not_the_end_is_warned_of_unless_it_is_named(algorithm: type[MAML]) -> None:
    with pytest.warns(
        UserWarning,
        match=r"'body.1', is taken for the network's head, but what it gives are not the network's "
        "outputs",
    ):
        algorithm(HeadFirst().double()).meta_loss(make_episodes())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The last layer")
        algorithm(HeadFirst().double(), head="classifier").meta_loss(make_episodes())
        MAML(HeadFirst().double(), adapt=["classifier"]).meta_loss(make_episodes())
        algorithm(build("mlp")).meta_loss(make_episodes())


@pytest.mark.parametrize(("saved", "loaded"), [(MAML, ANIL), (ANIL, BOIL), (BOIL, MAML)])
def test_a_checkpoint_of_another_algorithm_does_not_change_the_class(
    tmp_path: Path, saved: type[MAML], loaded: type[MAML]
) -> None:
    run = trainer(tmp_path)
    run.fit(saved(build("mlp"), RATE, STEPS), DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(tmp_path / "last.ckpt")
    model = loaded.load_from_checkpoint(tmp_path / "last.ckpt", network=build("mlp", seed=5))
    assert model.adapted_part == loaded.default_adapt
    assert model.train_steps == STEPS


def test_learned_rates_without_a_training_step_serve_testing() -> None:
    model = LSLR(build("mlp"), inner_lr=RATE, train_steps=0, test_steps=2)
    expected = MAML(build("mlp"), inner_lr=RATE, test_steps=2).evaluate(make_episodes()).loss
    torch.testing.assert_close(model.evaluate(make_episodes()).loss, expected, rtol=1e-6, atol=0)


def test_parameters_may_be_frozen_later_but_not_unfrozen() -> None:
    network, episodes = build("mlp"), make_episodes()
    model = LSLR(network, inner_lr=RATE, train_steps=STEPS).double()
    network[1].requires_grad_(False)
    model.meta_loss(episodes).backward()
    assert [rate.grad is None for rate in model.learned_rates.values] == [True, True, False, False]
    model = LSLR(network, inner_lr=RATE, train_steps=STEPS)
    network[1].requires_grad_(True)
    with pytest.raises(
        ValueError,
        match=r"rate for each parameter that adapts but \['1.weight', '1.bias'\] have none; "
        "unfreeze them before",
    ):
        model.meta_loss(episodes)


def of_rates(model: MAML) -> list[torch.Tensor]:
    return (
        []
        if model.learned_rates is None
        else [rate.detach().clone() for rate in model.learned_rates.parameters()]
    )


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (ANIL, {}),
        (BOIL, {}),
        (MAML, {"inner_rates": "per_layer"}),
        (LSLR, {}),
        (MetaSGD, {}),
        (LSLR, {"adapt": "head"}),
        (LSLR, {"adapt": ["0", "*.bias"]}),
        (MetaSGD, {"adapt": ["*.weight"]}),
        (ANIL, {"inner_rates": "per_parameter"}),
    ],
)
def test_one_sgd_step_is_autograd_through_the_unrolled_loop(
    tmp_path: Path, algorithm: type[MAML], arguments: dict[str, str]
) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    model = algorithm(
        network,
        inner_lr=RATE,
        train_steps=STEPS,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        **arguments,
    )
    w = leaves(network)
    rates = [rate.double().requires_grad_() for rate in of_rates(model)]
    names = list(adapting(network, model.adapted_part))
    each = [[rate[step] if algorithm is LSLR else rate for rate in rates] for step in range(STEPS)]
    steps = [dict(zip(names, of_step or [RATE] * len(names), strict=True)) for of_step in each]
    value = unrolled(plain_loss(build("conv_batch_norm")), w, episodes, steps, STEPS)
    expected = torch.autograd.grad(value, [*w.values(), *rates])

    trainer(tmp_path).fit(model, DataLoader([episodes], batch_size=None))
    moved: Params = {name: w[name].detach() - p for name, p in network.named_parameters()}
    assert relative_error(moved, dict(zip(w, expected, strict=False))) < 1e-12
    moved_rates = [before - after for before, after in zip(rates, of_rates(model), strict=True)]
    torch.testing.assert_close(moved_rates, list(expected[len(w) :]), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("base", [MAML, FOMAML, HFMAML])
@pytest.mark.parametrize(
    "arguments", [{"adapt": "head"}, {"adapt": "body"}, {"inner_rates": "per_parameter"}]
)
@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_every_curvature_and_execution_trains_and_tests(
    tmp_path: Path, base: type[MAML], arguments: dict[str, str], tasks: str
) -> None:
    model = base(
        build("conv_batch_norm"),
        inner_lr=RATE,
        train_steps=STEPS,
        test_steps=STEPS + 2,
        tasks=tasks,
        **arguments,
    )
    watched = {"network.0.weight", "network.5.weight"} | (
        {"learned_rates.values.0", "learned_rates.values.5"}
        if "inner_rates" in arguments
        else set()
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in watched}
    data = DataLoader([make_episodes(seed=k) for k in range(2)], batch_size=None)
    run = trainer(tmp_path)
    run.fit(model, data)
    assert [name for name in watched if torch.equal(before[name], model.get_parameter(name))] == []
    run.test(model, data, verbose=False)
    assert len(model.adaptation.mean) == STEPS + 3


def test_what_does_not_adapt_has_no_inner_rate_and_stays() -> None:
    model = ANIL(
        build("conv_batch_norm"), inner_lr=RATE, inner_rates="per_layer_and_step", train_steps=3
    )
    assert [tuple(rate.shape) for rate in model.learned_rates.parameters()] == [(3,), (3,)]


def test_learned_rates_are_in_the_checkpoint(tmp_path: Path) -> None:
    model = LSLR(build("mlp"), inner_lr=RATE, train_steps=STEPS)
    data = DataLoader([make_episodes()], batch_size=None)
    run = trainer(tmp_path)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = LSLR.load_from_checkpoint(
        tmp_path / "last.ckpt", network=build("mlp", seed=5), weights_only=True
    ).double()
    assert flat(dict(again.named_parameters())).allclose(
        flat(dict(model.named_parameters())), rtol=1e-6
    )
    assert all((rate != RATE).all() for rate in again.learned_rates.parameters())


def test_the_theory_is_of_one_rate_for_all_parameters(tmp_path: Path) -> None:
    for model in (
        ANIL(build("mlp"), optimizer=partial(torch.optim.SGD, lr=0.1)),
        MetaSGD(build("mlp")),
    ):
        with pytest.raises(ValueError, match="Expected one fixed inner rate for all parameters"):
            model.probe(make_episodes())
        run = trainer(tmp_path, callbacks=[AdaptiveMetaStepsize(episodes=[make_episodes()])])
        with pytest.raises(ValueError, match="Expected one fixed inner rate for all parameters"):
            run.fit(model, DataLoader([make_episodes()], batch_size=None))
        assert run.fit_loop.epoch_loop.batch_progress.total.ready == 0, "no step was taken"


def test_averages_of_steps_have_no_constants_in_evaluation() -> None:
    model = MAML(build("conv_batch_norm"), batch_norm="per_step").double()
    assert model.probe(make_episodes()).gradient_norms().isfinite().all()
    with pytest.raises(
        ValueError,
        match="Expected one loss for all inner steps but got batch_norm='per_step' in evaluation "
        "mode",
    ):
        model.eval().probe(make_episodes())


def scaled(layer: nn.Module) -> nn.Module:
    """A layer whose weight is parametrised by a module that is parametrised itself."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            weight_norm(self.scale)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * (1 + self.scale.weight.squeeze())

    register_parametrization(layer, "weight", Scale())
    return layer


def with_both(layer: nn.Module) -> nn.Module:
    weight_norm(layer, "bias", dim=None)
    return weight_norm(layer)


@pytest.mark.parametrize(
    "parametrized", [weight_norm, spectral_norm, orthogonal, scaled, with_both]
)
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_a_head_adapts_as_a_whole_whatever_its_parametrisations(parametrized, tasks: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(IMAGE**2, 6), nn.Tanh(), parametrized(nn.Linear(6, WAYS))
    )
    network = network.double()
    if parametrized is spectral_norm:
        network.eval()  # its power iteration would change what the next pass sees
    of_head = [name for name, _ in network.named_parameters() if name.startswith("3.")]
    model, episodes = ANIL(network, RATE, STEPS, tasks=tasks), make_episodes()
    assert sorted(model._adapting_parameters()) == sorted(of_head)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The last layer with trainable")
        gradient = model.meta_gradient(episodes)
    w = leaves(network)
    rates = [dict.fromkeys(of_head, RATE)] * STEPS
    loss = unrolled(plain_loss(network), w, episodes, rates, STEPS)
    exact = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    assert relative_error(gradient, exact) < 1e-10


def test_a_module_that_is_only_called_parametrizations_is_a_layer_like_any_other() -> None:
    parametrizations = nn.ModuleDict({"weight": nn.Linear(4, 2)})
    network = nn.ModuleDict({"body": nn.Linear(4, 4), "parametrizations": parametrizations})
    of_head = ["parametrizations.weight.weight", "parametrizations.weight.bias"]
    assert list(adapting(network, "head")) == of_head


@pytest.mark.parametrize(
    ("algorithm", "part", "other"),
    [(ANIL, "head", "body"), (ANIL, "head", "all"), (BOIL, "body", "all")],
)
def test_named_algorithms_adapt_no_other_part(algorithm: type[MAML], part: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"to be '{part}' or names of .* got '{other}'; .* MAML"):
        algorithm(build("mlp"), adapt=other)
    assert algorithm(build("mlp"), adapt=part).adapted_part == part
    assert algorithm(build("mlp"), adapt=["*.bias"]).adapted_part == ["*.bias"]


class Counting(nn.Linear):
    """A head that keeps count of its calls, in a number or in a list, and reads it."""

    def __init__(self, place: str) -> None:
        super().__init__(8, WAYS)
        self.place, self.calls, self.inputs = place, 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.inputs.append(x)
        calls = self.calls if self.place == "number" else len(self.inputs)
        return super().forward(x) / calls


@pytest.mark.parametrize("place", ["number", "list"])
def test_what_a_head_remembers_is_not_for_the_next_step(place: str) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE**2, 8), nn.Tanh())
    network, episodes = nn.Sequential(body, Counting(place)).double(), make_episodes()
    found = ANIL(network, 0.1, 2, tasks="loop").meta_gradient(episodes)
    plain = nn.Sequential(*body, nn.Linear(8, WAYS)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), network.state_dict().values(), strict=True)))
    right = ANIL(plain, 0.1, 2, tasks="loop").meta_gradient(episodes)
    assert relative_error(dict(zip(right, found.values(), strict=True)), right) < 1e-12
