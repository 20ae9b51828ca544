"""Means over tasks with their confidence intervals."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.networks import build, make_episodes
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer_in_double
from lightning_maml import MAML
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
