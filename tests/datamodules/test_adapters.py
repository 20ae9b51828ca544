"""Pipelines of other libraries keep their data code and change the model line."""

import random
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from helpers.pipelines import QUERIES, SHOTS, WAYS, EasyFSLLoader, example, torchmeta_loader
from helpers.trainers import on_device
from lightning_maml import MAML, Episodes
from lightning_maml.datamodules import EasyFSLDataModule, Learn2LearnDataModule, TorchmetaDataModule
from lightning_maml.datamodules.adapters import relabelled, task_of_easyfsl, task_of_examples

pytestmark = pytest.mark.cpu_only  # other loaders give batches on the CPU


class Taskset:
    """Tasks in the form of learn2learn's: flat, class by class."""

    def __init__(
        self, tasks: int | None = None, shuffled: bool = False, queries: list[int] | None = None
    ) -> None:
        self.left, self.shuffled, self.queries = tasks, shuffled, queries or [QUERIES] * WAYS
        self.random = random.Random(0)

    def sample(self) -> tuple[Tensor, Tensor]:
        if self.left == 0:
            raise StopIteration
        self.left = None if self.left is None else self.left - 1
        rows = [
            (label, number)
            for label, queries in enumerate(self.queries)
            for number in range(SHOTS + queries)
        ]
        if self.shuffled:
            self.random.shuffle(rows)
        return torch.stack([example(*row) for row in rows]), torch.tensor(
            [label for label, _ in rows]
        )


def datamodules() -> dict[str, LightningDataModule]:
    sizes = {"meta_batch_size": 2, "train_batches": 3, "val_tasks": 4, "test_tasks": 5}
    return {
        "learn2learn": Learn2LearnDataModule(Taskset(), Taskset(), Taskset(), shots=SHOTS, **sizes),
        "learn2learn, shuffled": Learn2LearnDataModule(
            *(Taskset(shuffled=True) for _ in range(3)), shots=SHOTS, **sizes
        ),
        "easyfsl": EasyFSLDataModule(
            EasyFSLLoader(6), EasyFSLLoader(4), EasyFSLLoader(5), meta_batch_size=2
        ),
        "torchmeta": TorchmetaDataModule(
            torchmeta_loader(3, 2), torchmeta_loader(2, 2), torchmeta_loader(3, 2)
        ),
    }


def episodes_with_order(episodes: Episodes) -> list[list[tuple[int, int]]]:
    return [
        [(int(row[0]), int(row[1])) for row in x]
        for x in (episodes.support_x[0], episodes.query_x[0])
    ]


@pytest.mark.parametrize("name", datamodules())
def test_adapters_keep_the_examples_and_classes_of_each_task(name: str) -> None:
    data = datamodules()[name]
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 3
    assert [len(batch.support_x) for batch in data.test_dataloader()] == (
        [2, 2, 2] if name == "torchmeta" else [2, 2, 1]
    )
    for batch in batches:
        assert isinstance(batch, Episodes)
        assert [tensor.shape for tensor in batch] == [(2, 6, 2), (2, 6), (2, 12, 2), (2, 12)]
        for number in range(len(batch.support_x)):
            classes = {
                (int(x), int(y))
                for xs, ys in (batch[:2], batch[2:])
                for x, y in zip(xs[number, :, 0], ys[number], strict=True)
            }
            assert [sorted(column) for column in zip(*classes, strict=True)] == [
                [*range(WAYS)],
                [*range(WAYS)],
            ]  # one number for each class
            assert name == "easyfsl" or all(of_class == number for of_class, number in classes)
        for support, query in zip(batch.support_x, batch.query_x, strict=True):
            rows = [tuple(row) for part in (support, query) for row in part.tolist()]
            assert sorted(rows) == [
                (label, number) for label in range(WAYS) for number in range(SHOTS + QUERIES)
            ]
            if name != "learn2learn, shuffled":
                assert set(support[:, 1].tolist()) == {0.0, 1.0}


