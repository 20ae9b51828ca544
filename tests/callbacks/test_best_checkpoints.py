"""A run that goes on in another folder keeps its best checkpoints, and nothing else is touched."""

import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from helpers.networks import build, make_episodes
from helpers.runs import MODELS, Noise
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import MAML, MLP, Episodes, KeepBestCheckpoints
from lightning_maml.callbacks import BestCheckpoint


def trained(folder: Path, epochs: int, checkpoint: Path | None = None, **options: Any) -> Trainer:
    """Train for epochs of two steps, the first being the best; checkpoints are in ``folder``."""
    kept = [
        ModelCheckpoint(folder, monitor="step", mode="min", save_top_k=2, filename="{step}"),
        ModelCheckpoint(folder, filename="last"),
    ]
    settings = {
        "precision": "32-true",
        "enable_checkpointing": True,
        "max_epochs": epochs,
        "callbacks": [KeepBestCheckpoints(), *kept],
    }
    run = trainer(folder, **(settings | options))
    run.fit(MODELS["FO-MAML"](), Noise(train_batches=2), ckpt_path=checkpoint)
    return run


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def of_best(run: Trainer) -> tuple[str, dict[str, float]]:
    """Return the name of the best and the scores of all that are kept."""
    callback = run.checkpoint_callback
    assert all(Path(path).parent == Path(callback.dirpath) for path in callback.best_k_models)
    return Path(callback.best_model_path).name, {
        Path(path).name: float(score) for path, score in callback.best_k_models.items()
    }


def test_best_checkpoints_are_copied_through_several_folders(tmp_path: Path) -> None:
    run, first = trained(tmp_path / "first", 1), tmp_path / "first" / "last.ckpt"
    assert of_best(run) == ("step=2.ckpt", {"step=2.ckpt": 2})
    run = trained(tmp_path / "second", 2, first)
    assert of_best(run) == ("step=2.ckpt", {"step=2.ckpt": 2, "step=4.ckpt": 4})
    run = trained(tmp_path / "third", 3, tmp_path / "second" / "last.ckpt")
    assert of_best(run) == ("step=2.ckpt", {"step=2.ckpt": 2, "step=4.ckpt": 4})
    assert names(tmp_path / "third") == {"step=2.ckpt", "step=4.ckpt", "last.ckpt"}
    assert (tmp_path / "third" / "step=2.ckpt").read_bytes() == (
        tmp_path / "first" / "step=2.ckpt"
    ).read_bytes()


def test_no_checkpoint_is_copied_if_one_was_replaced_since(tmp_path: Path) -> None:
    trained(tmp_path / "first", 2)
    shutil.copy(tmp_path / "first" / "step=4.ckpt", tmp_path / "first" / "step=2.ckpt")
    run = trained(tmp_path / "second", 3, tmp_path / "first" / "last.ckpt")
    assert of_best(run) == ("step=6.ckpt", {"step=6.ckpt": 6})
    assert names(tmp_path / "second") == {"step=6.ckpt", "last.ckpt"}


def test_a_damaged_best_checkpoint_does_not_stop_the_run(tmp_path: Path) -> None:
    trained(tmp_path / "first", 1)
    (tmp_path / "first" / "step=2.ckpt").write_bytes(b"PK")
    assert of_best(trained(tmp_path / "second", 2, tmp_path / "first" / "last.ckpt")) == (
        "step=4.ckpt",
        {"step=4.ckpt": 4},
    )


def test_files_in_the_new_folder_are_not_overwritten(tmp_path: Path) -> None:
    trained(tmp_path / "first", 1)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "step=2.ckpt").write_text("of another run")
    trained(tmp_path / "second", 2, tmp_path / "first" / "last.ckpt")
    assert (tmp_path / "second" / "step=2.ckpt").read_text() == "of another run"


