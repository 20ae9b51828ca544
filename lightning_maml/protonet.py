"""Prototypical networks, the metric baseline: no inner loop, a query belongs to the class whose mean embedding is nearest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DropBlock2d
from typing_extensions import override

from lightning_maml.adapt import AdaptationCurve, cat_chunks
from lightning_maml.deploy import AdaptedNetworks
from lightning_maml.episodes import AnyEpisodes, Episodes, ResampledEpisodes, check_episodes
from lightning_maml.episodic_module import EpisodicModule, LossFunction, OptimizerFactory, SchedulerFactory, check_labels
from lightning_maml.functional import Params, differentiable
from lightning_maml.learner import BatchNormPolicy, Learner, structural_copy
from lightning_maml.task_map import map_tasks


class ProtoNet(EpisodicModule):
    """Prototypical networks (Snell et al. 2017): the logits of a query are minus its squared distances to the classes' mean embeddings.

    Batches, figures and policies are those of :class:`lightning_maml.MAML`; there are no inner steps, so what is logged as ``_before``
    adaptation is what is logged after it. Train with more ways than are tested (the datamodules' ``ways`` and ``test_ways``) as the
    paper does, if you like: there is no head whose width would be fixed.

    Args:
        network: From images ``[B, C, H, W]`` to embeddings ``[B, D]``; the library's own with ``ways=None``.
        loss: Logits and labels to their mean loss.
        batch_norm: ``"batch"``: support and query set of a task are normalised together (transductive); ``"support"`` and ``"running"``
            as in :class:`lightning_maml.MAML`.
        optimizer: From parameters to the optimizer; by default Adam with its rate of 1e-3.
        lr_scheduler: From the optimizer to its scheduler, stepped once per epoch; by default none.

    Raises:
        ValueError: If the network does not fit the batch-norm policy; in a step, if the labels are not classes ``0 .. ways - 1`` of which
            each is in every support set.
        TypeError: In a step, if the episodes have a support batch for each inner step.
        FloatingPointError: In training, if the query loss is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LossFunction = F.cross_entropy,
        batch_norm: BatchNormPolicy = "batch",
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(network, loss, batch_norm, optimizer, lr_scheduler)
        if batch_norm == "per_step":
            raise ValueError(
                "Expected `batch_norm` to be 'batch', 'support' or 'running', as there are no inner steps, but got 'per_step'."
            )
        self.save_hyperparameters({"batch_norm": batch_norm})

    @override
    def evaluate(self, episodes: AnyEpisodes) -> AdaptationCurve:
        with torch.inference_mode(False), torch.no_grad():
            loss, outputs = self._classify(type(episodes)(*map(differentiable, episodes)))
        return AdaptationCurve(loss[:, None], outputs[:, None])

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        """Return the network with the prototypes of a task as its head, or of many tasks, for new queries.

        The logits are twice the inner product of embedding and prototype less the prototype's square (Snell et al. 2017, section 2.4):
        minus the squared distance, but for a term that all classes share.

        Args:
            support_x: Inputs of the support set, ``[S, ...]``; of many tasks ``[T, S, ...]``.
            support_y: Their labels ``0 .. ways - 1``, ``[S]`` or ``[T, S]``.

        Returns:
            As of :meth:`lightning_maml.MAML.adapt`.
        """
        of_one = support_y.ndim == 1
        if of_one:
            support_x, support_y = support_x[None], support_y[None]
        with torch.inference_mode(False), torch.no_grad():
            support = Episodes(*map(differentiable, (support_x, support_y, support_x, support_y)))
            network = structural_copy(self.network).eval()
            learner = Learner(network, self.batch_norm)
            ways = self._check(learner, support)
            embedded = torch.func.vmap(lambda x: learner(learner.params, x), randomness="different")(support.support_x)
            prototypes = torch.stack([class_means(*task, ways) for task in zip(embedded, support.support_y, strict=True)])
            head = {"1.weight": 2 * prototypes, "1.bias": -prototypes.square().sum(-1)}
            classifier = nn.Sequential(network, nn.Linear(prototypes.shape[-1], ways))
            networks = AdaptedNetworks(classifier.to(support_x), head, self.batch_norm, support.support_x)
            return networks.network(0) if of_one else networks

    @override
    def _meta_step(self, episodes: AnyEpisodes) -> tuple[Tensor, Tensor, Tensor]:
        loss, outputs = self._classify(episodes)
        self._stop_unless_losses_are_finite(loss, f"at step {self.global_step}; check the data.")
        self._update_running_averages(episodes)
        return loss.mean(), loss.detach(), outputs.detach()

    def _classify(self, episodes: AnyEpisodes) -> tuple[Tensor, Tensor]:
        """Return the query losses ``[T]`` and logits ``[T, Q, ways]``."""
        vectorised = not any(module.training and isinstance(module, DropBlock2d) for module in self.network.modules())
        learner = Learner(self.network, self.batch_norm)
        ways = self._check(learner, episodes)

        def of_one_task(task: Episodes) -> tuple[Tensor, Tensor]:
            support, query = self._embed(learner, task)
            logits = -(query[:, None] - class_means(support, task.support_y, ways)).square().sum(-1)
            return self.loss(logits, task.query_y), logits

        chunks = list(map_tasks(of_one_task, episodes, tasks="vmap" if vectorised else "loop"))
        loss, logits = cat_chunks(chunks)
        return loss, logits

    def _embed(self, learner: Learner, task: Episodes) -> tuple[Tensor, Tensor]:
        params: Params = learner.params
        if learner.uses_support_statistics:
            return learner(params, task.support_x), learner(params, task.query_x, statistics_of=task.support_x)
        embedded = learner(params, torch.cat([task.support_x, task.query_x]))
        shots = len(task.support_x)
        return embedded[:shots], embedded[shots:]

    def _check(self, learner: Learner, episodes: AnyEpisodes) -> int:
        """Refuse episodes that have no prototypes, and return their ways."""
        if isinstance(episodes, ResampledEpisodes):
            raise TypeError("Expected Episodes, which have one support set per task, but got ResampledEpisodes; use regime='finite_sum'.")
        check_episodes(episodes)
        if episodes.support_y.is_floating_point():
            raise ValueError("Expected labels, of classes that have prototypes, but got floating-point targets; ProtoNet only classifies.")
        ways = int(episodes.support_y.max()) + 1
        check_labels(episodes, ways)
        if any(len(labels.unique()) < ways for labels in episodes.support_y):
            raise ValueError(f"Expected every support set to hold examples of all {ways} classes, but one lacks some.")
        self._first_outputs(learner, episodes)
        return ways


def class_means(embedded: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Return the mean of each class's rows, ``[ways, D]``, of embeddings ``[S, D]`` (Snell et al. 2017, eq. 1)."""
    members = (labels == torch.arange(ways, device=labels.device)[:, None]).to(embedded)
    return members @ embedded / members.sum(1, keepdim=True)
