"""Episodes from the pipelines of other few-shot libraries: learn2learn, torchmeta and easyfsl."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_maml.batches.episodes import Episodes
from lightning_maml.batches.meta_batch import MetaBatch, meta_batch
from lightning_maml.datamodules.known_classes import check_splits, of_easyfsl, of_learn2learn
from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

Labels = Tensor | Sequence[Any]
"""Labels of any kind: integers, strings or other hashable values."""


class Taskset(Protocol):
    """What learn2learn calls a taskset or ``TaskDataset``.

    Examples:
        >>> import torch
        >>> class TwoClasses:
        ...     def sample(self):
        ...         return torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> x, y = TwoClasses().sample()
        >>> task_of_examples(x, y, shots=1).query_x.shape
        torch.Size([4, 1, 28, 28])
    """

    def sample(self) -> tuple[Tensor, Labels]:
        """Return a task: its examples ``[M, ...]`` and their labels."""


def relabelled(support_y: Labels, query_y: Labels) -> tuple[Tensor, Tensor, list[Any]]:
    """Number a task's classes from 0 to ``ways - 1``.

    Labels that are already these numbers are kept, as a sampler has given them out. Other labels
    are numbered at random, anew each time: if a class's number depended on the class, a network
    could memorise it and would not need to adapt.

    Args:
        support_y: Labels of the support examples.
        query_y: Labels of the queries.

    Returns:
        The numbers of the support examples, ``[S]``, those of the queries, ``[Q]``, and the classes
        in the order of their numbers.

    Raises:
        ValueError: If the class of a query is not in the support set.

    Examples:
        >>> relabelled([1, 0], [0, 0, 1])
        (tensor([1, 0]), tensor([0, 0, 1]), [0, 1])
        >>> support, query, classes = relabelled(["owl", "cat"], ["cat", "owl"])
        >>> [classes[number] for number in query]
        ['cat', 'owl']
    """
    support, query = _hashable(support_y), _hashable(query_y)
    found = list(dict.fromkeys(support))
    unknown = [label for label in dict.fromkeys(query) if label not in found]
    if unknown:
        raise UserValueError(
            f"Expected queries of the classes of the support set, {first_five(found)}, but got "
            f"some of {first_five(unknown)}; give each class of a task support examples."
        )
    ways = len(found)
    if set(found) == set(range(ways)):
        classes = sorted(found)
    else:
        classes = [found[number] for number in torch.randperm(ways, device="cpu").tolist()]
    numbers = {label: number for number, label in enumerate(classes)}
    # as a loader makes them, whatever torch's default device
    labels: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
    support_numbers = torch.tensor([numbers[label] for label in support], **labels)
    query_numbers = torch.tensor([numbers[label] for label in query], **labels)
    return support_numbers, query_numbers, classes


def _hashable(labels: Labels) -> list[Any]:
    """Return labels that can be keys of a dictionary, as tensors cannot.

    Raises:
        ValueError: If they are no labels of classes, but targets or labels of positions.
    """
    is_dense = isinstance(labels, Tensor) and labels.numel() > len(labels)
    if isinstance(labels, Tensor) and (labels.is_floating_point() or is_dense):
        raise UserValueError(
            "Expected labels of classes, whole numbers [examples], but got "
            f"{labels.dtype} {list(labels.shape)}; for targets of a regression or labels of "
            "pixels give Episodes of your own, which any loader may yield."
        )
    return [label.item() if isinstance(label, Tensor) else label for label in labels]


def task_of_examples(x: Tensor, y: Labels, shots: int) -> Episodes:
    """Divide the examples of a task into a support set and a query set.

    Args:
        x: Examples, ``[M, ...]``, in any order.
        y: Their labels.
        shots: Support examples per class: the first ones of each class. The others are queries, of
            which classes may have different numbers.

    Returns:
        The task, without the leading dimension of a meta-batch.

    Raises:
        ValueError: If a class has no more than ``shots`` examples, or there are not as many labels
            as examples.

    Examples:
        >>> import torch
        >>> task = task_of_examples(torch.arange(6.0), [0, 1, 0, 1, 0, 1], shots=1)
        >>> task.support_x
        tensor([0., 1.])
        >>> task.query_x, task.query_y
        (tensor([2., 4., 3., 5.]), tensor([0, 0, 1, 1]))
    """
    labels = _hashable(y)
    if len(labels) != len(x):
        raise UserValueError(
            f"Expected a label for each of the {len(x)} examples of a task but got {len(labels)}."
        )
    rows: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    short = [
        f"{len(of_class)} of {label}" for label, of_class in rows.items() if len(of_class) <= shots
    ]
    if short:
        raise UserValueError(
            f"Expected more than {shots} examples of each class of a task, {shots} for the "
            f"support set and some to query, but got {first_five(short)}; sample more or lower "
            "`shots`."
        )
    support = [row for of_class in rows.values() for row in of_class[:shots]]
    query = [row for of_class in rows.values() for row in of_class[shots:]]
    support_y, query_y, _ = relabelled(
        [labels[row] for row in support], [labels[row] for row in query]
    )
    return Episodes(x[support], support_y.to(x.device), x[query], query_y.to(x.device))


def task_of_easyfsl(batch: Sequence[Any]) -> Episodes:
    """Convert a batch that easyfsl's ``TaskSampler`` collated.

    Its labels depend on the class (they follow the order of a set of class ids), so they are
    numbered anew at random.

    Args:
        batch: Support images ``[S, ...]``, their labels, query images ``[Q, ...]``, their labels,
            and class ids.

    Returns:
        The task, without the leading dimension of a meta-batch.

    Raises:
        ValueError: If the batch is not these five things.
    """
    if not isinstance(batch, Sequence) or len(batch) != 5:
        raise UserValueError(
            "Expected easyfsl's support images, labels, query images, labels and class ids but "
            f"got {_kind(batch)}."
        )
    support_x, support_y, query_x, query_y, _ = batch
    support_y, query_y, classes = relabelled(support_y, query_y)
    numbers = torch.randperm(len(classes), device="cpu")
    return Episodes(support_x, numbers[support_y], query_x, numbers[query_y])


def episodes_of_torchmeta(batch: Mapping[str, Sequence[Tensor]]) -> Episodes:
    """Convert a batch that torchmeta's ``BatchMetaDataLoader`` collated.

    Args:
        batch: ``{"train": (x, y), "test": (x, y)}`` with ``x`` ``[T, S, ...]`` and ``y``
            ``[T, S]``; floats, for regression, and labels of pixels ``[T, S, ...]`` stay as they
            are.

    Raises:
        ValueError: If the batch is anything else.
    """
    if not isinstance(batch, Mapping) or not {"train", "test"} <= batch.keys():
        got = list(batch) if isinstance(batch, Mapping) else _kind(batch)
        raise UserValueError(
            f'Expected torchmeta\'s {{"train": (x, y), "test": (x, y)}} but got {got}.'
        )
    (support_x, support_y), (query_x, query_y) = batch["train"], batch["test"]
    is_dense = support_y.shape[2:].numel() > 1
    if support_y.is_floating_point() or is_dense:  # no labels of classes
        return Episodes(support_x, support_y, query_x, query_y)
    labels = [relabelled(*of_task)[:2] for of_task in zip(support_y, query_y, strict=True)]
    return Episodes(
        support_x,
        torch.stack([support for support, _ in labels]),
        query_x,
        torch.stack([query for _, query in labels]),
    )


class _Loaders(LightningDataModule):
    """Hands out the loaders that it was given."""

    def __init__(
        self,
        train: Iterable[MetaBatch],
        val: Iterable[MetaBatch] | None,
        test: Iterable[MetaBatch] | None,
    ) -> None:
        super().__init__()
        self._train, self._val, self._test = train, val, test

    def _check_one_process(self) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise UserValueError(
                f"Expected one process but got {self.trainer.world_size}: tasks that another "
                "library draws would be the same ones in each; use one device, or a datamodule "
                "of this library."
            )

    def train_dataloader(self) -> Iterable[MetaBatch]:
        """Return the training tasks."""
        self._check_one_process()
        return self._train

    def val_dataloader(self) -> Iterable[MetaBatch]:
        """Return the validation tasks; an empty list, for no validation, if there are none."""
        self._check_one_process()
        return [] if self._val is None else self._val

    def test_dataloader(self) -> Iterable[MetaBatch]:
        """Return the test tasks."""
        if self._test is None:
            raise UserValueError(
                "Expected `test` tasks but the datamodule was given none; give it some."
            )
        self._check_one_process()
        return self._test

    def predict_dataloader(self) -> Iterable[MetaBatch]:
        """Return the test tasks."""
        return self.test_dataloader()


class Learn2LearnDataModule(_Loaders):
    """Episodes of learn2learn's tasksets.

    Args:
        train: Training taskset: anything whose ``sample()`` returns a task as ``(data, labels)``,
            with the classes in any order.
        val: Validation taskset; by default there is no validation.
        test: Test taskset.
        shots: Support examples per class: the first ones of each class. The others are queries.
        test_shots: Support examples per class in validation and test; by default as in training.
        meta_batch_size: Tasks per optimizer step.
        train_batches: Meta-batches per epoch.
        val_tasks: Number of validation tasks; fresh ones each time, as tasksets draw them.
        test_tasks: Number of test tasks.
        num_workers: Loader processes.

    Raises:
        ValueError: If a number is out of range, or tasksets are known to share classes; while
            loading, if a class of a task has too few examples, or the taskset runs out of tasks.

    Examples:
        >>> import torch
        >>> from lightning_maml.datamodules import Learn2LearnDataModule
        >>> class TwoClasses:
        ...     def sample(self):
        ...         return torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> data = Learn2LearnDataModule(TwoClasses(), shots=1, meta_batch_size=4)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.support_x.shape, batch.query_x.shape
        (torch.Size([4, 2, 1, 28, 28]), torch.Size([4, 4, 1, 28, 28]))
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

        def loader(taskset: Taskset, tasks: int, shots: int) -> Iterable[MetaBatch]:
            dataset = _Sampled(taskset, tasks, shots)
            return DataLoader(
                dataset, batch_size=meta_batch_size, collate_fn=meta_batch, num_workers=num_workers
            )

        super().__init__(
            train=loader(train, train_batches * meta_batch_size, shots),
            val=None if val is None else loader(val, val_tasks, test_shots),
            test=None if test is None else loader(test, test_tasks, test_shots),
        )