def test_a_hostile_checkpoint_cannot_write_outside_the_new_folder(tmp_path: Path) -> None:
    trained(tmp_path / "first", 1)
    file = tmp_path / "first" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    state = next(state for state in content["callbacks"].values() if state.get("best_k_models"))
    (score,) = state["best_k_models"].values()
    shutil.copy(tmp_path / "first" / "step=2.ckpt", tmp_path / "victim.txt")
    (tmp_path / "runs" / "second").mkdir(parents=True)
    state["best_k_models"] = {f"{state['dirpath']}/../victim.txt": score}
    torch.save(content, file)
    trained(tmp_path / "runs" / "second", 2, file)
    assert names(tmp_path / "runs") == {"second"}


@pytest.mark.parametrize("call", ["validate", "test"])
def test_validate_and_test_copy_no_checkpoints(tmp_path: Path, call: str) -> None:
    trained(tmp_path / "first", 1)
    run = trained(tmp_path / "second", 1)
    before = run.checkpoint_callback.best_model_path
    getattr(run, call)(
        MODELS["FO-MAML"](),
        Noise(train_batches=2, test_tasks=6),
        ckpt_path=tmp_path / "first" / "last.ckpt",
        verbose=False,
    )
    assert run.checkpoint_callback.best_model_path == before


def test_fast_dev_run_copies_no_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path / "first", 1)
    trained(tmp_path / "second", 2, tmp_path / "first" / "last.ckpt", fast_dev_run=True)
    assert not (tmp_path / "second").exists()


def best_of(folder: Path, loaders: Any, epochs: int = 3, **options: Any) -> Trainer:
    """Train with the callback that finds out what to monitor."""
    settings = {
        "enable_checkpointing": True,
        "max_epochs": epochs,
        "callbacks": [KeepBestCheckpoints(), BestCheckpoint(), ModelCheckpoint(filename="last")],
    }
    run = trainer(folder, **settings)
    run.fit(MAML(**options), *loaders, ckpt_path=None)
    return run


def test_of_a_regression_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 5, 2, dtype=torch.float64)
    loader = DataLoader([Episodes(x, x, x, x)], batch_size=None)
    model = {"network": MLP(2, 2), "loss": torch.nn.functional.mse_loss}
    run = best_of(tmp_path, [loader, loader], **model)
    best = run.checkpoint_callback
    assert best.monitor == "val/loss"
    torch.testing.assert_close(best.best_model_score.cpu(), run.callback_metrics["val/loss"])
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == 2


def test_of_several_loaders_the_first_counts(tmp_path: Path) -> None:
    episodes = make_episodes()
    loader = DataLoader([episodes], batch_size=None)
    run = best_of(tmp_path, [loader, [loader, loader]], network=build("mlp"))
    assert run.checkpoint_callback.monitor == "val/accuracy/dataloader_idx_0"


def test_the_best_one_found_by_itself_is_carried_over(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes()], batch_size=None)

    def run(folder: Path, rate: float, epochs: int, path: Path | None = None) -> BestCheckpoint:
        best = BestCheckpoint()
        model = MAML(build("mlp"), optimizer=lambda params: torch.optim.SGD(params, lr=rate))
        callbacks = [KeepBestCheckpoints(), best, ModelCheckpoint(filename="last")]
        settings = {"enable_checkpointing": True, "max_epochs": epochs, "callbacks": callbacks}
        trainer(folder, **settings).fit(model, loader, loader, ckpt_path=path)
        return best

    first = run(tmp_path / "first", 0.0, 1)
    again = run(tmp_path / "second", 0.0, 2, Path(first.best_model_path).with_name("last.ckpt"))
    assert again.best_model_score == first.best_model_score
    assert again.monitor == "val/accuracy"
    assert Path(again.best_model_path).parent == Path(again.dirpath) != Path(first.dirpath)
    assert Path(again.best_model_path).read_bytes() == Path(first.best_model_path).read_bytes()


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_callback_of_an_earlier_fit_begins_anew_with_another_model(
    tmp_path: Path, same_trainer: bool
) -> None:
    """Otherwise a second model that is worse saves nothing, and the first one is tested."""
    best = BestCheckpoint()
    episodes = make_episodes()
    loader = DataLoader([episodes], batch_size=None)

    def new_trainer(folder: str) -> Trainer:
        settings = {"enable_checkpointing": True, "max_epochs": 1, "callbacks": [best]}
        return trainer(tmp_path / folder, **settings)

    def model(seed: int) -> MAML:
        return MAML(build("mlp", seed), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))

    run = new_trainer("0")
    for seed in range(3):
        if seed and not same_trainer:
            run = new_trainer(str(seed))
        run.fit_loop.max_epochs = seed + 1
        run.fit(fitted := model(seed), loader, loader)
        assert float(best.best_model_score) <= 1
        saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        for name, weight in fitted.state_dict().items():
            assert torch.equal(saved[name], weight)
        # the next one is not to beat it
        best.best_model_score = best.best_k_models[best.best_model_path] = torch.tensor(2.0)
        best.kth_value = torch.tensor(2.0)
    assert len([*tmp_path.rglob("best*.ckpt")]) == 3


