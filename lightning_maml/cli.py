"""The command ``lightning-maml``."""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from typing_extensions import override

from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes
from lightning_maml.batches.meta_batch import parts_of
from lightning_maml.batches.trees import map_tensors

# as they are imported, configs may name all callbacks without their module
from lightning_maml.callbacks import (
    AdaptiveMetaStepsize,
    BestCheckpoint,
    CheckpointOnInterrupt,
    KeepBestCheckpoints,
)
from lightning_maml.callbacks.meta_stepsize import is_plain_sgd
from lightning_maml.core.hvp import default_probe_radius
from lightning_maml.core.params import norm, subtract
from lightning_maml.datamodules import EpisodicDataModule
from lightning_maml.errors import (
    UserError,
    UserFileNotFoundError,
    UserFloatingPointError,
    UserTypeError,
    UserValueError,
)
from lightning_maml.execution.allocator import keep_freed_memory
from lightning_maml.io.checkpoints import read_checkpoint, read_trained
from lightning_maml.io.replay import load_step
from lightning_maml.theory import paper_scale
from lightning_maml.theory.report import Adaptive, Settings, report
from lightning_maml.theory.sizes_report import check_accuracy, sizes_report
from lightning_maml.verification.check import check


class _Trainer(Trainer):
    """Lightning's trainer with three more commands."""

    def measure(
        self,
        model: EpisodicModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        tasks: int = 16,
        epsilon: float | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure the theory's constants, and say which conditions of the theorems hold.

        Args:
            model: The model, at its initial weights.
            datamodule: Gives the training tasks.
            ckpt_path: A checkpoint at whose weights to measure instead.
            tasks: Training tasks to measure on.
            epsilon: Say also how many iterations, tasks and samples the theorems ask for if the
                expected norm of the gradient of F is to be at most this.
            weights_only: Has no effect: nothing else is ever read. It is here so that the config
                saved by a fit can be used.
        """
        if not isinstance(model, MAML):
            raise UserTypeError(
                "Expected MAML or one of its variants, which the theory is about, but got "
                f"{type(model).__name__}."
            )
        if not isinstance(datamodule, EpisodicDataModule):
            raise UserTypeError(
                "Expected a datamodule of lightning_maml, which draws tasks for this purpose, but "
                f"got {type(datamodule).__name__}; measure in Python, "
                "model.probe(episodes).constants(inner_lr, steps)."
            )
        if tasks < 2:
            raise UserValueError(
                f"Expected `tasks` to be at least 2, for a deviation between them, but got {tasks}."
            )
        if epsilon is not None:
            check_accuracy(epsilon)
        self._prepare(model, datamodule, ckpt_path)
        episodes = _transferred(
            self, datamodule.independent_episodes("measure", 0, tasks), model, datamodule
        )
        probe, alpha = model.probe(episodes, progress=True), model.check_for_theory()
        constants = probe.constants(alpha, model.train_steps)
        if not math.isfinite(constants.L + constants.rho):
            raise UserFloatingPointError(
                "Expected finite curvature along the inner path but it is not; lower inner_lr."
            )
        if constants.L == 0:
            raise UserValueError(
                "Expected task losses that bend, which the theorems are about, but they are linear "
                "along the inner path; give the network or the loss some curvature."
            )
        print(f"\n{type(model).__name__} at {_weights(ckpt_path)}, {tasks} training tasks\n")
        settings = _settings(self, model, datamodule, episodes)
        print(report(constants, settings))
        if epsilon is not None:
            objective = partial(probe.objective, steps=model.train_steps)
            print(f"\n{sizes_report(epsilon, constants, settings, objective)}")
        if model.curvature != "exact" and not (
            isinstance(episodes, ResampledEpisodes) and episodes.hessian_y.shape[2] == 0
        ):
            exact = model.meta_gradient(episodes, "exact")
            error = float(norm(subtract(model.meta_gradient(episodes), exact)) / norm(exact))
            print(
                f"\nThe meta-gradient of {type(model).__name__} differs from the exact one by "
                f"{error:.2g} of it, on these tasks together."
            )

    def check(
        self,
        model: EpisodicModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Check the model on the first training batch, before training it.

        Args:
            model: The model, at its initial weights.
            datamodule: Gives the batch.
            ckpt_path: A checkpoint whose weights to take instead.
            weights_only: Has no effect: nothing else is ever read. It is here so that the config
                saved by a fit can be used.
        """
        self._prepare(model, datamodule, ckpt_path)
        model.trainer, self.datamodule = self, datamodule  # which knows its ways
        datamodule.setup("fit")
        batch = next(iter(datamodule.train_dataloader()))
        episodes = parts_of(model.as_meta_batch(_transferred(self, batch, model, datamodule)))[0]
        with self.precision_plugin.train_step_context():
            # it refuses models without an inner loop
            report = check(model, episodes)  # type: ignore[arg-type]
        print(
            f"\n{type(model).__name__} at {_weights(ckpt_path)}, the first training "
            f"batch\n\n{report}"
        )
        if not report.ok:
            sys.exit(1)

    def _prepare(
        self, model: EpisodicModule, datamodule: LightningDataModule, ckpt_path: str | None
    ) -> None:
        """Give the model its weights, precision and device, and the datamodule its files."""
        if ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path)
            if "state_dict" not in checkpoint:  # which is all that is needed of a checkpoint
                checkpoint = read_trained(ckpt_path)
            model.load_state_dict(checkpoint["state_dict"])
        self.precision_plugin.convert_module(model).to(self.strategy.root_device)
        # the episodes and their transforms are those of training
        datamodule.trainer, self.training = self, True
        datamodule.prepare_data()

    def replay(
        self,
        model: EpisodicModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Repeat a step that broke a run.

        Args:
            model: The model as it was in that run.
            datamodule: Has no effect: the step's file holds its tasks.
            ckpt_path: The file of the step that the run saved.
            weights_only: Has no effect: nothing else is ever read. It is here so that the config
                saved by a fit can be used.
        """
        if ckpt_path is None:
            raise UserValueError(
                "Expected `ckpt_path` to be the file of a step that broke a run but got none."
            )
        episodes, epoch = load_step(model.to(self.strategy.root_device), ckpt_path)
        model.trainer = self  # the model may depend on its epoch
        # Lightning declares a type without it
        self.fit_loop.epoch_progress.current.processed = epoch  # type: ignore[attr-defined]
        with self.precision_plugin.train_step_context():
            loss = model.meta_loss(episodes)
        print(
            f"\nThe step of {ckpt_path} does not break this model: its query loss is {loss:.6g}, "
            "and its meta-gradient is finite."
        )


def _transferred(
    trainer: Trainer, batch: Any, model: EpisodicModule, datamodule: LightningDataModule
) -> Any:
    """Return a batch as a trainer gives it to the model."""

    def hook(name: str) -> Callable[[Any, int], Any]:
        owner = datamodule if is_overridden(name, datamodule) else model
        found: Callable[[Any, int], Any] = getattr(owner, name)
        return found

    batch = trainer.precision_plugin.convert_input(batch)
    batch = hook("on_before_batch_transfer")(batch, 0)
    batch = map_tensors(lambda tensor: tensor.to(model.device), batch)
    return hook("on_after_batch_transfer")(batch, 0)


def _weights(ckpt_path: str | None) -> str:
    return "the initial weights" if ckpt_path is None else ckpt_path


def _stepsize(trainer: Trainer, model: MAML) -> Adaptive | float | None:
    """Return the meta-stepsize of plain SGD, or None where steps are others than the theory's."""
    # as Lightning takes it: an optimizer, alone or with schedulers in a dict or in two lists
    optimizer: Any = model.configure_optimizers()
    is_scheduled = False
    while not isinstance(optimizer, Optimizer):
        if isinstance(optimizer, dict):
            is_scheduled |= optimizer.get("lr_scheduler") is not None
            optimizer = optimizer["optimizer"]
        else:
            is_scheduled |= isinstance(optimizer[-1], Sequence) and len(optimizer[-1]) > 0
            optimizer = optimizer[0]
    if not is_plain_sgd(optimizer) or trainer.gradient_clip_val:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdaptiveMetaStepsize):
            of_papers = paper_scale(callback.rule, model.curvature)
            scale = of_papers if callback.scale is None else callback.scale
            return Adaptive(callback.rule, scale, callback.tasks * trainer.world_size)
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    return None if is_scheduled or len(rates) > 1 else rates.pop()


