"""learn2learn's Lightning classes on Lightning 2.

Constructors, batches, logged metrics and numbers are the same.
``from learn2learn.algorithms import LightningMAML, LightningANIL`` and
``from learn2learn.utils.lightning import EpisodicBatcher`` become
``from lightning_maml.compat.learn2learn import EpisodicBatcher, LightningANIL, LightningMAML``;
only the tasksets still need learn2learn itself. Batches are learn2learn's: one task
``(data, labels)``, class by class, the first ``shots`` of each class being the support set; a
meta-batch is the trainer's ``accumulate_grad_batches``. Checkpoints have learn2learn's parameter
names.

Two things differ: dropout is inactive in evaluation, and the running averages of batch norm, which
no number depends on, stay as they are.
"""

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_maml.batches.episodes import Episodes
from lightning_maml.batches.outputs import logits_in
from lightning_maml.checks.label_checks import check_labels, ignored_label
from lightning_maml.checks.loss_checks import check_loss_value
from lightning_maml.checks.loss_reads import check_loss_reads_no_attributes
from lightning_maml.checks.network_checks import NetworkChecks
from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError
from lightning_maml.functional.adaptation import adapted_parameters
from lightning_maml.functional.loss_with_gradient import loss_with_gradient
from lightning_maml.functional.losses import Loss
from lightning_maml.functional.meta_gradient import meta_gradient
from lightning_maml.networks.facts import writes
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork

_FEATURES = "(features)"  # no parameter can have this name

Task = tuple[Tensor, Tensor]
"""A task of learn2learn's: its examples, class by class, and their labels.

Shapes are ``[ways * (shots + queries), ...]`` and ``[ways * (shots + queries)]``.
"""