@pytest.mark.fits
@pytest.mark.parametrize("name", datamodules())
def test_a_pipeline_trains_and_tests(name: str, tmp_path: Path) -> None:
    run = Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        **on_device(),
        logger=False,
        enable_checkpointing=False,
    )
    model = MAML(nn.Linear(2, WAYS), inner_lr=0.1)
    run.fit(model, datamodule=datamodules()[name])
    assert run.global_step == 6
    assert "val/accuracy" in run.callback_metrics
    run.test(model, datamodule=datamodules()[name], verbose=False)
    assert "test/accuracy" in run.callback_metrics


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["wolf", "ape", "cat"], ["cat", "cat", "wolf"]),
        (torch.tensor([40, 7]), torch.tensor([7, 7, 40])),
        ([1, "1"], ["1"]),
    ],
)
def test_labels_of_any_kind_are_numbered_in_each_task(given, asked) -> None:
    support, query, classes = relabelled(given, asked)
    assert sorted(set(support.tolist())) == [*range(len(given))]
    assert [classes[number] for number in support] == list(given)
    assert [classes[number] for number in query] == list(asked)


def test_labels_that_are_numbers_of_the_ways_are_kept() -> None:
    support, query, classes = relabelled(torch.tensor([2, 0, 1]), torch.tensor([1, 1, 2]))
    assert (support.tolist(), query.tolist(), classes) == ([2, 0, 1], [1, 1, 2], [0, 1, 2])


def easyfsl_task(classes: list[int]) -> Episodes:
    labels = torch.arange(len(classes))  # of classes in an order of their own
    images = torch.tensor(classes).float()[:, None]
    return task_of_easyfsl((images, labels, images, labels, classes))


@pytest.mark.parametrize(
    "draw",
    [
        lambda classes: task_of_examples(
            torch.tensor(classes * 2).float()[:, None], classes * 2, shots=1
        ),
        lambda classes: easyfsl_task(sorted(classes)),
    ],
    ids=["examples", "easyfsl"],
)
def test_the_number_of_a_class_does_not_depend_on_the_class(draw) -> None:
    torch.manual_seed(0)
    order = random.Random(0)
    numbers: dict[int, list[int]] = {}
    for _ in range(1500):
        task = draw(order.sample(range(30), 5))
        for image, number in zip(
            task.support_x[:, 0].tolist(), task.support_y.tolist(), strict=True
        ):
            numbers.setdefault(int(image), []).append(number)
        assert dict(
            zip(task.support_x[:, 0].tolist(), task.support_y.tolist(), strict=True)
        ) == dict(zip(task.query_x[:, 0].tolist(), task.query_y.tolist(), strict=True))
    # some 250 each: the mean of 2 has a standard error of 0.09
    means = [sum(of_class) / len(of_class) for of_class in numbers.values()]
    assert len(means) == 30
    assert all(abs(mean - 2) < 0.45 for mean in means)


def test_learn2learns_tasksets_without_relabelling_are_renumbered() -> None:
    l2l = pytest.importorskip("learn2learn")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    labels = torch.arange(20).repeat_interleave(6)
    dataset = l2l.data.MetaDataset(TensorDataset(labels[:, None].float(), labels))
    draw = l2l.data.transforms
    transforms = [draw.NWays(dataset, 3), draw.KShots(dataset, 5), draw.LoadData(dataset)]
    data = Learn2LearnDataModule(
        l2l.data.TaskDataset(dataset, transforms, num_tasks=-1),
        shots=2,
        meta_batch_size=8,
        train_batches=60,
    )
    numbers: dict[int, list[int]] = {}
    for batch in data.train_dataloader():
        for image, number in zip(
            batch.support_x.flatten().tolist(), batch.support_y.flatten().tolist(), strict=True
        ):
            numbers.setdefault(int(image), []).append(number)
    # of some 60 tasks each: the mean of 1 has a standard error of 0.1
    means = [sum(of_class) / len(of_class) for of_class in numbers.values()]
    assert len(means) == 20
    assert all(abs(mean - 1) < 0.5 for mean in means)


def test_classes_may_have_different_numbers_of_queries() -> None:
    data = Learn2LearnDataModule(
        Taskset(queries=[1, 2, 5]), shots=SHOTS, meta_batch_size=2, train_batches=1
    )
    (batch,) = data.train_dataloader()
    assert batch.query_y[0].bincount().tolist() == [1, 2, 5]
    assert batch.support_y[0].bincount().tolist() == [SHOTS] * WAYS