def _settings(
    trainer: Trainer, model: MAML, datamodule: EpisodicDataModule, episodes: AnyEpisodes
) -> Settings:
    return Settings(
        curvature=model.curvature,
        inner_lr=model.check_for_theory(),
        steps=model.train_steps,
        tasks=datamodule.meta_batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        query=episodes.query_y.shape[1],
        resampling=(episodes.support_y.shape[2], episodes.hessian_y.shape[2])
        if isinstance(episodes, ResampledEpisodes)
        else None,
        probe_radius=model.probe_radius
        or default_probe_radius(p for p in model.network.parameters() if p.requires_grad),
        stepsize=_stepsize(trainer, model),
        kinks=model.kinks(episodes),
    )


class SaveConfig(SaveConfigCallback):
    """Saves the config of a run, of a training without the checkpoint that it went on from.

    With it the config would test the weights from before that run. No file is overwritten: the
    folder may be that of the user's own config, as it is with some loggers and without any. If
    there is a ``config.yaml``, the name is ``config_1.yaml``, and so on.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.config = self.config.clone()
            self.config.ckpt_path = None
        folder = Path(trainer.log_dir or "")
        later = (f"config_{number}.yaml" for number in count(1))
        names = chain(["config.yaml"], later)
        self.config_filename = next(name for name in names if not (folder / name).exists())
        super().setup(trainer, pl_module, stage)


class FewShotCLI(LightningCLI):
    """A ``LightningCLI`` for models of this package, in projects of one's own.

    ``--ckpt_path last`` takes the last checkpoint of the last run. Arguments that are given count,
    and not those that the checkpoint was trained with, of which a warning lists those that differ.
    Saving the config overwrites no file.

    Args:
        *args: As for ``LightningCLI``, the model and the datamodule first.
        **kwargs: Likewise.

    Raises:
        FileNotFoundError: If ``--ckpt_path`` is no checkpoint.

    Examples:
        >>> from lightning_maml import MAML
        >>> from lightning_maml.cli import FewShotCLI
        >>> from lightning_maml.datamodules import GlyphsDataModule
        >>> network = {"class_path": "lightning_maml.Conv4", "init_args": {"ways": 5}}
        >>> network["init_args"] |= {"in_channels": 1, "image_size": 28}
        >>> arguments = {"model": {"network": network, "inner_lr": 0.4}}
        >>> cli = FewShotCLI(MAML, GlyphsDataModule, run=False, args=arguments)
        >>> cli.model.inner_lr
        0.4
    """

    runs = "lightning_logs"
    """Where runs are if the trainer has no ``default_root_dir``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"save_config_callback": SaveConfig, **kwargs})

    def _parse_ckpt_path(self) -> None:
        """Let command-line values override the checkpoint's, unlike Lightning."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint; warn if there is none, or it was trained with other arguments."""
        if self.subcommand is None:  # run=False
            return
        command = self.config[self.config.subcommand]
        if command.get("ckpt_path") == "last":
            folder = Path(command.trainer.default_root_dir or self.runs)
            if (last := last_checkpoint(folder)) is None:
                raise UserFileNotFoundError(
                    f"Expected `ckpt_path` 'last' to be the last checkpoint of a run in {folder} "
                    "but there is none; give its path."
                )
            command.ckpt_path = str(last)
        path = command.get("ckpt_path")
        if path is None:
            if self.config.subcommand in ("validate", "test", "predict"):
                rank_zero_warn(
                    "Without `ckpt_path` the model is run with the weights that it is made with, "
                    "untrained unless the network loads its own; --ckpt_path=last takes those of "
                    "the last training."
                )
            return
        is_address = "://" in path or path.startswith("registry") or path == "hpc"
        if not path or not (is_address or Path(path).exists()):
            raise UserFileNotFoundError(
                f"Expected `ckpt_path` to be 'last' or the path of a checkpoint but there is no "
                f"{path!r}; those of a run are in its folder `checkpoints`."
            )
        if Path(path).is_file():
            only_weights = command.get("weights_only") is not False
            saved = read_checkpoint(path, weights_only=only_weights).get("hyper_parameters", {})
            given = command.model.get("init_args") or command.model
            differing = [
                f"{name}={value} ({given[name]} now)"
                for name, value in saved.items()
                if name in given and given[name] != value
            ]
            if differing:
                rank_zero_warn(
                    "The checkpoint was trained with other arguments than those given now, which "
                    f"are used: {', '.join(differing)}."
                )


