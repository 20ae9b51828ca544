"""The stationarity monitor: an unbiased norm, an honest error, and a stop at a stationary point."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from helpers import another_process
from helpers.families import (
    Quartic,
    quartic_inner_lr,
    quartic_meta_objective,
    quartic_outputs_loss,
    quartic_tasks,
)
from helpers.folders import CONFIGS
from helpers.networks import build, flat, make_episodes
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import on_device
from lightning_maml import FOMAML, HFMAML, LSLR, MAML, MLP, Conv4, Episodes, meta_gradient
from lightning_maml.callbacks import MetaGradientMonitor, StationarityMonitor, TrainingPictures
from lightning_maml.callbacks.independent_tasks import IndependentTasks
from lightning_maml.callbacks.stationarity_monitor import norm_of_mean
from lightning_maml.cli import run
from lightning_maml.datamodules import GlyphsDataModule

CONFIG = CONFIGS / "glyphs_maml.yaml"


def trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    settings = {
        "default_root_dir": folder,
        **on_device(),
        "max_epochs": 1,
        "precision": "64-true",
        "callbacks": list(callbacks),
    }
    return Trainer(**(settings | quiet | arguments))


def samples(mean: torch.Tensor, random: torch.Generator) -> list[dict[str, torch.Tensor]]:
    return [
        {"w": mean + drawn_on_cpu(torch.randn, 50, dtype=torch.float64, generator=random)}
        for _ in range(8)
    ]


@pytest.mark.parametrize("size", [0.0, 2.0, 20.0])
def test_the_norm_of_a_mean_is_estimated_without_what_sampling_adds(size: float) -> None:
    random = torch.Generator().manual_seed(0)
    mean = torch.zeros(50, dtype=torch.float64)
    mean[0] = size
    estimates = [norm_of_mean(samples(mean, random)) for _ in range(300)]
    norms, errors = torch.tensor(estimates, dtype=torch.float64, device="cpu").T
    if size:
        assert norms.mean() == pytest.approx(size, rel=0.06)
        assert errors.mean() == pytest.approx(float(norms.std()), rel=0.3)
    covered = ((norms - size).abs() <= 2 * errors).double().mean()
    assert covered > 0.85


def test_equal_samples_have_no_error() -> None:
    one = {"w": torch.tensor([3.0, 0.0]), "v": torch.tensor([4.0])}
    assert norm_of_mean([one] * 5) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-6))


class Watch(Callback):
    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitor = next(
            callback for callback in trainer.callbacks if isinstance(callback, StationarityMonitor)
        )
        self.norms[trainer.global_step] = monitor.norm


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_norm_is_that_of_the_exact_meta_gradient_whatever_the_algorithm(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    network = build("mlp")
    module = algorithm(
        network, inner_lr=0.3, train_steps=2, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    monitor, watch = StationarityMonitor(every_n_steps=2, episodes=[make_episodes(seed=5)]), Watch()
    run = trainer(tmp_path, monitor, watch)
    run.fit(module, DataLoader([make_episodes(seed=k) for k in range(5)], batch_size=None))
    assert [watch.norms[2] == watch.norms[3], watch.norms[3] == watch.norms[4]] == [True, False]
    assert watch.norms[1] != watch.norms[1], "not yet known"
    repeat = algorithm(
        build("mlp"), inner_lr=0.3, train_steps=2, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    trainer(tmp_path).fit(
        repeat, DataLoader([make_episodes(seed=k) for k in range(4)], batch_size=None)
    )
    exact = meta_gradient(
        lambda w, x, y: torch.nn.functional.cross_entropy(
            torch.func.functional_call(repeat.network, w, (x,)), y
        ),
        dict(repeat.network.named_parameters()),
        make_episodes(seed=5),
        inner_lr=0.3,
        steps=2,
    ).grad
    assert monitor.norm == pytest.approx(float(flat(exact).norm()), rel=1e-9)
    assert run.callback_metrics["train/meta_gradient_norm"] == pytest.approx(monitor.norm)
    assert run.callback_metrics["train/meta_gradient_norm_se"] == pytest.approx(0, abs=1e-6)


def test_training_stops_at_an_epsilon_stationary_point(tmp_path: Path) -> None:
    network = Quartic()
    with torch.no_grad():
        network.w /= 10
    module = MAML(
        network,
        inner_lr=quartic_inner_lr(1),
        loss=quartic_outputs_loss,
        optimizer=partial(torch.optim.SGD, lr=0.05),
    )
    monitor = StationarityMonitor(every_n_steps=1, stop_at=1e-3, episodes=[quartic_tasks()])
    run = trainer(tmp_path, monitor)
    run.fit(module, DataLoader([quartic_tasks()] * 500, batch_size=None))
    reached = torch.func.grad(partial(quartic_meta_objective, steps=1))(network.w.detach()).norm()
    assert 5 < run.global_step < 500
    assert 0.3e-3 < reached <= 1e-3, "not before, and no step after"


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    drawn = []

    def episodes() -> Iterator[Episodes]:
        for seed in range(100):
            drawn.append(seed)
            yield make_episodes(seed=seed)

    monitor = StationarityMonitor(every_n_steps=1, meta_batches=3, episodes=episodes())
    run = trainer(tmp_path, monitor, accumulate_grad_batches=3)
    run.fit(MAML(build("mlp"), inner_lr=0.1), DataLoader([make_episodes()] * 6, batch_size=None))
    assert (run.global_step, len(drawn)) == (2, 2 * 3)


def test_a_resumed_run_continues_the_stream_of_tasks(tmp_path: Path) -> None:
    data = GlyphsDataModule(ways=3, meta_batch_size=2, train_batches=4, val_tasks=2)

    def fit(epochs: int, checkpoint: Path | None = None) -> float:
        torch.manual_seed(0)
        module, monitor = (
            MAML(Conv4(1, 3, 28, channels=2, activation="gelu"), inner_lr=0.1),
            StationarityMonitor(2, tasks=2, meta_batches=3),
        )
        # In 64-true Lightning loads checkpoints through float32.
        run = trainer(
            tmp_path, monitor, max_epochs=epochs, enable_checkpointing=True, precision="32-true"
        )
        run.fit(module, data, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return monitor.norm

    whole = fit(2)
    fit(1)
    assert fit(2, tmp_path / "1.ckpt") == whole


def test_a_second_fit_measures_at_its_own_steps_with_the_same_tasks(tmp_path: Path) -> None:
    """Also at the step at which the first one ended."""
    batches = [make_episodes(seed=seed) for seed in range(5)]
    monitor = StationarityMonitor(2, meta_batches=3, episodes=batches)
    norms = []
    for _ in range(2):
        model = MAML(build("mlp"), 0.1, optimizer=partial(torch.optim.SGD, lr=0.0))
        run = trainer(tmp_path, monitor)
        run.fit(model, DataLoader([make_episodes()] * 2, batch_size=None))
        norms.append(monitor.norm)
        assert monitor.state_dict() == {"drawn": 3, "last_step": 2}
    assert norms[0] == norms[1]


class SaveFigures(Callback):
    """What each process has, of the monitors and the validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_norm, of_fidelity, pictures = trainer.callbacks[:3]
        fidelity = [figure for found in of_fidelity.history[2].values() for figure in found]
        # either process may be the first to get here
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            [of_norm.norm, of_norm.standard_error, *fidelity, *pictures.history[0][:4]],
            self.folder / f"{trainer.global_rank}.pt",
        )


