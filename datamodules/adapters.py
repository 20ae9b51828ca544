"""Episodes from existing few-shot pipelines: learn2learn's tasksets, torchmeta's and easyfsl's loaders."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_maml.batches.episodes import Episodes
from lightning_maml.datamodules.known_classes import check_splits, of_easyfsl, of_learn2learn
from lightning_maml.datamodules.messages import first_five

Labels = Tensor | Sequence[Any]
"""Labels of any kind: integers, strings or other things that can be told apart."""


class Taskset(Protocol):
    """What learn2learn calls a taskset or ``TaskDataset``."""

    def sample(self) -> tuple[Tensor, Labels]:
        """Return a task: its examples ``[M, ...]`` with their labels."""


def relabelled(support_y: Labels, query_y: Labels) -> tuple[Tensor, Tensor, list[Any]]:
    """Return a task's labels as ``0 .. ways - 1``, ``[S]`` and ``[Q]``, and the classes in the order of these numbers.

    Labels that are already these numbers are kept, as the sampler gave them out. Others are
    numbered at random, anew each time: if a class's number depended on the class, a network could
    learn it by heart and would not need to adapt.

    Raises:
        ValueError: If the class of a query is not in the support set.
    """
    support, query = (
        [label.item() if isinstance(label, Tensor) else label for label in labels]
        for labels in (support_y, query_y)
    )
    found = list(dict.fromkeys(support))
    if unknown := [label for label in dict.fromkeys(query) if label not in found]:
        raise ValueError(
            f"Expected queries of the classes of the support set, {_first_five(found)}, but got "
            f"some of {_first_five(unknown)}; give each class of a task support examples."
        )
    ways = len(found)
    classes = (
        sorted(found)
        if set(found) == {*range(ways)}
        else [found[number] for number in torch.randperm(ways).tolist()]
    )
    numbers = {label: number for number, label in enumerate(classes)}
    support_numbers, query_numbers = (
        torch.tensor([numbers[label] for label in labels], dtype=torch.long)
        for labels in (support, query)
    )
    return support_numbers, query_numbers, classes


def task_of_examples(x: Tensor, y: Labels, shots: int) -> Episodes:
    """Return a task (without the dimension T) whose support set is the first ``shots`` examples of each class.

    The examples may come in any order. Classes may have different numbers of queries.

    Raises:
        ValueError: If a class has no more than ``shots`` examples, or there are not as many labels
            as examples.
    """
    labels = [label.item() if isinstance(label, Tensor) else label for label in y]
    if len(labels) != len(x):
        raise ValueError(
            f"Expected a label for each of the {len(x)} examples of a task but got {len(labels)}."
        )
    rows: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    if short := {
        label: len(of_class) for label, of_class in rows.items() if len(of_class) <= shots
    }:
        raise ValueError(
            f"Expected more than {shots} examples of each class of a task, {shots} for the "
            "support set and some to query, but got "
            f"{_first_five(f'{count} of {label}' for label, count in short.items())}; sample more "
            "or lower `shots`."
        )
    support = [row for of_class in rows.values() for row in of_class[:shots]]
    query = [row for of_class in rows.values() for row in of_class[shots:]]
    support_y, query_y, _ = relabelled(
        [labels[row] for row in support], [labels[row] for row in query]
    )
    return Episodes(x[support], support_y.to(x.device), x[query], query_y.to(x.device))


def task_of_easyfsl(batch: Sequence[Any]) -> Episodes:
    """Return a task (without the dimension T) from a batch that easyfsl's ``TaskSampler`` collated.

    Its labels depend on the class (they follow the order of a set of class ids), so they are
    renumbered at random.

    Raises:
        ValueError: If the batch is not support images, their labels, query images, their labels and
            class ids.
    """
    if not isinstance(batch, Sequence) or len(batch) != 5:
        raise ValueError(
            "Expected easyfsl's support images, labels, query images, labels and class ids but "
            f"got {_kind(batch)}."
        )
    support_x, support_y, query_x, query_y, _ = batch
    support_y, query_y, classes = relabelled(support_y, query_y)
    numbers = torch.randperm(len(classes))
    return Episodes(support_x, numbers[support_y], query_x, numbers[query_y])


def episodes_of_torchmeta(batch: Mapping[str, Sequence[Tensor]]) -> Episodes:
    """Return the meta-batch of a batch that torchmeta's ``BatchMetaDataLoader`` collated.

    Raises:
        ValueError: If the batch is not ``{"train": (x, y), "test": (x, y)}``.
    """
    if not isinstance(batch, Mapping) or not {"train", "test"} <= batch.keys():
        got = list(batch) if isinstance(batch, Mapping) else _kind(batch)
        raise ValueError(
            f'Expected torchmeta\'s {{"train": (x, y), "test": (x, y)}} but got {got}.'
        )
    (support_x, support_y), (query_x, query_y) = batch["train"], batch["test"]
    if support_y.is_floating_point():  # regression
        return Episodes(support_x, support_y, query_x, query_y)
    labels = [relabelled(*of_task)[:2] for of_task in zip(support_y, query_y, strict=True)]
    return Episodes(
        support_x,
        torch.stack([support for support, _ in labels]),
        query_x,
        torch.stack([query for _, query in labels]),
    )


def meta_batch(tasks: Sequence[Episodes]) -> Episodes:
    """Return the meta-batch of some tasks, which must have the same size.

    Raises:
        ValueError: If they differ in the number of support or query examples.
    """
    sizes = {(len(task.support_y), len(task.query_y)) for task in tasks}
    if len(sizes) > 1:
        raise ValueError(
            "Expected the tasks of a meta-batch to have the same number of support and of query "
            f"examples but got {sorted(sizes)}; let the sampler draw as many for each task, or "
            "use meta_batch_size=1."
        )
    episodes: Episodes = default_collate([*tasks])
    return episodes


class _Loaders(LightningDataModule):
    """Datamodule that hands out the loaders it was given."""

    def __init__(
        self,
        train: Iterable[Episodes],
        val: Iterable[Episodes] | None,
        test: Iterable[Episodes] | None,
    ) -> None:
        super().__init__()
        self._train, self._val, self._test = train, val, test

    def train_dataloader(self) -> Iterable[Episodes]:
        """Return the training tasks."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"Expected one process but got {self.trainer.world_size}: tasks that another "
                "library draws would be the same ones in each; use one device, or a datamodule "
                "of this library."
            )
        return self._train

    def val_dataloader(self) -> Iterable[Episodes]:
        """Return the validation tasks; if there are none, there is no validation."""
        return [] if self._val is None else self._val

    def test_dataloader(self) -> Iterable[Episodes]:
        """Return the test tasks."""
        if self._test is None:
            raise ValueError(
                "Expected `test` tasks but the datamodule was given none; give it some."
            )
        return self._test

    def predict_dataloader(self) -> Iterable[Episodes]:
        """Return the test tasks."""
        return self.test_dataloader()