class _CLI(FewShotCLI):
    runs = "runs"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands plus ``check``, ``measure`` and ``replay``."""
        return LightningCLI.subcommands() | {
            name: {"model", "datamodule"} for name in ("check", "measure", "replay")
        }

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add loggers and checkpoints, unless the config has its own or wants none."""
        if not self._of_trainer("barebones"):
            kwargs |= self._loggers() | self._callbacks()
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> dict[str, Any]:
        """Log to TensorBoard and CSV in ``default_root_dir``."""
        if self._of_trainer("logger") is not None:
            return {}
        folder = Path(self._of_trainer("default_root_dir") or self.runs)
        tensorboard = TensorBoardLogger(folder, name="")
        # the two share it on purpose
        warnings.filterwarnings("ignore", "Experiment logs directory")
        return {"logger": [tensorboard, CSVLogger(folder, name="", version=tensorboard.version)]}

    def _callbacks(self) -> dict[str, Any]:
        """Keep the best checkpoint and, after every epoch, the last one."""
        configured = self._of_trainer("callbacks") or []
        own = configured if isinstance(configured, list) else [configured]
        given = [*own, *self.trainer_defaults["callbacks"]]
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in given)
        if has_own or self._of_trainer("enable_checkpointing") is False:
            return {}
        return {"callbacks": [*own, BestCheckpoint(), ModelCheckpoint(filename="last")]}

    def _of_trainer(self, argument: str) -> Any:
        return self._get(self.config_init, f"trainer.{argument}")


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest last or interrupted checkpoint of the runs in a folder.

    Lightning would only look in the new run's own. Runs of other experiments, in folders of the
    folder, count only if it has none itself.
    """
    # -v1 and so on: of later runs that share a folder
    names = ("last.ckpt", "last-v*.ckpt", "interrupted.ckpt")
    own = [f"{place}/{name}" for place in ("version_*/**", "checkpoints") for name in names]
    found = [path for pattern in own for path in folder.glob(pattern)]
    found = found or [path for name in names for path in folder.rglob(name)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def run(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> LightningCLI:
    """Run ``lightning-maml fit | validate | test | predict | check | measure | replay``.

    Args:
        args: The command line, by default the process's own.
        callbacks: Added to those of the config.

    Returns:
        The finished command with its ``trainer``, ``model`` and ``datamodule``.
    """
    if os.getcwd() not in sys.path:  # for modules of the user's, as `python -m` does
        sys.path.insert(0, os.getcwd())
    return _CLI(
        EpisodicModule,
        LightningDataModule,
        trainer_class=_Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={
            "callbacks": [*callbacks, CheckpointOnInterrupt(), KeepBestCheckpoints()]
        },
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Run the command ``lightning-maml``.

    Errors that a user can mend end it with one sentence, all others with a traceback.
    """
    keep_freed_memory()
    try:
        run(args)
    except UnicodeDecodeError as error:
        sys.exit(
            "lightning-maml: Expected configs and lists to be text in UTF-8 but one is not "
            f"({error})."
        )
    except Exception as error:
        mendable = [cause for cause in _causes(error) if isinstance(cause, UserError)]
        if not mendable:
            raise
        sys.exit(f"lightning-maml: {mendable[-1]}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, the last one first.

    An error that came up while another was handled is of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
