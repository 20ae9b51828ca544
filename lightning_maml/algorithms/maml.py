"""MAML as a Lightning module; its variants are in variants.py."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_maml.algorithms.adapting import AdaptingModule, Plan
from lightning_maml.algorithms.base import Step, StepResult
from lightning_maml.algorithms.features import encode, functional_head
from lightning_maml.algorithms.non_finite import check_is_finite
from lightning_maml.batches.episodes import AnyEpisodes, Episodes, check_episodes
from lightning_maml.batches.meta_batch import even_meta_batch
from lightning_maml.batches.trees import Inputs, detached, map_tensors, tensors
from lightning_maml.checks.findings import Kind
from lightning_maml.checks.label_checks import check_is_tensor, ignored_label
from lightning_maml.checks.requirements import (
    Unwritten,
    refuse_differentiable,
    refuse_without_gradient,
)
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.inner_rates import rates_of_steps, tensor_rates
from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError
from lightning_maml.execution.auto import Execution
from lightning_maml.execution.compilation import state_of
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.functional.adaptation import adaptation_curve, adapted_parameters
from lightning_maml.functional.graph_size import graph_bytes
from lightning_maml.functional.loss_with_gradient import loss_with_gradient
from lightning_maml.functional.meta_gradient import MetaGradient, meta_gradient
from lightning_maml.io.plain import whole_number
from lightning_maml.networks.adapted import AdaptedNetworks
from lightning_maml.networks.buffers import statistics_in_training
from lightning_maml.networks.copies import copy_in_mode
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.theory.measure import Probe


class MAML(AdaptingModule):
    """Model-agnostic meta-learning by the exact meta-gradient of N inner steps.

    Ji et al. 2022; N = 1: Fallah et al. 2020, Algorithm 1.

    Batches are :class:`lightning_maml.Episodes` (Ji's Algorithm 2) or, with fresh samples for every
    inner step and for the curvature (Ji's Algorithm 1), :class:`lightning_maml.ResampledEpisodes`.
    Every optimizer, scheduler, clipping and accumulation setting of Lightning applies to the
    meta-parameters. Logged: ``train/``, ``val/`` and ``test/`` ``loss`` and, for classification,
    ``accuracy`` on the query sets after adaptation, and both as ``_before`` for before adaptation
    (in training only on the steps that are logged). Validation and test add ``_ci95``, the
    half-width of the 95 % confidence interval over the tasks, and ``accuracy_step_00 .. K``.

    Args:
        network: The network to meta-train, any module; its frozen parameters stay as they are.
        inner_lr: alpha, the rate of the inner steps. The loss is a mean over the support set, so
            multiply a rate published for a loss summed over the classes by ``ways``. Or a dict of
            rates by the names of parameters and modules, ``{"body": 0.01, "head": 0.1}``, of which
            the longest that fits a parameter counts; ``""`` is the whole network.
        train_steps: N, inner steps in training.
        test_steps: K, inner steps in validation, test and prediction; by default N.
        loss: Maps outputs and labels to their mean loss.
        batch_norm: ``"batch"``: the statistics of the batch at hand (transductive on the query set,
            as in the MAML papers); ``"support"``: of the support set only; ``"running"``: batch
            statistics in training, running averages in evaluation; ``"per_step"``: the same with
            averages for each inner step, as in MAML++, taken from the first task of each
            meta-batch (of each size, where tasks differ in size).
        optimizer: Builds the meta-optimizer from the parameters; by default Adam with its rate of
            1e-3.
        lr_scheduler: Builds the scheduler from the optimizer; by default none. It may also return
            the dict that Lightning knows, ``{"scheduler": ..., "interval": "step", ...}``.
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
        adapt: Which parameters take the inner steps, ``"all"``, ``"head"`` or ``"body"``, or a list
            of names of parameters and modules, in which ``*`` stands for anything, dots included:
            ``["head", "*.bias"]``. The meta-optimizer trains all. By default what the class is
            named for: the head in :class:`ANIL`, the body in :class:`BOIL`, all in the others.
        head: Name of the submodule that is the head; by default the last one that has trainable
            parameters of its own.
        inner_rates: ``"fixed"``: all are ``inner_lr``; or learned with the network, starting from
            ``inner_lr``: ``"per_layer"`` (one for each parameter tensor), ``"per_layer_and_step"``
            or ``"per_parameter"`` (one for each element). By default fixed; learned by
            :class:`LSLR` per layer and step, by :class:`MetaSGD` per parameter.
        compiled: Compile the meta-gradient as a whole, all tasks (or ``chunk_size``) as one, at the
            first batch of each shape: this takes from 10 seconds to minutes, and pays off for small
            networks. Numbers that the network or the loss read stay what they were then, and each
            new inner rate, unless it is learned, is compiled anew.
        lr_scheduler_interval: Whether the scheduler is stepped after every ``"epoch"`` or every
            ``"step"`` of the optimizer.
        metrics: Metrics of torchmetrics (one, a ``MetricCollection`` or a dict), of query outputs
            and labels; logged in validation and test after adaptation, and as ``_before`` for
            before it. By default none.
        metrics_over: ``"tasks"``: a metric is computed on the queries of each task, and the mean
            over the tasks is logged, with ``_ci95``; ``"queries"``: it is computed once, on the
            queries of all tasks.
        inner_optimizer: What an inner step does with the gradient: :class:`InnerSGD` (momentum,
            weight decay), :class:`InnerAdam`, or one of your own (:class:`InnerOptimizer`), whose
            state starts anew for each task; by default gradient descent. The meta-gradient is
            taken through it, by :class:`FOMAML` as through copies of the network that torch's
            optimizers move: the query gradient after adaptation.
        support_loss: The loss of the inner steps, if it is not that of the query sets.
        query_in_eval: Run the network in training mode in the inner steps and in evaluation mode
            on the query sets, in training and in evaluation alike, as loops do that call
            ``train()`` before the inner steps and ``eval()`` after them. So dropout acts on the
            support set alone; and with ``batch_norm="running"`` the support set is normalised by
            its own statistics and the query set by the running averages, which only support sets
            move.
        keep_graphs: Whether the graphs of all inner steps are kept for the exact meta-gradient:
            ``"always"``; ``"never"``, so that memory holds one at a time, and each is built twice;
            or ``"auto"``, if they fit into half of the memory that is free at the first batch. The
            numbers are the same.
        cuda_graphs: Whether training steps on a GPU run as CUDA graphs: after two batches of the
            same shapes the next one is captured, and further ones only replay its kernels, which
            takes the host a fraction of the time. What cannot be captured runs as usual, and is
            named in the log: networks that draw random numbers, or fetch numbers from the GPU.

    Raises:
        TypeError: If what should be a number is none; numpy's numbers are taken as Python's.
        ValueError: If an argument is out of range; in a step, if the network's outputs do not fit
            the episode's labels, if stacked tasks would give other numbers than single ones, or if
            the network has no second derivatives that the algorithm needs.
        FloatingPointError: In training, if the query loss or the meta-gradient is not finite; the
            parameters are then untouched.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> model = MAML(MLP(4, 3), inner_lr=0.1, train_steps=2)
        >>> model.meta_loss(Episodes(x, y, x, y)).backward()  # or Trainer().fit(model, loader)
        >>> model.adapt(x[0], y[0])(x[0]).shape  # the network adapted to a task
        torch.Size([6, 3])
    """

    def adapt(
        self,
        support_x: Inputs,
        support_y: Tensor,
        steps: int | None = None,
        *,
        many: bool | None = None,
    ) -> nn.Module:
        """Return the network adapted to a task, or the networks adapted to many, for new queries.

        The network is in evaluation mode, both while it adapts (but with ``query_in_eval``) and in
        what is returned.

        Args:
            support_x: Inputs of the support set, ``[S, ...]``; of many tasks ``[T, S, ...]``.
            support_y: Their labels ``0 .. ways - 1``, ``[S]`` or ``[T, S]``; or targets of a
                regression, or labels for each pixel or token, ``[S, ...]`` or ``[T, S, ...]``.
            steps: Inner steps; by default ``test_steps``.
            many: Whether these are many tasks. By default integer labels ``[S]`` are of one task,
                and all others of many: say ``many=False`` for one task of a regression.

        Returns:
            For one task a copy of the network with the adapted parameters, which takes queries
            ``[Q, ...]``: with ``batch_norm="support"`` it keeps the statistics of the support set,
            with ``"batch"`` it uses those of each batch of queries. For many tasks
            :class:`lightning_maml.AdaptedNetworks`, which takes ``[T, Q, ...]``. With
            ``tasks="loop"``, and where vmap does not accept the network, these are adapted and
            called one by one; otherwise they are called as one, and adapted 32 (or ``chunk_size``)
            at once, or with ``"auto"`` on a CPU as many as in training.
        """
        check_is_tensor(support_y, "support_y")
        steps = self.test_steps if steps is None else whole_number(steps, "steps")
        is_guess = many is None and support_y.is_floating_point()
        if many is None:
            many = is_guess or support_y.ndim > 1
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return self._networks_of(*detached((support_x, support_y)), steps, many)
        except Exception as error:
            if is_guess:
                error.add_note(
                    "Targets that are floats are taken for those of many tasks, [T, S, ...]: for "
                    "one task say many=False."
                )
            raise

    def _networks_of(
        self, support_x: Inputs, support_y: Tensor, steps: int, many: bool
    ) -> nn.Module:
        of_one = not many
        if of_one:
            support_x, support_y = map_tensors(lambda tensor: tensor[None], (support_x, support_y))
        support = Episodes(support_x, support_y, support_x, support_y)
        check_episodes(support)
        network = copy_in_mode(self.network, training=self._query_in_eval)
        kind = self._kind(network, support)
        info = self._check(FunctionalNetwork(network, self.batch_norm), support, kind)
        as_one = not of_one and self._adapts_as_one(support, network, kind)
        execution = Execution("loop", None)
        if as_one:
            sharing = partial(self._tasks_share_state, support, network, kind)
            execution = self._executor.of_adaptation(
                self.network, self.device, support, info.draws, sharing
            )
        functional = FunctionalNetwork(network, self.batch_norm, vectorised=are_stacked(*execution))
        adapted = adapted_parameters(
            [self._losses(functional, self._averages(j)).support for j in range(steps + 1)],
            functional.params,
            support_x,
            support_y,
            **self._inner_steps(steps),
            has_aux=True,
            may_draw=execution.tasks != "threads",  # networks that draw are run in a loop
            **execution._asdict(),
        )
        with torch.no_grad():
            for name, average in self._averages(steps).items():
                adapted[name] = average.repeat(len(support_y), 1)
            networks = AdaptedNetworks(network, adapted, self.batch_norm, support_x, as_one)
            if as_one and (verdict := networks.compare_stacked(support_x)).wrong:
                if self._executor.tasks == "vmap":
                    self._executor.check_stacking(verdict)
                networks.stacked = False
            return networks.network(0) if of_one else networks

    def _adapts_as_one(self, support: Episodes, network: nn.Module, kind: Kind) -> bool:
        """Return whether the tasks are adapted to, and their networks called, as one."""
        if self._executor.tasks == "loop":
            return False
        verdict = self._verdict(support, network, kind, adapts_only=True)
        if self._executor.tasks == "vmap":
            self._executor.check_stacking(verdict)
            return True
        return not any(verdict)

    def meta_gradient(
        self, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Params:
        """Return the meta-gradient of some tasks for the network's parameters.

        Those of the inner rates and of the loss's parameters, where these are learned, are left
        out.

        Raises:
            ValueError: If the tasks' labels do not fit the network's outputs.
        """
        episodes = even_meta_batch(episodes)
        for attempt in self._attempts(episodes):
            with attempt:
                plan = self._plan(episodes)
                function = self._gradient_function(plan, episodes, curvature)
                found = self._captured(function, plan)()
        return {name: found.grad[name] for name in plan.functional.params}

    @override
    def meta_loss(self, episodes: Any) -> Tensor:
        """Return the query loss, for a training loop without a trainer.

        It is a scalar whose backward pass deposits the meta-gradient.

        Args:
            episodes: A meta-batch, in any of the forms that ``training_step`` takes.

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
            raise UserValueError(
                "Expected `train_steps` to be at least 1 to train learned inner rates, which get "
                "their gradient from inner steps, but got 0; use inner_rates='fixed'."
            )

    def _check_that_the_support_loss_is_trained(self) -> None:
        learned = isinstance(self.support_loss, nn.Module) and any(
            p.requires_grad for p in self.support_loss.parameters()
        )
        if learned and (self.curvature == "none" or self.train_steps == 0):
            raise UserValueError(
                "Expected a `support_loss` without trainable parameters, which get their gradient "
                "from second derivatives of inner steps, but got some with "
                f"{type(self).__name__} and train_steps={self.train_steps}; freeze them by "
                "requires_grad_(False), or train with MAML or HFMAML."
            )

    @override
    def _plan_step(self, episodes: AnyEpisodes) -> Step:
        self._check_that_rates_are_used()
        self._check_that_the_support_loss_is_trained()
        refuse_differentiable(episodes)
        params = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        inputs = {f"inputs {number}": x for number, x in enumerate(tensors(episodes))}
        unwritten = Unwritten(params | inputs)
        plan = self._plan(episodes)
        run = self._captured(self._gradient_function(plan, episodes), plan)

        def finish(found: MetaGradient) -> StepResult:
            self._update_buffers(self.network, episodes, self.batch_norm)
            self._update_step_statistics(episodes)
            rates = rates_of_steps(self._rates(), self._adapting_parameters(), self.train_steps)
            points = [params | self._loss_of_outputs().params, *map(tensor_rates, rates)]
            loss = loss_with_gradient(points, [found.grad, *found.inner_lr], found.query_loss)
            return StepResult(loss, found.query_loss, found.aux)

        return Step(run, self._stop_unless_finite, finish, unwritten)

    def _gradient_function(
        self, plan: Plan, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Callable[[], MetaGradient]:
        """Return a function that computes the meta-gradient of a meta-batch.

        Subclasses define others.

        Args:
            plan: What was decided for the meta-batch.
            episodes: The meta-batch.
            curvature: By default the algorithm's own, as in training. If one is given, callbacks
                and the check ask for plain MAML's gradient with it, to compare: a subclass whose
                :meth:`_losses` depend on the meta-parameters themselves (a proximal term, say) may
                not pass these on to MAML's, which does not differentiate such terms.
        """
        return self._maml_gradient(plan, episodes, curvature or self.curvature)

    def _maml_gradient(
        self,
        plan: Plan,
        episodes: AnyEpisodes,
        curvature: CurvatureName,
        step_weights: Sequence[float] | None = None,
    ) -> Callable[[], MetaGradient]:
        arguments = self._training_arguments(plan, episodes)
        if plan.head is not None:
            head = functional_head(self.network, plan.head, plan.execution)
            loss, query_loss = self._losses(head)
            features = partial(encode, plan.functional, plan.head)
            arguments |= {"loss": loss, "query_loss": query_loss, "encode": features}
        if self._compiler is not None:
            states = map(state_of, (self.network, self.loss, self.support_loss))
            step = self._settings_of_inner_steps()
            setting = (curvature, self.probe_radius, plan.head, step, *states)
            arguments["call"] = partial(self._compiler, setting)
        if curvature == "finite_difference":
            arguments["probe_radius"] = self.probe_radius
        if curvature == "exact" and isinstance(episodes, Episodes):
            arguments["keep_graphs"] = self._keeps_graphs(plan, episodes, arguments)
        return partial(meta_gradient, **arguments, curvature=curvature, step_weights=step_weights)

    def _keeps_graphs(self, plan: Plan, episodes: Episodes, arguments: Mapping[str, Any]) -> bool:
        """Return whether the graphs of all inner steps are kept, decided once for each batch."""
        if plan.head is not None:  # those of the head alone are small
            return self._graphs.fit(1, self.device, int)
        names = ("loss", "params", "episodes", "tasks", "chunk_size", "has_aux")
        measure = partial(graph_bytes, **{name: arguments[name] for name in names})

        def find() -> bool:
            return self._graphs.fit(self.train_steps, self.device, measure)

        key = (*plan.kind, plan.execution, self.train_steps, len(episodes.query_y))
        return self._once("graphs", key, find)

    def _training_arguments(self, plan: Plan, episodes: AnyEpisodes) -> dict[str, Any]:
        """Return the arguments for a meta-gradient.

        It is that of the loss's parameters too, which do not adapt.
        """
        arguments = self._arguments(plan, episodes, self.train_steps)
        arguments["params"] = plan.functional.params | self._loss_of_outputs().params
        return arguments | self._inner_steps(self.train_steps)

    def _update_step_statistics(self, episodes: AnyEpisodes) -> None:
        if self.step_statistics is None:
            return
        first = map_tensors(lambda tensor: tensor[:1], episodes)
        functional = FunctionalNetwork(self.network, self.batch_norm)
        plan = Plan(functional, Execution("loop", None), head=None, kind=())
        arguments = self._arguments(plan, first) | {
            "query_loss": partial(statistics_in_training, self.network)
        }
        found = adaptation_curve(**arguments, **self._inner_steps(self.train_steps)).aux
        self.step_statistics.update(
            {name: (mean[0], variance[0]) for name, (mean, variance) in found.items()}
        )

    def _stop_unless_finite(self, found: MetaGradient) -> None:
        where = (
            f"at step {self.global_step} (inner_lr={self.inner_lr}, "
            f"train_steps={self.train_steps}); lower inner_lr or check the data."
        )
        gradients = dict(found.grad)
        for step, rates in enumerate(found.inner_lr):
            gradients |= {f"inner rate {step} of {name}": rate for name, rate in rates.items()}
        check_is_finite(found.query_loss, gradients, where)

    def probe(self, episodes: AnyEpisodes, *, progress: bool = False) -> Probe:
        """Return a probe that measures the theory's constants at the current parameters.

        Raises:
            ValueError: If the theory does not cover such a model
                (:meth:`lightning_maml.MAML.check_for_theory`), if each step has a loss of its own,
                or if the tasks' labels do not fit the network's outputs.
        """
        self.check_for_theory()
        episodes = even_meta_batch(episodes)
        if self.step_statistics is not None and not self.training:
            raise UserValueError(
                "Expected one loss for all inner steps but got batch_norm='per_step' in "
                "evaluation mode; use another `batch_norm`."
            )
        return Probe(
            **self._arguments(self._plan(episodes), episodes),
            progress=progress,
            ignored=ignored_label(self.loss),
        )

    def check_for_theory(self) -> float:
        """Check that the theory's constants and stepsizes cover such a model.

        Returns:
            alpha, its one inner rate.

        Raises:
            ValueError: If not all parameters, those of the loss included, adapt by gradient descent
                at one fixed rate, or the algorithm's meta-gradient is not the query loss's; the
                theory assumes both.
        """
        if type(self)._gradient_function is not MAML._gradient_function:
            raise UserValueError(
                "Expected MAML, FOMAML or HFMAML, which the theory is about, but got "
                f"{type(self).__name__}."
            )
        if self.inner_optimizer is not None:
            raise UserValueError(
                "Expected inner steps of gradient descent, which the theory is about, but got "
                f"{self.inner_optimizer}; leave `inner_optimizer` out."
            )
        if trained := self._loss_of_outputs().trained:
            raise UserValueError(
                "Expected a loss without trainable parameters, as in the theory all parameters "
                f"adapt, but got {trained}; freeze them with requires_grad_(False)."
            )
        are_others = self.learned_rates is not None or self.adapted_part != "all"
        if are_others or isinstance(self.inner_lr, Mapping):
            raise UserValueError(
                "Expected one fixed inner rate for all parameters, of which the theory's "
                f"constants and stepsizes are, but got adapt={self.adapted_part!r} with "
                f"{'fixed' if self.learned_rates is None else 'learned'} rates, "
                f"inner_lr={self.inner_lr}; use adapt='all', inner_rates='fixed' and one number."
            )
        return self.inner_lr