class LightningEpisodicModule(LightningModule):
    """Base of the algorithms: steps, optimizer and command-line arguments.

    The steps log ``{train,valid,test}_{loss,accuracy}``; the optimizer is Adam with a step
    schedule. A subclass defines ``meta_learn``.

    Args:
        loss: Maps outputs and labels to their mean loss; by default the cross-entropy.
        **kwargs: ``train_ways``, ``train_shots``, ``train_queries``, ``test_ways``, ``test_shots``,
            ``test_queries`` (5, 1 and 1), ``lr`` of Adam (0.001), ``scheduler_step`` (20) and
            ``scheduler_decay`` (1.0) of its schedule, ``adaptation_steps`` N (1) and
            ``adaptation_lr`` alpha (0.1). They become attributes, which may also be set later.
            Others are ignored, as in learn2learn, whose users pass all arguments of their program.

    Raises:
        ValueError: If ``train_ways`` and ``test_ways`` differ.

    Examples:
        >>> import torch
        >>> from lightning_maml.compat.learn2learn import LightningEpisodicModule
        >>> class NearestMean(LightningEpisodicModule):
        ...     def meta_learn(self, batch, batch_idx, ways, shots, queries):
        ...         x, y = (part.unflatten(0, (ways, shots + queries)) for part in batch)
        ...         means = x[:, :shots].mean(1)
        ...         outputs = -torch.cdist(x[:, shots:].flatten(0, 1), means)
        ...         labels = y[:, shots:].flatten()
        ...         accuracy = (outputs.argmax(-1) == labels).float().mean()
        ...         return self.loss(outputs, labels), accuracy
        >>> task = torch.eye(3).repeat_interleave(2, 0), torch.arange(3).repeat_interleave(2)
        >>> _, accuracy = NearestMean().meta_learn(task, 0, ways=3, shots=1, queries=1)
        >>> accuracy
        tensor(1.)
    """

    train_ways: int = 5
    train_shots: int = 1
    train_queries: int = 1
    test_ways: int = 5
    test_shots: int = 1
    test_queries: int = 1
    lr: float = 0.001
    scheduler_step: int = 20
    scheduler_decay: float = 1.0
    adaptation_steps: int = 1
    adaptation_lr: float = 0.1

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._checked_modes: set[bool] = set()
        chosen = {name: kwargs.get(name, default) for name, default in self._defaults().items()}
        self.save_hyperparameters(chosen)
        for name, value in chosen.items():
            setattr(self, name, value)
        if chosen["train_ways"] != chosen["test_ways"]:
            raise UserValueError(
                "Expected `train_ways` and `test_ways` to be the same, as the outputs of a "
                f"network are, but got {chosen['train_ways']} and {chosen['test_ways']}."
            )

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: getattr(cls, name) for name in LightningEpisodicModule.__annotations__}

    @staticmethod
    def add_model_specific_args(parent_parser: ArgumentParser) -> ArgumentParser:
        """Return a parser with the arguments of these classes and those of ``parent_parser``.

        Args:
            parent_parser: The program's own parser.
        """
        parser = ArgumentParser(parents=[parent_parser], add_help=True, conflict_handler="resolve")
        for name, default in LightningEpisodicModule._defaults().items():
            parser.add_argument(f"--{name}", type=type(default), default=default)
        parser.add_argument("--data_parallel", action="store_true", help="has no effect")
        return parser

    def meta_learn(
        self, batch: Task, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Return a task's query loss and accuracy.

        With gradients enabled, the loss's backward pass gives the meta-gradient.

        Args:
            batch: The task.
            batch_idx: Its number; not used.
            ways: Classes.
            shots: Support examples per class.
            queries: Query examples per class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define meta_learn(batch, batch_idx, ways, shots, queries)."
        )

    def training_step(self, batch: Task, batch_idx: int) -> Tensor:
        """Return and log a training task's query loss."""
        return self._step("train", batch, batch_idx)

    def validation_step(self, batch: Task, batch_idx: int) -> Tensor:
        """Return and log a validation task's query loss."""
        return self._step("valid", batch, batch_idx)

    def test_step(self, batch: Task, batch_idx: int) -> Tensor:
        """Return and log a test task's query loss."""
        return self._step("test", batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """Return Adam and its schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(
            optimizer, step_size=self.scheduler_step, gamma=self.scheduler_decay
        )
        return [optimizer], [schedule]

    def _step(self, stage: str, batch: Task, batch_idx: int) -> Tensor:
        split = "train" if stage == "train" else "test"
        ways: int = getattr(self, f"{split}_ways")
        shots: int = getattr(self, f"{split}_shots")
        queries: int = getattr(self, f"{split}_queries")
        loss, accuracy = self.meta_learn(batch, batch_idx, ways, shots, queries)
        # each task counts once in the mean, whatever its number of examples
        settings: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
        self.log(f"{stage}_loss", loss.detach(), **settings)
        self.log(f"{stage}_accuracy", accuracy.detach(), prog_bar=True, **settings)
        return loss

    def _check_once(
        self,
        functional: FunctionalNetwork,
        episodes: Episodes,
        whole: FunctionalNetwork,
        of_inputs: Episodes,
    ) -> None:
        """Check networks, loss, and the order of examples on the first task of a mode.

        Args:
            functional: The network that adapts.
            episodes: The task, with what that network takes.
            whole: The network from the inputs on.
            of_inputs: The task.
        """
        if writes(functional.network) is None:  # as in a copy of this module
            self._checked_modes.clear()
        if self.training in self._checked_modes:
            return
        _check_order(episodes)
        check = NetworkChecks("all", None, logits_in)
        loss = FunctionalLoss(self.loss, logits_in)

        def check_classes(outputs: torch.Size | None) -> None:
            if outputs and not episodes.support_y.is_floating_point():
                check_labels(episodes, outputs[0], ignored_label(self.loss))

        check(functional.network, functional, episodes, [loss], check_classes)
        check_loss_reads_no_attributes(loss, whole.network, whole, of_inputs)
        if not loss.params:
            check_loss_value(loss, whole, of_inputs, self.parameters())
        self._checked_modes.add(self.training)

    def _learn(
        self, loss: Loss, params: Params, episodes: Episodes, adapts: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Adapt the parameters named ``adapts`` to one task; return its query loss and accuracy."""
        rates, steps = dict.fromkeys(adapts, self.adaptation_lr), self.adaptation_steps
        if torch.is_grad_enabled():
            result = meta_gradient(
                loss, params, episodes, inner_lr=rates, steps=steps, has_aux=True
            )
            value = loss_with_gradient([params], [result.grad], result.query_loss)
            outputs = result.aux[0]
        else:
            support = (episodes.support_x, episodes.support_y)
            adapted = adapted_parameters(
                loss, params, *support, inner_lr=rates, steps=steps, has_aux=True
            )
            w = params | {name: tensor[0] for name, tensor in adapted.items()}
            value, outputs = loss(w, episodes.query_x[0], episodes.query_y[0])
        accuracy = (outputs.argmax(-1) == episodes.query_y[0]).float().mean()
        return value, accuracy


class _Wrapped(nn.Module):
    """Holds a network under the name that learn2learn's checkpoints have for it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.module(x)
        return outputs


class LightningMAML(LightningEpisodicModule):
    """learn2learn's ``LightningMAML``: exact multi-step MAML.

    Batch norm uses the statistics of each batch, support or query set. Dropout is active in
    training only (learn2learn leaves it active in evaluation).

    Args:
        model: The network.
        loss: Maps outputs and labels to their mean loss; by default the cross-entropy.
        **kwargs: See :class:`LightningEpisodicModule`.

    Examples:
        >>> import torch
        >>> from lightning_maml import MLP
        >>> from lightning_maml.compat.learn2learn import LightningMAML
        >>> model = LightningMAML(MLP(4, 3), train_ways=3, test_ways=3, adaptation_lr=0.5)
        >>> task = torch.rand(6, 4), torch.arange(3).repeat_interleave(2)
        >>> loss, accuracy = model.meta_learn(task, 0, ways=3, shots=1, queries=1)
        >>> loss.backward()
        >>> all(parameter.grad is not None for parameter in model.parameters())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        self.model = _Wrapped(model)

    def meta_learn(
        self, batch: Task, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Return a task's query loss after adaptation, and its accuracy."""
        functional = FunctionalNetwork(self.model.module)
        of_outputs = FunctionalLoss(self.loss, logits_in)

        def loss(w: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs = functional(w, x)
            return of_outputs(w, outputs, y), outputs

        episodes = _split(*batch, ways, shots, queries)
        self._check_once(functional, episodes, functional, episodes)
        params = functional.params | of_outputs.params
        return self._learn(loss, params, episodes, list(functional.params))


class LightningANIL(LightningEpisodicModule):
    """learn2learn's ``LightningANIL``: only the classifier adapts.

    The features of support and query set are taken together, so that their batch norm has the
    statistics of both, as in learn2learn. They are computed once: the meta-gradient reaches them as
    if they were parameters that do not adapt.

    Args:
        features: The network up to the classifier.
        classifier: Maps features to outputs.
        loss: Maps outputs and labels to their mean loss; by default the cross-entropy.
        **kwargs: See :class:`LightningEpisodicModule`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_maml.compat.learn2learn import LightningANIL
        >>> features = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> model = LightningANIL(features, nn.Linear(8, 3), train_ways=3, test_ways=3)
        >>> task = torch.rand(6, 4), torch.arange(3).repeat_interleave(2)
        >>> loss, accuracy = model.meta_learn(task, 0, ways=3, shots=1, queries=1)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        self.features = features
        self.classifier = _Wrapped(classifier)

    def meta_learn(
        self, batch: Task, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Return a task's query loss after adaptation, and its accuracy."""
        data, labels = batch
        functional = FunctionalNetwork(self.classifier.module)
        adapted = list(functional.params)
        of_outputs = FunctionalLoss(self.loss, logits_in)
        params = functional.params | of_outputs.params | {_FEATURES: self._features_of(data)}

        # the inputs of the "network" are row numbers, so that the features are a parameter and get
        # a gradient
        def loss(w: Params, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            classifier = {name: w[name] for name in adapted}
            outputs = functional(classifier, w[_FEATURES][rows])
            return of_outputs(w, outputs, y), outputs

        features = params[_FEATURES].detach()
        whole = FunctionalNetwork(nn.Sequential(self.features, self.classifier.module))
        self._check_once(
            functional,
            _split(features, labels, ways, shots, queries),
            whole,
            _split(data, labels, ways, shots, queries),
        )
        rows = torch.arange(len(data), device=data.device)
        episodes = _split(rows, labels, ways, shots, queries)
        return self._learn(loss, params, episodes, adapted)

    def _features_of(self, data: Tensor) -> Tensor:
        """Return the features, computed with batch statistics."""
        functional = FunctionalNetwork(self.features)
        features: Tensor = functional(functional.params, data)
        return features


class EpisodicBatcher(LightningDataModule):
    """learn2learn's ``EpisodicBatcher``: ``epoch_length`` tasks per epoch, one per batch.

    Args:
        train_tasks: A taskset: an object with ``sample()``, which returns a task.
        validation_tasks: By default the training tasks.
        test_tasks: By default the validation tasks.
        epoch_length: Tasks per epoch, of each taskset.

    Examples:
        >>> import torch
        >>> from lightning_maml.compat.learn2learn import EpisodicBatcher
        >>> class Noise:
        ...     def sample(self):
        ...         return torch.rand(6, 4), torch.arange(3).repeat_interleave(2)
        >>> data = EpisodicBatcher(Noise(), epoch_length=10)
        >>> [x.shape for x, y in data.train_dataloader()][:2]
        [torch.Size([6, 4]), torch.Size([6, 4])]
    """

    def __init__(
        self,
        train_tasks: Any,
        validation_tasks: Any = None,
        test_tasks: Any = None,
        epoch_length: int = 1,
    ) -> None:
        super().__init__()
        self.train_tasks = train_tasks
        self.validation_tasks = train_tasks if validation_tasks is None else validation_tasks
        self.test_tasks = self.validation_tasks if test_tasks is None else test_tasks
        self.epoch_length = epoch_length

    def train_dataloader(self) -> DataLoader[Task]:
        """Return the training tasks."""
        return self._loader(self.train_tasks)

    def val_dataloader(self) -> DataLoader[Task]:
        """Return the validation tasks."""
        return self._loader(self.validation_tasks)

    def test_dataloader(self) -> DataLoader[Task]:
        """Return the test tasks."""
        return self._loader(self.test_tasks)

    def _loader(self, tasks: Any) -> DataLoader[Task]:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise UserValueError(
                f"Expected one process but got {self.trainer.world_size}: the tasks of a taskset "
                "would be the same ones in each; use one device, or a datamodule of this library."
            )
        return DataLoader(_Sampled(tasks, self.epoch_length), batch_size=None)


class _Sampled(Dataset[Task]):
    def __init__(self, tasks: Any, length: int) -> None:
        self._tasks, self._length = tasks, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Task:
        try:
            task: Task = self._tasks.sample()
        # left alone, these would end the epoch without a word, and the training with it
        except (StopIteration, IndexError) as error:
            raise UserValueError(
                f"Expected {self._length} tasks of the taskset but it gave no more at number "
                f"{number}; let it have more."
            ) from error
        return task


def _split(x: Tensor, y: Tensor, ways: int, shots: int, queries: int) -> Episodes:
    """Return a meta-batch of one task; its support set is the first ``shots`` of each class."""
    per_class = shots + queries
    if len(x) != ways * per_class:
        raise UserValueError(
            f"Expected a task of {ways} ways with {shots} shots and {queries} queries, "
            f"{ways * per_class} examples, but got {len(x)}; give the taskset and the algorithm "
            "the same numbers."
        )
    within_class = torch.arange(len(x), device=x.device) % per_class
    support, query = within_class < shots, within_class >= shots
    return Episodes(x[support][None], y[support][None], x[query][None], y[query][None])


def _check_order(episodes: Episodes) -> None:
    """Check that examples come class by class, so that each class is in both sets.

    Raises:
        ValueError: If they come in another order.
    """
    if episodes.support_y.is_floating_point() or episodes.support_y.ndim > 2:
        return
    in_support, in_queries = (Counter(y.flatten().tolist()) for y in episodes[1::2])
    are_even = all(len(set(counts.values())) == 1 for counts in (in_support, in_queries))
    if in_support.keys() != in_queries.keys() or not are_even:
        raise UserValueError(
            "Expected the examples of a task class by class but got another order, in which the "
            f"support set has the labels {sorted(in_support.elements())} and the query set "
            f"{sorted(in_queries.elements())}; sort them by their labels."
        )
