"""Quiet trainers on the device of the test, of one epoch unless told otherwise."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

QUIET = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


class _OnDevice(SingleDeviceStrategy):
    """Leaves a model on its device after a run, for what the test does with it then.

    Lightning moves it to the CPU.
    """

    def teardown(self) -> None:
        model = self.lightning_module
        super().teardown()
        if model is not None:
            model.to(self.root_device)


def on_device() -> dict[str, Any]:
    """Return the arguments of a trainer on the device of the test, and on no other GPU."""
    device = torch.get_default_device()
    if device.type == "cpu":
        return {"accelerator": "cpu"}
    return {"accelerator": device.type, "devices": 1, "strategy": _OnDevice(device)}


def trainer(folder: Path, **arguments: Any) -> Trainer:
    settings = {"default_root_dir": folder, "max_epochs": 1, **on_device(), **QUIET}
    return Trainer(**settings | arguments)


def trainer_in_double(folder: Path, **arguments: Any) -> Trainer:
    return trainer(folder, **{"precision": "64-true", **arguments})
