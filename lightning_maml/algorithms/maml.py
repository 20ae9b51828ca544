"""MAML as a Lightning module; its variants are in variants.py, the mathematics in lightning_maml/functional."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_maml.algorithms.base import (
    EpisodicModule,
    Kind,
    LossFunction,
    OptimizerFactory,
    SchedulerFactory,
    refuse_without_gradient,
    with_accuracy,
)
from lightning_maml.batches.episodes import (
    AnyEpisodes,
    Episodes,
    check_episodes,
    first_task,
    support_set,
)
from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import Inputs, cat, detached, map_tensors, tensors
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.inner_loop import inner_loop
from lightning_maml.core.inner_rates import (
    InnerRates,
    InnerRatesName,
    LearnedRates,
    check_inner_rates,
    rates_of_steps,
    tensor_rates,
)
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.params import Params
from lightning_maml.core.rng import is_random
from lightning_maml.core.tensors import leaves_of
from lightning_maml.execution.auto import Execution, Executor, TasksName
from lightning_maml.execution.compilation import Compiler, state_of
from lightning_maml.execution.task_map import are_stacked, cat_chunks, map_tasks
from lightning_maml.functional.adaptation import (
    AdaptationCurve,
    adaptation_curve,
    adapted_parameters,
)
from lightning_maml.functional.arguments import check_step_count
from lightning_maml.functional.loss_with_gradient import loss_with_gradient
from lightning_maml.functional.losses import LossFunctions
from lightning_maml.functional.meta_gradient import (
    MetaGradient,
    meta_gradient,
    not_finite,
)
from lightning_maml.io.plain import number, plain, whole_number
from lightning_maml.networks.adapted import AdaptedNetworks
from lightning_maml.networks.batch_norm import (
    StepStatistics,
    batch_norms,
    entering_statistics,
    forget_running_averages,
)
from lightning_maml.networks.checks import KINDS, FirstLook, Seen, first_outputs, first_support
from lightning_maml.networks.functional_network import (
    OF_LOSS,
    BatchNormPolicy,
    FunctionalLoss,
    HeadDoesNotEndError,
    HeadLearner,
    Learner,
    hooks_tensors,
    modes,
    reading,
    structural_copy,
)
from lightning_maml.networks.head_body import PartName, adapting, head_of
from lightning_maml.networks.kinks import weight_normed
from lightning_maml.networks.loss_checks import LossLook, check_labels, check_targets, ignored_label
from lightning_maml.networks.stacking_trial import HOOKED, Verdict, compare_losses
from lightning_maml.theory.measure import Probe


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
    """What is known of a meta-batch before it is worked on: it was checked, and how its tasks are run is decided.

    Attributes:
        learner: The network as a function.
        execution: How the tasks are run.
        head: Name of the head, if it alone adapts and ends the network, so that the features before
            it are computed only once.
    """

    learner: Learner
    execution: Execution
    head: str | None


class MAML(EpisodicModule):
    """Model-agnostic meta-learning by the exact meta-gradient of N inner steps (Ji et al. 2022; N = 1: Fallah et al. 2020, Algorithm 1).

    Batches are :class:`lightning_maml.Episodes` (Ji's Algorithm 2) or, with fresh samples for every
    inner step and for the curvature (Ji's Algorithm 1), :class:`lightning_maml.ResampledEpisodes`.
    Every optimizer, scheduler, clipping and accumulation setting of Lightning applies to the
    meta-parameters. Logged: ``train/``, ``val/`` and ``test/`` ``loss`` and, for classification,
    ``accuracy`` on the query sets after adaptation, and both as ``_before`` for before adaptation
    (in training only on the steps that are logged). Validation and test add ``_ci95``, the
    half-width of the 95 % confidence interval over the tasks, and ``accuracy_step_0 .. K``.

    Args:
        network: The network to meta-train, any module; its frozen parameters stay as they are.
        inner_lr: alpha, the rate of the inner steps. The loss is a mean over the support set, so
            multiply a rate published for a loss summed over the classes by ``ways``.
        train_steps: N, inner steps in training.
        test_steps: K, inner steps in validation, test and prediction; by default N.
        loss: Maps outputs and labels to their mean loss.
        batch_norm: ``"batch"``: the statistics of the batch at hand (transductive on the query set,
            as in the MAML papers); ``"support"``: of the support set only; ``"running"``: batch
            statistics in training, running averages in evaluation; ``"per_step"``: the same with
            averages for each inner step, as in MAML++, taken from the first task of each
            meta-batch.
        optimizer: Builds the meta-optimizer from the parameters; by default Adam with its rate of
            1e-3.
        lr_scheduler: Builds the scheduler from the optimizer; it is stepped once per epoch; by
            default none.
        tasks: ``"loop"``: one task after the other; ``"threads"``: one task per CPU core;
            ``"vmap"``: all as one; ``"auto"``: on the CPU threads, with small tasks stacked (but a
            loop for the largest tasks, for up to three small ones and for networks that draw random
            numbers), and elsewhere vmap of as many tasks as there is memory for. Before tasks are
            stacked, two of them are compared with the same two alone, in loss, gradient and (for
            the exact algorithm) Hessian-vector product. If these differ, ``"auto"`` does not stack;
            a stack that was asked for is refused.
        chunk_size: How many tasks are vectorised together: in each step of the loop or of a thread,
            by default one; with ``"vmap"``, by default all; with ``"auto"``, by default as many as
            suit their size.
        adapt: Which parameters take the inner steps, ``"all"``, ``"head"`` or ``"body"``; the
            meta-optimizer trains all. By default what the class is named for: the head in
            :class:`ANIL`, the body in :class:`BOIL`, all in the others.
        head: Name of the submodule that is the head; by default the last one that has trainable
            parameters of its own.
        inner_rates: ``"fixed"``: all are ``inner_lr``; or learned with the network, starting from
            ``inner_lr``: ``"per_layer"`` (one for each parameter tensor), ``"per_layer_and_step"``
            or ``"per_parameter"`` (one for each element). By default fixed; learned by
            :class:`LSLR` per layer and step, by :class:`MetaSGD` per parameter.
        compiled: Compile the meta-gradient as a whole, all tasks (or ``chunk_size``) as one, at the
            first batch of each shape: this takes from 10 seconds to minutes, and pays off for small
            networks. Numbers and flags that the network or the loss read stay what they were then,
            and each new inner rate, unless it is learned, is compiled anew.

    Raises:
        TypeError: If what should be a number is none; numpy's numbers are taken as Python's.
        ValueError: If an argument is out of range; in a step, if the network's outputs do not fit
            the episode's labels, if stacked tasks would give other numbers than single ones, or if
            the network has no second derivatives that the algorithm needs.
        FloatingPointError: In training, if the query loss or the meta-gradient is not finite; the
            parameters are then untouched.
    """

    curvature: ClassVar[CurvatureName] = "exact"
    default_adapt: ClassVar[PartName] = "all"
    default_inner_rates: ClassVar[InnerRatesName] = "fixed"
    learns_rates: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        inner_lr: float = 0.4,
        train_steps: int = 1,
        test_steps: int | None = None,
        loss: LossFunction = F.cross_entropy,
        batch_norm: BatchNormPolicy = "batch",
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
        tasks: TasksName = "auto",
        chunk_size: int | None = None,
        adapt: PartName | None = None,
        head: str | None = None,
        inner_rates: InnerRatesName | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(network, loss, batch_norm, optimizer, lr_scheduler)
        inner_lr, train_steps = (
            number(inner_lr, "inner_lr"),
            whole_number(train_steps, "train_steps"),
        )
        test_steps = None if test_steps is None else whole_number(test_steps, "test_steps")
        chunk_size = None if chunk_size is None else whole_number(chunk_size, "chunk_size")
        check_step_count(train_steps, "train_steps")
        check_step_count(train_steps if test_steps is None else test_steps, "test_steps")
        self._executor = Executor(tasks, chunk_size, compiled)
        settings: dict[str, Any] = {
            "inner_lr": inner_lr,
            "train_steps": train_steps,
            "test_steps": test_steps,
            "batch_norm": batch_norm,
            "tasks": tasks,
        }
        settings |= {
            "chunk_size": chunk_size,
            "adapt": adapt,
            "head": head,
            "inner_rates": inner_rates,
            "compiled": compiled,
        }
        self.save_hyperparameters(plain(settings))
        inner_rates = self.default_inner_rates if inner_rates is None else inner_rates
        check_inner_rates(inner_rates)
        if inner_rates != "fixed" and not self.learns_rates:
            raise ValueError(
                f"Expected `inner_rates` to be 'fixed' with {type(self).__name__}, which cannot "
                f"learn them, but got {inner_rates!r}."
            )
        adapt = self.default_adapt if adapt is None else adapt
        params = adapting(network, adapt, head)
        rates_of_steps(inner_lr, params, 1)  # refuses a rate out of range
        self.inner_lr, self.train_steps = inner_lr, train_steps
        self.test_steps = train_steps if test_steps is None else test_steps
        self.adapts, self.head = adapt, head
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
        self._first_look = FirstLook(adapt, head, self.logits)
        self._checked_losses: dict[tuple[Any, ...], LossFunction] = {}
        self._loss_look = LossLook()
        self._warned_of_weight_norm = False
        self._features_once = adapt == "head"

    def _check_that_it_compiles(self) -> None:
        reasons = {
            f"{type(self).__name__}, which has no gradient to compile": not self.compiles,
            "batch_norm='per_step', whose averages change": self.step_statistics is not None,
            "a network that draws random numbers": is_random(self.network),
        }
        if wrong := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(
                "Expected a meta-gradient of stacked tasks with `compiled=True` but got "
                f"{wrong[0]}; leave it uncompiled."
            )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose learned rates or step averages do not match this model's, before its weights are looked at.

        Raises:
            ValueError: If they do not match.
        """
        kept = ("learned_rates.", "step_statistics.")
        theirs, ours = (
            {name: list(tensor.shape) for name, tensor in state.items() if name.startswith(kept)}
            for state in (checkpoint["state_dict"], self.state_dict())
        )
        if theirs != ours:
            raise ValueError(
                "Expected a checkpoint with the inner rates and batch-norm averages of this "
                f"model but got others ({len(theirs)} tensors, here {len(ours)}); give the model "
                "the `inner_rates`, `batch_norm`, `adapt` and `train_steps` that it was trained "
                "with."
            )
        super().on_load_checkpoint(checkpoint)

    @override
    def _adapts_by(self) -> dict[str, Any]:
        return super()._adapts_by() | {"adapt": self.adapts}

    @override
    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        """Adapt to each task in ``test_steps`` steps.

        Returns:
            The query losses ``[T, K + 1]`` and, as ``aux``, the query outputs
            ``[T, K + 1, Q, ...]`` after 0 .. K steps.
        """
        check_episodes(episodes)
        # looks differentiate, which tensors made in inference mode rule out
        with torch.inference_mode(False), torch.no_grad():
            curve: AdaptationCurve = self._executor.within_memory(
                self._evaluate, detached(episodes), self.device
            )
        return curve

    def _evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        return self._adapt(self._plan(episodes), episodes, self.test_steps)

    def adapt(self, support_x: Inputs, support_y: Tensor, steps: int | None = None) -> nn.Module:
        """Return the network adapted to a task, or the networks adapted to many, for new queries.

        The network is in evaluation mode, both while it adapts and in what is returned.

        Args:
            support_x: Inputs of the support set, ``[S, ...]``; of many tasks ``[T, S, ...]``.
            support_y: Their labels ``0 .. ways - 1``, ``[S]`` or ``[T, S]``. Regression targets are
                always those of many tasks, ``[T, S, ...]``.
            steps: Inner steps; by default ``test_steps``.

        Returns:
            For one task a copy of the network with the adapted parameters, which takes queries
            ``[Q, ...]``: with ``batch_norm="support"`` it keeps the statistics of the support set,
            with ``"batch"`` it uses those of each batch of queries. For many tasks
            :class:`lightning_maml.AdaptedNetworks`, which takes ``[T, Q, ...]``. With
            ``tasks="loop"``, and where vmap does not accept the network, these are adapted and
            called one by one; otherwise they are called as one, and adapted 32 (or ``chunk_size``)
            at once, or with ``"auto"`` on a CPU as many as in training.
        """
        if not isinstance(support_y, Tensor):
            raise TypeError(
                f"Expected `support_y` to be a tensor but got {type(support_y).__name__}; make it "
                "one, torch.tensor(...)."
            )
        with torch.inference_mode(False), torch.enable_grad():
            return self._networks_of(
                *detached((support_x, support_y)), self.test_steps if steps is None else steps
            )

    def _networks_of(self, support_x: Inputs, support_y: Tensor, steps: int) -> nn.Module:
        of_one = support_y.ndim == 1 and not support_y.is_floating_point()
        if of_one:
            support_x, support_y = map_tensors(lambda tensor: tensor[None], (support_x, support_y))
        support = Episodes(support_x, support_y, support_x, support_y)
        network = structural_copy(self.network).eval()
        check_episodes(support)
        kind = self._kind(network, support)
        self._check(Learner(network, self.batch_norm), support, kind)
        as_one = not of_one and self._adapts_as_one(support, network, kind)
        execution = (
            self._executor.of_adaptation(self.network, self.device, support)
            if as_one
            else Execution("loop", None)
        )
        learner = Learner(network, self.batch_norm, vectorised=are_stacked(*execution))
        adapted = adapted_parameters(
            [self._support_loss(learner, self._averages(j)) for j in range(steps + 1)],
            *(learner.params, support_x, support_y),
            inner_lr=self._rates(),
            steps=steps,
            has_aux=True,
            # the test of stacking has found that they draw none
            may_draw=execution.tasks != "threads",
            **execution._asdict(),
        )
        with torch.no_grad():
            adapted |= {
                name: average.repeat(len(support_y), 1)
                for name, average in self._averages(steps).items()
            }
            networks = AdaptedNetworks(network, adapted, self.batch_norm, support_x, as_one)
            if as_one and (verdict := networks.compare_stacked(support_x)).wrong:
                if self._executor.tasks == "vmap":
                    self._executor.check_stacking(verdict)
                networks.stacked = False
            return networks.network(0) if of_one else networks

    def _adapts_as_one(self, support: Episodes, network: nn.Module, kind: Kind) -> bool:
        """Return whether the tasks of ``support`` are adapted to, and their networks called, as one."""
        if self._executor.tasks == "loop":
            return False
        verdict = self._verdict(support, network, kind)
        if self._executor.tasks == "vmap":
            self._executor.check_stacking(verdict)
            return True
        return not any(verdict)

    def meta_gradient(
        self, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Params:
        """Return the meta-gradient of some tasks at the current parameters, by default the algorithm's own, for the network's parameters.

        Those of the inner rates and of the loss's parameters, where these are learned, are left
        out.

        Raises:
            ValueError: If the tasks' labels do not fit the network's outputs.
        """
        check_episodes(episodes)

        def of(episodes: AnyEpisodes) -> Params:
            plan = self._plan(episodes)
            own = (
                self._training_gradient
                if curvature is None
                else partial(self._meta_gradient, curvature=curvature)
            )
            found: MetaGradient = own(plan, episodes)
            return {name: found.grad[name] for name in plan.learner.params}

        gradient: Params = self._executor.within_memory(of, episodes, self.device)
        return gradient

    def inner_path(self, task: Episodes) -> TaskPath:
        """Return the path that adaptation to a task takes in evaluation, and the losses along it.

        Args:
            task: ``Episodes`` with one task: support set ``[1, S, ...]`` and query set
                ``[1, Q, ...]``.

        Raises:
            ValueError: With ``batch_norm="per_step"``, where each step has a loss of its own.
        """
        if self.step_statistics is not None:
            raise ValueError(
                "Expected one loss for all inner steps but got batch_norm='per_step'; use "
                "another `batch_norm`."
            )
        check_episodes(task)
        learner = Learner(structural_copy(self.network).eval(), self.batch_norm)
        support, query = self._support_loss(learner), self._query_loss(learner)
        with torch.inference_mode(False), torch.no_grad():
            of_one = first_task(detached(task))
            w = {name: p.detach().clone() for name, p in learner.params.items()}
            rates = detached(rates_of_steps(self._rates(), w, self.test_steps))
            losses = LossFunctions(support, has_aux=True).of_task(of_one, self.test_steps)
            path, w_N = inner_loop(losses, w, rates)
            points = [*(step.w for step in path), w_N]
        return TaskPath(
            points,
            lambda w: support(w, of_one.support_x, of_one.support_y)[0],
            lambda w: query(w, of_one)[0],
        )

    def probe(self, episodes: AnyEpisodes, *, progress: bool = False) -> Probe:
        """Return a probe that measures the theory's constants for some tasks at the current parameters.

        Raises:
            ValueError: If the theory does not cover such a model
                (:meth:`lightning_maml.MAML.check_for_theory`), if each step has a loss of its own,
                or if the tasks' labels do not fit the network's outputs.
        """
        self.check_for_theory()
        check_episodes(episodes)
        if self.step_statistics is not None and not self.training:
            raise ValueError(
                "Expected one loss for all inner steps but got batch_norm='per_step' in "
                "evaluation mode; use another `batch_norm`."
            )
        return Probe(**self._arguments(self._plan(episodes), episodes), progress=progress)

    def check_for_theory(self) -> None:
        """Check that the theory's constants and stepsizes cover such a model.

        Raises:
            ValueError: If not all parameters adapt at one fixed rate, or the algorithm's
                meta-gradient is not the query loss's; the theory assumes both.
        """
        own = (type(self)._training_gradient, type(self)._meta_gradient)
        if own != (MAML._training_gradient, MAML._meta_gradient):
            raise ValueError(
                "Expected MAML, FOMAML or HFMAML, of which the theory is, but got "
                f"{type(self).__name__}."
            )
        if self.adapts != "all" or self.learned_rates is not None:
            raise ValueError(
                "Expected one fixed inner rate for all parameters, of which the theory's "
                f"constants and stepsizes are, but got adapt={self.adapts!r} with "
                f"{'fixed' if self.learned_rates is None else 'learned'} rates; use adapt='all' "
                "and inner_rates='fixed'."
            )

    @override
    def meta_loss(self, episodes: AnyEpisodes) -> Tensor:
        """Return the query loss as a scalar whose backward pass deposits the meta-gradient, for a training loop without a trainer.

        Raises:
            ValueError: As in ``EpisodicModule.meta_loss``, and if there are trainable parameters
                besides those of network, loss and rates: they would get no gradient.
        """
        if not self._gradients_arrive:
            learned_here = {*self._loss_of_outputs().params.values()}
            others = [
                name
                for name, p in self._besides_the_network()
                if p not in learned_here and not name.startswith("learned_rates.")
            ]
            refuse_without_gradient(others)
            self._gradients_arrive = True
        loss: Tensor = super().meta_loss(episodes)
        return loss

    def _check_that_rates_are_used(self) -> None:
        if self.learned_rates is not None and self.train_steps == 0:
            raise ValueError(
                "Expected `train_steps` to be at least 1 to train learned inner rates, which get "
                "their gradient from inner steps, but got 0; use inner_rates='fixed'."
            )

    @override
    def _meta_step(self, episodes: AnyEpisodes) -> tuple[Tensor, Tensor, Tensor]:
        self._check_that_rates_are_used()
        given = tensors(episodes)
        if any(tensor.requires_grad for tensor in given):
            made = [
                name
                for name, part in episodes._asdict().items()
                if any(tensor.requires_grad for tensor in tensors(part))
            ]
            raise ValueError(
                f"Expected episodes that need no gradient but {made} do, and would get none; put "
                "what makes them into the network, or give them detached, x.detach()."
            )
        rates = rates_of_steps(self._rates(), self._adapting(), self.train_steps)
        params = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        read_only = params | {f"inputs {number}": tensor for number, tensor in enumerate(given)}
        versions = {
            name: tensor._version for name, tensor in read_only.items() if not tensor.is_inference()
        }
        result: MetaGradient = self._executor.within_memory(
            lambda batch: self._training_gradient(self._plan(batch), batch), episodes, self.device
        )
        if written := [
            name for name, version in versions.items() if read_only[name]._version != version
        ]:
            raise ValueError(
                "Expected a network and a loss that leave parameters and inputs as they are but "
                f"they wrote to {written}, which are no longer what they were; let them work on "
                "copies, x.clone()."
            )
        self._stop_unless_finite(result)
        self._update_running_averages(episodes)
        trained = params | self._loss_of_outputs().params
        loss = loss_with_gradient(
            [trained, *map(tensor_rates, rates)], [result.grad, *result.inner_lr], result.query_loss
        )
        return loss, result.query_loss, result.aux

    @override
    def _figures_before(self, episodes: AnyEpisodes) -> dict[str, Tensor]:
        curve = self._adapt(self._plan(episodes), episodes, 0)
        figures = with_accuracy(curve.loss, curve.aux, episodes, ignored_label(self.loss))
        return {f"{name}_before": values[:, 0] for name, values in figures.items()}

    def _training_gradient(self, plan: Plan, episodes: AnyEpisodes) -> MetaGradient:
        return self._meta_gradient(plan, episodes, self.curvature)

    def _meta_gradient(
        self,
        plan: Plan,
        episodes: AnyEpisodes,
        curvature: CurvatureName,
        step_weights: Sequence[float] | None = None,
    ) -> MetaGradient:
        try:
            return self._gradient_by(plan, episodes, curvature, step_weights)
        except HeadDoesNotEndError:
            self._features_once = False
            return self._gradient_by(plan._replace(head=None), episodes, curvature, step_weights)

    def _gradient_by(
        self,
        plan: Plan,
        episodes: AnyEpisodes,
        curvature: CurvatureName,
        step_weights: Sequence[float] | None,
    ) -> MetaGradient:
        arguments = self._training_arguments(plan, episodes)
        if plan.head is not None:
            reader = self._head_learner(plan.head, plan.execution)
            losses = {"loss": self._support_loss(reader), "query_loss": self._query_loss(reader)}
            arguments |= losses | {"encode": partial(self._encode, plan.learner, plan.head)}
        call = None
        if self._compiler is not None:
            call = partial(
                self._compiler,
                (
                    curvature,
                    self.probe_radius,
                    plan.head,
                    *map(state_of, (self.network, self.loss)),
                ),
            )
        return meta_gradient(
            **arguments,
            call=call,
            inner_lr=self._rates(),
            steps=self.train_steps,
            curvature=curvature,
            probe_radius=self.probe_radius if curvature == "finite_difference" else None,
            step_weights=step_weights,
        )

    def _adapt(self, plan: Plan, episodes: AnyEpisodes, steps: int) -> AdaptationCurve:
        try:
            return self._curve_by(plan, episodes, steps)
        except HeadDoesNotEndError:
            self._features_once = False
            return self._curve_by(plan._replace(head=None), episodes, steps)

    def _curve_by(self, plan: Plan, episodes: AnyEpisodes, steps: int) -> AdaptationCurve:
        if plan.head is not None:
            with torch.inference_mode(False), torch.no_grad():
                episodes = detached(episodes)
                encode = partial(self._encode, plan.learner, plan.head, plan.learner.params)
                chunks = map_tasks(
                    lambda task, axis: axis.vmap(encode)(task),
                    episodes,
                    **plan.execution._asdict(),
                )
                support_x, query_x = cat_chunks([*chunks])
            plan = plan._replace(learner=self._head_learner(plan.head, plan.execution))
            episodes = episodes._replace(support_x=support_x, query_x=query_x)
        return adaptation_curve(
            **self._arguments(plan, episodes, steps), inner_lr=self._rates(), steps=steps
        )

    def _head_that_ends(self, seen: Seen, episodes: AnyEpisodes) -> str | None:
        """Return the head if it alone adapts and ends the network, so that the features before it need computing only once."""
        if (
            not self._features_once
            or not isinstance(episodes, Episodes)
            or self.step_statistics is not None
        ):
            return None
        head = head_of(self.network, self.head)
        return (
            head
            if seen.ends_with_head and not batch_norms(self.network.get_submodule(head))
            else None
        )

    def _encode(
        self, learner: Learner, head: str, params: Params, task: Episodes
    ) -> tuple[Tensor, Tensor]:
        statistics_of = task.support_x if learner.uses_support_statistics else None
        support = learner.features(params, task.support_x, head)
        query = learner.features(params, task.query_x, head, statistics_of=statistics_of)
        # features computed under autocast are the inputs of what runs without it
        dtype = next(iter(params.values())).dtype
        return support.to(dtype), query.to(dtype)

    def _averages(self, step: int) -> dict[str, Tensor]:
        """Return the running averages of networks adapted in ``step`` steps, if these have averages of their own."""
        return {} if self.step_statistics is None else self.step_statistics(step)

    def _adapting(self) -> Params:
        return adapting(self.network, self.adapts, self.head)

    def _rates(self) -> InnerRates:
        names = self._adapting().keys()
        if self.learned_rates is None:
            return dict.fromkeys(names, self.inner_lr)
        rates: InnerRates = self.learned_rates(names)
        return rates

    def _arguments(
        self, plan: Plan, episodes: AnyEpisodes, steps: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments that the functions share, with a loss for each of ``steps`` steps where batch norm has averages for each."""
        learner = plan.learner
        loss: Any = self._support_loss(learner)
        query_loss: Any = self._query_loss(learner)
        if self.step_statistics is not None and steps is not None:
            loss, query_loss = (
                [of(learner, self._averages(j)) for j in range(steps + 1)]
                for of in (self._support_loss, self._query_loss)
            )
        return {
            "loss": loss,
            "params": learner.params,
            "episodes": episodes,
            "query_loss": query_loss,
            "has_aux": True,
            **plan.execution._asdict(),
        }

    def _training_arguments(self, plan: Plan, episodes: AnyEpisodes) -> dict[str, Any]:
        """Return the arguments for a meta-gradient, which is that of the loss's parameters too; these do not adapt."""
        arguments = self._arguments(plan, episodes, self.train_steps)
        return arguments | {"params": plan.learner.params | self._loss_of_outputs().params}

    def _modes_of_loss(self) -> tuple[Any, ...]:
        return modes(self.loss) if isinstance(self.loss, nn.Module) else ()

    def _check_loss(self, learner: Learner, episodes: AnyEpisodes) -> None:
        """Refuse, once for each loss and mode of it, one whose value or gradient would not be the right one.

        It must be a scalar, and may not read parameters of the network, or its own past its
        modules: adapted ones cannot be put there.
        """
        kind = (id(self.loss), self._modes_of_loss())
        if kind in self._checked_losses:
            return
        of_outputs, read = self._loss_of_outputs(), list[str]()
        y = detached(support_set(first_task(episodes))[1])
        with first_support(learner, episodes) as x, torch.no_grad():
            outputs = learner(
                {name: p.detach().clone().requires_grad_() for name, p in learner.params.items()}, x
            )
            with reading(learner.params, read):
                of_outputs({}, outputs, y)
        if read:
            raise ValueError(
                "Expected a loss of outputs and labels but it reads the network's parameters "
                f"{sorted(set(read))} from outside, where adapted values cannot be put; let the "
                "network return what the loss needs of them."
            )
        with first_support(learner, episodes), torch.enable_grad():
            outputs = map_outputs(Tensor.detach, outputs)
            value = of_outputs(
                {name: p.detach() for name, p in of_outputs.params.items()}, outputs, y
            )
        if value.ndim:
            raise ValueError(
                f"Expected the loss of a task to be a scalar but got shape {list(value.shape)}; "
                "use reduction='mean'."
            )
        leaves, own = (
            leaves_of(value),
            {id(p): name.removeprefix(OF_LOSS) for name, p in of_outputs.params.items()},
        )
        if past_modules := sorted(own[leaf] for leaf in leaves & own.keys()):
            raise ValueError(
                "Expected a loss that reaches its parameters through its modules but it reads "
                f"{past_modules} from elsewhere (a tuple, a closure, a global), where adapted "
                "values cannot be put; read them from the module's attributes."
            )
        # those of a subclass are refused by their names
        known = (*tensors_in(outputs), *self.parameters())
        if leaves - {id(tensor) for tensor in known}:
            raise ValueError(
                "Expected a loss whose trainable parameters are those of an nn.Module but it "
                "depends on one from elsewhere (a closure, a global), which would get no "
                "gradient; make the loss a module that has it as a parameter, or detach it."
            )
        if len(self._checked_losses) == KINDS:
            self._checked_losses.clear()
        self._checked_losses[kind] = self.loss  # held, so that no other loss gets its id

    def _head_learner(self, head: str, execution: Execution) -> HeadLearner:
        return HeadLearner(self.network, head, vectorised=are_stacked(*execution))

    def _plan(self, episodes: AnyEpisodes) -> Plan:
        """Check a meta-batch and decide how its tasks are run.

        Raises:
            ValueError: If its labels do not fit the network's outputs, or network and loss are none
                that can be trained in this way.
        """
        learner, kind = Learner(self.network, self.batch_norm), self._kind(self.network, episodes)
        seen = self._check(learner, episodes, kind)
        stacking = partial(self._verdict, episodes, self.network, kind)
        execution = self._executor(self.network, self.device, episodes, seen.draws, stacking)
        return Plan(
            learner.stacked() if are_stacked(*execution) else learner,
            execution,
            self._head_that_ends(seen, episodes),
        )

    def _execution(self, episodes: AnyEpisodes) -> Execution:
        """Return how the tasks of a meta-batch are run."""
        return self._plan(episodes).execution

    def _verdict(self, episodes: AnyEpisodes, network: nn.Module, kind: Kind) -> Verdict:
        """Return whether tasks of a checked batch can be stacked for ``network``, the model's own or a structural copy in another mode."""

        def look() -> Verdict:
            if hooks_tensors(network):
                return Verdict(HOOKED)
            if network is not self.network:  # a copy only adapts, by first derivatives
                return self._compare_in_double(episodes, network, curved=False)
            try:
                # any algorithm may be asked for exact gradients
                return self._compare_in_double(episodes, network, curved=True)
            except NoSecondDerivativeError:
                if self.curvature == "exact":
                    raise
                return self._compare_in_double(episodes, network, curved=False)

        return self._once_for_its_kind(kind, look)

    def _compare_in_double(
        self, episodes: AnyEpisodes, network: nn.Module, *, curved: bool
    ) -> Verdict:
        """Compare in float64, or in their own type networks and losses that run in no other."""
        reason = ""
        for dtype in (torch.float64, None):
            try:
                return self._compare_stacked(episodes, network, dtype, curved)
            except NoSecondDerivativeError:
                raise
            except (
                Exception
            ) as error:  # the trial has other parameters, with which a network may raise anything
                if dtype is None and isinstance(error, ValueError):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
        return Verdict(f"even single ones fail at parameters a little away from these ({reason})")

    def _compare_stacked(
        self, episodes: AnyEpisodes, network: nn.Module, dtype: torch.dtype | None, curved: bool
    ) -> Verdict:
        episodes = detached(episodes)
        network, criterion, averages = structural_copy(network, dtype), self.loss, self._averages(0)
        if dtype is not None:
            criterion = (
                structural_copy(criterion, dtype) if isinstance(criterion, nn.Module) else criterion
            )
            episodes, averages = tree_map(
                lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor,
                (episodes, averages),
            )
        of_outputs = FunctionalLoss(criterion, self.logits)

        def both_losses(learner: Learner, params: Params, task: AnyEpisodes) -> Tensor:
            x, y = support_set(task)
            of_support = of_outputs(params, learner(params, x, averages=averages), y)
            statistics_of = x if learner.uses_support_statistics else None
            outputs = learner(params, task.query_x, statistics_of=statistics_of, averages=averages)
            value: Tensor = of_support + of_outputs(params, outputs, task.query_y)
            return value

        single, stacked = (
            Learner(network, self.batch_norm, vectorised=vectorised) for vectorised in (False, True)
        )
        with torch.autocast(
            self.device.type, enabled=dtype is None and torch.is_autocast_enabled(self.device.type)
        ):
            return compare_losses(
                partial(both_losses, single),
                partial(both_losses, stacked),
                single.params | of_outputs.params,
                episodes,
                curved=curved,
            )

    def _only_evaluates(self, learner: Learner) -> bool:
        """Return whether a learner is that of a copy in evaluation mode, rather than of a network that is trained in that mode."""
        return (
            self.network.training
            and not learner.network.training
            and not isinstance(learner, HeadLearner)
        )

    def _loss_of_outputs(self, *, training: bool = True) -> FunctionalLoss:
        loss = self.loss
        if isinstance(loss, nn.Module) and not training:
            loss = structural_copy(loss).eval()
        return FunctionalLoss(loss, self.logits)

    def _support_loss(
        self, learner: Learner, averages: Mapping[str, Tensor] | None = None
    ) -> Callable[[Params, Tensor, Tensor], tuple[Tensor, Tensor]]:
        of_outputs = self._loss_of_outputs(training=not self._only_evaluates(learner))

        def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs = learner(params, x, averages=averages)
            return of_outputs(params, outputs, y), self.logits(outputs)

        return loss

    def _query_loss(
        self, learner: Learner, averages: Mapping[str, Tensor] | None = None
    ) -> Callable[[Params, AnyEpisodes], tuple[Tensor, Tensor]]:
        of_outputs = self._loss_of_outputs(training=not self._only_evaluates(learner))

        def loss(params: Params, task: AnyEpisodes) -> tuple[Tensor, Tensor]:
            statistics_of = support_set(task)[0] if learner.uses_support_statistics else None
            outputs = learner(params, task.query_x, statistics_of=statistics_of, averages=averages)
            return of_outputs(params, outputs, task.query_y), self.logits(outputs)

        return loss

    @override
    def _update_running_averages(self, episodes: AnyEpisodes) -> None:
        super()._update_running_averages(episodes)
        if self.step_statistics is not None:
            first = map_tensors(lambda tensor: tensor[:1], episodes)
            plan = Plan(Learner(self.network, self.batch_norm), Execution("loop", None), None)
            arguments = self._arguments(plan, first) | {"query_loss": self._entering}
            found = adaptation_curve(
                **arguments, inner_lr=self._rates(), steps=self.train_steps
            ).aux
            self.step_statistics.update(
                {name: (mean[0], variance[0]) for name, (mean, variance) in found.items()}
            )

    def _entering(
        self, params: Params, task: AnyEpisodes
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return, besides a loss of zero, the statistics of what enters each batch norm for support and query set together."""
        network = structural_copy(self.network)
        in_training = {name: norm for name, norm in batch_norms(network).items() if norm.training}
        for norm in in_training.values():
            forget_running_averages(norm)
        found = entering_statistics(
            network, params, cat([support_set(task)[0], task.query_x]), correction=1
        )
        return next(iter(params.values())).new_zeros(()), {
            name: found[name] for name in in_training
        }

    def _check(self, learner: Learner, episodes: AnyEpisodes, kind: Kind) -> Seen:
        """Refuse what would give wrong numbers, or fail in the loss: some networks, and episodes whose labels do not fit their outputs."""
        seen = self._look(learner, episodes, kind)
        shape = seen.outputs
        task = first_task(episodes)
        _, support_y = support_set(task)
        if support_y.is_floating_point():
            check_targets(support_y, self.loss)
        else:
            assert shape is not None, "with labels there are logits"
            ways = self._ways_of_datamodule()
            if ways is not None and shape != (ways,):
                raise ValueError(
                    f"Expected `network` to have {ways} outputs, one per way of the episode, but "
                    f"got {shape[0]}; give its head as many outputs as the datamodule has `ways`, "
                    "and leave `test_ways` the same, because a head has one width."
                )
            check_labels(episodes, shape[0], ignored_label(self.loss))
        self._loss_look(
            self.loss,
            (shape, learner.network.training, self._modes_of_loss()),
            lambda number: self._loss_of_outputs().given(
                first_outputs(learner, episodes, of_queries=number == 1)
            ),
            (support_y, task.query_y),
        )
        self._check_loss(learner, episodes)
        return seen

    def _ways_of_datamodule(self) -> int | None:
        """Return how many classes the episodes of a running trainer's datamodule have, if it has one that says so."""
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        if trainer is None or data is None:
            return None
        judges = trainer.evaluating or trainer.predicting
        return (
            getattr(data, "test_ways", None)
            if judges
            else getattr(data, "ways", None)
            if trainer.training
            else None
        )

    def _look(self, learner: Learner, episodes: AnyEpisodes, kind: Kind) -> Seen:
        return self._first_look(
            kind, self.network, learner, episodes, self._loss_of_outputs(), self._inspect
        )

    def _inspect(self, run: Callable[[], Tensor]) -> None:
        """Look at the network while it runs, once for each kind of batch."""
        if (
            self.curvature == "exact"
            and not self._warned_of_weight_norm
            and (layers := weight_normed(self.network))
        ):
            rank_zero_warn(
                "Torch's second derivative of weight norm is wrong, and so is the exact "
                f"meta-gradient through {layers}; train with HFMAML, which takes first "
                "derivatives only, or write the norm out: g * v / v.norm(dim=1, keepdim=True)."
            )
            self._warned_of_weight_norm = True

    def _stop_unless_finite(self, result: MetaGradient) -> None:
        where = (
            f"at step {self.global_step} (inner_lr={self.inner_lr}, "
            f"train_steps={self.train_steps}); lower inner_lr or check the data."
        )
        self._stop_unless_losses_are_finite(result.query_loss, where)
        if broken := not_finite(result):
            raise FloatingPointError(
                f"Expected a finite meta-gradient but it is not finite in {broken} {where}"
            )
