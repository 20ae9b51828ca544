"""Glyphs: reproducible, distinct, and served like any other data."""

import pytest
import torch
from lightning import Trainer

from lightning_maml.datamodules import GlyphsDataModule

pytestmark = pytest.mark.cpu_only  # images are drawn on the CPU


def test_the_same_seed_draws_the_same_characters_and_another_seed_others() -> None:
    one = GlyphsDataModule().class_images("val")
    assert torch.equal(one.images, GlyphsDataModule().class_images("val").images)
    assert not torch.equal(one.images, GlyphsDataModule(glyph_seed=1).class_images("val").images)


def test_every_split_has_its_own_characters_of_twenty_drawings() -> None:
    splits = {name: GlyphsDataModule().class_images(name) for name in ("val", "test")}
    assert [len(split.members) for split in splits.values()] == [50, 100]
    assert all(
        split.images.shape[1:] == (1, 28, 28) and split.images.dtype == torch.uint8
        for split in splits.values()
    )
    assert not torch.equal(splits["val"].images, splits["test"].images[:1000])
    ink = splits["test"].images.float().div(255).mean((1, 2, 3))
    assert 0.03 < ink.quantile(0.01) < ink.quantile(0.99) < 0.35


def test_loaders_work_before_setup_too() -> None:
    module = GlyphsDataModule(val_tasks=4, meta_batch_size=4)
    assert len(list(module.val_dataloader())) == 1
    module.setup()
    assert len(module.train_dataloader()) == 200


def test_test_episodes_may_have_another_shape() -> None:
    module = GlyphsDataModule(
        ways=5,
        shots=1,
        queries=2,
        test_ways=3,
        test_shots=4,
        test_queries=5,
        meta_batch_size=2,
        train_batches=1,
    )
    module.setup("fit")
    train, val = next(iter(module.train_dataloader())), next(iter(module.val_dataloader()))
    assert (train.support_x.shape[1], train.query_x.shape[1]) == (5, 10)
    assert (val.support_x.shape[1], val.query_x.shape[1]) == (12, 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 1}, "`ways` to be at least 2 but got 1"),
        ({"test_shots": 0}, "`test_shots` to be at least 1 but got 0"),
        ({"meta_batch_size": 0}, "`meta_batch_size` to be at least 1 but got 0"),
        ({"num_workers": -1}, "`num_workers` to be at least 0 but got -1"),
        ({"seed": -1}, r"`seed` to be from 0 to 2\*\*32 - 1 but got -1"),
        ({"seed": 2**32}, r"`seed` to be from 0 to 2\*\*32 - 1 but got 4294967296"),
        ({"glyph_seed": -1}, r"`glyph_seed` to be from 0 to 2\*\*32 - 1 but got -1"),
        ({"rotations": "all"}, "`rotations` to be 'none', 'classes' or 'augment' but got 'all'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlyphsDataModule(**arguments)


def test_too_few_classes_are_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match="the ways of split 'val' to be at most 50, its classes, but got 51"
    ):
        GlyphsDataModule(test_ways=51).setup("fit")


@pytest.mark.parametrize("split", ["val", "test"])
def test_fewer_tasks_than_processes_are_refused(split: str) -> None:
    data = GlyphsDataModule(val_tasks=3, test_tasks=3)
    data.trainer = Trainer(accelerator="cpu", devices=4, logger=False)
    with pytest.raises(
        ValueError,
        match=f"Expected `{split}_tasks` to be at least 4, one for each process, but got 3",
    ):
        getattr(data, f"{split}_dataloader")()


def test_characters_of_another_seed_are_drawn_between_two_runs() -> None:
    data = GlyphsDataModule(ways=2, meta_batch_size=2, test_tasks=2)
    first = next(iter(data.test_dataloader())).query_x
    data.glyph_seed = 1
    other = next(iter(data.test_dataloader())).query_x
    assert not torch.equal(other, first)
    fresh = GlyphsDataModule(ways=2, meta_batch_size=2, test_tasks=2, glyph_seed=1)
    assert torch.equal(other, next(iter(fresh.test_dataloader())).query_x)
