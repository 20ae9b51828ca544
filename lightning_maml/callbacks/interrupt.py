"""Ctrl-C ends a run at a point where a checkpoint of it is exact."""

import os
import signal
import sys
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

INTERRUPTED = 128 + signal.SIGINT
"""The exit status, by convention, of a process that SIGINT ended."""


class CheckpointOnInterrupt(Callback):
    """On Ctrl-C finishes the step or validation, writes ``interrupted.ckpt`` beside the checkpoints, and ends with status 130.

    A run that goes on from there ends as if it had never been interrupted. A second Ctrl-C ends the
    process at once. The command ``lightning-maml fit`` has this callback. Outside of the main
    thread, where no signal arrives, it does nothing.
    """

    def __init__(self) -> None:
        self._is_interrupted = False
        self._before: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start listening for Ctrl-C."""
        self._is_interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the checkpoint and end, if any process was interrupted."""
        self._end_if_interrupted(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same after a validation."""
        if trainer.validating:  # and not in the check before training
            self._end_if_interrupted(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same after training."""
        self._end_if_interrupted(trainer)

    def _end_if_interrupted(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._is_interrupted, all=False):
            path = os.path.join(_folder(trainer), "interrupted.ckpt")
            trainer.save_checkpoint(path)
            rank_zero_info(
                f"Interrupted after step {trainer.global_step}; go on with ckpt_path={path}"
            )
            sys.exit(INTERRUPTED)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _on_signal(self, *_: Any) -> None:
        self._is_interrupted = True
        signal.signal(signal.SIGINT, self._before)
        rank_zero_info(
            "\nCtrl-C: the run ends after this step or validation; once more, and it ends now."
        )


def _folder(trainer: Trainer) -> str:
    """Return where the run's checkpoints are or, if it keeps none, ``checkpoints`` beside its logs."""
    folders = [
        str(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    ]
    return (
        folders[0]
        if folders
        else os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    )