def watched(folder: Path, tasks: int, **arguments: Any) -> None:
    torch.manual_seed(0)
    module = MAML(
        Conv4(1, 3, 28, channels=2, activation="gelu"),
        inner_lr=0.1,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    watching = [
        StationarityMonitor(1, tasks=tasks, meta_batches=3),
        MetaGradientMonitor(1, tasks=tasks),
        TrainingPictures(),
    ]
    run = trainer(folder, *watching, SaveFigures(folder), **arguments)
    run.fit(module, GlyphsDataModule(ways=3, meta_batch_size=tasks, train_batches=2, val_tasks=6))
    assert (folder / "fidelity.png").is_file()


@pytest.mark.cpu_only
def test_processes_share_the_tasks_and_agree_on_the_norm(tmp_path: Path) -> None:
    of_one, of_two = (tmp_path / name for name in ("one", "two"))
    watched(of_one, 4)
    another_process.in_two(watched, of_two, 2)
    (one,), (first, second) = (
        [torch.load(file) for file in sorted(folder.glob("*.pt"))] for folder in (of_one, of_two)
    )
    assert first == second
    assert first == pytest.approx(one, rel=1e-6, abs=1e-9)


def test_missing_hessian_batches_are_refused(tmp_path: Path) -> None:
    data = GlyphsDataModule(ways=3, regime="resampling", hessian_shots=0)
    with pytest.raises(
        ValueError, match="`hessian_shots` to be at least 1 for StationarityMonitor"
    ):
        trainer(tmp_path, StationarityMonitor()).fit(FOMAML(Conv4(1, 3, 28, channels=2)), data)


def test_stationarity_monitor_runs_from_a_config(tmp_path: Path) -> None:
    monitor = [
        "--trainer.callbacks=StationarityMonitor",
        "--trainer.callbacks.every_n_steps=1",
        "--trainer.callbacks.stop_at=1e6",
    ]
    small = [
        "--trainer.callbacks.tasks=2",
        "--data.train_batches=5",
        "--data.meta_batch_size=2",
        "--trainer.limit_val_batches=1",
    ]
    command = run(
        ["fit", f"--config={CONFIG}", *monitor, *small, f"--trainer.default_root_dir={tmp_path}"]
    )
    assert command.trainer.global_step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` to be at least 1 but got 0"),
        ({"meta_batches": 2}, "`meta_batches` to be at least 3, for a standard error, but got 2"),
        ({"stop_at": 0.0}, "`stop_at` to be positive but got 0.0"),
        ({"tasks": 0}, "`tasks` to be at least 1 but got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StationarityMonitor(**arguments)


class DividesBefore(MAML):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(support_x=batch.support_x / 100, query_x=batch.query_x / 100)


class DividesAfter(MAML):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(support_x=batch.support_x / 100, query_x=batch.query_x / 100)


def test_tasks_are_prepared_as_those_of_training(tmp_path: Path) -> None:
    """By the hooks of the module, and in the precision of the trainer."""
    x, y = 100 * torch.rand(2, 6, 4), torch.arange(3).repeat(2, 2)
    batches, norms = [Episodes(x, y, x, y)] * 3, []
    for module in (DividesBefore, DividesAfter):
        torch.manual_seed(0)
        monitor = StationarityMonitor(1, meta_batches=3, episodes=batches)
        sgd = partial(torch.optim.SGD, lr=0.0)
        model = module(MLP(4, 3, activation="gelu"), 0.1, optimizer=sgd)
        trainer(tmp_path, monitor).fit(model, DataLoader(batches[:1], batch_size=None))
        norms.append(monitor.norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize("of_loss", [False, True])
def test_a_norm_that_leaves_out_what_is_trained_does_not_stop_a_run(
    of_loss: bool, tmp_path: Path
) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.scale * outputs, y)

    batches = [make_episodes(seed=seed) for seed in range(3)]
    model = MAML(build("mlp"), 0.1, loss=Scaled()) if of_loss else LSLR(build("mlp"), 0.1)
    run = trainer(tmp_path, StationarityMonitor(stop_at=1e-3, episodes=batches))
    with pytest.raises(ValueError, match="Expected `stop_at` to be None where more than the"):
        run.fit(model, DataLoader(batches, batch_size=None))


def test_a_second_fit_draws_its_own_figures_alone(tmp_path: Path) -> None:
    batches = [make_episodes(seed=seed) for seed in range(3)]
    monitor, pictures = MetaGradientMonitor(1, episodes=batches), TrainingPictures()
    loader = DataLoader(batches, batch_size=None)
    for steps in (3, 2):
        run = trainer(tmp_path, monitor, pictures, limit_train_batches=steps)
        run.fit(MAML(build("mlp"), 0.1), loader, loader)
        assert list(monitor.history) == [*range(1, steps + 1)]
        assert [found.step for found in pictures.history] == [steps]


@pytest.mark.filterwarnings("ignore:HFMAML needs a twice differentiable network")
def test_an_exact_meta_gradient_through_weight_norm_is_pointed_out(tmp_path: Path) -> None:
    batches = [make_episodes(seed=seed) for seed in range(3)]
    network = build("mlp")
    torch.nn.utils.parametrizations.weight_norm(network[1])
    run = trainer(tmp_path, MetaGradientMonitor(1, episodes=batches))
    with pytest.warns(
        UserWarning, match="measures the exact meta-gradient, which is wrong through"
    ):
        run.fit(HFMAML(network, 0.1), DataLoader(batches, batch_size=None))


def test_a_loader_of_independent_tasks_is_drawn_from_its_start_in_each_fit() -> None:
    data = GlyphsDataModule(ways=2, meta_batch_size=2, train_batches=2)
    loader = data.train_dataloader()
    tasks, streams = IndependentTasks("stationarity", 2, loader), []
    for drawn in (0, 0, 3):
        tasks.start_at(drawn)
        streams.append([tasks._next_of(loader).support_x for _ in range(5)])
    assert len({tuple(x.flatten().tolist()) for x in streams[0]}) == 5, "each pass has fresh tasks"
    assert all(torch.equal(a, b) for a, b in zip(streams[0], streams[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(streams[0][3:], streams[2], strict=False))
