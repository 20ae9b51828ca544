"""Models that adapt to a task by gradient steps: what they share in training and evaluation."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_maml.algorithms.base import (
    Interval,
    LossFunction,
    OptimizerFactory,
    SchedulerFactory,
)
from lightning_maml.algorithms.checked import CheckedModule
from lightning_maml.algorithms.features import functional_head, with_features
from lightning_maml.algorithms.losses import ModelLosses, model_losses
from lightning_maml.algorithms.metrics import with_accuracy
from lightning_maml.algorithms.query_metrics import Metrics, MetricsOver
from lightning_maml.algorithms.resume import described
from lightning_maml.batches.episodes import AnyEpisodes, Episodes, first_task
from lightning_maml.batches.meta_batch import even_meta_batch
from lightning_maml.batches.trees import detached
from lightning_maml.checks.findings import Kind
from lightning_maml.checks.label_checks import ignored_label
from lightning_maml.checks.network_checks import NetworkInfo
from lightning_maml.checks.requirements import check_loss_is_callable
from lightning_maml.core.inner_loop import inner_loop
from lightning_maml.core.inner_optimizers import InnerOptimizer, check_inner_optimizer
from lightning_maml.core.inner_rates import (
    InnerRates,
    InnerRatesName,
    LearnedRates,
    check_inner_rates,
    check_rate_names,
    rates_by_name,
    rates_of_steps,
)
from lightning_maml.core.params import Params
from lightning_maml.core.rng import is_random, unchanged_random_state
from lightning_maml.errors import UserValueError, check_truth
from lightning_maml.execution.auto import Attempt, Cures, Execution, Executor, TasksName
from lightning_maml.execution.compilation import Compiler
from lightning_maml.execution.cuda_graphs import CudaGraphs, state_read_by, works_on
from lightning_maml.execution.graphs import Graphs, KeepGraphs
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.functional.adaptation import AdaptationCurve, adaptation_curve
from lightning_maml.functional.arguments import check_step_count
from lightning_maml.functional.losses import LossFunctions
from lightning_maml.io.plain import number, whole_number
from lightning_maml.networks.attributes import NotComparableError
from lightning_maml.networks.batch_norm import StepStatistics, batch_norms
from lightning_maml.networks.buffers import BufferUpdate
from lightning_maml.networks.copies import copy_in_mode
from lightning_maml.networks.facts import writes, writes_in
from lightning_maml.networks.functional_network import (
    BatchNormPolicy,
    FunctionalHead,
    FunctionalNetwork,
    HeadDoesNotEndError,
)
from lightning_maml.networks.head_body import (
    Part,
    PartName,
    adapting,
    frozen_that_fit,
    head_of,
    plain_part,
)

InnerRate = float | Mapping[str, float]
"""alpha; or rates by the names of parameters and modules, see
:func:`lightning_maml.core.inner_rates.rates_by_name`."""


class TaskPath(NamedTuple):
    """The path that adaptation to a task takes, and the losses along it.

    Attributes:
        points: w_0 .. w_K, all trainable parameters.
        support: Maps such a point to the support loss, which the path descends.
        query: Maps such a point to the query loss.
    """

    points: list[Params]
    support: Callable[[Params], Tensor]
    query: Callable[[Params], Tensor]


class Plan(NamedTuple):
    """What is decided for a meta-batch, once it was checked.

    Attributes:
        functional: The network as a function.
        execution: How the tasks are run.
        head: Name of the head, if it alone adapts and ends the network, so that the features before
            it are computed only once.
        kind: What tells it from meta-batches of other kinds.
    """

    functional: FunctionalNetwork
    execution: Execution
    head: str | None
    kind: Kind


class AdaptingModule(CheckedModule):
    """A model that adapts to a task by gradient steps on its support set.

    Takes MAML's arguments.

    Here is what training and evaluation share: the settings, how tasks are run, and the inner
    steps. Subclasses define how the model is trained.
    """

    default_adapt: ClassVar[PartName] = "all"
    default_inner_rates: ClassVar[InnerRatesName] = "fixed"
    learns_rates: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        inner_lr: InnerRate = 0.4,
        train_steps: int = 1,
        test_steps: int | None = None,
        loss: LossFunction = F.cross_entropy,
        batch_norm: BatchNormPolicy = "batch",
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
        tasks: TasksName = "auto",
        chunk_size: int | None = None,
        adapt: Part | None = None,
        head: str | None = None,
        inner_rates: InnerRatesName | None = None,
        compiled: bool = False,
        lr_scheduler_interval: Interval = "epoch",
        metrics: Metrics | None = None,
        metrics_over: MetricsOver = "tasks",
        inner_optimizer: InnerOptimizer | None = None,
        support_loss: LossFunction | None = None,
        query_in_eval: bool = False,
        keep_graphs: KeepGraphs = "auto",
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__(
            network,
            loss,
            batch_norm,
            optimizer,
            lr_scheduler,
            lr_scheduler_interval,
            metrics,
            metrics_over,
        )
        adapt = None if adapt is None else plain_part(adapt)
        inner_lr, train_steps = _plain_rate(inner_lr), whole_number(train_steps, "train_steps")
        test_steps = None if test_steps is None else whole_number(test_steps, "test_steps")
        chunk_size = None if chunk_size is None else whole_number(chunk_size, "chunk_size")
        check_truth(compiled=compiled, query_in_eval=query_in_eval, cuda_graphs=cuda_graphs)
        check_inner_optimizer(inner_optimizer)
        if support_loss is not None:
            check_loss_is_callable(support_loss, "support_loss")
        check_step_count(train_steps, "train_steps")
        check_step_count(train_steps if test_steps is None else test_steps, "test_steps")
        self._executor = Executor(tasks, chunk_size, compiled)
        self._graphs = Graphs(keep_graphs)
        self._cuda_graphs = CudaGraphs() if cuda_graphs else None
        settings: dict[str, Any] = {
            "inner_lr": inner_lr,
            "train_steps": train_steps,
            "test_steps": test_steps,
            "batch_norm": batch_norm,
            "tasks": tasks,
            "chunk_size": chunk_size,
            "adapt": adapt,
            "head": head,
            "inner_rates": inner_rates,
            "compiled": compiled,
            "query_in_eval": query_in_eval,
            "keep_graphs": keep_graphs,
            "cuda_graphs": cuda_graphs,
        }
        self._save_settings(settings)
        self._made_with = settings
        inner_rates = self._rates_that_are_learned(inner_rates)
        adapt = self._part_that_adapts(adapt)
        params = adapting(network, adapt, head)
        if lines := frozen_that_fit(network, adapt):
            rank_zero_warn(f"In `adapt`, {'; '.join(lines)}.")
        if hooked := [name for name, parameter in params.items() if parameter._backward_hooks]:
            rank_zero_warn(
                f"The hooks of the parameters {hooked} see the meta-gradient only, because inner "
                "steps adapt copies; what is to hold in every step, such as a mask, belongs in "
                "the network's forward pass."
            )
        _check_rates(network, params, inner_lr)
        self._inner_lr: InnerRate = inner_lr
        self.inner_optimizer = inner_optimizer
        self.support_loss = support_loss
        self._query_in_eval = query_in_eval
        if query_in_eval:
            if batch_norm == "per_step":
                raise UserValueError(
                    "Expected `batch_norm` to be 'batch', 'support' or 'running' with "
                    "`query_in_eval=True` but got 'per_step', which is for networks in one mode."
                )
            self._update_buffers = BufferUpdate(in_two_modes=True)
        self.train_steps = train_steps
        self.test_steps = train_steps if test_steps is None else test_steps
        self.adapted_part, self.head = adapt, head
        self.learned_rates = (
            None
            if inner_rates == "fixed"
            else LearnedRates(params, inner_lr, inner_rates, train_steps)
        )
        self.step_statistics = (
            StepStatistics(network, train_steps) if batch_norm == "per_step" else None
        )
        self.probe_radius: float | None = None
        if compiled:
            self._check_that_it_compiles()
        self._compiler = Compiler() if compiled else None
        self._head_ends = True

    def _rates_that_are_learned(self, inner_rates: InnerRatesName | None) -> InnerRatesName:
        """Return which inner rates are learned, by default as the class does."""
        inner_rates = self.default_inner_rates if inner_rates is None else inner_rates
        check_inner_rates(inner_rates)
        if inner_rates != "fixed" and not self.learns_rates:
            raise UserValueError(
                f"Expected `inner_rates` to be 'fixed' with {type(self).__name__}, which cannot "
                f"learn them, but got {inner_rates!r}."
            )
        return inner_rates

    @property
    def inner_lr(self) -> InnerRate:
        """The inner rate; where it is learned, what it started from."""
        return self._inner_lr

    @inner_lr.setter
    def inner_lr(self, rate: InnerRate) -> None:
        if getattr(self, "learned_rates", None) is not None:
            raise UserValueError(
                "Expected `inner_lr` to stay as the model was made, since its rates are learned, "
                f"but got {rate}; write to `learned_rates`, or make another model."
            )
        rate = _plain_rate(rate)
        _check_rates(self.network, self._adapting_parameters(), rate)
        self._inner_lr = rate

    def _part_that_adapts(self, adapt: Part | None) -> Part:
        """Return what adapts, unless that would make this another algorithm without a word."""
        own = self.default_adapt
        if adapt is None:
            return own
        if own != "all" and isinstance(adapt, str) and adapt != own:
            raise UserValueError(
                f"Expected `adapt` of {type(self).__name__} to be {own!r} or names of parameters "
                f"but got {adapt!r}; leave it out, or take MAML."
            )
        return adapt

    def _check_that_it_compiles(self) -> None:
        reasons = {
            f"{type(self).__name__}, which cannot be compiled": not self.compiles,
            "batch_norm='per_step', whose averages change": self.step_statistics is not None,
            "a network that draws random numbers": is_random(self.network),
        }
        if wrong := [reason for reason, holds in reasons.items() if holds]:
            raise UserValueError(
                "Expected a meta-gradient of stacked tasks with `compiled=True` but got "
                f"{wrong[0]}; leave it uncompiled."
            )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other learned rates or step averages, then restore the run.

        Raises:
            ValueError: If they do not match this model's.
        """
        theirs = _shapes_besides_the_network(checkpoint["state_dict"])
        ours = _shapes_besides_the_network(self.state_dict())
        if theirs != ours:
            raise UserValueError(
                "Expected a checkpoint with the inner rates and batch-norm averages of this model "
                f"but got others ({len(theirs)} tensors, here {len(ours)}); give the model the "
                "`inner_rates`, `batch_norm`, `adapt` and `train_steps` that it was trained with."
            )
        super().on_load_checkpoint(checkpoint)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings as they are now, which may have been changed on the model."""
        now: dict[str, Any] = {"test_steps": self.test_steps}
        # what is learned for each step and part goes with those that it was made for
        if self.learned_rates is None and self.step_statistics is None:
            now |= {"inner_lr": self.inner_lr, "train_steps": self.train_steps}
            now |= {"adapt": self.adapted_part, "head": self.head}
        made = self._made_with
        at_first = made | {
            "test_steps": made["train_steps"] if made["test_steps"] is None else made["test_steps"],
            "adapt": self.default_adapt if made["adapt"] is None else made["adapt"],
        }
        changed = {name: value for name, value in now.items() if value != at_first[name]}
        if "train_steps" in changed:  # on which test steps that are not given depend
            changed["test_steps"] = self.test_steps
        saved = checkpoint.get("hyper_parameters", {})
        # not what a subclass saves under such a name
        ours = {name for name in saved if saved[name] == made.get(name)}
        saved.update({name: value for name, value in changed.items() if name in ours})
        super().on_save_checkpoint(checkpoint)

    @override
    def _adaptation_settings(self) -> dict[str, Any]:
        settings = super()._adaptation_settings() | {"adapt": self.adapted_part}
        if self.inner_optimizer is not None:
            settings["inner optimizer"] = repr(self.inner_optimizer)
        if self.support_loss is not None:
            settings["support loss"] = described(self.support_loss)
        if self._query_in_eval:
            settings["query_in_eval"] = True
        return settings

    @override
    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        """Adapt to each task in ``test_steps`` steps, in the mode in which the network is.

        Call ``model.eval()`` beforehand for what validation and test give; a warning reminds of it
        where layers act differently in training mode.

        Returns:
            The query losses ``[T, K + 1]`` and, as ``aux``, the query outputs
            ``[T, K + 1, Q, ...]`` after 0 .. K steps.
        """
        if not self._query_in_eval:  # with which both modes are the same
            self._warn_of_training_mode()
        episodes = even_meta_batch(episodes)
        # the checks differentiate, which tensors made in inference mode rule out
        with torch.inference_mode(False), torch.no_grad():
            episodes = detached(episodes)
            for attempt in self._attempts(episodes):
                with attempt:
                    curve = self._curve(self._plan(episodes), episodes, self.test_steps)
        return curve

    def inner_path(self, task: Episodes) -> TaskPath:
        """Return the path that adaptation to a task takes in evaluation, and the losses along it.

        Args:
            task: ``Episodes`` with one task: support set ``[1, S, ...]`` and query set
                ``[1, Q, ...]``.

        Raises:
            ValueError: With ``batch_norm="per_step"``, where each step has a loss of its own.
        """
        if self.step_statistics is not None:
            raise UserValueError(
                "Expected one loss for all inner steps but got batch_norm='per_step'; use "
                "another `batch_norm`."
            )
        task = even_meta_batch(task)  # type: ignore[assignment]
        functional = FunctionalNetwork(copy_in_mode(self.network, training=False), self.batch_norm)
        support, query = self._losses(functional)
        with torch.inference_mode(False), torch.no_grad():
            of_one = first_task(detached(task))
            w = {name: p.detach().clone() for name, p in functional.params.items()}
            rates = detached(rates_of_steps(self._rates(), w, self.test_steps))
            losses = LossFunctions(support, has_aux=True).of_task(of_one, self.test_steps)
            path, w_N = inner_loop(losses, w, rates, self.inner_optimizer)
            points = [*(step.w for step in path), w_N]
        return TaskPath(
            points,
            lambda w: support(w, of_one.support_x, of_one.support_y)[0],
            lambda w: query(w, of_one)[0],
        )

    @override
    def _attempts(self, episodes: AnyEpisodes) -> Iterator[Attempt]:
        cures: Cures = {
            HeadDoesNotEndError: self._compute_features_in_every_step,
            torch.OutOfMemoryError: self._drop_graphs,
        }
        return self._executor.attempts(len(episodes.query_y), self.device, cures)

    def _drop_graphs(self) -> bool:
        """Free the CUDA graphs; if there are none, keep no graphs of inner steps any more."""
        if self._drop_captured():
            return True
        self._findings.forget("graphs")
        return self._graphs.drop()

    def _compute_features_in_every_step(self) -> bool:
        changes, self._head_ends = self._head_ends, False
        return changes

    def _plan(self, episodes: AnyEpisodes) -> Plan:
        """Check a meta-batch and decide how its tasks are run.

        Raises:
            ValueError: If its labels do not fit the network's outputs, or network and loss are none
                that can be trained in this way.
        """
        functional = self._functional(episodes)
        network = functional.network
        kind = self._kind(network, episodes)
        info = self._check(functional, episodes, kind)
        stacking = partial(self._verdict, episodes, network, kind)
        sharing = partial(self._tasks_share_state, episodes, network, kind)
        execution = self._executor(network, self.device, episodes, info.draws, stacking, sharing)
        if are_stacked(*execution):
            functional = functional.stacked()
        return Plan(functional, execution, self._head_that_ends(info, episodes), kind)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # what moves parameters or changes their type; Lightning moves them to the CPU after a run
        self._drop_captured()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _drop_captured(self) -> bool:
        return self._cuda_graphs is not None and self._cuda_graphs.drop()

    def _captured(self, function: Callable[[], Any], plan: Plan) -> Callable[[], Any]:
        """Return a function of a meta-batch, on a GPU as a CUDA graph where that is possible."""
        graphs = self._cuda_graphs
        if graphs is None or not works_on(self.device) or not isinstance(function, partial):
            return function
        if writes(plan.functional.network) is None:  # what a pass changes is not known yet
            return function
        if plan.execution.tasks == "threads":  # which do not take part in a capture
            graphs.give_up("tasks='threads'")
            return function
        own = [getattr(self, name) for name in _READ_BY_A_STEP]
        if self.inner_optimizer is not None:
            own.append(type(self.inner_optimizer))
        if not all(map(_is_of_the_library, [*own, function.func])):
            graphs.give_up("inner optimizer, losses or gradient are defined outside the library")
            return function
        try:
            read = self.loss, self.support_loss, self.step_statistics
            state = state_read_by(self.network, read, self.device)
        except NotComparableError as error:
            graphs.give_up(str(error))
            return function
        return partial(graphs, function, (plan.kind, plan.execution, plan.head, state))

    def _functional(self, episodes: AnyEpisodes) -> FunctionalNetwork:
        """Return the network as it adapts.

        With ``query_in_eval`` it is a copy in training mode, and its evaluation mode was checked.

        Raises:
            ValueError: If parts of it are trained in evaluation mode, which ``train()`` would end.
        """
        given = FunctionalNetwork(self.network, self.batch_norm)
        if not self._query_in_eval:
            return given
        adapts, answers = (given.in_mode(training=training) for training in (True, False))
        pairs = zip(adapts.network.modules(), self.network.modules(), strict=True)
        ended = any(there.training and not here.training for there, here in pairs)
        if self.network.training and ended:
            raise UserValueError(
                "Expected a network in training mode with `query_in_eval=True`, which calls its "
                "train() before the inner steps, but parts of it are in evaluation mode; let a "
                "train() of its own keep them there."
            )
        self._check(answers, episodes, self._kind(answers.network, episodes))
        return adapts

    def _execution(self, episodes: AnyEpisodes) -> Execution:
        """Return how the tasks of a meta-batch are run."""
        return self._plan(episodes).execution

    def _head_that_ends(self, info: NetworkInfo, episodes: AnyEpisodes) -> str | None:
        """Return the head if it alone adapts and ends the network.

        The features before it then need computing only once.
        """
        if self.adapted_part != "head" or not self._head_ends:
            return None
        if not isinstance(episodes, Episodes) or self._query_in_eval:
            return None
        if self.step_statistics is not None or not info.ends_with_head:
            return None
        head = head_of(self.network, self.head)
        # alone it would not put back what a pass changes in it
        changes = writes_in(self.network, head) or batch_norms(self.network.get_submodule(head))
        return None if changes else head

    def _curve(self, plan: Plan, episodes: AnyEpisodes, steps: int) -> AdaptationCurve:
        if plan.head is not None:
            with torch.inference_mode(False), torch.no_grad():
                episodes = detached(episodes)
                episodes = with_features(plan.functional, plan.head, plan.execution, episodes)
            head = functional_head(self.network, plan.head, plan.execution)
            plan = plan._replace(functional=head)
        arguments = self._arguments(plan, episodes, steps)
        return adaptation_curve(**arguments, **self._inner_steps(steps))

    @override
    def _figures_before(self, episodes: AnyEpisodes) -> dict[str, Tensor]:
        # what is logged is not to change what is trained
        with unchanged_random_state(self.device):
            for attempt in self._attempts(episodes):
                with attempt:
                    curve = self._curve(self._plan(episodes), episodes, 0)
        figures = with_accuracy(curve.loss, curve.aux, episodes, ignored_label(self.loss))
        return {f"{name}_before": values[:, 0] for name, values in figures.items()}

    def _arguments(
        self, plan: Plan, episodes: AnyEpisodes, steps: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments that the functions of a meta-batch share.

        Where batch norm has averages for each step, there is a loss for each of ``steps`` steps.
        """
        loss: Any
        query_loss: Any
        loss, query_loss = self._losses(plan.functional)
        if self.step_statistics is not None and steps is not None:
            each = [self._losses(plan.functional, self._averages(j)) for j in range(steps + 1)]
            loss, query_loss = [of.support for of in each], [of.query for of in each]
        return {
            "loss": loss,
            "params": plan.functional.params,
            "episodes": episodes,
            "query_loss": query_loss,
            "has_aux": True,
            **plan.execution._asdict(),
        }

    def _inner_steps(self, steps: int) -> dict[str, Any]:
        """Return the arguments for ``steps`` inner steps."""
        return {
            "inner_lr": self._rates(),
            "steps": steps,
            "inner_optimizer": self.inner_optimizer,
        }

    def _losses(
        self, functional: FunctionalNetwork, averages: Mapping[str, Tensor] | None = None
    ) -> ModelLosses:
        """Return the support and the query loss of a network, the model's own or a copy."""
        of_outputs = self._loss_of_outputs(training=not self._only_evaluates(functional))
        support = query = functional
        if self._query_in_eval:
            support, query = (functional.in_mode(training=mode) for mode in (True, False))
        return model_losses(support, query, of_outputs, self.logits, averages)

    def _only_evaluates(self, functional: FunctionalNetwork) -> bool:
        """Return whether this is a copy in evaluation mode of a network in training mode."""
        is_head = isinstance(functional, FunctionalHead)
        return self.network.training and not functional.network.training and not is_head

    def _rates(self) -> InnerRates:
        names = self._adapting_parameters().keys()
        if self.learned_rates is None:
            return rates_by_name(self.inner_lr, names)
        rates: InnerRates = self.learned_rates(names)
        return rates


