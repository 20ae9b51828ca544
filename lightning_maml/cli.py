"""The command ``lightning-maml``."""

import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

import lightning_maml.callbacks  # noqa: F401  so that configs may name its classes without their module
from lightning_maml.datamodules import EpisodicDataModule
from lightning_maml.module import MAML


class _CLI(LightningCLI):
    def _parse_ckpt_path(self) -> None:
        """Do not merge the checkpoint's arguments into the config, where Lightning would: what is typed now decides."""

    def before_instantiate_classes(self) -> None:
        """Say so where a checkpoint was trained with other arguments than those given now."""
        command = self.config[self.config.subcommand]
        if command.get("ckpt_path") and Path(command.ckpt_path).is_file():
            try:
                saved = torch.load(command.ckpt_path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"Expected {command.ckpt_path} to be a whole checkpoint but it cannot be read: {reason}") from error
            given = command.model.init_args
            differing = [f"{name}={value} ({given[name]} now)" for name, value in saved.items() if name in given and given[name] != value]
            if differing:
                rank_zero_warn(
                    f"The checkpoint was trained with other arguments than those given now, which count: {', '.join(differing)}."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard and CSV, in ``default_root_dir/version_N`` (by default of ``runs``), unless the config names loggers."""
        if self._get(self.config_init, "trainer.logger") is None:
            folder = Path(self._get(self.config_init, "trainer.default_root_dir") or "runs")
            tensorboard = TensorBoardLogger(folder, name="")
            kwargs["logger"] = [tensorboard, CSVLogger(folder, name="", version=tensorboard.version)]
            warnings.filterwarnings("ignore", "Experiment logs directory")  # that the two share it is meant
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
    """Be the command ``lightning-maml``: what a user can cause ends it with one sentence, anything else with its traceback."""
    try:
        run(args)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        sentences = [str(cause) for cause in causes if str(cause).startswith("Expected ")]
        if not sentences:
            raise
        sys.exit(f"lightning-maml: {sentences[-1]}")