class _Sampled(Dataset[Episodes]):
    """Some tasks of a taskset, as a dataset; the number of a task has no influence on it."""

    def __init__(self, taskset: Taskset, tasks: int, shots: int) -> None:
        self._taskset, self._tasks, self._shots = taskset, tasks, shots

    def __len__(self) -> int:
        return self._tasks

    def __getitem__(self, number: int) -> Episodes:
        try:
            x, y = self._taskset.sample()
        except (StopIteration, IndexError) as error:
            raise UserValueError(
                f"Expected {self._tasks} tasks of the taskset but it gave no more at number "
                f"{number}; let it have more."
            ) from error
        return task_of_examples(x, y, self._shots)


class EasyFSLDataModule(_Loaders):
    """Episodes of loaders with easyfsl's ``TaskSampler`` and its collate function.

    Args:
        train: Training loader, of one task per batch. An epoch has its ``n_tasks`` tasks.
        val: Validation loader; by default there is no validation.
        test: Test loader.
        meta_batch_size: Tasks per optimizer step.

    Raises:
        ValueError: If ``meta_batch_size`` is not positive, or loaders are known to share classes;
            while loading, if a batch is not easyfsl's.

    Examples:
        >>> import torch
        >>> from lightning_maml.datamodules import EasyFSLDataModule
        >>> labels = torch.tensor([0, 1])
        >>> task = [torch.rand(2, 3, 84, 84), labels, torch.rand(2, 3, 84, 84), labels, [7, 4]]
        >>> data = EasyFSLDataModule([task] * 8, meta_batch_size=4)  # a list in place of a loader
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.support_x.shape
        torch.Size([4, 2, 3, 84, 84])
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

        def convert(batches: list[Any]) -> MetaBatch:
            return meta_batch([task_of_easyfsl(batch) for batch in batches])

        super().__init__(
            train=_Converted(train, convert, meta_batch_size),
            val=None if val is None else _Converted(val, convert, meta_batch_size),
            test=None if test is None else _Converted(test, convert, meta_batch_size),
        )


class TorchmetaDataModule(_Loaders):
    """Episodes of torchmeta's ``BatchMetaDataLoader``, or of other loaders of the same form.

    Their batches are ``{"train": (x, y), "test": (x, y)}`` with ``x`` ``[T, S, ...]``. An epoch is
    as long as the loader; if the loader goes through all combinations of classes, set the trainer's
    ``limit_train_batches``.

    Args:
        train: Training loader.
        val: Validation loader; by default there is no validation.
        test: Test loader.

    Raises:
        ValueError: While loading, if a batch is not torchmeta's.

    Examples:
        >>> import torch
        >>> from lightning_maml.datamodules import TorchmetaDataModule
        >>> part = torch.rand(4, 2, 1, 28, 28), torch.tensor([[0, 1]] * 4)
        >>> data = TorchmetaDataModule([{"train": part, "test": part}])  # in place of a loader
        >>> next(iter(data.train_dataloader())).support_x.shape
        torch.Size([4, 2, 1, 28, 28])
    """

    def __init__(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
    ) -> None:
        def convert(batches: list[Any]) -> Episodes:
            [batch] = batches
            return episodes_of_torchmeta(batch)

        super().__init__(
            train=_Converted(train, convert, 1),
            val=None if val is None else _Converted(val, convert, 1),
            test=None if test is None else _Converted(test, convert, 1),
        )


class _Converted:
    """Meta-batches, each made of ``size`` batches of a loader."""

    def __init__(
        self, batches: Iterable[Any], convert: Callable[[list[Any]], MetaBatch], size: int
    ) -> None:
        self._batches, self._convert, self._size = batches, convert, size
        self._gave = False  # whether the last epoch had any tasks

    def __len__(self) -> int:
        return math.ceil(len(cast(Sized, self._batches)) / self._size)

    def __iter__(self) -> Iterator[MetaBatch]:
        batches = iter(self._batches)
        gives = False
        while few := list(islice(batches, self._size)):
            gives = True
            yield self._convert(few)
        if self._gave and not gives:
            raise UserValueError(
                "Expected a loader that can be gone through in every epoch but this one "
                f"({type(self._batches).__name__}) gave nothing the second time; give a loader, "
                "not its iterator."
            )
        self._gave = gives


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserValueError(f"Expected `{name}` to be at least 1 but got {number}.")


def _kind(batch: Any) -> str:
    return f"{len(batch)} items" if isinstance(batch, Sequence) else type(batch).__name__
