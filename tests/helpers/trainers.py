"""Quiet trainers on the device of the test, of one epoch unless told otherwise."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

QUIET = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def on_device() -> dict[str, Any]:
    """Return the arguments of a trainer on the device of the test, and on no other GPU."""
    return {"accelerator": torch.get_default_device().type, "devices": 1}


def trainer(folder: Path, **arguments: Any) -> Trainer:
    settings = {"default_root_dir": folder, "max_epochs": 1, **on_device(), **QUIET}
    return Trainer(**settings | arguments)


def trainer_in_double(folder: Path, **arguments: Any) -> Trainer:
    return trainer(folder, **{"precision": "64-true", **arguments})
