"""The command ``lightning-maml``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_maml.callbacks  # noqa: F401  so that configs may name its classes without their module
from lightning_maml.datamodules import EpisodicDataModule
from lightning_maml.module import MAML


class _CLI(LightningCLI):
    def _parse_ckpt_path(self) -> None:
        """Do nothing: what config and command line say counts, also for ``test --ckpt_path``, and not what the checkpoint was made with."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard and CSV, in ``default_root_dir/version_N`` (by default of ``runs``), unless the config names loggers."""
        if self._get(self.config_init, "trainer.logger") is None:
            folder = Path(self._get(self.config_init, "trainer.default_root_dir") or "runs")
            tensorboard = TensorBoardLogger(folder, name="")
            kwargs["logger"] = [tensorboard, CSVLogger(tensorboard.log_dir, name="", version="csv")]
        return super().instantiate_trainer(**kwargs)


def run(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> LightningCLI:
    """Run ``lightning-maml fit | validate | test | predict``.

    Args:
        args: The command line, by default the process's own.
        callbacks: Added to those of the config.

    Returns:
        The finished command with its ``trainer``, ``model`` and ``datamodule``.
    """
    return _CLI(
        MAML,
        EpisodicDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"callbacks": list(callbacks)},
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Be the command ``lightning-maml``."""
    run(args)
