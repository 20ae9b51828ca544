"""What few-shot algorithms share as Lightning modules: optimizer, steps, and logged figures."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lightning import LightningModule
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from lightning_maml.algorithms.metrics import Estimate, LoaderFigures, with_accuracy
from lightning_maml.algorithms.non_finite import NonFinitePolicy
from lightning_maml.algorithms.resume import ResumeState, described, warn_of_other_settings
from lightning_maml.batches.episodes import AnyEpisodes, check_episodes
from lightning_maml.batches.outputs import logits_in
from lightning_maml.batches.trees import map_tensors
from lightning_maml.checks.findings import Findings, Kind, kind_of_batch
from lightning_maml.checks.loss_checks import ignored_label
from lightning_maml.checks.requirements import (
    check_loss_is_callable,
    check_network,
    refuse_without_gradient,
)
from lightning_maml.core.rng import random_state
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.functional.adaptation import AdaptationCurve
from lightning_maml.io.checkpoints import WholeCheckpoints, read_trained
from lightning_maml.io.plain import plain
from lightning_maml.networks.buffers import BufferUpdate
from lightning_maml.networks.functional_network import BatchNormPolicy
from lightning_maml.networks.stacking_trial import Verdict

LossFunction = nn.Module | Callable[[Any, Tensor], Tensor]
"""Maps what the network returns (torch's own losses: its logits) and labels or targets, each
``[B, ...]``, to their mean loss.  Modules are listed so that YAML may have ``init_args``. """

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class StepResult(NamedTuple):
    """A training step.

    Attributes:
        loss: The scalar to call ``backward`` on.
        query_loss: The query loss of each task, ``[T]``.
        outputs: The query outputs, ``[T, Q, ...]``.
    """

    loss: Tensor
    query_loss: Tensor
    outputs: Any


class Step(NamedTuple):
    """What is to be done with a meta-batch in training.

    Attributes:
        run: Computes; what it returns is ``finish``'s to check.
        finish: Makes the result of what ``run`` returned.
    """

    run: Callable[[], Any]
    finish: Callable[[Any], StepResult]


class EpisodicModule(LightningModule):
    """A few-shot algorithm; subclasses define how it is trained and how it is evaluated.

    Args:
        network: The network to train, any module.
        loss: Maps outputs and labels to their mean loss.
        batch_norm: Which statistics batch norm uses.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the scheduler from the optimizer; it is stepped once per epoch; by
            default none.

    Raises:
        ValueError: If the network does not fit the batch-norm policy, or there is no such policy.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LossFunction,
        batch_norm: BatchNormPolicy,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__()
        check_network(network, batch_norm)
        check_loss_is_callable(loss)
        self.network = network
        self.loss = loss
        self.batch_norm: BatchNormPolicy = batch_norm
        self.adaptation: Estimate | None = None
        """Accuracy (for regression: loss) on the tasks of the last validation or test (its last
        loader) after 0 .. K steps, ``[K + 1]``."""
        self.non_finite = NonFinitePolicy()
        """What becomes of steps whose loss or meta-gradient is not finite."""
        self.run_folder = Path()
        """Where the run keeps its logs; all processes have to take part in asking the trainer for
        it.
        """
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._resume = ResumeState()
        self._figures = LoaderFigures()
        self._findings = Findings()
        self._update_buffers = BufferUpdate(batch_norm)
        self._gradients_arrive = False  # whether this was checked

    @property
    def skipped(self) -> int:
        """How many steps were skipped because they were not finite."""
        return self.non_finite.skipped

    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        """Return query losses and outputs after 0 .. K inner steps.

        Returns:
            The losses ``[T, K + 1]`` and, as ``aux``, the outputs ``[T, K + 1, Q, ...]``.

        Raises:
            TypeError: If these are no episodes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(episodes).")

    def _plan_step(self, episodes: AnyEpisodes) -> "Step":
        """Check a meta-batch and return what is to be done with it."""
        raise NotImplementedError(f"{type(self).__name__} must define _plan_step(episodes).")

    def _attempts(self, episodes: AnyEpisodes) -> Iterator[AbstractContextManager[Any]]:
        """Yield contexts to try a step in, until one comes to its end."""
        yield nullcontext()

    def meta_loss(self, episodes: AnyEpisodes) -> Tensor:
        """Return the query loss, for a training loop without a trainer.

        It is a scalar whose backward pass deposits the meta-gradient.

        Raises:
            ValueError: If the network's outputs do not fit the episodes' labels, or if the
                algorithm anneals over a trainer's epochs (:class:`lightning_maml.MAMLPlusPlus`) and
                there is no trainer.
            FloatingPointError: If the query loss or the meta-gradient is not finite.
        """
        check_episodes(episodes)
        return self._step(episodes).loss

    def _step(self, episodes: AnyEpisodes) -> StepResult:
        for attempt in self._attempts(episodes):
            with attempt:
                step = self._plan_step(episodes)
                found = step.run()
        return step.finish(found)

    def configure_optimizers(self) -> Any:
        """Build the meta-optimizer and its scheduler."""
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": monitor},
        }

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
        """
        theirs, ours = (
            {name for name in names if name.startswith("loss.")}
            for names in (state_dict, self.state_dict())
        )
        if strict and theirs != ours:
            found = sorted(theirs ^ ours)
            where = "the checkpoint" if found[0] in theirs else "this model"
            raise UserValueError(
                f"Expected the loss that the checkpoint's model had but {found} are in {where} "
                "alone; make the model with the same `loss=`, because a checkpoint does not hold "
                "it."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what a run needs to go on as if it had not been interrupted.

        Warns if the checkpoint's model adapted in another way.
        """
        warn_of_other_settings(checkpoint.get("adapts_by", {}), self._adaptation_settings())
        if self._trainer is not None and self.trainer.training:
            # Lightning does so later, when the weights are already rounded
            self.trainer.precision_plugin.convert_module(self)
            self._resume.load(checkpoint)
            self.non_finite.load(checkpoint)

    def _adaptation_settings(self) -> dict[str, Any]:
        """Return in words what adaptation depends on besides weights and hyperparameters."""
        return {"loss": described(self.loss)}

    def on_train_start(self) -> None:
        """Continue from where a checkpoint was written."""
        self._resume.restore(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse parameters in the optimizer that have no gradient, before the first step.

        Raises:
            ValueError: If there are any besides the network's.
        """
        if self._gradients_arrive:
            return
        # else this step is skipped
        self._gradients_arrive = any(p.grad is not None for p in self.network.parameters())
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if self._gradients_arrive:
            refuse_without_gradient(
                [name for name, p in self._besides_the_network() if p in held and p.grad is None]
            )

    def _besides_the_network(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = set(self.network.parameters())
        return (
            (name, p) for name, p in self.named_parameters() if p.requires_grad and p not in own
        )

    def on_validation_start(self) -> None:
        """Remember the random numbers of training."""
        if not self.trainer.sanity_checking:
            self._resume.pause_random_numbers(self.device)

    def on_validation_end(self) -> None:
        """Continue the random numbers of training."""
        if not self.trainer.sanity_checking:
            self._resume.continue_random_numbers(self.device)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the outputs of the network as it is, without adaptation."""
        return self.network(*inputs, **named)

    @staticmethod
    def logits(outputs: Any) -> Any:
        """Return the logits, or a regression's outputs, from what the network returned.

        Override it for a network that names them otherwise. Accuracy, predictions and torch's own
        losses are of these; a loss of your own is given what the network returned.

        Args:
            outputs: What the network returned for ``B`` examples.

        Returns:
            A tensor ``[B, ...]``: the outputs if they are one, or their attribute or entry
            ``logits``; of a regression also other outputs as they are, if they are tensors in
            dicts, tuples and lists.
        """
        return logits_in(outputs)

    def training_step(self, batch: AnyEpisodes, batch_idx: int) -> Tensor | None:
        """Return the query loss, whose backward pass deposits the meta-gradient.

        None for a step that is skipped.

        Raises:
            FloatingPointError: If the query loss or the meta-gradient is not finite, unless such
                steps are skipped (:class:`lightning_maml.SkipNonFinite`). The step is saved for
                ``lightning-maml replay``.
        """
        loss: Tensor | None = self._train_on(batch)
        return loss

    # if the model is compiled: compilers know no second derivatives; torch 2.7 would not accept
    # this on the hook itself
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train_on(self, batch: AnyEpisodes) -> Tensor | None:
        check_episodes(batch)
        before_it = random_state(self.device)
        try:
            result = self._step(batch)
        except FloatingPointError as error:
            self.non_finite.skip_or_stop(self, batch, before_it, error, self.run_folder)
            return None
        ignored = ignored_label(self.loss)
        figures = with_accuracy(result.query_loss, result.outputs, batch, ignored)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            figures = self._figures_before(batch) | figures
        for name, values in figures.items():
            self.log(
                f"train/{name}",
                values.mean(),
                prog_bar=name in ("loss", "accuracy"),
                batch_size=len(values),
            )
        return result.loss

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._figures.start(len(self.trainer.num_val_batches), self.device)

    def validation_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect loss and accuracy after 0 .. K steps."""
        self._judge(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation tasks."""
        self._log_figures("val")

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._figures.start(len(self.trainer.num_test_batches), self.device)

    def test_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect loss and accuracy after 0 .. K steps."""
        self._judge(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means over all test tasks."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        found = self._figures.log(self, stage)
        if found is not None:
            self.adaptation = found

    def predict_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the outputs for the query sets after adaptation, ``[T, Q, ...]``."""
        return map_tensors(lambda outputs: outputs[:, -1], self._evaluate_uncompiled(batch).aux)

    def _judge(self, episodes: AnyEpisodes, loader: int) -> None:
        curve = self._evaluate_uncompiled(episodes)
        figures = with_accuracy(curve.loss, curve.aux, episodes, ignored_label(self.loss))
        self._figures.update(loader, figures)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _evaluate_uncompiled(self, episodes: AnyEpisodes) -> AdaptationCurve:
        return self.evaluate(episodes)

    def _figures_before(self, episodes: AnyEpisodes) -> dict[str, Tensor]:
        """Return the figures before adaptation that training steps log, each ``[T]``."""
        return {}

    def _kind(self, network: nn.Module, episodes: AnyEpisodes) -> Kind:
        """Return what tells one kind of batch from another, for the model's network or a copy."""
        return kind_of_batch(network, self.network, episodes)

    def _stacking_verdict(self, kind: Kind, find: Callable[[], Verdict]) -> Verdict:
        """Return whether tasks can be stacked, as ``find`` found for the first batch of a kind."""

        def find_and_say() -> Verdict:
            verdict = find()
            if any(verdict):
                rank_zero_info(
                    "Tasks are not stacked unless that is asked for: "
                    f"{verdict.wrong or verdict.slow}."
                )
            return verdict

        return self._findings.once("stacking", kind, self.loss, find_and_say)
