"""What few-shot algorithms share as Lightning modules: optimizer, steps, and logged figures."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_maml.algorithms.checkpointed import CheckpointedModule
from lightning_maml.algorithms.loader_figures import LoaderFigures
from lightning_maml.algorithms.metrics import Estimate, with_accuracy
from lightning_maml.algorithms.query_metrics import Metrics, MetricsOver, named_metrics
from lightning_maml.batches.episodes import AnyEpisodes, check_episodes
from lightning_maml.batches.known_labels import KnownLabels
from lightning_maml.batches.meta_batch import UnevenEpisodes, as_meta_batch, parts_of
from lightning_maml.batches.outputs import logits_in
from lightning_maml.batches.trees import map_tensors, unstacked
from lightning_maml.checks.findings import Findings, Found, Kind, kind_of_batch
from lightning_maml.checks.label_checks import ignored_label, warn_of_a_dimension_too_many
from lightning_maml.checks.requirements import (
    Unwritten,
    check_factory,
    check_loss_is_callable,
    check_network,
    refuse_without_gradient,
)
from lightning_maml.core.rng import is_random, random_state
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.functional.adaptation import AdaptationCurve
from lightning_maml.networks.batch_norm import batch_norms
from lightning_maml.networks.buffers import BufferUpdate
from lightning_maml.networks.functional_network import BatchNormPolicy
from lightning_maml.networks.stacking_trial import Verdict

LossFunction = nn.Module | Callable[[Any, Tensor], Tensor]
"""Maps what the network returns (torch's own losses: its logits) and labels or targets, each
``[B, ...]``, to their mean loss.  Modules are listed so that YAML may have ``init_args``. """

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = (
    Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | Callable[[Optimizer], dict[str, Any]]
)
"""It may return Lightning's dict, ``{"scheduler": ..., "interval": "step", ...}``."""

Interval = Literal["epoch", "step"]


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
        run: Computes.
        check: Refuses what ``run`` returned, if it is not finite for instance.
        finish: Makes the result of it, and writes to the network's buffers.
        unwritten: What ``run`` must leave as it is.
    """

    run: Callable[[], Any]
    check: Callable[[Any], None]
    finish: Callable[[Any], StepResult]
    unwritten: Unwritten = Unwritten({})


class EpisodicModule(CheckpointedModule):
    """A few-shot algorithm; subclasses define how it is trained and how it is evaluated.

    Args:
        network: The network to train, any module.
        loss: Maps outputs and labels to their mean loss.
        batch_norm: Which statistics batch norm uses.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the scheduler from the optimizer, or Lightning's dict of one; by
            default none.
        lr_scheduler_interval: Whether it is stepped after every ``"epoch"`` or ``"step"``.
        metrics: Metrics of torchmetrics on the query sets of validation and test; by default none.
        metrics_over: See :class:`lightning_maml.algorithms.query_metrics.QueryMetrics`.

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
        lr_scheduler_interval: Interval = "epoch",
        metrics: Metrics | None = None,
        metrics_over: MetricsOver = "tasks",
    ) -> None:
        super().__init__()
        check_network(network, batch_norm)
        check_loss_is_callable(loss)
        check_factory(optimizer, "optimizer", "functools.partial(torch.optim.SGD, lr=0.1)")
        if lr_scheduler is not None:
            example = "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)"
            check_factory(lr_scheduler, "lr_scheduler", example)
        self.network = network
        self.loss = loss
        self._batch_norm: BatchNormPolicy = batch_norm
        self._looked_at_dimensions = False
        self.adaptation: Estimate | None = None
        """Accuracy (for regression: loss) on the tasks of the last validation or test (its first
        loader) after 0 .. K steps, ``[K + 1]``."""
        if lr_scheduler_interval not in get_args(Interval):
            raise UserValueError(
                "Expected `lr_scheduler_interval` to be 'epoch' or 'step' but got "
                f"{lr_scheduler_interval!r}."
            )
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._lr_scheduler_interval: Interval = lr_scheduler_interval
        # in a dict, so no submodules: what metrics hold is not trained or saved
        self._figures = LoaderFigures(named_metrics(metrics, metrics_over), metrics_over)
        self._findings = Findings()
        self.known_labels = KnownLabels()
        self._update_buffers = BufferUpdate()
        self._gradients_arrive = False  # whether this was checked

    @property
    def batch_norm(self) -> BatchNormPolicy:
        """Which statistics batch norm uses."""
        return self._batch_norm

    @batch_norm.setter
    def batch_norm(self, policy: BatchNormPolicy) -> None:
        # the network was checked for its policy, and "per_step" has averages that are saved
        raise UserValueError(
            "Expected `batch_norm` to stay as the model was made but got "
            f"{policy!r}; make another model with the same network, or "
            "load_from_checkpoint(path, network=network, batch_norm=...)."
        )

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

    def meta_loss(self, episodes: Any) -> Tensor:
        """Return the query loss, for a training loop without a trainer.

        It is a scalar whose backward pass deposits the meta-gradient.

        Args:
            episodes: A meta-batch, in any of the forms that ``training_step`` takes.

        Raises:
            ValueError: If the network's outputs do not fit the episodes' labels, or if the
                algorithm anneals over a trainer's epochs (:class:`lightning_maml.MAMLPlusPlus`) and
                there is no trainer.
            FloatingPointError: If the query loss or the meta-gradient is not finite.
        """
        computed = []
        for part in parts_of(self.as_meta_batch(episodes)):
            check_episodes(part)
            computed.append(self._run_step(part))
        return _mean_loss([finish() for finish in computed])

    def _warn_of_training_mode(self) -> None:
        """Warn if an evaluation would be another one than that of ``Trainer.test``."""
        norms = batch_norms(self.network).values()
        averages = self.batch_norm in ("running", "per_step") and any(n.training for n in norms)
        if averages or is_random(self.network):
            what = "batch norm normalises by each batch" if averages else "dropout is active"
            rank_zero_warn(
                f"The network is evaluated in training mode, in which {what}; call model.eval() "
                "beforehand for the accuracy that validation and test give."
            )

    def as_meta_batch(self, batch: Any) -> Any:
        """Return the meta-batch that a loader means.

        The trainer has moved and converted tensors, but not arrays.
        """
        found = as_meta_batch(batch)
        if found is not batch and self._trainer is not None:
            found = map_tensors(lambda tensor: tensor.to(self.device), found)
            found = self._trainer.precision_plugin.convert_input(found)
        return found

    def _run_step(self, episodes: AnyEpisodes) -> Callable[[], StepResult]:
        """Compute a step, and return what finishes it."""
        for attempt in self._attempts(episodes):
            with attempt:
                step = self._plan_step(episodes)
                try:
                    found = step.run()
                except Exception:  # raised again, unless tensors that it read were written to
                    step.unwritten.check()
                    raise
        step.unwritten.check()
        step.check(found)
        return partial(step.finish, found)

    def configure_optimizers(self) -> Any:
        """Build the meta-optimizer and its scheduler."""
        optimizer = self._optimizer(self._optimised())
        if self._lr_scheduler is None:
            return optimizer
        made: Any = self._lr_scheduler(optimizer)
        given = made if isinstance(made, Mapping) else {"scheduler": made}
        if "scheduler" not in given:
            raise UserValueError(
                "Expected `lr_scheduler` to make a scheduler, or a dict with one as 'scheduler', "
                f"but got a dict with {sorted(given)}; name it so."
            )
        scheduler = given["scheduler"]
        defaults = {
            "monitor": getattr(scheduler, "monitor", "val/loss"),
            "interval": self._lr_scheduler_interval,
        }
        settings = {**defaults, **given}
        if isinstance(scheduler, ReduceLROnPlateau):
            self._refuse_a_figure_of_one_process(settings["monitor"])
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _refuse_a_figure_of_one_process(self, monitor: str | None) -> None:
        own = [f"train/{name}{when}" for name in ("loss", "accuracy") for when in ("", "_before")]
        if monitor in own and self._trainer and self._trainer.world_size > 1:
            raise UserValueError(
                f"Expected a figure of all processes for the rate to follow but got {monitor!r}, "
                "which each process has its own of, so that their weights would drift apart; "
                "monitor val/loss or val/accuracy."
            )

    def _optimised(self) -> Iterable[nn.Parameter]:
        """Return the parameters that the meta-optimizer gets."""
        return self.parameters()

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
                [
                    name
                    for name, p in self._besides_the_network()
                    # the rate of a frozen layer has none
                    if p in held and p.grad is None and not name.startswith("learned_rates.")
                ]
            )

    def _besides_the_network(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = set(self.network.parameters())
        return (
            (name, p) for name, p in self.named_parameters() if p.requires_grad and p not in own
        )

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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the query loss, whose backward pass deposits the meta-gradient.

        None for a step that is skipped.

        Args:
            batch: A meta-batch: :class:`lightning_maml.Episodes` or
                :class:`lightning_maml.ResampledEpisodes`; ``(support_x, support_y, query_x,
                query_y)``, each with the tasks in front; or a list of tasks without this leading
                dimension, which may differ in size.
            batch_idx: Its number.

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
    def _train_on(self, batch: Any) -> Tensor | None:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_logged = bool(every) and (self.global_step + 1) % every == 0
        parts = parts_of(self.as_meta_batch(batch))
        computed = []
        for part in parts:
            check_episodes(part)
            if not self._looked_at_dimensions:
                warn_of_a_dimension_too_many(part)
                self._looked_at_dimensions = True
            before_it = random_state(self.device)
            try:
                computed.append(self._run_step(part))
            except FloatingPointError as error:
                self.non_finite.skip_or_stop(self, part, before_it, error, self.run_folder)
                return None
        results = [finish() for finish in computed]
        of_parts = []
        for part, result in zip(parts, results, strict=True):
            ignored = ignored_label(self.loss)
            figures = with_accuracy(result.query_loss, result.outputs, part, ignored)
            of_parts.append(self._figures_before(part) | figures if is_logged else figures)
        for name in of_parts[0]:
            values = torch.cat([figures[name] for figures in of_parts])
            self.log(
                f"train/{name}",
                values.mean(),
                prog_bar=name in ("loss", "accuracy"),
                batch_size=len(values),
            )
        return _mean_loss(results)

    def setup(self, stage: str) -> None:
        """Do what a run needs beforehand, and warn of a precision that loses gradients."""
        super().setup(stage)
        self._refuse_hooks_that_are_not_called()
        if stage == "fit" and self.trainer.precision == "16-mixed":
            rank_zero_warn(
                "precision='16-mixed' scales the meta-gradient when it is finished, but not the "
                "gradients of which it is computed, and float16 makes small ones 0; take "
                "'bf16-mixed'."
            )

    def _refuse_hooks_that_are_not_called(self) -> None:
        """Refuse hooks that the datamodule has too, because Lightning calls its alone."""
        # not `trainer.datamodule`, which stays that of an earlier run
        selector = self.trainer._data_connector._datahook_selector
        data = selector and selector.datamodule
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        for hook in hooks:
            if data is not None and is_overridden(hook, data) and is_overridden(hook, self):
                raise UserTypeError(
                    f"Expected `{hook}` in the model or in the datamodule but both have it, of "
                    "which Lightning calls the datamodule's alone; move the model's into a "
                    f"subclass of {type(data).__name__}, and let it call super()'s first."
                )

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._figures.start(len(self.trainer.num_val_batches), self.device)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Collect loss, accuracy and metrics after 0 .. K steps.

        Returns:
            What callbacks get in ``on_validation_batch_end``: a dict of ``"loss"``, the query
            losses after adaptation ``[T]``, and ``"outputs"``, the query outputs after adaptation
            as ``predict_step`` returns them.
        """
        return self._judge(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation tasks."""
        self._log_figures("val")

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._figures.start(len(self.trainer.num_test_batches), self.device)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Collect loss, accuracy and metrics after 0 .. K steps; returns what validation does."""
        return self._judge(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means over all test tasks."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        found = self._figures.log(self, stage)
        if found is not None:
            self.adaptation = found

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the outputs for the query sets after adaptation, ``[T, Q, ...]``.

        Of tasks that differ in size it is a list of ``[Q, ...]``, in the order of the tasks.
        """
        batch = self.as_meta_batch(batch)
        of_parts = [self._evaluate_uncompiled(part) for part in parts_of(batch)]
        return _after_adaptation(batch, [curve.aux for curve in of_parts])

    def _judge(self, batch: Any, loader: int) -> dict[str, Any]:
        batch = self.as_meta_batch(batch)
        of_parts = []
        for part in parts_of(batch):
            curve = self._evaluate_uncompiled(part)
            figures = with_accuracy(curve.loss, curve.aux, part, ignored_label(self.loss))
            self._figures.update(loader, figures, curve.aux, part.query_y)
            of_parts.append(curve)
        losses = _after_adaptation(batch, [curve.loss for curve in of_parts])
        return {
            "loss": torch.stack(losses) if isinstance(losses, list) else losses,
            "outputs": _after_adaptation(batch, [curve.aux for curve in of_parts]),
        }

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _evaluate_uncompiled(self, episodes: AnyEpisodes) -> AdaptationCurve:
        return self.evaluate(episodes)

    def _figures_before(self, episodes: AnyEpisodes) -> dict[str, Tensor]:
        """Return the figures before adaptation that training steps log, each ``[T]``."""
        return {}

    def _kind(self, network: nn.Module, episodes: AnyEpisodes) -> Kind:
        """Return what tells one kind of batch from another, for the model's network or a copy."""
        return kind_of_batch(network, self.network, episodes)

    def _stacking_verdict(
        self, kind: Kind, find: Callable[[], Verdict], also: tuple[Any, ...] = ()
    ) -> Verdict:
        """Return whether tasks can be stacked, as ``find`` found for the first batch of a kind."""

        def find_and_say() -> Verdict:
            verdict = find()
            if any(verdict):
                rank_zero_info(
                    "Tasks are not stacked unless that is asked for: "
                    f"{verdict.wrong or verdict.slow}."
                )
            return verdict

        return self._once("stacking", kind, find_and_say, also)

    def _once(
        self,
        check: str,
        kind: Kind,
        find: Callable[[], Found],
        also: tuple[Any, ...] = (),
        *,
        again: bool = False,
    ) -> Found:
        """Run a check once for each kind of batch and ``also``, and return what it found."""
        read = (*self._read_by_checks(), *also)
        return self._findings.once(check, kind, read, find, again=again)

    def _read_by_checks(self) -> tuple[Any, ...]:
        """Return what decides a check besides the network and the batch."""
        return (self.loss,)


def _after_adaptation(batch: Any, of_parts: list[Any]) -> Any:
    """Return what evaluation gave after the last step, ``[T, ...]``.

    Of tasks that differ in size it is a list of ``[...]``, in the order of the tasks.

    Args:
        batch: The meta-batch.
        of_parts: For each of its parts a tree of tensors ``[T, K + 1, ...]``.
    """
    last = [map_tensors(lambda tensor: tensor[:, -1], of_part) for of_part in of_parts]
    if not isinstance(batch, UnevenEpisodes):
        return last[0]
    return batch.in_order([*map(unstacked, last)])


def _mean_loss(results: list[StepResult]) -> Tensor:
    """Return the mean loss over the tasks of all parts of a meta-batch."""
    if len(results) == 1:
        return results[0].loss
    tasks = [len(result.query_loss) for result in results]
    total = [result.loss * count for result, count in zip(results, tasks, strict=True)]
    return torch.stack(total).sum() / sum(tasks)
