"""The named variants: MAML++ and Reptile under real trainers, and the arguments of all."""

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader

from helpers.folders import CONFIGS
from helpers.networks import build, leaves, make_episodes, plain_loss, relative_error, unrolled
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import (
    HFMAML,
    IMAML,
    MAML,
    Episodes,
    MAMLPlusPlus,
    Reptile,
    ResampledEpisodes,
    adaptation_curve,
)
from lightning_maml.cli import run

STEPS, RATE = 3, 0.3


def test_the_weights_of_the_multi_step_loss_go_to_the_last_step() -> None:
    model = MAMLPlusPlus(build("mlp"), train_steps=4, multi_step_epochs=10)
    assert model.step_weights(0) == [0.25] * 4
    assert model.step_weights(5) == pytest.approx([0.125] * 3 + [0.625])
    assert model.step_weights(10) == model.step_weights(99) == [0, 0, 0, 1]
    assert MAMLPlusPlus(build("mlp"), train_steps=2, multi_step_epochs=0).step_weights(0) == [0, 1]
    assert MAMLPlusPlus(build("mlp"), train_steps=0, inner_rates="fixed").step_weights(0) == []


def test_maml_plus_plus_anneals_the_loss_and_the_order_of_derivatives(tmp_path: Path) -> None:
    """Each epoch's step against autograd through the unrolled loop.

    Its inner gradients are constants in the first epoch.
    """
    network, episodes = build("conv_batch_norm"), make_episodes()
    model = MAMLPlusPlus(
        network,
        RATE,
        STEPS,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        multi_step_epochs=2,
        first_order_epochs=1,
        inner_rates="fixed",
    )
    expected = leaves(network)
    loss = plain_loss(build("conv_batch_norm"))
    for epoch in range(3):
        total = {name: torch.zeros_like(p) for name, p in expected.items()}
        for steps, weight in enumerate(model.step_weights(epoch), start=1):
            if epoch == 0:
                for task in zip(*episodes, strict=True):
                    here = expected
                    for _ in range(steps):
                        gradient = torch.autograd.grad(loss(here, *task[:2]), list(here.values()))
                        here = {
                            name: (p - RATE * g).detach().requires_grad_()
                            for (name, p), g in zip(here.items(), gradient, strict=True)
                        }
                    gradient = torch.autograd.grad(
                        loss(here, *task[2:]) / len(episodes.support_x), list(here.values())
                    )
                    total = {
                        name: total[name] + weight * g
                        for name, g in zip(here, gradient, strict=True)
                    }
            else:
                gradient = torch.autograd.grad(
                    unrolled(loss, expected, episodes, RATE, steps), list(expected.values())
                )
                total = {
                    name: total[name] + weight * g
                    for name, g in zip(expected, gradient, strict=True)
                }
        expected = {
            name: (p - 0.1 * total[name]).detach().requires_grad_() for name, p in expected.items()
        }
    trainer(tmp_path, max_epochs=3).fit(model, DataLoader([episodes], batch_size=None))
    assert relative_error(dict(network.named_parameters()), expected) < 1e-12


def test_reptile_moves_towards_the_adapted_parameters(tmp_path: Path) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes()
    w = leaves(network)
    loss = plain_loss(build("conv_batch_norm"))
    adapted = []
    for x, y in zip(episodes.support_x, episodes.support_y, strict=True):
        here = w
        for _ in range(STEPS):
            gradient = torch.autograd.grad(loss(here, x, y), list(here.values()))
            here = {
                name: (p - RATE * g).detach().requires_grad_()
                for (name, p), g in zip(here.items(), gradient, strict=True)
            }
        adapted.append(here)
    epsilon = 0.5
    expected = {
        name: p + epsilon * (sum(point[name] for point in adapted) / len(adapted) - p)
        for name, p in w.items()
    }
    model = Reptile(network, RATE, STEPS, optimizer=partial(torch.optim.SGD, lr=epsilon))
    run = trainer(tmp_path)
    run.fit(model, DataLoader([episodes], batch_size=None))
    assert relative_error(dict(network.named_parameters()), expected) < 1e-12
    query_loss = adaptation_curve(loss, w, episodes, inner_lr=RATE, steps=STEPS).loss[:, -1].mean()
    torch.testing.assert_close(run.callback_metrics["train/loss"].double(), query_loss.cpu())


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_reptile_takes_a_fresh_mini_batch_in_each_step(tmp_path: Path, tasks: str) -> None:
    network, episodes = build("conv_batch_norm"), make_episodes(shots=3)
    parts = [tensor.unflatten(1, (STEPS, -1)) for tensor in episodes[:2]]
    resampled = ResampledEpisodes(*parts, *(part[:, :, :0] for part in parts), *episodes[2:])
    w, loss = leaves(network), plain_loss(build("conv_batch_norm"))
    means = {name: torch.zeros_like(p) for name, p in w.items()}
    for x, y in zip(*resampled[:2], strict=True):
        here = w
        for batch in zip(x, y, strict=True):
            gradient = torch.autograd.grad(loss(here, *batch), list(here.values()))
            here = {
                name: (p - RATE * g).detach().requires_grad_()
                for (name, p), g in zip(here.items(), gradient, strict=True)
            }
        means = {
            name: mean + here[name].detach() / len(resampled.support_x)
            for name, mean in means.items()
        }
    model = Reptile(network, RATE, STEPS, optimizer=partial(torch.optim.SGD, lr=1.0), tasks=tasks)
    trainer(tmp_path).fit(model, DataLoader([resampled], batch_size=None))
    assert relative_error(dict(network.named_parameters()), means) < 1e-12


