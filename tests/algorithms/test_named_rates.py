"""Inner rates by the names of layers: the gradient of each algorithm, checkpoints and refusals."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error, unrolled
from helpers.trainers import trainer_in_double
from lightning_maml import (
    ANIL,
    BOIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Episodes,
    InnerAdam,
    MetaSGD,
    Reptile,
)
from lightning_maml.core.inner_rates import rates_by_name

# layers 1 and 3 of the mlp have parameters
RATES = {"1": 0.5, "3.weight": 0.1, "": 0.2}
OF_PARAMETERS = {"1.weight": 0.5, "1.bias": 0.5, "3.weight": 0.1, "3.bias": 0.2}
STEPS = 2


def by_autograd(rates: dict[str, float]) -> dict[str, torch.Tensor]:
    network, episodes = build("mlp"), make_episodes()
    w = leaves(network)
    objective = unrolled(plain_loss(network, F.cross_entropy), w, episodes, [rates] * STEPS, STEPS)
    return dict(zip(w, torch.autograd.grad(objective, [*w.values()]), strict=True))


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize(
    ("algorithm", "rates", "bound"),
    [
        (MAML, OF_PARAMETERS, 1e-12),
        (HFMAML, OF_PARAMETERS, 1e-7),
        (LSLR, OF_PARAMETERS, 1e-12),
        (MetaSGD, OF_PARAMETERS, 1e-12),
    ],
)
def test_meta_gradients_are_those_of_autograd(
    algorithm: type[MAML], rates: dict[str, float], bound: float, tasks: str
) -> None:
    model = algorithm(build("mlp"), RATES, STEPS, tasks=tasks)
    assert relative_error(model.meta_gradient(make_episodes()), by_autograd(rates)) < bound


def test_a_rate_of_zero_keeps_a_layer_as_it_is() -> None:
    frozen = MAML(build("mlp"), {"1": 0.0, "3": 0.4}, STEPS).meta_gradient(make_episodes())
    of_head = ANIL(build("mlp"), 0.4, STEPS).meta_gradient(make_episodes())
    assert relative_error(frozen, of_head) < 1e-12
    ready = MAML(build("mlp"), {"1": 0.4, "3": 0.0}, STEPS).meta_gradient(make_episodes())
    of_body = BOIL(build("mlp"), {"1": 0.4}, STEPS).meta_gradient(make_episodes())
    assert relative_error(ready, of_body) < 1e-12


@pytest.mark.parametrize("algorithm", [FOMAML, IMAML, Reptile])
def test_equal_rates_are_one_rate(algorithm: type[MAML]) -> None:
    one = algorithm(build("mlp"), 0.1, STEPS).meta_gradient(make_episodes())
    named = algorithm(build("mlp"), {"1": 0.1, "3": 0.1}, STEPS).meta_gradient(make_episodes())
    assert relative_error(named, one) == 0


def test_adaptation_takes_them_too() -> None:
    episodes = make_episodes()
    model = MAML(build("mlp"), RATES, test_steps=1)
    adapted = dict(model.adapt(episodes.support_x[0], episodes.support_y[0]).named_parameters())
    w = leaves(build("mlp"))
    loss = plain_loss(build("mlp"), F.cross_entropy)(
        w, episodes.support_x[0], episodes.support_y[0]
    )
    gradient = torch.autograd.grad(loss, [*w.values()])
    for (name, p), g in zip(w.items(), gradient, strict=True):
        torch.testing.assert_close(adapted[name].detach(), (p - OF_PARAMETERS[name] * g).detach())


def test_checkpoints_hold_them(tmp_path: Path) -> None:
    model = MAML(build("mlp"), RATES)
    run = trainer_in_double(tmp_path)
    run.fit(model, DataLoader([make_episodes()], batch_size=None))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MAML.load_from_checkpoint(tmp_path / "model.ckpt", network=build("mlp"))
    assert loaded.inner_lr == RATES


def test_the_longest_name_counts() -> None:
    rates = {"": 0.1, "body": 0.2, "body.0.weight": 0.3}
    names = ["body.0.weight", "body.0.bias", "body.10.weight", "bodywork.weight"]
    assert [*rates_by_name(rates, names).values()] == [0.3, 0.2, 0.2, 0.1]


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        (
            {"1": 0.1},
            ValueError,
            r"a rate for every parameter .* \['3.weight', '3.bias'\] have none",
        ),
        (
            {"": 0.1, "2": 0.1},
            ValueError,
            r"to name parameters of the network, .* but \['2'\] are none",
        ),
        ({}, ValueError, "a rate for every parameter"),
        ({"": -0.1}, ValueError, "a finite number of at least 0 but got -0.1"),
        ({"": "0.1"}, TypeError, r"`inner_lr\[''\]` to be a number but got '0.1'"),
    ],
)
def test_other_rates_are_refused(rates: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MAML(build("mlp"), rates)


def test_the_theory_is_of_one_rate() -> None:
    with pytest.raises(ValueError, match="Expected one fixed inner rate for all parameters"):
        MAML(build("mlp"), RATES).probe(make_episodes())


def test_layers_with_a_rate_may_be_frozen_later() -> None:
    network = build("mlp")
    model = MAML(network, {"1": 0.5, "3": 0.4}, STEPS)
    network[1].requires_grad_(False)
    found = model.meta_gradient(make_episodes())
    assert {*found} == {"3.weight", "3.bias"}


class Complex(torch.nn.Module):
    """A smooth network with a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.complex128))
        self.head = torch.nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.tanh(x.to(self.weight.dtype) @ self.weight)
        return self.head(torch.cat([z.real, z.imag], -1))


