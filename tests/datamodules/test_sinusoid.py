"""Sinusoids, drawn as the MAML paper says."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.trainers import trainer_in_double as trainer
from lightning_maml import MAML, MLP, Episodes, ResampledEpisodes
from lightning_maml.datamodules import SinusoidDataModule


def fitted(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return amplitude, phase and largest residual of ``y = a sin x + b cos x`` for each task."""
    x, y = x.double(), y.double()
    basis = torch.cat([x.sin(), x.cos()], -1)
    solution = torch.linalg.lstsq(basis, y).solution
    a, b = solution[:, 0, 0], solution[:, 1, 0]
    residual = (basis @ solution - y).abs().amax((1, 2))
    return (a**2 + b**2).sqrt(), torch.atan2(-b, a), residual


def test_tasks_are_sinusoids_of_the_papers_amplitudes_phases_and_inputs() -> None:
    data = SinusoidDataModule(meta_batch_size=2000, train_batches=1, queries=20)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Episodes)
    assert batch.support_x.shape == batch.support_y.shape == (2000, 10, 1)
    assert batch.query_x.shape == batch.query_y.shape == (2000, 20, 1)
    x = torch.cat([batch.support_x, batch.query_x], 1)
    amplitude, phase, residual = fitted(x, torch.cat([batch.support_y, batch.query_y], 1))
    assert residual.max() < 1e-5, "support and query points lie on one sinusoid"
    for values, least, most in (
        (x.flatten(), -5, 5),
        (amplitude, 0.1, 5),
        (phase, 0, math.pi),
    ):
        assert least - 1e-5 <= values.min() < least + 0.01 * (most - least)
        assert most - 0.01 * (most - least) < values.max() <= most + 1e-5
        counts = torch.histc(values.float(), 10, least, most)
        expected = len(values) / 10
        # chi-squared with 9 degrees of freedom, at a level of 1e-6; the seed is fixed
        assert ((counts - expected) ** 2 / expected).sum() < 45


def test_tasks_depend_on_seed_split_and_number_alone() -> None:
    def first(split: str = "train", **options) -> torch.Tensor:
        data = SinusoidDataModule(**{"meta_batch_size": 8, "train_batches": 4} | options)
        return next(iter(getattr(data, f"{split}_dataloader")())).support_y[:4]

    assert torch.equal(first(), first(meta_batch_size=4))
    assert torch.equal(first(), first(num_workers=1))
    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(first(), first("val"))
    data = SinusoidDataModule()
    drawn = data.independent_episodes("measure", 0, tasks=4)
    assert drawn.support_y.shape == (4, 10, 1)
    assert not torch.equal(drawn.support_y, first())


def test_resampled_tasks_have_points_of_their_own_for_each_step() -> None:
    data = SinusoidDataModule(
        regime="resampling", train_steps=3, shots=5, hessian_shots=4, meta_batch_size=2
    )
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ResampledEpisodes)
    assert [x.shape for x in batch[::2]] == [(2, 3, 5, 1), (2, 3, 4, 1), (2, 10, 1)]
    x, y = (torch.cat([part.flatten(1, -2) for part in batch[k::2]], 1) for k in (0, 1))
    assert len(x.unique()) == 2 * (15 + 12 + 10)
    assert fitted(x[..., None], y[..., None])[2].max() < 1e-5
    assert isinstance(next(iter(data.val_dataloader())), Episodes)


@pytest.mark.parametrize("regime", ["finite_sum", "resampling"])
def test_a_model_learns_them(tmp_path: Path, regime: str) -> None:
    torch.manual_seed(0)
    model = MAML(MLP(1, 1, activation="tanh"), 0.05, 1, loss=F.mse_loss, optimizer=torch.optim.Adam)
    data = SinusoidDataModule(train_batches=150, val_tasks=50, test_tasks=200, regime=regime)
    run = trainer(tmp_path)
    [before] = run.test(model, data, verbose=False)
    run.fit(model, data)
    [after] = run.test(model, data, verbose=False)
    assert after["test/loss"] < 0.8 * before["test/loss"]
    assert after["test/loss"] < after["test/loss_before"]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected `shots` to be at least 1 but got 0"):
        SinusoidDataModule(shots=0)
    with pytest.raises(TypeError, match="Expected a datamodule of images but got Sinusoid"):
        SinusoidDataModule().class_images("train")
