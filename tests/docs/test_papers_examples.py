"""The papers' examples: their networks and losses are what they say, and their configs run."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from helpers.folders import ROOT
from helpers.networks import relative_error
from lightning_maml import FOMAML, MAML, meta_gradient
from lightning_maml.algorithms.metrics import TaskMean
from lightning_maml.cli import main, run
from lightning_maml.core.params import Params
from lightning_maml.theory.curvature import hessian_lipschitz, smoothness

LINEAR = ROOT / "examples" / "linear_classifier"
NAVIGATION = ROOT / "examples" / "reinforcement_learning"
sys.path += map(str, (LINEAR, NAVIGATION, ROOT / "examples"))

import linear_classifier
import navigation
import point_navigation

FEW = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def in_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["lightning-maml"])
    monkeypatch.chdir(folder)
    return [*FEW, f"--trainer.default_root_dir={tmp_path}"]


def cross_entropy_at(logits: list[float]) -> tuple[float, float]:
    """Return L and rho of one sample's loss of a linear classifier where it gives these logits."""
    torch.manual_seed(0)
    network = linear_classifier.UnitLinear(len(logits), 7).double()
    x = torch.rand(1, 7, dtype=torch.float64)
    unit = x / x.norm()
    w = {"weight": torch.tensor(logits, dtype=torch.float64)[:, None] * unit}

    def loss(params: Params) -> Tensor:
        outputs = functional_call(network, params, (x,))
        return torch.nn.functional.cross_entropy(outputs, torch.tensor([0]))

    return smoothness(loss, w).value, hessian_lipschitz(loss, w).value


def test_L_and_rho_of_the_linear_classifier_are_attained_and_not_exceeded() -> None:
    L, _ = cross_entropy_at([0.0, 0.0])
    assert pytest.approx(L, rel=1e-6) == linear_classifier.L
    p = (3 + math.sqrt(3)) / 6  # where p (1 - p) (1 - 2 p) is largest
    _, rho = cross_entropy_at([math.log(p / (1 - p)), 0.0])
    assert rho == pytest.approx(linear_classifier.RHO, rel=1e-3)
    assert rho <= linear_classifier.RHO
    random = torch.Generator().manual_seed(0)
    for ways in (2, 3, 5, 20):
        for spread in (0.3, 1.0, 3.0):
            L, rho = cross_entropy_at((spread * torch.randn(ways, generator=random)).tolist())
            assert L <= linear_classifier.L * (1 + 1e-6)
            assert rho <= linear_classifier.RHO


@pytest.mark.parametrize("name", ["given", "measured", "resampling"])
def test_the_adaptive_configs_run_within_the_theory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--trainer.max_epochs=1", "--data.train_batches=3", "--data.val_tasks=4"]
    where = in_folder(LINEAR, tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command = run(["fit", f"--config={name}.yaml", *where, *small])
    assert not [str(w.message) for w in caught if "AdaptiveMetaStepsize" in str(w.message)]
    logged = command.trainer.callback_metrics
    assert 0 < logged["train/L"] <= linear_classifier.L
    assert 0 < logged["train/rho"] <= linear_classifier.RHO
    assert command.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        1 / float(logged["train/meta_smoothness"])
    )


def test_measure_finds_every_condition_met_but_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = in_folder(LINEAR, tmp_path, monkeypatch)
    main(["measure", "--config=given.yaml", "--tasks=4", "--epsilon=0.1", *where])
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("  does not hold")]
    assert len(failed) == 2
    assert "and C_beta = 1, above 0 needed" in failed[0]
    assert "scale = 1, at most the papers' constant" in failed[1]
    assert "Sizes for E|grad F| <= 0.1 by Ji, Corollary 10" in printed


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_network_that_acts_has_the_gradient_of_data_drawn_at_each_point(
    algorithm: type[MAML], steps: int
) -> None:
    """Against ``meta_gradient(sample=...)``, which draws the runs beforehand at each point."""
    torch.manual_seed(0)
    network = navigation.Runs().double()
    model = algorithm(network, 0.02, train_steps=steps, loss=navigation.MinusReturn(1.0))
    episodes = navigation.Goals(3, 1, 4, steps, runs=5, horizon=6)[0]
    episodes = type(episodes)(*(tensor.double() for tensor in episodes))
    task = point_navigation.Navigation(network.policy)
    params = {name: p.detach() for name, p in network.policy.named_parameters()}
    expected = meta_gradient(
        task.loss,
        params,
        episodes,
        inner_lr=0.02,
        steps=steps,
        curvature=model.curvature,
        sample=task.sample,
    ).grad
    found = model.meta_gradient(episodes)
    without_prefix = {name.removeprefix("policy."): tensor for name, tensor in found.items()}
    assert relative_error(without_prefix, expected) < 1e-10


def test_a_reward_is_discounted_by_its_step() -> None:
    runs = torch.zeros(2, 3, 3)
    runs[..., 1] = 1.0  # at (1, 0) after each action
    goals = torch.zeros(2, 2)
    assert navigation.MinusReturn(0.5)(runs, goals) == pytest.approx(1 + 0.5 + 0.25)


@pytest.mark.parametrize("algorithm", ["MAML", "FOMAML", "HFMAML"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_reinforcement_learning_config_runs(
    algorithm: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = in_folder(NAVIGATION, tmp_path, monkeypatch)
    small = ["--data.train_batches=2", "--data.meta_batch_size=2", "--data.horizon=4"]
    several = [f"--model.train_steps={steps}", f"--data.train_steps={steps}"]
    often = ["--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    command = run(
        [
            "fit",
            "--config=config.yaml",
            f"--model={algorithm}",
            *where,
            *small,
            *several,
            *often,
            "--trainer.callbacks.every_n_steps=1",
        ]
    )
    logged = command.trainer.callback_metrics
    assert logged["val/loss"] > 0  # minus a return, which is negative here
    assert command.trainer.global_step == 2


@pytest.mark.slow
def test_reinforcement_learning_learns_to_adapt_in_three_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Returns of 400 new goals before and after adaptation.

    A point that stays where it is has -2.8 (a goal's mean squared distance is 1/6).
    """
    where = in_folder(NAVIGATION, tmp_path, monkeypatch)
    several = ["--model.train_steps=3", "--data.train_steps=3"]
    command = run(["fit", "--config=config.yaml", *where, *several])
    returns = TaskMean()
    for episodes in command.datamodule.test_dataloader():
        returns.update(-command.model.eval().evaluate(episodes).loss)
    mean, interval, _ = returns.compute()
    with capsys.disabled():
        print([f"{m:.2f} ± {i:.2f}" for m, i in zip(mean, interval, strict=True)])
    assert mean[-1] - interval[-1] > -1.4 > mean[0] + interval[0]
