"""Means over tasks with their confidence intervals."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from helpers.networks import build, make_episodes
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double
from lightning_maml import MAML, ProtoNet
from lightning_maml.algorithms.loader_figures import LoaderFigures
from lightning_maml.algorithms.metrics import TaskMean


def test_the_interval_is_1_96_standard_errors_over_all_updates() -> None:
    values = drawn_on_cpu(torch.rand, 37, 3, generator=torch.Generator().manual_seed(0))
    metric = TaskMean()
    for part in values.split((10, 1, 26)):
        metric.update(part)
    estimate = metric.compute()
    torch.testing.assert_close(estimate.mean, values.mean(0).cpu())
    torch.testing.assert_close(estimate.ci95, 1.96 * values.std(0).cpu() / math.sqrt(37))
    assert estimate.tasks == 37


def test_about_95_percent_of_the_intervals_hold_the_mean() -> None:
    values = drawn_on_cpu(torch.rand, 2000, 50, generator=torch.Generator().manual_seed(1))
    held = 0
    for sample in values:
        metric = TaskMean()
        metric.update(sample)
        estimate = metric.compute()
        held += int(abs(estimate.mean - 0.5) <= estimate.ci95)
    assert held / 2000 == pytest.approx(0.945, abs=0.015)


def test_a_single_task_has_no_interval() -> None:
    metric = TaskMean()
    metric.update(torch.tensor([0.5]))
    assert metric.compute().ci95.isnan()


def test_a_reset_forgets() -> None:
    metric = TaskMean()
    metric.update(torch.tensor([1.0, 0.0]))
    metric.reset()
    metric.update(torch.tensor([1.0]))
    assert metric.compute().tasks == 1


def test_accuracies_beside_losses_that_are_not_finite_are_pointed_out(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes(tasks=2)], batch_size=None)
    model = MAML(build("mlp"), 1.7e308, test_steps=5)
    with pytest.warns(UserWarning, match="Losses of `test` tasks are not finite"):
        trainer_in_double(tmp_path).test(model, loader, verbose=False)


class Elsewhere(LightningModule):
    """A module on a device that has no numbers, which keeps what it is to log."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, torch.Tensor] = {}
        self.to("meta")

    def log(self, name: str, value: torch.Tensor, **_: Any) -> None:
        self.logged[name] = value

    def log_dict(self, values: dict[str, torch.Tensor], **_: Any) -> None:
        self.logged |= values


@pytest.mark.cpu_only
def test_what_is_logged_is_on_the_modules_device() -> None:
    # NCCL, which reduces it over processes, takes nothing else
    figures = LoaderFigures({"error": MeanAbsoluteError()}, "tasks")
    figures.start(1, torch.device("cpu"))
    both = {"loss": torch.rand(2, 3), "accuracy": torch.rand(2, 3)}
    figures.update(0, both, torch.rand(2, 3, 5, 1), torch.rand(2, 5, 1))
    module = Elsewhere()
    figures.log(module, "val")
    assert {"val/loss", "val/accuracy_ci95", "val/error"} <= module.logged.keys()
    assert {value.device.type for value in module.logged.values()} == {"meta"}


class WithoutSuper(MAML):
    def on_validation_epoch_start(self) -> None:
        pass


def test_a_hook_that_leaves_out_its_parents_is_pointed_out(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes(tasks=2)], batch_size=None)
    with pytest.raises(RuntimeError, match=r"let those of your subclass call super\(\)'s"):
        trainer_in_double(tmp_path).validate(WithoutSuper(build("mlp")), loader, verbose=False)


class Drawn:
    """Ten tasks, drawn with numpy's random numbers each time."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for _ in range(10):
            self.seeds.append(int(np.random.randint(10**9)))
            yield make_episodes(tasks=2, seed=self.seeds[-1])


@pytest.mark.cpu_only
def test_each_validation_draws_tasks_of_its_own(tmp_path: Path) -> None:
    model, run, drawn = MAML(build("mlp")), trainer_in_double(tmp_path), Drawn()
    for _ in range(3):
        run.validate(model, drawn, verbose=False)
    assert len({*drawn.seeds}) == len(drawn.seeds) >= 30


@pytest.mark.parametrize("model", [MAML, ProtoNet])
def test_an_evaluation_in_training_mode_is_pointed_out(model: Any) -> None:
    with_dropout = torch.nn.Sequential(build("conv_batch_norm"), torch.nn.Dropout(0.5))
    for network, policy, what in (
        (with_dropout, "batch", "dropout is active"),
        (build("conv_batch_norm"), "running", "batch norm normalises by each batch"),
    ):
        made = model(network, batch_norm=policy)
        with pytest.warns(UserWarning, match=f"{what}; call model.eval"):
            made.evaluate(make_episodes())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The network is evaluated in training mode")
            made.eval().evaluate(make_episodes())


def test_with_query_in_eval_both_modes_are_one_evaluation() -> None:
    network = torch.nn.Sequential(build("conv_batch_norm"), torch.nn.Dropout(0.5))
    model = MAML(network, query_in_eval=True)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The network is evaluated in training mode")
        for mode in (True, False):
            torch.manual_seed(0)
            losses.append(model.train(mode).evaluate(make_episodes()).loss)
    assert torch.equal(*losses)
