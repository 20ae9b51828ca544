"""Whole checkpoints, from which a run goes on as if it had never been interrupted."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lightning import LightningModule
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.non_finite import NonFinitePolicy
from lightning_maml.algorithms.resume import ResumeState, described, warn_of_other_settings
from lightning_maml.algorithms.trained_classes import TrainedClasses
from lightning_maml.errors import UserRuntimeError, UserTypeError, UserValueError
from lightning_maml.io.checkpoints import WholeCheckpoints, read_trained
from lightning_maml.io.plain import plain


class CheckpointedModule(LightningModule):
    """A module whose runs can be resumed exactly, from files that are whole or absent.

    Attributes:
        loss: The loss, which a checkpoint does not hold.
        non_finite: What becomes of steps whose loss or meta-gradient is not finite.
        run_folder: Where the run keeps its logs; all processes have to take part in asking the
            trainer for it.
    """

    loss: Any

    def __init__(self) -> None:
        super().__init__()
        self.non_finite = NonFinitePolicy()
        self.run_folder = Path()
        self._resume = ResumeState()
        self._trained_classes = TrainedClasses()

    def _save_settings(self, settings: dict[str, Any]) -> None:
        """Save the arguments that checkpoints hold."""
        self.save_hyperparameters(plain(settings))
        # Lightning takes an argument that equals the settings for them, and metrics of torchmetrics
        # equal everything
        self._hparams_name = None

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Load a model, running nothing in the file unless ``weights_only=False``.

        Raises:
            ValueError: If the file is not whole, asks for more than tensors and plain data, was not
                written by a trainer, or has weights of another loss.
        """
        parameter = inspect.signature(cls).parameters.get("network")
        if (
            parameter is not None
            and parameter.default is parameter.empty
            and "network" not in kwargs
        ):
            raise UserTypeError(
                "Expected the network, which a checkpoint does not hold, but got none; call "
                f"{cls.__name__}.load_from_checkpoint(path, network=...)."
            )
        weights_only = weights_only is None or weights_only
        if weights_only and isinstance(checkpoint_path, str | Path):
            named = read_trained(checkpoint_path).get("hyper_parameters") or {}
            if "_instantiator" in named:  # Lightning would import and call what it names
                raise UserValueError(
                    f"Expected {checkpoint_path} to hold plain hyperparameters but it names what "
                    "makes the model; it is not loaded."
                )
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )

    def setup(self, stage: str) -> None:
        """Have checkpoints written whole or not at all, unless the trainer has a plugin for them.

        Raises:
            TypeError: If the trainer's strategy splits parameters over processes.
        """
        if isinstance(
            self.trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy
        ):
            raise UserTypeError(
                "Expected a strategy that keeps whole parameters in each process but got "
                f"{type(self.trainer.strategy).__name__}; meta-gradients take other values for "
                "the parameters than the network holds: use 'ddp'."
            )
        self._resume.forget()
        self.run_folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a run needs to go on as if it had not been interrupted."""
        checkpoint["adapts_by"] = self._adaptation_settings()
        self._resume.save(self, checkpoint)
        self.non_finite.save(checkpoint)
        self._trained_classes.save(checkpoint)
        # for a trainer that was given a plugin of its own, too
        checkpoint.update(plain(checkpoint))

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights as torch does.

        Raises:
            ValueError: If ``strict`` and the loss that they were saved with has weights that this
                model's has not, or the reverse.
            RuntimeError: If other weights differ in shape or, if ``strict``, in name.
        """
        theirs, ours = (
            {name for name in names if name.startswith(("loss.", "support_loss."))}
            for names in (state_dict, self.state_dict())
        )
        if strict and theirs != ours:
            found = sorted(theirs ^ ours)
            where = "the checkpoint" if found[0] in theirs else "this model"
            raise UserValueError(
                f"Expected the loss that the checkpoint's model had but {found} are in {where} "
                "alone; make the model with the same `loss=` and `support_loss=`, because a "
                "checkpoint does not hold them."
            )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if not (differing := _differences(state_dict, self, strict)):
                raise
            raise UserRuntimeError(
                f"Expected weights of such a model but {differing}; make network and model as they "
                "were for training."
            ) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what a run needs to go on as if it had not been interrupted.

        Warns if the checkpoint's model adapted in another way.
        """
        warn_of_other_settings(checkpoint.get("adapts_by", {}), self._adaptation_settings())
        self._trained_classes.load(checkpoint)
        if self._trainer is not None and self.trainer.training:
            # Lightning does so later, when the weights are already rounded
            self.trainer.precision_plugin.convert_module(self)
            self._resume.load(checkpoint)
            self.non_finite.load(checkpoint)

    def _adaptation_settings(self) -> dict[str, Any]:
        """Return in words what adaptation depends on besides weights and hyperparameters."""
        return {"loss": described(self.loss)}

    def on_train_start(self) -> None:
        """Continue from where a checkpoint was written.

        Warns if an earlier run trained on classes that this one validates on, as happens where
        classes were added to a folder, and so are shared out in another way.
        """
        self._resume.restore(self)
        self._trained_classes.warn_if_among(self.trainer, "val")
        self._trained_classes.add(self.trainer)

    def on_test_start(self) -> None:
        """Warn if the model was trained on classes that it is now tested on."""
        self._trained_classes.warn_if_among(self.trainer, "test")

    def on_validation_start(self) -> None:
        """Remember the random numbers of training; outside of it, warn as for a test."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._trained_classes.warn_if_among(self.trainer, "val")
        elif not self.trainer.sanity_checking:
            self._resume.pause_random_numbers(self.device)

    def on_validation_end(self) -> None:
        """Continue the random numbers of training."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._resume.continue_random_numbers(self.device)


def _differences(theirs: Mapping[str, Any], model: LightningModule, strict: bool) -> str:
    """Return the first weights that differ in shape or, if strict, in name; "" if none do."""
    there, here = (
        {name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        for weights in (theirs, model.state_dict())
    )
    names = [name for name in there.keys() & here.keys() if there[name] != here[name]]
    if strict:
        names += there.keys() ^ here.keys()
    if not names:
        return ""
    order = [*{**here, **there}]
    found = [
        f"{name!r} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in sorted(names, key=order.index)[:3]
    ]
    return f"{len(names)} differ: {', '.join(found)}{', ...' if len(names) > 3 else ''}"