class Learn2LearnDataModule(_Loaders):
    """Episodes of learn2learn's tasksets.

    Args:
        train: Training taskset: anything whose ``sample()`` returns a task as ``(data, labels)``,
            with the classes in any order.
        val: Validation taskset.
        test: Test taskset.
        shots: Support examples per class: the first ones of each class; the others are queries.
        test_shots: The same in validation and test; by default as in training.
        meta_batch_size: Tasks per optimizer step.
        train_batches: Meta-batches per epoch.
        val_tasks: Validation tasks; fresh ones each time, as tasksets draw them.
        test_tasks: Test tasks.
        num_workers: Loader processes.

    Raises:
        ValueError: If a number is out of range, or tasksets are known to share classes; while
            loading, if a task cannot be split, its size differs from the others', or the taskset
            runs out of tasks.
    """

    def __init__(
        self,
        train: Taskset,
        val: Taskset | None = None,
        test: Taskset | None = None,
        shots: int = 1,
        test_shots: int | None = None,
        meta_batch_size: int = 32,
        train_batches: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        num_workers: int = 0,
    ) -> None:
        test_shots = shots if test_shots is None else test_shots
        _check_positive(shots=shots, test_shots=test_shots, meta_batch_size=meta_batch_size)
        _check_positive(train_batches=train_batches, val_tasks=val_tasks, test_tasks=test_tasks)
        check_splits(of_learn2learn, train=train, val=val, test=test)

        def loader(taskset: Taskset, tasks: int, shots: int) -> Iterable[Episodes]:
            dataset = _Sampled(taskset, tasks, shots)
            return DataLoader(
                dataset, batch_size=meta_batch_size, collate_fn=meta_batch, num_workers=num_workers
            )

        super().__init__(
            loader(train, train_batches * meta_batch_size, shots),
            None if val is None else loader(val, val_tasks, test_shots),
            None if test is None else loader(test, test_tasks, test_shots),
        )