@pytest.mark.parametrize("kind", ["per_layer", "per_layer_and_step", "per_parameter"])
@pytest.mark.parametrize("algorithm", [MAML, HFMAML])
def test_learned_rates_of_complex_parameters_are_real_and_right(
    algorithm: type[MAML], kind: str
) -> None:
    model = algorithm(Complex(), 0.1, 2, inner_rates=kind)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 6, 5, generator=random, dtype=torch.float64)
    y = torch.arange(3).repeat(3, 2)
    episodes = Episodes(x[0], y, x[1], y)
    model.meta_loss(episodes).backward()
    for rate in model.learned_rates.values:
        assert rate.dtype is torch.float64
        entry = rate.detach().view(-1)
        first = float(entry[0])
        above, below = (
            float(loss_with(model, entry, first + shift, episodes)) for shift in (1e-5, -1e-5)
        )
        entry[0] = first
        assert float(rate.grad.view(-1)[0]) == pytest.approx((above - below) / 2e-5, rel=1e-5)


def loss_with(model: MAML, entry: torch.Tensor, value: float, episodes: Episodes) -> torch.Tensor:
    entry[0] = value
    return model.meta_loss(episodes).detach()


def test_where_complex_parameters_do_not_work_a_sentence_says_so() -> None:
    x, y = torch.rand(2, 6, 5, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    model = MAML(Complex(), 0.1, inner_optimizer=InnerAdam())
    with pytest.raises(TypeError, match="Expected real parameters with InnerAdam but got complex"):
        model.meta_loss(Episodes(x, y, x, y))
    with pytest.raises(ValueError, match="Expected real parameters with IMAML but got complex"):
        IMAML(Complex())


@pytest.mark.parametrize("rates", [{"": 0.1, "2": 0.3}, {"2.weight": 0.3, "": 0.1}])
def test_shared_parameters_have_one_rate(rates: dict[str, float]) -> None:
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
    )
    network[2].weight = network[0].weight
    with pytest.raises(ValueError, match=r"'2.weight' is '0.weight' too, .* name both, with one"):
        MAML(network, rates)
    named = {"": 0.1, "2": 0.3, "0.weight": 0.3}
    assert MAML(network, named)._rates()["0.weight"] == 0.3
    assert MAML(network, {"": 0.1})._rates()["0.weight"] == 0.1


def test_rates_that_are_set_later_are_checked_too() -> None:
    model = MAML(build("mlp"), RATES)
    with pytest.raises(ValueError, match=r"but \['2'\] are none"):
        model.inner_lr = {"": 0.1, "2": 0.1}
    assert model.inner_lr == RATES
