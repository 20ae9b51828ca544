"""Pictures of learning: they show what validation logged, and a run that goes on draws on."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from helpers.networks import build, make_episodes
from helpers.trainers import on_device
from lightning_maml import MAML, MLP, Conv4, Episodes, ProtoNet, SkipNonFinite
from lightning_maml.callbacks import MetaGradientMonitor, TrainingPictures, draw_learning
from lightning_maml.callbacks.training_pictures import Validation
from lightning_maml.datamodules import GlyphsDataModule


def in_float32(seed: int, tasks: int = 4) -> Episodes:
    episodes = make_episodes(tasks=tasks, seed=seed)
    return episodes._replace(support_x=episodes.support_x.float(), query_x=episodes.query_x.float())


def loader(batches: list[Episodes]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "enable_checkpointing": False,
}
TRAIN, VAL = [in_float32(seed) for seed in range(4)], [in_float32(seed) for seed in range(10, 13)]


def there(batches: list[Episodes]) -> list[Episodes]:
    """Return batches on the device of the test, where a trainer moves them to."""
    device = torch.get_default_device()
    return [Episodes(*(tensor.to(device) for tensor in batch)) for batch in batches]


def fit(
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    val: Any = None,
    checkpoint: Path | None = None,
    epochs: int = 2,
) -> Trainer:
    run = Trainer(
        default_root_dir=folder,
        **on_device(),
        max_epochs=epochs,
        callbacks=[*callbacks],
        **QUIET,
    )
    run.fit(module, loader(TRAIN), loader(VAL) if val is None else val, ckpt_path=checkpoint)
    return run


def module() -> MAML:
    return MAML(build("mlp").float(), 0.3, test_steps=2, optimizer=partial(torch.optim.SGD, lr=0.1))


def test_history_has_the_figures_of_validation_and_training(tmp_path: Path) -> None:
    pictures, still = (
        TrainingPictures(),
        MAML(build("mlp").float(), 0.3, test_steps=2, optimizer=partial(torch.optim.SGD, lr=0.0)),
    )
    fit(tmp_path, still, pictures)
    right = [
        (still.evaluate(batch).aux.argmax(-1) == batch.query_y[:, None]).double().mean(-1)
        for batch in there(VAL)
    ]
    per_task = torch.cat(right)  # after 0, 1, 2 steps
    in_training = MAML(build("mlp").float(), 0.3)
    train = torch.cat(
        [
            (in_training.evaluate(batch).aux[:, -1].argmax(-1) == batch.query_y).double().mean(-1)
            for batch in there(TRAIN)
        ]
    )
    ci95 = 1.96 * float(per_task[:, -1].std()) / len(per_task) ** 0.5
    expected = (
        float(per_task[:, -1].mean()),
        ci95,
        float(per_task[:, 0].mean()),
        float(train.mean()),
    )
    assert [found.step for found in pictures.history] == [4, 8]
    for found in pictures.history:
        assert found[1:] == pytest.approx(expected, abs=1e-6)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["learning.png"]


def test_a_trainer_that_logs_nothing_goes_without_pictures(tmp_path: Path) -> None:
    run = Trainer(
        barebones=True,
        **on_device(),
        default_root_dir=tmp_path,
        max_epochs=2,
        callbacks=[TrainingPictures()],
    )
    run.fit(module(), loader(TRAIN), loader(VAL))
    assert run.global_step == 2 * len(TRAIN)
    assert not [*tmp_path.rglob("*.png")]


def test_draw_learning_shows_the_lines_and_the_confidence_interval() -> None:
    figure = draw_learning(
        [Validation(10, 0.5, 0.1, 0.2, 0.6), Validation(20, 0.7, 0.05, 0.25, 0.8)], "accuracy"
    )
    axes = figure.axes[0]
    lines = [[pytest.approx(value) for value in line.get_ydata()] for line in axes.lines]
    assert lines == [[0.5, 0.7], [0.6, 0.8], [0.2, 0.25]]
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({round(float(y), 6) for x, y in band if x == 10}) == [0.4, 0.6]
    assert axes.get_ylabel() == "query accuracy"


def test_fidelity_is_drawn_beside_a_meta_gradient_monitor(tmp_path: Path) -> None:
    fit(tmp_path, module(), MetaGradientMonitor(2, episodes=[in_float32(20)]), TrainingPictures())
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["fidelity.png", "learning.png"]


def test_a_resumed_run_continues_the_history(tmp_path: Path) -> None:
    whole, half, rest = TrainingPictures(), TrainingPictures(), TrainingPictures()
    fit(tmp_path, module(), whole)
    fit(tmp_path, module(), half, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, module(), rest, checkpoint=tmp_path / "half.ckpt")
    assert rest.history == whole.history


def test_a_run_resumed_between_two_validations_has_the_same_history(tmp_path: Path) -> None:
    def pictures(*others: Callback, checkpoint: Path | None = None) -> TrainingPictures:
        torch.manual_seed(0)
        found, data = (
            TrainingPictures(),
            GlyphsDataModule(ways=3, meta_batch_size=2, train_batches=4, val_tasks=4),
        )
        run = Trainer(
            default_root_dir=tmp_path,
            **on_device(),
            max_epochs=1,
            callbacks=[found, *others],
            **(QUIET | {"enable_checkpointing": True}),
        )
        run.fit(
            MAML(Conv4(1, 3, 28, channels=4, activation="gelu"), 0.3), data, ckpt_path=checkpoint
        )
        return found

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    assert pictures(keep).history == pictures(checkpoint=tmp_path / "step=2.ckpt").history


@pytest.mark.parametrize(("is_global_zero", "steps"), [(True, 2), (False, 0)])
def test_only_process_0_restores_the_training_sums_of_a_checkpoint(
    is_global_zero: bool, steps: int
) -> None:
    pictures = TrainingPictures()
    pictures.load_state_dict({"history": [], "sum": 1.5, "steps": 2})
    trainer: Any = SimpleNamespace(is_global_zero=is_global_zero)
    pictures.on_fit_start(trainer, module())
    assert pictures.state_dict()["steps"] == steps


def test_skipped_steps_do_not_count_in_the_training_mean(tmp_path: Path) -> None:
    broken = TRAIN[0]._replace(query_x=torch.full_like(TRAIN[0].query_x, torch.nan))
    some, without = TrainingPictures(), TrainingPictures()
    for pictures, batches in ((some, [broken, TRAIN[1], broken, TRAIN[2]]), (without, TRAIN[1:3])):
        run = Trainer(
            default_root_dir=tmp_path,
            **on_device(),
            max_epochs=1,
            callbacks=[SkipNonFinite(), pictures],
            **QUIET,
        )
        run.fit(module(), loader(batches), loader(VAL))
    assert some.history[0].train == without.history[0].train


def test_nothing_is_drawn_for_a_subclass_with_other_validation_figures(tmp_path: Path) -> None:
    class Own(MAML):
        def validation_step(self, batch: Episodes, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/loss", 0.25)

    run = fit(tmp_path, Own(build("mlp").float(), 0.3), TrainingPictures())
    assert run.callback_metrics["val/loss"] == 0.25
    assert "val/loss_ci95" not in run.callback_metrics
    assert list(tmp_path.glob("*.png")) == []


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match="Expected MAML, one of its variants or ProtoNet for TrainingPictures but got Boring",
    ):
        fit(tmp_path, BoringModel(), TrainingPictures())


def test_pictures_of_several_loaders_baselines_and_regression(tmp_path: Path) -> None:
    several = TrainingPictures()
    fit(tmp_path / "several", module(), several, val=[loader(VAL), loader(VAL[:1])])
    one = TrainingPictures()
    fit(tmp_path / "one", module(), one)
    assert several.history == one.history
    torch.manual_seed(0)
    fit(
        tmp_path / "baseline",
        ProtoNet(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))),
        TrainingPictures(),
    )
    assert (tmp_path / "baseline" / "learning.png").is_file()

    def regression(batch: Episodes) -> Episodes:
        support, query = batch.support_x.flatten(2), batch.query_x.flatten(2)
        return Episodes(support, support[:, :, :1], query, query[:, :, :1])

    pictures = TrainingPictures()
    run = Trainer(
        default_root_dir=tmp_path / "targets",
        **on_device(),
        max_epochs=1,
        callbacks=[pictures],
        **QUIET,
    )
    model = MAML(MLP(64, 1), 0.01, loss=torch.nn.MSELoss())
    run.fit(
        model,
        loader([regression(batch) for batch in TRAIN]),
        loader([regression(batch) for batch in VAL]),
    )
    assert pictures.history[0].mean == pytest.approx(float(run.callback_metrics["val/loss"]))


def test_curves_are_drawn_under_any_default_device() -> None:
    with torch.device("meta"):
        figure = draw_learning([Validation(100, 0.5, 0.25, 0.25, 0.75)], "accuracy")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.5]
