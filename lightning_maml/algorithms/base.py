"""What few-shot algorithms share as Lightning modules: optimizer, steps, logged figures and checks of batches."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning import LightningModule
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from lightning_maml.algorithms.metrics import Estimate, TaskMean
from lightning_maml.batches.episodes import AnyEpisodes, check_episodes
from lightning_maml.batches.outputs import logits_in
from lightning_maml.batches.trees import Inputs, call, cat, count, map_tensors, shapes, tensors
from lightning_maml.core.params import Params
from lightning_maml.core.rng import (
    random_state,
    set_random_state,
    set_torch_random_state,
    torch_random_state,
)
from lightning_maml.functional.adaptation import AdaptationCurve
from lightning_maml.io.checkpoints import WholeCheckpoints, read_trained
from lightning_maml.io.plain import plain
from lightning_maml.io.replay import save_step
from lightning_maml.networks.batch_norm import averages_kept, batch_norms
from lightning_maml.networks.checks import KINDS
from lightning_maml.networks.functional_network import (
    BatchNormPolicy,
    Learner,
    deep_copy,
    modes,
    trainable_besides_parameters,
    writes,
)
from lightning_maml.networks.loss_checks import ignored_label
from lightning_maml.networks.stacking_trial import Verdict

LossFunction = nn.Module | Callable[[Any, Tensor], Tensor]
"""Maps what the network returns (torch's own losses: its logits) and labels or targets, each
``[B, ...]``, to their mean loss.  Modules are listed so that YAML may have ``init_args``. """

Kind = tuple[Any, ...]
"""A network with its modes and the shapes of its parameters, and the types and shapes of a
batch."""

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class EpisodicModule(LightningModule):
    """A few-shot algorithm; subclasses define how a meta-batch is trained on and how it is evaluated.

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
        Learner(network, batch_norm)  # refuses a network that the policy does not fit
        _warn_if_compiled(network)
        _refuse_lazy(network)
        _refuse_scripted_batch_norm(network, batch_norm)
        if computed := [name for name, p in network.named_parameters() if not p.is_leaf]:
            raise ValueError(
                "Expected a network whose parameters are leaves, which can be trained, but "
                f"{computed} were computed from others; so they are if a module of TorchScript is "
                "deep-copied: copy it before it is scripted."
            )
        if trainable := trainable_besides_parameters(network):
            raise ValueError(
                f"Expected trainable tensors of the network to be parameters but {trainable} are "
                "none, and would get no gradient; make them nn.Parameter, or give them detached."
            )
        if not callable(loss) or isinstance(loss, type):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
            raise TypeError(
                f"Expected `loss` to be a function or a module but got {got}; give "
                "torch.nn.functional.cross_entropy, or a made module, nn.MSELoss()."
            )
        self.network = network
        self.loss = loss
        self.batch_norm: BatchNormPolicy = batch_norm
        self.adaptation: Estimate | None = None
        """Accuracy (for regression: loss) on the tasks of the last validation or test (its last
        loader) after 0 .. K steps, ``[K + 1]``."""
        self.skips_non_finite = False
        self.skipped = 0
        """How many steps were skipped."""
        self.run_folder = Path()
        """Where the run keeps its logs; all processes have to take part in asking the trainer for
        it."""
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._figures: list[TaskMean] = []
        self._verdicts: dict[Kind, tuple[LossFunction, Verdict]] = {}
        self._gradients: Params = {}
        self._sees_all_at_once: bool | None = None
        self._gradients_arrive = False  # whether this was checked
        self._random_state: dict[str, Any] | None = None  # from which training is to go on

    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        """Return the query losses ``[T, K + 1]`` and, as ``aux``, the query outputs ``[T, K + 1, Q, ...]`` after 0 .. K inner steps.

        Raises:
            TypeError: If these are no episodes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(episodes).")

    def _meta_step(self, episodes: AnyEpisodes) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scalar to call ``backward`` on, and each task's query loss ``[T]`` and query outputs ``[T, Q, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} must define _meta_step(episodes).")

    def meta_loss(self, episodes: AnyEpisodes) -> Tensor:
        """Return the query loss as a scalar whose backward pass deposits the meta-gradient, for a training loop without a trainer.

        Raises:
            ValueError: If the network's outputs do not fit the episodes' labels, or if the
                algorithm anneals over a trainer's epochs (:class:`lightning_maml.MAMLPlusPlus`) and
                there is no trainer.
            FloatingPointError: If the query loss or the meta-gradient is not finite.
        """
        check_episodes(episodes)
        return self._meta_step(episodes)[0]

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
        """Load a model as Lightning does, but run nothing in the file unless ``weights_only=False``.

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
            raise TypeError(
                "Expected the network, which a checkpoint does not hold, but got none; call "
                f"{cls.__name__}.load_from_checkpoint(path, network=...)."
            )
        weights_only = weights_only is None or weights_only
        if weights_only and isinstance(checkpoint_path, str | Path):
            named = read_trained(checkpoint_path).get("hyper_parameters") or {}
            if "_instantiator" in named:  # Lightning would import and call what it names
                raise ValueError(
                    f"Expected {checkpoint_path} to hold plain hyperparameters but it names what "
                    "makes the model; it is not loaded."
                )
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )

    def setup(self, stage: str) -> None:
        """Have checkpoints written by :class:`lightning_maml.io.checkpoints.WholeCheckpoints`, unless the trainer has a plugin for them.

        Raises:
            TypeError: If the trainer's strategy splits parameters over processes.
        """
        if isinstance(
            self.trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy
        ):
            raise TypeError(
                "Expected a strategy that keeps whole parameters in each process but got "
                f"{type(self.trainer.strategy).__name__}; meta-gradients take other values for "
                "the parameters than the network holds: use 'ddp'."
            )
        self._random_state, self._gradients = None, {}  # which an aborted run may have left
        self.run_folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random generators in training, and the gradients of batches that the optimizer has yet to step on."""
        checkpoint["adapts_by"] = self._adapts_by()
        checkpoint["random_state"] = (
            random_state(self.device) if self._random_state is None else self._random_state
        )
        trainer = self.trainer
        if (
            trainer.fit_loop.epoch_loop.batch_progress.current.ready
            % trainer.accumulate_grad_batches
        ):
            gradients = {
                name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None
            }
            checkpoint["gradients"] = {
                name: trainer.strategy.reduce(grad, reduce_op="mean")
                for name, grad in gradients.items()
            }
        if self.skipped:
            checkpoint["skipped"] = self.skipped
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
            raise ValueError(
                f"Expected the loss that the checkpoint's model had but {found} are in {where} "
                "alone; make the model with the same `loss=`, because a checkpoint does not hold "
                "it."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what a run needs to go on as if it had not been interrupted: the types of its weights, random numbers, sums of gradients.

        Warns if the checkpoint's model adapted in another way.
        """
        theirs, ours = checkpoint.get("adapts_by", {}), self._adapts_by()
        if theirs and (
            differing := [
                name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)
            ]
        ):
            trained, here = (
                ", ".join(f"{name} {kept.get(name)}" for name in differing)
                for kept in (theirs, ours)
            )
            rank_zero_warn(
                f"The checkpoint's model adapts with {trained} but this one with {here}; unless "
                "that is meant, make it as the other was made."
            )
        if self._trainer is not None and self.trainer.training:
            # Lightning does so later, when the weights are already rounded
            self.trainer.precision_plugin.convert_module(self)
            self._random_state = checkpoint.get("random_state")
            self._gradients = checkpoint.get("gradients", {})
            self.skipped = checkpoint.get("skipped", 0)

    def _adapts_by(self) -> dict[str, Any]:
        """Return what adaptation depends on besides the weights and the hyperparameters, in plain words."""
        return {"loss": described(self.loss)}

    def on_train_start(self) -> None:
        """Continue the random numbers and the sums of gradients from where the checkpoint has them."""
        self._go_on_with_random_numbers()
        for name, gradient in self._gradients.items():
            self.get_parameter(name).grad = gradient.to(self.device)
        self._gradients = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse, before the first step, parameters that the optimizer was given but that have no gradient.

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
        """Remember the random state of training, so that what validation draws does not move it: a resumed run would not draw that."""
        if not self.trainer.sanity_checking:
            self._random_state = random_state(self.device)

    def on_validation_end(self) -> None:
        """Continue the random numbers of training."""
        if not self.trainer.sanity_checking:
            self._go_on_with_random_numbers()

    def _go_on_with_random_numbers(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state, self.device)
            self._random_state = None

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
        """Return the query loss, as a scalar whose backward pass deposits the meta-gradient; None for a step that is skipped.

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
            loss, query_loss, outputs = self._meta_step(batch)
        except FloatingPointError as error:
            self._skip_or_stop(batch, before_it, error)
            return None
        figures = with_accuracy(query_loss, outputs, batch, ignored_label(self.loss))
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
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._start_judging(self.trainer.num_val_batches)

    def validation_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect loss and accuracy after 0 .. K steps."""
        self._judge(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation tasks."""
        self._log_estimates("val")

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._start_judging(self.trainer.num_test_batches)

    def test_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect loss and accuracy after 0 .. K steps."""
        self._judge(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means over all test tasks."""
        self._log_estimates("test")

    def predict_step(self, batch: AnyEpisodes, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the outputs for the query sets after adaptation, ``[T, Q, ...]``."""
        return map_tensors(lambda outputs: outputs[:, -1], self._evaluate_uncompiled(batch).aux)

    def _start_judging(self, batches_of_loaders: Sequence[int | float]) -> None:
        self._figures = [TaskMean().to(self.device) for _ in batches_of_loaders]

    def _judge(self, episodes: AnyEpisodes, loader: int) -> None:
        curve = self._evaluate_uncompiled(episodes)
        figures = with_accuracy(curve.loss, curve.aux, episodes, ignored_label(self.loss))
        self._figures[loader].update(torch.stack([*figures.values()], -1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _evaluate_uncompiled(self, episodes: AnyEpisodes) -> AdaptationCurve:
        return self.evaluate(episodes)

    def _log_estimates(self, stage: str) -> None:
        """Log the means over the tasks of each loader with their confidence intervals; several loaders are named as Lightning does."""
        for loader, figures in enumerate(self._figures):
            if not figures.update_called:  # the loader is empty, or a subclass has steps of its own
                continue
            of_loader, estimate = (
                f"/dataloader_idx_{loader}" if len(self._figures) > 1 else "",
                figures.compute(),
            )
            for number, name in enumerate(("loss", "accuracy")[: estimate.mean.shape[-1]]):
                mean, ci95 = estimate.mean[:, number], estimate.ci95[:, number]
                self.adaptation = Estimate(mean, ci95, estimate.tasks)
                self.log(
                    f"{stage}/{name}{of_loader}",
                    mean[-1],
                    prog_bar=stage == "val",
                    sync_dist=True,
                    add_dataloader_idx=False,
                )
                beside = {f"{name}_ci95": ci95[-1], f"{name}_before": mean[0]}
                if name == "accuracy" or estimate.mean.shape[-1] == 1:
                    beside |= {f"{name}_step_{step}": value for step, value in enumerate(mean)}
                values = {f"{stage}/{figure}{of_loader}": value for figure, value in beside.items()}
                self.log_dict(values, sync_dist=True, add_dataloader_idx=False)

    def _skip_or_stop(
        self, episodes: AnyEpisodes, before_it: dict[str, Any], error: FloatingPointError
    ) -> None:
        if self.skips_non_finite:
            self.skipped += 1
            self.log("train/skipped", float(self.skipped), prog_bar=True, batch_size=1)
            return
        path = save_step(self, episodes, before_it, self.run_folder)
        config = self.run_folder / "config.yaml"
        command = (
            f"`lightning-maml replay --config={config if config.is_file() else 'CONFIG'} "
            f"--ckpt_path={path}`"
        )
        raise FloatingPointError(f"{error} Take the step again by {command}.") from None

    def _figures_before(self, episodes: AnyEpisodes) -> dict[str, Tensor]:
        """Return the figures before adaptation that training steps log, each ``[T]``."""
        return {}

    def _kind(self, network: nn.Module, episodes: AnyEpisodes) -> Kind:
        """Return what tells one kind of batch from another, for each of which network and loss are looked at anew.

        Args:
            network: The model's own, or a copy in another mode.
            episodes: The batch.
        """
        parameters = tuple((p.shape, p.requires_grad) for p in network.parameters())
        return self.network, network is self.network, modes(network), parameters, shapes(episodes)

    def _once_for_its_kind(self, kind: Kind, look: Callable[[], Verdict]) -> Verdict:
        """Return whether tasks can be stacked, as ``look`` found for the first batch of this kind and with this loss."""
        loss, verdict = self._verdicts.get(kind, (None, Verdict()))
        if loss is not self.loss:
            verdict = look()
            if len(self._verdicts) == KINDS:
                self._verdicts.clear()
            self._verdicts[kind] = self.loss, verdict
            if any(verdict):
                rank_zero_info(
                    "Tasks are not stacked unless that is asked for: "
                    f"{verdict.wrong or verdict.slow}."
                )
        return verdict

    def _stop_unless_losses_are_finite(self, query_loss: Tensor, where: str) -> None:
        finite = query_loss.isfinite()
        if not finite.all():
            tasks = (~finite).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"Expected a finite query loss but got {query_loss[tasks].tolist()} in tasks "
                f"{tasks} {where}"
            )

    def _update_running_averages(self, episodes: AnyEpisodes) -> None:
        """Let the network see the meta-batch once, at the parameters before adaptation, and keep what it writes to its buffers.

        These are batch norm's averages, if they are used, and what any other layer keeps. The next
        step starts from there.
        """
        averages = self.batch_norm == "running"
        if not writes(self.network) and not (averages and batch_norms(self.network)):
            return
        sets = [
            *_sets(episodes.support_x, episodes.support_y.ndim - episodes.query_y.ndim),
            *_sets(episodes.query_x),
        ]
        alike = len({shapes(x) for x in sets}) == 1
        with (
            torch.enable_grad(),
            nullcontext() if averages else averages_kept(self.network),
            _same_buffers(self.network),
        ):
            if alike and self._sees_all_at_once is None:
                self._sees_all_at_once = _accepts(self.network, cat(sets))
            for x in [cat(sets)] if alike and self._sees_all_at_once else sets:
                call(self.network, x)


_BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")


def _refuse_scripted_batch_norm(network: nn.Module, policy: BatchNormPolicy) -> None:
    scripted = {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, torch.jit.ScriptModule)
    }
    norms = [
        name
        for name, part in scripted.items()
        if getattr(part, "original_name", "") in _BATCH_NORMS
    ]
    if norms and (policy != "running" or any(scripted[name].training for name in norms)):
        raise ValueError(
            "Expected batch norm as nn.BatchNorm layers, whose statistics `batch_norm` decides, "
            f"but {norms} are TorchScript's; script the network after training, or put a frozen "
            "one into evaluation mode and use `batch_norm='running'`."
        )


def _refuse_lazy(network: nn.Module) -> None:
    if lazy := [name for name, p in network.named_parameters() if is_lazy(p)]:
        raise ValueError(
            f"Expected a network whose parameters have shapes but {lazy} are lazy; run it once on "
            "an example, network(x), before the model is made."
        )


def _warn_if_compiled(network: nn.Module) -> None:
    if any(
        isinstance(part, OptimizedModule) or part._compiled_call_impl is not None
        for part in network.modules()
    ):
        rank_zero_warn(
            "The network was given to torch.compile, but tasks run it as it was before, because "
            "each runs a copy with other parameters; give it uncompiled. `compiled=True` "
            "compiles the whole meta-gradient, for the algorithms that have it."
        )


def refuse_without_gradient(without_gradient: list[str]) -> None:
    """Refuse parameters that are to be trained and get no gradient.

    Raises:
        ValueError: If there are any.
    """
    if without_gradient:
        raise ValueError(
            "Expected a gradient for every parameter that the optimizer was given but "
            f"{without_gradient} get none; put them into the network, or into a loss that is an "
            "nn.Module, or freeze them."
        )


def _sets(x: Inputs, batches: int = 0) -> list[Any]:
    """Return the inputs of each task, and where it has several batches, of each of these, from ``[T, ..., B, ...]``."""
    flat = map_tensors(lambda tensor: tensor.flatten(0, batches), x)
    return [
        map_tensors(lambda tensor, number=number: tensor[number], flat)
        for number in range(count(flat))
    ]


def _accepts(network: nn.Module, x: Inputs) -> bool:
    """Return whether a network runs on inputs ``x``, which may be more than it runs on otherwise; it stays as it is."""
    device = tensors(x)[0].device
    before = torch_random_state(device)
    try:
        call(deep_copy(network), x)
    except Exception:  # noqa: BLE001 # a network that was made for a certain number of examples may raise anything
        return False
    finally:
        set_torch_random_state(before, device)
    return True


@contextmanager
def _same_buffers(network: nn.Module) -> Iterator[None]:
    """Copy values that replace a buffer meanwhile into the tensor that it was, which other code may refer to (compiled programs do)."""
    before = [(module._buffers, dict(module._buffers)) for module in network.modules()]
    yield
    for buffers, originals in before:
        for name, tensor in originals.items():
            now = dict(buffers).get(name)  # those of TorchScript are no dict
            if (
                tensor is not None
                and now is not None
                and now is not tensor
                and now.shape == tensor.shape
            ):
                buffers[name] = tensor.detach().copy_(now.detach())
            elif now is not None and now.grad_fn is not None:
                buffers[name] = now.detach()


def described(loss: Any) -> str:
    """Return the name of a loss, with the settings of a module or a partial function."""
    if isinstance(loss, partial):
        return f"{described(loss.func)} with {dict(loss.keywords)}"
    if not isinstance(loss, nn.Module):
        return str(getattr(loss, "__qualname__", type(loss).__qualname__))
    settings = {
        name: value
        for name, value in vars(loss).items()
        if isinstance(value, str | int | float) and name[0] != "_" and name != "training"
    }
    return f"{type(loss).__qualname__} with {settings}" if settings else type(loss).__qualname__


def with_accuracy(
    loss: Tensor, outputs: Tensor, episodes: AnyEpisodes, ignored: int | None
) -> dict[str, Tensor]:
    """Return ``loss``, the query losses ``[T, ...]``, and except for regression ``accuracy``, the share of correct query labels.

    Args:
        loss: Query losses ``[T, ...]``.
        outputs: Query outputs ``[T, ..., Q, ways]``.
        episodes: The tasks.
        ignored: The label of queries that the loss leaves out, which accuracy leaves out too; None
            if there is none.
    """
    labels = episodes.query_y
    if labels.is_floating_point():
        return {"loss": loss}
    labels = labels.view(len(labels), *[1] * (outputs.ndim - 3), -1)
    correct = (outputs.argmax(-1) == labels).float()
    if ignored is None:
        return {"loss": loss, "accuracy": correct.mean(-1)}
    counts = (labels != ignored).float()
    return {"loss": loss, "accuracy": (correct * counts).sum(-1) / counts.sum(-1)}