_READ_BY_A_STEP = (
    "logits",
    "_losses",
    "_loss_of_outputs",
    "_arguments",
    "_training_arguments",
    "_inner_steps",
    "_rates",
    "_averages",
    "_gradient_function",
)
"""What a subclass may define anew, and let depend on what changes from step to step."""


def _is_of_the_library(part: Any) -> bool:
    return (part.__module__ or "").startswith("lightning_maml.")


def _check_rates(network: nn.Module, params: Params, inner_lr: InnerRate) -> None:
    """Check that inner rates are in range, and name parameters that adapt.

    Raises:
        ValueError: If they do not.
    """
    first_names = {id(p): name for name, p in network.named_parameters()}
    every_name = network.named_parameters(remove_duplicate=False)
    shared = {
        name: first_names[id(p)]
        for name, p in every_name
        if name != first_names[id(p)] and first_names[id(p)] in params
    }
    check_rate_names(inner_lr, [*first_names.values()], shared)
    rates_of_steps(rates_by_name(inner_lr, params), params, 1)  # refuses a rate out of range


def _plain_rate(inner_lr: InnerRate) -> float | dict[str, float]:
    if isinstance(inner_lr, Mapping):
        return {name: number(rate, f"inner_lr[{name!r}]") for name, rate in inner_lr.items()}
    return number(inner_lr, "inner_lr")


def _shapes_besides_the_network(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of the learned rates and the step averages in a model's state."""
    kept = ("learned_rates.", "step_statistics.")
    return {name: list(x.shape) for name, x in state.items() if name.startswith(kept)}
