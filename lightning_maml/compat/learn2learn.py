"""learn2learn's Lightning classes on Lightning 2: the same constructors, batches, logged metrics and numbers.

``from learn2learn.algorithms import LightningMAML, LightningANIL`` and
``from learn2learn.utils.lightning import EpisodicBatcher`` become
``from lightning_maml.compat.learn2learn import EpisodicBatcher, LightningANIL, LightningMAML``;
learn2learn itself is needed for its tasksets only. Batches are learn2learn's: one task
``(data, labels)``, class by class, its first ``shots`` of each class the support set; a meta-batch
is the trainer's ``accumulate_grad_batches``. Checkpoints have learn2learn's parameter names. What
differs: dropout is inactive in evaluation, and the running averages of batch norm, on which no
number depends, stay as they are.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_maml.batches.episodes import Episodes
from lightning_maml.core.params import Params
from lightning_maml.functional.adaptation import Loss, adapted_parameters
from lightning_maml.functional.meta_gradient import meta_gradient, surrogate
from lightning_maml.networks.functional_network import Learner

_FEATURES = "(features)"  # a name that no parameter has

Task = tuple[Tensor, Tensor]
"""A task of learn2learn's: examples ``[ways * (shots + queries), ...]``, class by class, and their
labels."""


class LightningEpisodicModule(LightningModule):
    """What the algorithms share: steps that log ``{train,valid,test}_{loss,accuracy}``, Adam with a step schedule, command-line arguments.

    Args:
        loss: Maps outputs and labels to their mean loss; by default the cross-entropy.
        **kwargs: ``train_ways``, ``train_shots``, ``train_queries``, ``test_ways``, ``test_shots``,
            ``test_queries`` (5, 1 and 1), ``lr`` of Adam (0.001), ``scheduler_step`` (20) and
            ``scheduler_decay`` (1.0) of its schedule, ``adaptation_steps`` N (1) and
            ``adaptation_lr`` alpha (0.1). Others are ignored, as in learn2learn, whose users pass
            all arguments of their program.

    These arguments become attributes, which may also be set later.

    Raises:
        ValueError: If ``train_ways`` and ``test_ways`` differ.
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
        chosen = {name: kwargs.get(name, default) for name, default in self._defaults().items()}
        self.save_hyperparameters(chosen)
        for name, value in chosen.items():
            setattr(self, name, value)
        if chosen["train_ways"] != chosen["test_ways"]:
            raise ValueError(
                "Expected `train_ways` and `test_ways` to be the same, as the outputs of a "
                f"network are, but got {chosen['train_ways']} and {chosen['test_ways']}."
            )

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: getattr(cls, name) for name in LightningEpisodicModule.__annotations__}

    @staticmethod
    def add_model_specific_args(parent_parser: ArgumentParser) -> ArgumentParser:
        """Return a parser with the arguments of these classes beside those of ``parent_parser``."""
        parser = ArgumentParser(parents=[parent_parser], add_help=True, conflict_handler="resolve")
        for name, default in LightningEpisodicModule._defaults().items():
            parser.add_argument(f"--{name}", type=type(default), default=default)
        parser.add_argument("--data_parallel", action="store_true", help="has no effect")
        return parser

    def meta_learn(
        self, batch: Task, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Return a task's query loss and accuracy; with gradients enabled, the loss's backward pass gives the meta-gradient."""
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
        sizes = (
            getattr(self, f"{'train' if stage == 'train' else 'test'}_{name}")
            for name in ("ways", "shots", "queries")
        )
        loss, accuracy = self.meta_learn(batch, batch_idx, *sizes)
        for name, value in (("loss", loss), ("accuracy", accuracy)):
            self.log(
                f"{stage}_{name}",
                value.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "accuracy",
                batch_size=1,
            )
        return loss

    def _learn(
        self, loss: Loss, params: Params, episodes: Episodes, adapts: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Adapt the parameters named ``adapts`` to one task, and return its query loss and accuracy."""
        rates, steps = dict.fromkeys(adapts, self.adaptation_lr), self.adaptation_steps
        if torch.is_grad_enabled():
            result = meta_gradient(
                loss, params, episodes, inner_lr=rates, steps=steps, has_aux=True
            )
            value, outputs = surrogate([params], [result.grad], result.query_loss), result.aux[0]
        else:
            support = (episodes.support_x, episodes.support_y)
            adapted = adapted_parameters(
                loss, params, *support, inner_lr=rates, steps=steps, has_aux=True
            )
            w = params | {name: tensor[0] for name, tensor in adapted.items()}
            value, outputs = loss(w, episodes.query_x[0], episodes.query_y[0])
        return value, (outputs.argmax(-1) == episodes.query_y[0]).float().mean()


class _Wrapped(nn.Module):
    """Holds a network under the name that learn2learn's checkpoints have for it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.module(x)
        return outputs


class LightningMAML(LightningEpisodicModule):
    """learn2learn's ``LightningMAML``: exact multi-step MAML; batch norm uses the statistics of each batch, support or query set.

    Dropout is active in training only (learn2learn leaves it active in evaluation).

    Args:
        model: The network.
        loss: Maps outputs and labels to their mean loss; by default the cross-entropy.
        **kwargs: See :class:`LightningEpisodicModule`.
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
        learner = Learner(self.model.module)

        def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs = learner(params, x)
            return self.loss(outputs, y), outputs

        return self._learn(
            loss, learner.params, _split(*batch, ways, shots, queries), list(learner.params)
        )


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
        learner = Learner(self.classifier.module)
        rows = torch.arange(len(data), device=data.device)

        def loss(params: Params, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs = learner(
                {name: params[name] for name in learner.params}, params[_FEATURES][rows]
            )
            return self.loss(outputs, y), outputs

        params = learner.params | {_FEATURES: self._features_of(data)}
        return self._learn(
            loss, params, _split(rows, labels, ways, shots, queries), list(learner.params)
        )

    def _features_of(self, data: Tensor) -> Tensor:
        """Return the features, computed with batch statistics."""
        learner = Learner(self.features)
        features: Tensor = learner(learner.params, data)
        return features


class EpisodicBatcher(LightningDataModule):
    """learn2learn's ``EpisodicBatcher``: ``epoch_length`` tasks per epoch of each taskset, one per batch.

    Args:
        train_tasks: Taskset with ``sample()``.
        validation_tasks: By default the training tasks.
        test_tasks: By default the validation tasks.
        epoch_length: Tasks per epoch.
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
        """Return the training tasks.

        Raises:
            ValueError: If there are several processes, each of which would draw the same tasks.
        """
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"Expected one process but got {self.trainer.world_size}: the tasks of a taskset "
                "would be the same ones in each; use one device, or a datamodule of this library."
            )
        return DataLoader(_Sampled(self.train_tasks, self.epoch_length), batch_size=None)

    def val_dataloader(self) -> DataLoader[Task]:
        """Return the validation tasks."""
        return DataLoader(_Sampled(self.validation_tasks, self.epoch_length), batch_size=None)

    def test_dataloader(self) -> DataLoader[Task]:
        """Return the test tasks."""
        return DataLoader(_Sampled(self.test_tasks, self.epoch_length), batch_size=None)


class _Sampled(Dataset[Task]):
    def __init__(self, tasks: Any, length: int) -> None:
        self._tasks, self._length = tasks, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Task:
        try:
            task: Task = self._tasks.sample()
        except (
            StopIteration,
            IndexError,
        ) as error:  # left alone it would silently end the epoch, and the training
            raise ValueError(
                f"Expected {self._length} tasks of the taskset but it gave no more at number "
                f"{number}; let it have more."
            ) from error
        return task


def _split(x: Tensor, y: Tensor, ways: int, shots: int, queries: int) -> Episodes:
    """Return a meta-batch of the one task, with the first ``shots`` examples of each class as its support set."""
    per_class = shots + queries
    if len(x) != ways * per_class:
        raise ValueError(
            f"Expected a task of {ways} ways with {shots} shots and {queries} queries, "
            f"{ways * per_class} examples, but got {len(x)}; give the taskset and the algorithm "
            "the same numbers."
        )
    place = torch.arange(len(x), device=x.device) % per_class
    support, query = place < shots, place >= shots
    return Episodes(x[support][None], y[support][None], x[query][None], y[query][None])