def test_the_same_fit_that_goes_on_keeps_its_best(tmp_path: Path) -> None:
    best = BestCheckpoint()
    loader = DataLoader([make_episodes()], batch_size=None)
    settings = {"enable_checkpointing": True, "max_epochs": 1, "callbacks": [best]}
    run = trainer(tmp_path, **settings)
    model = MAML(build("mlp"), optimizer=partial(torch.optim.SGD, lr=0.0))
    run.fit(model, loader, loader)
    best.best_model_score = best.best_k_models[best.best_model_path] = torch.tensor(2.0)
    best.kth_value = torch.tensor(2.0)
    run.fit_loop.max_epochs = 2
    run.fit(model, loader, loader)
    assert best.best_model_score == 2.0
    # it can be sent to other processes
    assert pickle.loads(pickle.dumps(best)).best_model_path == best.best_model_path


def test_a_resumed_run_keeps_the_best_of_its_callback(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes()], batch_size=None)
    model = MAML(build("mlp"), optimizer=partial(torch.optim.SGD, lr=0.0))
    best = BestCheckpoint()

    def fit(folder: str, epochs: int, path: Path | None = None) -> None:
        settings = {"enable_checkpointing": True, "max_epochs": epochs}
        callbacks = [best, ModelCheckpoint(tmp_path / folder, filename="last")]
        run = trainer(tmp_path / folder, **settings, callbacks=callbacks)
        run.fit(model, loader, loader, ckpt_path=path)

    fit("first", 1)
    first = best.best_model_path
    fit("second", 2, tmp_path / "first" / "last.ckpt")
    assert best.best_model_path == first  # the second was no better


def test_a_validation_before_the_fit_decides_nothing(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes(tasks=2)], batch_size=None)
    callback = BestCheckpoint()
    settings = {"enable_checkpointing": True, "callbacks": [callback]}
    run, model = trainer(tmp_path / "first", **settings), MAML(build("mlp"))
    run.validate(model, [loader, loader], verbose=False)
    run.fit(model, loader, loader)
    assert callback.monitor == "val/accuracy"
    trainer(tmp_path / "second", **settings).fit(MAML(build("mlp")), loader, loader)
    assert Path(callback.best_model_path).is_relative_to(tmp_path / "second")


class OtherNames(MAML):
    def on_validation_epoch_end(self) -> None:
        self.log("valid_loss", 1.0)


def test_a_validation_without_the_figures_that_it_knows_is_pointed_out(tmp_path: Path) -> None:
    loader = DataLoader([make_episodes(tasks=2)], batch_size=None)
    settings = {"enable_checkpointing": True, "callbacks": [BestCheckpoint()]}
    with pytest.warns(UserWarning, match=r"neither val/accuracy nor val/loss but \[.*'valid_loss'"):
        trainer(tmp_path, **settings).fit(OtherNames(build("mlp")), loader, loader)
