"""Episodes are disjoint, unbiased, reproducible, and divided among processes without overlap."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.images import numbered_images
from lightning_maml.datamodules import GlyphsDataModule
from lightning_maml.datamodules.gathering import Drawn, gathered
from lightning_maml.datamodules.prefetch import as_it_is
from lightning_maml.datamodules.sampler import ClassImages, EpisodeDataset, Resampling, TaskSampler

pytestmark = pytest.mark.cpu_only  # episodes are drawn on the CPU


def dataset(seed: int = 0, rotations: str = "none", **shape) -> EpisodeDataset:
    shape = {"ways": 5, "shots": 2, "queries": 3} | shape
    return EpisodeDataset(
        numbered_images(), **shape, rotations=rotations, seed=(seed, 0), split="train"
    )


def class_of(x: torch.Tensor) -> torch.Tensor:
    return x.amax((1, 2, 3)).long() - 100


def test_an_episode_has_its_shape_and_one_class_per_label() -> None:
    task = dataset()[0, 0]
    assert task.support_x.shape == (10, 1, 3, 3)
    assert task.query_x.shape == (15, 1, 3, 3)
    assert task.support_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert task.query_y.bincount().tolist() == [3] * 5
    support, query = class_of(task.support_x), class_of(task.query_x)
    assert len(set(support.tolist())) == 5
    for label in range(5):
        assert set(support[task.support_y == label].tolist()) == set(
            query[task.query_y == label].tolist()
        )


def test_support_and_query_are_disjoint() -> None:
    for number in range(50):
        task = dataset(shots=5, queries=5)[0, number]
        numbers = [
            {(int(c), int(n)) for c, n in zip(class_of(x), x[:, 0, 1, 1], strict=True)}
            for x in (task.support_x, task.query_x)
        ]
        assert len(numbers[0]) == len(numbers[1]) == 25
        assert not numbers[0] & numbers[1]


def test_labels_tell_nothing_about_classes() -> None:
    """Every class gets every label equally often: chi-squared at a level of 1e-6, fixed seed."""
    counts = torch.zeros(12, 5)
    episodes = dataset(shots=1, queries=1)
    for number in range(6000):
        task = episodes[0, number]
        counts[class_of(task.support_x), task.support_y] += 1
    expected = counts.sum() / counts.numel()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 130, "59 degrees of freedom"


def test_a_task_is_a_function_of_seed_epoch_and_number() -> None:
    assert all(torch.equal(a, b) for a, b in zip(dataset()[3, 7], dataset()[3, 7], strict=True))
    for other in (dataset()[3, 8], dataset()[4, 7], dataset(seed=1)[3, 7]):
        assert not torch.equal(other.support_x, dataset()[3, 7].support_x)


@pytest.mark.parametrize("rotations", ["none", "classes", "augment"])
@pytest.mark.parametrize("resampling", [None, Resampling(2, 1), Resampling(2, 0)])
def test_a_task_is_the_same_alone_and_in_any_batch(
    rotations: str, resampling: Resampling | None
) -> None:
    episodes = dataset(rotations=rotations, shots=1, queries=2, resampling=resampling)
    keys = [(3, 5), (0, 1), (3, 4), (0, 0, 2), (0, 0)]
    together, backwards = episodes.__getitems__(keys), episodes.__getitems__(keys[::-1])
    for place, key in enumerate(keys):
        alone = episodes[key]
        for name in alone._fields:
            assert torch.equal(getattr(together, name)[place], getattr(alone, name))
            assert torch.equal(getattr(backwards, name)[-1 - place], getattr(alone, name))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_images_of_any_type_are_turned_each_by_its_angle(dtype: torch.dtype) -> None:
    images = torch.arange(2 * 3 * 25).remainder(251).reshape(6, 1, 5, 5).to(dtype)
    rows, turns = torch.tensor([4, 0, 0, 5, 1]), torch.tensor([3, 0, 1, 2, 1])
    found = gathered(images, Drawn(rows, turns))
    assert found.dtype == dtype
    for place, (row, turn) in enumerate(zip(rows, turns.tolist(), strict=True)):
        assert torch.equal(found[place], torch.rot90(images[row], turn, (-2, -1)))


def test_labels_of_a_task_can_be_changed_alone() -> None:
    episodes = dataset()
    batch = episodes.__getitems__([(0, 0), (0, 1)])
    batch.support_y[0] += 1
    assert batch.support_y[1].tolist() == episodes[0, 0].support_y.tolist()


def test_classes_of_all_sizes_give_each_image_equally_often() -> None:
    """Chi-squared at a level of 1e-6, fixed seed; classes of 2, 3 and 6 images in mixed order."""
    order = np.random.RandomState(0).permutation(11)
    members = [order[:2], order[2:5], order[5:]]
    images = torch.arange(11, dtype=torch.uint8)[:, None, None, None]
    shape = {"ways": 3, "shots": 1, "queries": 1, "rotations": "none", "seed": (0,)}
    episodes = EpisodeDataset(ClassImages(images, members), **shape, split="train")
    batch = episodes.__getitems__([(0, number) for number in range(6000)])
    for x in (batch.support_x, batch.query_x):
        for of_class in members:
            counts = x.flatten().bincount(minlength=11)[torch.from_numpy(of_class)]
            assert counts.sum() == 6000
            expected = 6000 / len(of_class)
            assert ((counts - expected) ** 2 / expected).sum() < 40, "5 degrees of freedom at most"
    assert (batch.support_x != batch.query_x).all(), "the other image, where a class has two"


def test_purposes_and_splits_draw_other_tasks() -> None:
    images = numbered_images()
    shape = {"ways": 5, "shots": 1, "queries": 1, "rotations": "none"}
    drawn = [
        EpisodeDataset(images, **shape, seed=seed, split="train")[key].support_x
        for seed in [(0, 0), (0, 1), (1, 0)]
        for key in [(0, 0), (0, 0, 1), (0, 0, 2)]
    ]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 9


def batches(
    workers: int, epoch: int = 0, replicas: int = 1, rank: int = 0, batch_size: int = 4
) -> list[torch.Tensor]:
    sampler = TaskSampler(24, fresh=True, num_replicas=replicas, rank=rank)
    sampler.set_epoch(epoch)
    return [
        batch.support_x
        for batch in DataLoader(
            dataset(),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=as_it_is,
        )
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_episodes(workers: int) -> None:
    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(workers), strict=True))


def test_epochs_differ_in_training_and_not_in_evaluation() -> None:
    assert not torch.equal(batches(0, epoch=0)[0], batches(0, epoch=1)[0])
    sampler = TaskSampler(3, fresh=False)
    sampler.set_epoch(5)
    assert list(sampler) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_of_a_loop_without_a_trainer_has_fresh_tasks(workers: int) -> None:
    data = GlyphsDataModule(meta_batch_size=2, train_batches=2, val_tasks=2, num_workers=workers)
    train, val = data.train_dataloader(), data.val_dataloader()
    passes = [[batch.support_x for batch in train] for _ in range(3)]
    assert len({tuple(x.flatten().tolist()) for batches in passes for x in batches}) == 6
    train.sampler.set_epoch(1)
    again = [batch.support_x for batch in train]
    assert all(torch.equal(a, b) for a, b in zip(again, passes[1], strict=True))
    next(iter(train))  # a pass that is broken off
    assert not torch.equal(next(iter(train)).support_x, passes[2][0])
    one, other = next(iter(val)), next(iter(val))
    assert torch.equal(one.support_x, other.support_x)
    # a loader goes on where another one was, also if it was used before
    state = {"epoch": 2, "batches": 1}
    fresh = data.train_dataloader()
    for loader in (fresh, train):
        loader.load_state_dict(state)
        (rest,) = list(loader)
        assert torch.equal(rest.support_x, passes[2][1])
    # a new loader begins anew
    assert torch.equal(next(iter(data.train_dataloader())).support_x, passes[0][0])


def test_processes_share_a_steps_tasks_without_overlap() -> None:
    alone = batches(0, batch_size=4)
    shared = [batches(0, replicas=2, rank=rank, batch_size=2) for rank in range(2)]
    assert len(alone) == len(shared[0]) == len(shared[1])
    for step, whole in enumerate(alone):
        assert torch.equal(whole[0::2], shared[0][step])
        assert torch.equal(whole[1::2], shared[1][step])


def test_an_uneven_number_of_tasks_is_divided_without_repetition() -> None:
    samplers = [TaskSampler(7, fresh=False, num_replicas=3, rank=rank) for rank in range(3)]
    assert [len(sampler) for sampler in samplers] == [3, 2, 2]
    assert sorted(number for sampler in samplers for _, number in sampler) == list(range(7))


def test_rotated_classes_are_four_times_as_many_and_turned_alike() -> None:
    episodes = dataset(rotations="classes", ways=48, shots=1, queries=1)
    task = episodes[0, 0]
    corners = [tuple(x[0].ge(100).nonzero()[0].tolist()) for x in task.support_x]
    assert len(set(zip(corners, class_of(task.support_x).tolist(), strict=True))) == 48
    assert corners == [tuple(x[0].ge(100).nonzero()[0].tolist()) for x in task.query_x]


def test_augmenting_rotations_differ_between_the_classes_of_an_episode() -> None:
    task = dataset(rotations="augment", ways=12)[0, 0]
    corners = {
        label: {
            tuple(x[0].ge(100).nonzero()[0].tolist()) for x in task.query_x[task.query_y == label]
        }
        for label in range(12)
    }
    assert all(len(turns) == 1 for turns in corners.values()), "one rotation per class"
    assert len({turns.copy().pop() for turns in corners.values()}) > 1, "not one rotation per task"
    assert len(set(class_of(task.support_x).tolist())) == 12, "a character is drawn once per task"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"ways": 13}, "the ways of split 'train' to be at most 12, its classes, but got 13"),
        (
            {"shots": 6, "queries": 5},
            (
                r"split 'train' \(6 \+ 5\) to be at most 10, the images of its smallest class, but "
                "12 of its 12 classes"
            ),
        ),
    ],
)
def test_too_few_classes_or_images_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(**shape)


def test_augmenting_turns_are_as_frequent_as_each_other() -> None:
    """Chi-squared at a level of 1e-6, three degrees of freedom, fixed seed."""
    episodes, counts = (
        dataset(rotations="augment", ways=12, shots=1, queries=1),
        dict.fromkeys([(0, 0), (0, 2), (2, 0), (2, 2)], 0),
    )
    for number in range(100):
        for x in episodes[0, number].support_x:
            counts[tuple(x[0].ge(100).nonzero()[0].tolist())] += 1
    assert sum((count - 300) ** 2 / 300 for count in counts.values()) < 30.7


def test_batches_of_inner_steps_are_turned_like_the_query_set() -> None:
    episodes = dataset(rotations="augment", ways=4, shots=2, queries=1, resampling=Resampling(3, 1))

    def seen(x: torch.Tensor) -> list[tuple[int, ...]]:
        return [(int(image.max()), *image[0].ge(100).nonzero()[0].tolist()) for image in x]

    task = episodes[0, 0]
    assert task.support_x.shape == (3, 8, 1, 3, 3)
    assert task.hessian_x.shape == (3, 4, 1, 3, 3)
    for step in range(3):
        assert (
            seen(task.support_x[step])[::2]
            == seen(task.support_x[step])[1::2]
            == seen(task.hessian_x[step])
            == seen(task.query_x)
        )
        assert task.support_y[step].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("shape", [(1, 3, 4), (9,), (3, 3)])
def test_images_that_are_not_square_cannot_be_turned(shape: tuple[int, ...]) -> None:
    data = ClassImages(torch.zeros(20, *shape), list(np.arange(20).reshape(5, 4)))
    arguments = {"ways": 2, "shots": 1, "queries": 1, "seed": (0,), "split": "train"}
    for rotations in ("classes", "augment"):
        with pytest.raises(
            ValueError,
            match=rf"square images \[M, C, H, W\] .* got shape {re.escape(str([20, *shape]))}; "
            r"set rotations='none'\.$",
        ):
            EpisodeDataset(data, rotations=rotations, **arguments)
    assert EpisodeDataset(data, rotations="none", **arguments)[0, 0].support_x.shape == (2, *shape)


@pytest.mark.parametrize("names", [(), ("cat", "dog", "owl")])
def test_small_classes_are_refused_or_dropped(names: tuple[str, ...]) -> None:
    data = ClassImages(
        torch.zeros(9, 1, 3, 3), [np.arange(4), np.arange(4, 6), np.arange(6, 9)], names
    )
    arguments = {
        "ways": 1,
        "shots": 1,
        "queries": 2,
        "seed": (0,),
        "split": "val",
        "rotations": "none",
    }
    found = "1 of its 3 classes have fewer images than the 3 that an episode takes"
    found += ": dog (2)" if names else ""
    cure = "; lower `shots` or `queries`"
    cure += ", or leave these out by small_classes='drop'." if names else "."
    for given in ({}, {"small_classes": "raise"}):
        with pytest.raises(
            ValueError,
            match=re.escape(f"to be at most 2, the images of its smallest class, but {found}{cure}")
            + "$",
        ):
            EpisodeDataset(data, **arguments, **given)
    with pytest.warns(
        UserWarning,
        match=re.escape(f"Split 'val': {found}; without them 2 classes are left.") + "$",
    ):
        kept = EpisodeDataset(data, small_classes="drop", **arguments)
    assert kept.__getitem__((0, 0)).query_x.shape == (2, 1, 3, 3)


def test_small_classes_where_batches_are_drawn_afresh_are_refused_with_all_sizes() -> None:
    data = ClassImages(torch.zeros(9, 1, 3, 3), [np.arange(4), np.arange(4, 9)], ())
    with pytest.raises(
        ValueError,
        match=r"train_steps x .* to be at most 4, .* 2 of its 2 classes .* than the 8 .*; lower "
        r"`shots`, `hessian_shots`, `queries` or `train_steps`\.$",
    ):
        EpisodeDataset(
            data,
            ways=1,
            shots=1,
            queries=2,
            seed=(0,),
            split="train",
            rotations="none",
            resampling=Resampling(steps=3, hessian_shots=1),
        )


def test_a_sampler_skips_the_tasks_that_were_given_out() -> None:
    sampler = TaskSampler(9, fresh=True, num_replicas=2, rank=1)
    assert list(sampler) == [(0, 1), (0, 3), (0, 5), (0, 7)]
    sampler.set_epoch(0)
    sampler.given = 3
    assert list(sampler) == [(0, 7)]


@pytest.mark.parametrize("members", [[[0, 1, 2, 2], [3, 4, 5]], [[0, 1, 2], [2, 3, 4]]])
def test_an_image_that_is_there_twice_is_refused(members: list[list[int]]) -> None:
    data = ClassImages(torch.rand(6, 1, 4, 4), [np.array(rows) for rows in members])
    with pytest.raises(ValueError, match=r"belong to one class once.* but rows \[2\] of `images`"):
        EpisodeDataset(data, ways=2, shots=1, queries=1, rotations="none", seed=(0,), split="train")


def test_a_sampler_for_other_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All would take the same tasks."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert list(TaskSampler(3, fresh=False, num_replicas=2, rank=1)) == [(0, 1)]
    with pytest.raises(
        ValueError, match="a loader that was made for 2 processes but got one for 1"
    ):
        list(TaskSampler(3, fresh=False))
