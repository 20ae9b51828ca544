"""Quiet trainers on the CPU, of one epoch unless told otherwise."""

from pathlib import Path
from typing import Any

from lightning import Trainer

QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def trainer(folder: Path, **arguments: Any) -> Trainer:
    return Trainer(**{"default_root_dir": folder, "max_epochs": 1, **QUIET, **arguments})


def trainer_in_double(folder: Path, **arguments: Any) -> Trainer:
    return trainer(folder, **{"precision": "64-true", **arguments})
