"""Prototypical networks, the baseline without an inner loop: the nearest class mean wins."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_maml.algorithms.base import (
    EpisodicModule,
    Interval,
    LossFunction,
    OptimizerFactory,
    SchedulerFactory,
    Step,
    StepResult,
)
from lightning_maml.algorithms.non_finite import check_losses_are_finite
from lightning_maml.algorithms.query_metrics import Metrics, MetricsOver
from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.meta_batch import even_meta_batch
from lightning_maml.batches.trees import Inputs, cat, detached, map_tensors
from lightning_maml.checks.batch_norm_checks import check_policy
from lightning_maml.checks.broadcasting import check_broadcasting
from lightning_maml.checks.first_pass import first_outputs
from lightning_maml.checks.hidden_layers import check_hides_no_layers
from lightning_maml.checks.label_checks import check_is_tensor, check_labels
from lightning_maml.checks.logits_checks import check_logits
from lightning_maml.checks.loss_reads import check_loss_reads_no_attributes
from lightning_maml.checks.repeated_passes import check_writes
from lightning_maml.core.context import evaluating
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.task_axis import Randomness, TaskAxis
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.execution.auto import ADAPTED_AT_ONCE
from lightning_maml.execution.task_map import TaskExecution, cat_chunks, map_tasks
from lightning_maml.functional.adaptation import AdaptationCurve
from lightning_maml.networks.adapted import AdaptedNetworks
from lightning_maml.networks.copies import copy_in_mode
from lightning_maml.networks.facts import facts_of
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import BatchNormPolicy, FunctionalNetwork
from lightning_maml.networks.stacking_trial import HOOKED, Verdict, compare, two_tasks

_NOT_STACKED = (
    "Expected a network and a loss whose tasks can be stacked with `tasks='vmap'` but {}; use "
    "tasks='loop'."
)


class ProtoNet(EpisodicModule):
    """Prototypical networks (Snell et al. 2017).

    The logits of a query are minus its squared distances to the classes' mean embeddings.

    Batches, figures and policies are those of :class:`lightning_maml.MAML`; there are no inner
    steps, so what is logged as ``_before`` adaptation equals what is logged after it. You may train
    with more ways than you test with (the datamodules' ``ways`` and ``test_ways``), as the paper
    does: there is no head whose width would be fixed.

    Args:
        network: Maps images ``[B, C, H, W]`` to embeddings ``[B, D]``; give the library's own
            networks ``ways=None``.
        loss: Maps logits and labels to their mean loss.
        batch_norm: ``"batch"``: support and query set of a task are normalised together
            (transductive); ``"support"`` and ``"running"`` as in :class:`lightning_maml.MAML`.
        optimizer: Builds the optimizer from the parameters; by default Adam with its rate of 1e-3.
        lr_scheduler: Builds the scheduler from the optimizer; by default none. It may also return
            the dict that Lightning knows, ``{"scheduler": ..., "interval": "step", ...}``.
        tasks: ``"vmap"``: the tasks of a meta-batch together; ``"loop"``: one after the other, for
            networks that vmap cannot take; ``"auto"``: together where vmap takes the network.
        lr_scheduler_interval: Whether the scheduler is stepped after every ``"epoch"`` or every
            ``"step"`` of the optimizer.
        metrics: Metrics of torchmetrics (one, a ``MetricCollection`` or a dict), of query outputs
            and labels; logged in validation and test after adaptation, and as ``_before`` for
            before it. By default none.
        metrics_over: ``"tasks"``: a metric is computed on the queries of each task, and the mean
            over the tasks is logged, with ``_ci95``; ``"queries"``: it is computed once, on the
            queries of all tasks.

    Raises:
        ValueError: If the network does not fit the batch-norm policy; in a step, if the labels are
            not classes ``0 .. ways - 1``, each of which is in every support set.
        TypeError: In a step, if the episodes have a support batch for each inner step.
        FloatingPointError: In training, if the query loss is not finite.

    Examples:
        >>> import torch
        >>> from lightning_maml import MLP, ProtoNet
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> model = ProtoNet(MLP(4, ways=8))  # embeddings of eight numbers
        >>> model.adapt(x[0], y[0])(x[0]).shape
        torch.Size([6, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LossFunction = F.cross_entropy,
        batch_norm: BatchNormPolicy = "batch",
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
        tasks: Literal["auto", "loop", "vmap"] = "auto",
        lr_scheduler_interval: Interval = "epoch",
        metrics: Metrics | None = None,
        metrics_over: MetricsOver = "tasks",
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
        if batch_norm == "per_step":
            raise UserValueError(
                "Expected `batch_norm` to be 'batch', 'support' or 'running', as there are no "
                "inner steps, but got 'per_step'."
            )
        if tasks not in ("auto", "loop", "vmap"):
            raise UserValueError(
                f"Expected `tasks` to be 'auto', 'loop' or 'vmap' but got {tasks!r}."
            )
        self._save_settings({"batch_norm": batch_norm, "tasks": tasks})
        self._tasks: Literal["auto", "loop", "vmap"] = tasks

    @override
    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        self._warn_of_training_mode()
        episodes = even_meta_batch(episodes)
        with torch.inference_mode(False), torch.no_grad():
            loss, outputs = self._classify(detached(episodes))
        return AdaptationCurve(loss[:, None], outputs[:, None])

    def adapt(self, support_x: Inputs, support_y: Tensor) -> nn.Module:
        """Return the network with a task's prototypes as its head, or one for each of many tasks.

        With ``batch_norm="batch"`` the prototypes have the statistics of the support set and
        queries those of their own batch, whereas evaluation normalises both together; ``"support"``
        and ``"running"`` give here what they give in evaluation.

        The logits are twice the inner product of embedding and prototype, less the prototype's
        square (Snell et al. 2017, section 2.4). This is minus the squared distance, up to a term
        that all classes share.

        Args:
            support_x: Inputs of the support set, ``[S, ...]``; of many tasks ``[T, S, ...]``.
            support_y: Their labels ``0 .. ways - 1``, ``[S]`` or ``[T, S]``.

        Returns:
            As :meth:`lightning_maml.MAML.adapt` does.
        """
        check_is_tensor(support_y, "support_y")
        of_one = support_y.ndim == 1
        if of_one:
            support_x, support_y = map_tensors(lambda tensor: tensor[None], (support_x, support_y))
        with torch.inference_mode(False), torch.no_grad():
            support = detached(Episodes(support_x, support_y, support_x, support_y))
            check_episodes(support)
            network = copy_in_mode(self.network, training=False)
            functional, ways, tasks = self._checked(network, support)

            def means(task: Episodes) -> tuple[Tensor]:
                return (
                    class_means(
                        self.logits(functional(functional.params, task.support_x)),
                        task.support_y,
                        ways,
                    ),
                )

            chunk_size = ADAPTED_AT_ONCE if tasks == "vmap" else None
            chunks = map_tasks(
                lambda task, axis: axis.vmap(means)(task),
                support,
                tasks=tasks,
                chunk_size=chunk_size,
            )
            (prototypes,) = cat_chunks([*chunks])
            head = {"head.weight": 2 * prototypes, "head.bias": -prototypes.square().sum(-1)}
            linear = nn.Linear(
                prototypes.shape[-1], ways, device=prototypes.device, dtype=prototypes.dtype
            )
            classifier = _Classifier(network, linear, self.logits)
            networks = AdaptedNetworks(
                classifier, head, self.batch_norm, support.support_x, tasks == "vmap"
            )
            if (
                tasks == "vmap"
                and not of_one
                and (wrong := networks.compare_stacked(support.support_x).wrong)
            ):
                if self._tasks == "vmap":
                    raise UserValueError(_NOT_STACKED.format(wrong))
                networks.stacked = False
            return networks.network(0) if of_one else networks

    def on_fit_start(self) -> None:
        """Refuse to fit a network that is frozen; testing one needs no training.

        Raises:
            ValueError: If no parameter is trainable.
        """
        if not any(p.requires_grad for p in self.parameters()):
            raise UserValueError(
                "Expected `network` to have trainable parameters to fit but all of them are "
                "frozen; unfreeze some, or test it without training."
            )

    @override
    def _plan_step(self, episodes: AnyEpisodes) -> Step:
        def check(found: tuple[Tensor, Tensor]) -> None:
            check_losses_are_finite(found[0], f"at step {self.global_step}; check the data.")

        def finish(found: tuple[Tensor, Tensor]) -> StepResult:
            loss, outputs = found
            self._update_buffers(self.network, episodes, self.batch_norm)
            return StepResult(loss.mean(), loss.detach(), outputs.detach())

        return Step(partial(self._classify, episodes), check, finish)

    def _classify(self, episodes: AnyEpisodes) -> tuple[Tensor, Tensor]:
        """Return the query losses ``[T]`` and logits ``[T, Q, ways]``."""
        functional, ways, tasks = self._checked(self.network, episodes)
        of_task = partial(self._of_task, functional, ways)
        loss, logits = cat_chunks(
            [*map_tasks(lambda task, axis: axis.vmap(of_task)(task), episodes, tasks=tasks)]
        )
        return loss, logits

    def _of_task(
        self, functional: FunctionalNetwork, ways: int, task: Episodes
    ) -> tuple[Tensor, Tensor]:
        with evaluating(derivatives=1):
            support, query = self._embedded(functional, task)
        logits = -(query[:, None] - class_means(support, task.support_y, ways)).square().sum(-1)
        return self.loss(logits, task.query_y), logits

    def _embedded(self, functional: FunctionalNetwork, task: Episodes) -> tuple[Tensor, Tensor]:
        if functional.uses_support_statistics:
            queries = functional(functional.params, task.query_x, statistics_of=task.support_x)
            return self.logits(functional(functional.params, task.support_x)), self.logits(queries)
        embedded = self.logits(functional(functional.params, cat([task.support_x, task.query_x])))
        shots = len(task.support_y)
        return embedded[:shots], embedded[shots:]

    def _checked(
        self, network: nn.Module, episodes: AnyEpisodes
    ) -> tuple[FunctionalNetwork, int, TaskExecution]:
        """Refuse episodes without prototypes; return network, ways, and how tasks are run."""
        tasks: TaskExecution = "vmap" if self._tasks == "auto" else self._tasks
        functional = FunctionalNetwork(network, self.batch_norm, vectorised=tasks == "vmap")
        ways = ways_of(self.known_labels.of(episodes, ("support_y", "query_y")))

        def look() -> Verdict:
            check_writes(functional, episodes)
            check_hides_no_layers(functional, episodes)
            check_policy(functional, episodes)
            embedded = self.logits(first_outputs(functional, episodes))
            check_logits(embedded, episodes.support_y[0])
            if embedded.shape[1] == ways:
                rank_zero_warn(
                    f"ProtoNet compares embeddings, but those of this network have {ways} numbers, "
                    "as many as there are classes; if they are a head's logits, leave the head out "
                    "(`ways=None` for Conv4 and ResNet12)."
                )
            of_distances = FunctionalLoss(self.loss, self.logits)
            of_distances.given = lambda _: embedded.new_zeros(len(embedded), ways)
            check_loss_reads_no_attributes(of_distances, self.network, functional, episodes)
            targets = (episodes.support_y[0], episodes.query_y[0])
            check_broadcasting(self.loss, lambda _: embedded.new_zeros(2 * ways, ways), targets)
            if facts_of(network).hooks_tensors:
                return Verdict(HOOKED)
            if self._tasks == "loop":
                return Verdict()
            return self._compare_stacked(network, ways, episodes)

        verdict = self._stacking_verdict(self._kind(network, episodes), look)
        if verdict.wrong and self._tasks == "vmap":
            raise UserValueError(_NOT_STACKED.format(verdict.wrong))
        if any(verdict) and self._tasks == "auto":
            functional, tasks = FunctionalNetwork(network, self.batch_norm), "loop"
        return functional, ways, tasks

    def _compare_stacked(self, network: nn.Module, ways: int, episodes: AnyEpisodes) -> Verdict:
        """Compare two tasks stacked and one by one: losses, and gradient of a weighted sum."""
        tasks = two_tasks(episodes)
        stacked = tree_map(lambda *tensors: torch.stack(tensors), *tasks)
        device = episodes.support_y.device
        before = generator_states(device)

        def evaluated(
            functional: FunctionalNetwork, losses: Callable[[Callable[[Episodes], Tensor]], Tensor]
        ) -> dict[str, Tensor]:
            def loss(task: Episodes) -> Tensor:
                return self._of_task(of_point, ways, task)[0]

            of_point = copy.copy(functional)
            of_point.params = {
                name: p.detach().requires_grad_() for name, p in functional.params.items()
            }
            if not of_point.params:
                return {"loss": losses(loss)}
            with torch.enable_grad():
                values = losses(loss)
                weighted = (values * torch.arange(1.0, 3.0, device=device).to(values)).sum()
                gradient = torch.autograd.grad(
                    weighted, [*of_point.params.values()], materialize_grads=True
                )
            return {
                "loss": values.detach(),
                "gradient": torch.cat([tensor.flatten() for tensor in gradient]),
            }

        def in_turn(loss: Callable[[Episodes], Tensor]) -> Tensor:
            values = []
            for task in tasks:
                set_generator_states(before, device)
                values.append(loss(task))
            return torch.stack(values)

        def as_one(loss: Callable[[Episodes], Tensor], randomness: Randomness) -> Tensor:
            found: Tensor = TaskAxis(2, randomness).vmap(loss)(stacked)
            return found

        single, vectorised = (
            FunctionalNetwork(network, self.batch_norm, vectorised=flag) for flag in (False, True)
        )
        return compare(
            lambda _: evaluated(single, in_turn),
            lambda _, randomness: evaluated(vectorised, partial(as_one, randomness=randomness)),
            device,
        )


class _Classifier(nn.Module):
    """A network of embeddings with prototypes as its head."""

    def __init__(
        self, network: nn.Module, head: nn.Linear, embeddings: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.network, self.head, self._embeddings = network, head, embeddings

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.head(self._embeddings(self.network(*inputs, **named)))


def ways_of(episodes: AnyEpisodes) -> int:
    """Return the number of classes of episodes, each of which must have a prototype.

    Raises:
        TypeError: If they have several support sets.
        ValueError: If there is more than one label per example, a label is none of these classes,
            or a class has no example.
    """
    if isinstance(episodes, ResampledEpisodes):
        raise UserTypeError(
            "Expected Episodes, which have one support set per task, but got ResampledEpisodes; "
            "use regime='finite_sum'."
        )
    if episodes.support_y.is_floating_point():
        raise UserValueError(
            "Expected labels, of classes that have prototypes, but got floating-point targets; "
            "ProtoNet only classifies."
        )
    if episodes.support_y.ndim > 2:
        raise UserValueError(
            "Expected one label per example, [tasks, examples], whose classes have prototypes, but "
            f"got shape {list(episodes.support_y.shape)}; use MAML or one of its variants."
        )
    ways = int(episodes.support_y.max()) + 1
    check_labels(episodes, ways)
    each = episodes.support_y[..., None] == torch.arange(ways, device=episodes.support_y.device)
    if not each.any(1).all():
        raise UserValueError(
            f"Expected every support set to hold examples of all {ways} classes, but one lacks "
            "some."
        )
    return ways


def class_means(embedded: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Return the mean embedding of each class, ``[ways, D]`` (Snell et al. 2017, eq. 1).

    Args:
        embedded: Embeddings ``[S, D]``.
        labels: Their classes, ``[S]``.
        ways: The number of classes.
    """
    members = (labels == torch.arange(ways, device=labels.device)[:, None]).to(embedded)
    return members @ embedded / members.sum(1, keepdim=True)
