"""A run resumed from any checkpoint ends as the one that was never stopped.

On the CPU it does bit for bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from helpers.runs import MODELS, Noise, is_same
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import MAML, AdaptiveMetaStepsize
from lightning_maml.algorithms import resume

EPOCHS = 2
LATER = ("FO-MAML", "LSLR", "Reptile", "ANIL", "BOIL", "MetaSGD", "iMAML")
QUICK = ("MAML with dropout", "MAML, adaptive meta-stepsize")


class Checkpoints(Callback):
    """Saves one after every step, before and after the validations too."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validated")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")

    @staticmethod
    def _save(trainer: Trainer, when: str) -> None:
        trainer.save_checkpoint(
            Path(trainer.default_root_dir) / f"{trainer.fit_loop.total_batch_idx:02d}_{when}.ckpt"
        )


def ended(
    folder: Path,
    name: str,
    checkpoint: Path | None,
    workers: int = 0,
    noise: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Train to the end, from the start or a checkpoint; return what there is at the end.

    Other random numbers are drawn before.
    """
    torch.manual_seed(0 if checkpoint is None else 1234)
    callbacks = [Checkpoints()] if checkpoint is None else []
    if "adaptive" in name:
        callbacks.append(AdaptiveMetaStepsize(scale=1.0, tasks=2, every_n_steps=3))
    settings = {
        "max_epochs": EPOCHS,
        "val_check_interval": 2,
        "callbacks": callbacks,
        "precision": "32-true",
        "enable_checkpointing": False,
    }
    run = trainer(folder, **(settings | options))
    model = MODELS[name]()
    run.fit(model, Noise(noise, num_workers=workers, train_batches=4), ckpt_path=checkpoint)
    return {
        "step": run.global_step,
        "model": model.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
    }


def resumes_from_each(folder: Path, name: str, every: int = 1, **options: Any) -> None:
    whole = ended(folder, name, None, **options)
    checkpoints = sorted(folder.glob("*.ckpt"))
    assert len(checkpoints) > whole["step"] >= 4
    differing = [
        file.name
        for file in checkpoints[::every]
        if not is_same(ended(folder, name, file, **options), whole)
    ]
    assert not differing


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LATER)) for name in MODELS]
)
def test_every_algorithm_goes_on_from_every_checkpoint(tmp_path: Path, name: str) -> None:
    resumes_from_each(tmp_path, name)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"noise": 0.1},
        pytest.param({"precision": "64-true"}, marks=pytest.mark.slow),
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3},
        {"limit_train_batches": 3, "max_epochs": 3, "val_check_interval": 1.0},
        pytest.param({"val_check_interval": 1.0}, marks=pytest.mark.slow),
        {"check_val_every_n_epoch": 2, "val_check_interval": 1.0},
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, marks=pytest.mark.slow),
        {"gradient_clip_val": 0.01},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_resumed_run_equals_the_whole_one_under_each_trainer_option(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    resumes_from_each(tmp_path, "MAML with dropout", every=2, **options)


def test_a_validation_that_was_broken_off_leaves_no_random_numbers(tmp_path: Path) -> None:
    class BrokenOff(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    def fitted(model: MAML) -> dict[str, Any]:
        torch.manual_seed(0)
        trainer(tmp_path, precision="32-true").fit(model.train(), Noise())
        return model.state_dict()

    models = [MODELS["MAML with dropout"]() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, precision="32-true", callbacks=[BrokenOff()]).validate(models[1], Noise())
    assert is_same(*map(fitted, models))


def test_a_checkpoint_after_a_fit_has_the_random_numbers_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning has moved the model to the CPU by then; no test machine has a GPU."""
    model = MODELS["MAML with dropout"]()
    run = trainer(tmp_path, precision="32-true", max_epochs=1)
    run.fit(model, Noise())
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("cuda"))
    monkeypatch.setattr(resume, "random_state", lambda device: {"of": str(device)})
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    assert checkpoint["random_state"] == {"of": "cuda"}
