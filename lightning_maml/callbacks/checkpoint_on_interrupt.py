"""End a run on Ctrl-C where its checkpoint is exact."""

import os
import signal
import sys
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

INTERRUPTED = 128 + signal.SIGINT
"""The exit status, by convention, of a process that SIGINT ended."""


class CheckpointOnInterrupt(Callback):
    """On Ctrl-C, finishes the step or validation, writes ``interrupted.ckpt``, and exits.

    The checkpoint is written beside the others, and the exit status is 130. A run that resumes from
    it ends as if it had never been interrupted. A second Ctrl-C ends the process at once. The
    command ``lightning-maml fit`` has this callback. Outside of the main thread, where no signal
    arrives, it does nothing.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_maml.callbacks import CheckpointOnInterrupt
        >>> trainer = Trainer(callbacks=[CheckpointOnInterrupt()], logger=False)
        >>> any(isinstance(callback, CheckpointOnInterrupt) for callback in trainer.callbacks)
        True
    """

    def __init__(self) -> None:
        self._is_interrupted = False
        self._before: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start listening for Ctrl-C."""
        self._is_interrupted = False
        # Python sets signal handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the checkpoint and exit, if any process was interrupted."""
        self._end_if_interrupted(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same after a validation in training, but not after the sanity check."""
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            self._end_if_interrupted(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same after training."""
        self._end_if_interrupted(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _on_signal(self, *_: Any) -> None:
        self._is_interrupted = True
        # the next Ctrl-C does what it did before training
        signal.signal(signal.SIGINT, self._before)
        rank_zero_info(
            "\nCtrl-C: the run ends after this step or validation; press it again, and it ends now."
        )

    def _end_if_interrupted(self, trainer: Trainer) -> None:
        # saving is collective, so all processes must take part if one of them was interrupted
        if not trainer.strategy.reduce_boolean_decision(self._is_interrupted, all=False):
            return
        path = os.path.join(_folder(trainer), "interrupted.ckpt")
        trainer.save_checkpoint(path)
        rank_zero_info(f"Interrupted after step {trainer.global_step}; go on with ckpt_path={path}")
        sys.exit(INTERRUPTED)


def _folder(trainer: Trainer) -> str:
    """Return the folder of the run's checkpoints, or ``checkpoints`` beside its logs."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            return str(callback.dirpath)
    return os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