class Alternating(Taskset):
    def sample(self) -> tuple[Tensor, Tensor]:
        self.queries = (
            [QUERIES + 1] * WAYS if self.queries == [QUERIES] * WAYS else [QUERIES] * WAYS
        )
        return super().sample()


def test_tasks_of_different_sizes_are_one_meta_batch() -> None:
    data = Learn2LearnDataModule(Alternating(), shots=SHOTS, meta_batch_size=3, train_batches=1)
    (batch,) = data.train_dataloader()
    assert batch.places == [[0, 2], [1]]
    sizes = [part.query_y.shape[1] for part in batch.parts]
    assert sorted(sizes) == [QUERIES * WAYS, (QUERIES + 1) * WAYS]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Learn2LearnDataModule(
                Taskset(tasks=3), shots=2, meta_batch_size=2, train_batches=2
            ),
            "4 tasks .* no more at number 3",
        ),
        (
            lambda: Learn2LearnDataModule(Taskset(queries=[0, 1, 1]), shots=2),
            "more than 2 examples of each class .* but got 2 of 0; sample",
        ),
        (
            lambda: Learn2LearnDataModule(Taskset(), shots=0),
            "Expected `shots` to be at least 1 but got 0",
        ),
        (lambda: EasyFSLDataModule([(1, 2)]), "easyfsl's support images, .* but got 2 items"),
        (
            lambda: EasyFSLDataModule([], meta_batch_size=0),
            "Expected `meta_batch_size` to be at least 1 but got 0",
        ),
        (lambda: TorchmetaDataModule([{"support": 1}]), r"torchmeta's .* but got \['support'\]"),
        (lambda: TorchmetaDataModule([torch.zeros(2)]), "torchmeta's .* but got Tensor"),
    ],
)
def test_tasks_that_cannot_be_converted_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(make().train_dataloader())


def test_a_query_of_an_unknown_class_and_missing_labels_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="Expected queries of the classes of the support set, a, b, but got some of c",
    ):
        relabelled(["a", "b"], ["a", "c"])
    with pytest.raises(
        ValueError, match="Expected a label for each of the 3 examples of a task but got 2"
    ):
        task_of_examples(torch.zeros(3, 1), [0, 1], 1)


def test_an_iterator_in_place_of_a_loader_is_refused_in_the_second_epoch() -> None:
    loader = TorchmetaDataModule(iter(torchmeta_loader(2, 2))).train_dataloader()
    assert len(list(loader)) == 2
    with pytest.raises(
        ValueError,
        match=r"every epoch but this one \(list_iterator\) gave nothing the second time; give a "
        "loader",
    ):
        list(loader)


def test_regression_targets_are_left_as_they_are() -> None:
    x, y = torch.rand(2, 5, 1), torch.rand(2, 5, 1)
    (batch,) = TorchmetaDataModule([{"train": (x, y), "test": (x, y)}]).train_dataloader()
    assert torch.equal(batch.support_y, y)


def test_testing_without_test_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `test` tasks but the datamodule was given none"):
        Learn2LearnDataModule(Taskset()).test_dataloader()


@pytest.mark.fits
def test_a_loader_without_a_length_can_be_trained_on(tmp_path: Path) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[OrderedDict]:
            while True:
                yield torchmeta_loader(1, 2)[0]

    run = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        **on_device(),
        logger=False,
        enable_checkpointing=False,
        limit_train_batches=2,
    )
    run.fit(
        MAML(nn.Linear(2, WAYS)),
        datamodule=TorchmetaDataModule(DataLoader(Endless(), batch_size=None)),
    )
    assert run.global_step == 2


class MetaDataset:
    """With the attributes of learn2learn's MetaDataset."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        labels = [int(dataset[number][1]) for number in range(len(dataset))]
        self.labels_to_indices = {
            label: [number for number, other in enumerate(labels) if other == label]
            for label in set(labels)
        }


class FilterLabels:
    """Of the name of learn2learn's transform that leaves out classes."""


class TasksetOf(Taskset):
    """With the attributes of learn2learn's TaskDataset."""

    def __init__(self, dataset: Dataset, *task_transforms) -> None:
        super().__init__()
        self.dataset, self.task_transforms = MetaDataset(dataset), list(task_transforms)