def test_the_meta_gradient_is_what_is_trained_by() -> None:
    episodes = make_episodes()
    for model in (Reptile(build("mlp"), RATE, STEPS), MAML(build("mlp"), RATE, STEPS)):
        model.meta_loss(episodes).backward()
        assert (
            relative_error(
                model.meta_gradient(episodes),
                {name: p.grad for name, p in model.network.named_parameters()},
            )
            < 1e-12
        )


def test_a_loop_without_a_trainer_moves_the_running_averages() -> None:
    model = MAML(build("conv_batch_norm"), RATE, STEPS, batch_norm="running")
    model.meta_loss(make_episodes())
    assert model.network[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reptile(build("mlp"), inner_rates="per_layer"),
            "'fixed' with Reptile, which cannot learn them, but got 'per_layer'",
        ),
        (
            lambda: MAMLPlusPlus(build("mlp"), multi_step_epochs=-1),
            "Expected `multi_step_epochs` to be at least 0 but got -1",
        ),
        (
            lambda: MAMLPlusPlus(build("mlp")).meta_loss(make_episodes()),
            "Expected a trainer, over whose epochs MAMLPlusPlus anneals",
        ),
        (
            lambda: Reptile(build("mlp")).probe(make_episodes()),
            "Expected MAML, FOMAML or HFMAML, which the theory is about, but got Reptile",
        ),
        (
            lambda: MAMLPlusPlus(build("mlp"), first_order_epochs=-1),
            "Expected `first_order_epochs` to be at least 0 but got -1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


VARIANTS = {
    HFMAML: {"probe_radius": None},
    MAMLPlusPlus: {"multi_step_epochs": 15, "first_order_epochs": 0},
    IMAML: {"proximal_strength": 2.0, "cg_steps": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_command_knows_the_arguments_that_variants_share_with_maml(
    variant: type[MAML], capsys: pytest.CaptureFixture[str]
) -> None:
    shared = dict(inspect.signature(MAML.__init__).parameters)
    config = CONFIGS / "glyphs_maml.yaml"
    named = f"lightning_maml.{variant.__name__}"
    with pytest.raises(SystemExit):
        run(["fit", f"--config={config}", f"--model={named}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["class_path"] == named
    assert printed["init_args"].keys() == (shared.keys() - {"self"}) | VARIANTS[variant].keys()
    assert printed["init_args"]["tasks"] == "auto"
    for name, default in VARIANTS[variant].items():
        assert printed["init_args"][name] == default


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_argument_that_a_variant_does_not_have_is_refused(
    variant: type[MAML], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_step'"):
        variant(build("mlp"), train_step=2)
    config = CONFIGS / "glyphs_maml.yaml"
    arguments = [f"--model=lightning_maml.{variant.__name__}", "--model.init_args.train_step=2"]
    with pytest.raises(SystemExit):
        run(["fit", f"--config={config}", *arguments])
    assert "train_step" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [MAMLPlusPlus, IMAML])
def test_variants_that_cannot_be_compiled_say_so(variant: type[MAML]) -> None:
    with pytest.raises(ValueError, match=f"got {variant.__name__}, which cannot be compiled"):
        variant(build("mlp"), compiled=True)


def test_reptile_leaves_what_does_not_adapt_to_no_weight_decay(tmp_path: Path) -> None:
    network, before = build("mlp"), build("mlp")
    model = Reptile(network, RATE, 1, adapt="head", optimizer=torch.optim.AdamW)
    trainer(tmp_path).fit(model, DataLoader([make_episodes()], batch_size=None))
    moved = [
        name
        for name, p in before.named_parameters()
        if not torch.equal(p, network.get_parameter(name))
    ]
    assert moved == ["3.weight", "3.bias"]


@pytest.mark.parametrize(
    ("loss", "kink"),
    [
        (F.l1_loss, "abs (of the loss)"),
        (lambda z, y: (z - F.one_hot(y, 3)).norm(p=1), "linalg_vector_norm (of the loss)"),
        (F.multi_margin_loss, "multi_margin_loss (of the loss)"),
    ],
)
def test_kinks_of_the_loss_are_warned_of(loss: Any, kink: str) -> None:
    network, episodes = build("mlp"), make_episodes()
    if loss is F.l1_loss:
        x, _, query_x, _ = episodes
        episodes = Episodes(x, x[..., 0, 0, :3], query_x, query_x[..., 0, 0, :3])
    model = HFMAML(network, 0.1, loss=loss)
    with pytest.warns(
        UserWarning, match=re.escape(f"differentiable network and loss but got kinks in {kink}")
    ):
        model.meta_loss(episodes)


def test_reptile_gives_the_optimizer_what_may_be_thawed() -> None:
    network = build("mlp")
    network[1].requires_grad_(False)
    frozen_later = Reptile(network, RATE, 1, optimizer=torch.optim.AdamW).configure_optimizers()
    assert len(frozen_later.param_groups[0]["params"]) == 4


class DrawingLoss(torch.nn.Module):
    """Cross-entropy with noise on the logits, written with a maximum that gives no gradient."""

    def forward(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = logits + 0.01 * torch.randn_like(logits)
        shifted = logits - logits.max(-1, keepdim=True).values.detach()
        return (shifted.logsumexp(-1) - shifted.gather(-1, y[:, None])[:, 0]).mean()


def test_a_maximum_that_gives_no_gradient_is_no_kink_of_the_loss() -> None:
    model = HFMAML(build("mlp"), 0.1, loss=DrawingLoss())
    torch.manual_seed(0)
    assert model.kinks(make_episodes()) == []
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn), "looking draws nothing"