class _Sampled(Dataset[Episodes]):
    def __init__(self, taskset: Taskset, tasks: int, shots: int) -> None:
        self._taskset, self._tasks, self._shots = taskset, tasks, shots

    def __len__(self) -> int:
        return self._tasks

    def __getitem__(self, number: int) -> Episodes:
        try:
            x, y = self._taskset.sample()
        except (StopIteration, IndexError) as error:
            raise ValueError(
                f"Expected {self._tasks} tasks of the taskset but it gave no more at number "
                f"{number}; let it have more."
            ) from error
        return task_of_examples(x, y, self._shots)


class EasyFSLDataModule(_Loaders):
    """Episodes of loaders with easyfsl's ``TaskSampler`` and its collate function.

    Args:
        train: Training loader, of one task per batch; an epoch has its ``n_tasks`` tasks.
        val: Validation loader.
        test: Test loader.
        meta_batch_size: Tasks per optimizer step.

    Raises:
        ValueError: If ``meta_batch_size`` is not positive, or loaders are known to share classes;
            while loading, if a batch is not easyfsl's, or tasks differ in size.
    """

    def __init__(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        meta_batch_size: int = 32,
    ) -> None:
        _check_positive(meta_batch_size=meta_batch_size)
        check_splits(of_easyfsl, train=train, val=val, test=test)

        def loader(batches: Iterable[Any]) -> Iterable[Episodes]:
            return _Converted(
                batches,
                lambda few: meta_batch([task_of_easyfsl(batch) for batch in few]),
                meta_batch_size,
            )

        super().__init__(
            loader(train),
            None if val is None else loader(val),
            None if test is None else loader(test),
        )


class TorchmetaDataModule(_Loaders):
    """Episodes of torchmeta's ``BatchMetaDataLoader``, or of others that give ``{"train": (x, y), "test": (x, y)}``, ``x`` ``[T, S, ...]``.

    An epoch is as long as the loader; if the loader goes through all combinations of classes, set
    the trainer's ``limit_train_batches``.

    Args:
        train: Training loader.
        val: Validation loader.
        test: Test loader.

    Raises:
        ValueError: While loading, if a batch is not torchmeta's.
    """

    def __init__(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
    ) -> None:
        def loader(batches: Iterable[Any]) -> Iterable[Episodes]:
            return _Converted(batches, lambda few: episodes_of_torchmeta(few[0]), 1)

        super().__init__(
            loader(train),
            None if val is None else loader(val),
            None if test is None else loader(test),
        )


class _Converted:
    """Meta-batches that are each made of ``size`` batches of a loader."""

    def __init__(
        self, batches: Iterable[Any], convert: Callable[[list[Any]], Episodes], size: int
    ) -> None:
        self._batches, self._convert, self._size = batches, convert, size
        self._gave = False

    def __len__(self) -> int:
        return math.ceil(len(cast(Sized, self._batches)) / self._size)

    def __iter__(self) -> Iterator[Episodes]:
        batches, passes = iter(self._batches), 0
        while few := list(islice(batches, self._size)):
            passes += 1
            yield self._convert(few)
        if self._gave and not passes:
            raise ValueError(
                "Expected a loader that can be gone through in every epoch but this one "
                f"({type(self._batches).__name__}) gave nothing the second time; give a loader, "
                "not its iterator."
            )
        self._gave = passes > 0


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"Expected `{name}` to be at least 1 but got {number}.")


def _first_five(labels: Iterable[Any]) -> str:
    return first_five(list(map(str, labels)))


def _kind(batch: Any) -> str:
    return f"{len(batch)} items" if isinstance(batch, Sequence) else type(batch).__name__