class TaskSampler:
    """With the attribute of easyfsl's TaskSampler."""

    def __init__(self, dataset: Dataset) -> None:
        self.items_per_label = MetaDataset(dataset).labels_to_indices

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0]])


def loader_of(dataset: Dataset) -> DataLoader:
    return DataLoader(dataset, batch_sampler=TaskSampler(dataset))


@pytest.mark.parametrize(
    ("adapter", "tasks_of"), [(Learn2LearnDataModule, TasksetOf), (EasyFSLDataModule, loader_of)]
)
def test_splits_known_to_share_classes_are_refused(adapter: type, tasks_of: type) -> None:
    data = TensorDataset(torch.zeros(24, 1), torch.arange(24) % 6)
    by_class = [
        Subset(data, [number for number in range(24) if number % 6 in labels])
        for labels in ((0, 1), (2, 3), (4, 5))
    ]
    adapter(*map(tasks_of, by_class))
    # numbers are no names
    adapter(*(tasks_of(TensorDataset(torch.zeros(24, 1), torch.arange(24) % 6)) for _ in range(3)))
    with pytest.raises(
        ValueError,
        match=r"`train` and `val` to share no class but 6 are both in train and in val \(0, 1, "
        r"2, 3, 4, ...\)",
    ):
        adapter(*(tasks_of(Subset(data, range(start, start + 8))) for start in (0, 8, 16)))
    with pytest.raises(
        ValueError,
        match=r"`val` and `test` to share no class but 1 are both in val and in test \(3\)",
    ):
        adapter(*map(tasks_of, by_class[:2]), tasks_of(Subset(by_class[1], [1, 3])))
    other = TensorDataset(torch.zeros(24, 1), torch.arange(24) % 6)
    zero, one = [0, 6, 12, 18], [1, 7, 13, 19]
    adapter(
        tasks_of(ConcatDataset([Subset(data, zero), Subset(other, one)])),
        tasks_of(ConcatDataset([Subset(data, one), Subset(other, zero)])),
    )
    same = tasks_of(data)
    with pytest.raises(
        ValueError,
        match="Expected `train` and `test` to draw from different classes but they are the same",
    ):
        adapter(same, None, same)


def test_tasksets_whose_transforms_may_leave_out_classes_are_trusted() -> None:
    data = TensorDataset(torch.zeros(24, 1), torch.arange(24) % 6)
    Learn2LearnDataModule(TasksetOf(data, FilterLabels()), TasksetOf(data, FilterLabels()))


@pytest.mark.parametrize("of", ["train", "val", "test", "predict"])
def test_several_processes_are_refused(of: str) -> None:
    """All would take the same tasks, and count them as different ones."""
    task = torch.rand(6, 4), torch.arange(2).repeat(3)
    tasksets = [SimpleNamespace(sample=lambda: task) for _ in range(3)]
    data = Learn2LearnDataModule(*tasksets, shots=1)
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="Expected one process but got 2"):
        getattr(data, f"{of}_dataloader")()


@pytest.mark.parametrize(
    "y", [torch.rand(6), torch.zeros(6, 4, 4, dtype=torch.long)], ids=["targets", "masks"]
)
def test_what_is_no_label_of_a_class_is_refused(y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected labels of classes, whole numbers \[examples\]"):
        task_of_examples(torch.rand(6, 1, 4, 4), y, shots=1)


def test_masks_of_torchmetas_form_stay_as_they_are() -> None:
    part = torch.rand(2, 3, 1, 4, 4), torch.randint(9, (2, 3, 4, 4))
    [batch] = TorchmetaDataModule([{"train": part, "test": part}]).train_dataloader()
    assert torch.equal(batch.support_y, part[1])


def test_labels_in_a_column_are_labels() -> None:
    y = torch.tensor([[4], [9], [4], [9]])
    assert sorted(task_of_examples(torch.rand(4, 2), y, shots=1).query_y.tolist()) == [0, 1]
    part = torch.rand(1, 4, 2), y[None]
    [batch] = TorchmetaDataModule([{"train": part, "test": part}]).train_dataloader()
    assert batch.support_y.shape == (1, 4)
