"""A model that is tested on classes that it was trained on says so."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import TensorDataset

from helpers.trainers import trainer
from lightning_maml import MAML, MLP
from lightning_maml.datamodules import (
    ClassImages,
    EpisodicDataModule,
    FewShotDataModule,
    SinusoidDataModule,
)

pytestmark = pytest.mark.cpu_only  # datasets are read


def data(classes: int = 30, first: int = 0, **options: Any) -> FewShotDataModule:
    """Classes 0 .. ``classes - 1`` of the dataset whose images begin with ``first``."""
    labels = torch.arange(classes).repeat(4)
    images = torch.zeros(len(labels), 1, 2, 2)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = first + labels, torch.arange(len(labels))
    sizes = {"ways": 2, "shots": 1, "queries": 1, "train_batches": 1, "val_tasks": 2}
    return FewShotDataModule(TensorDataset(images, labels), **sizes, test_tasks=2, **options)


def model() -> MAML:
    return MAML(MLP(4, 2, hidden=(3,)), inner_lr=0.1, train_steps=1)


def classes_said(
    trained: MAML, module: Any, folder: Path, stage: str = "test", **how: Any
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = getattr(trainer(folder), stage)
        run(trained, module, verbose=False, **how)
    return [str(each.message) for each in caught if "trained on" in str(each.message)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MAML, Path]:
    folder = tmp_path_factory.mktemp("trained")
    found, run = model(), trainer(folder)
    run.fit(found, data())
    run.save_checkpoint(folder / "trained.ckpt")
    return found, folder / "trained.ckpt"


def test_another_split_of_the_same_classes(trained: tuple[MAML, Path], tmp_path: Path) -> None:
    fitted, path = trained
    again = data(split_seed=1)
    train, test = (
        set(each.class_images(split).names) for each, split in ((data(), "train"), (again, "test"))
    )
    expected = f"trained on {len(train & test)} of the {len(test)} test classes"
    loaded = MAML.load_from_checkpoint(path, network=MLP(4, 2, hidden=(3,)))
    for found in (
        classes_said(fitted, again, tmp_path),
        classes_said(loaded, again, tmp_path),
        classes_said(model(), again, tmp_path, ckpt_path=path),
    ):
        assert len(found) == 1
        assert expected in found[0]
    assert len(classes_said(fitted, again, tmp_path, "validate")) == 1


def test_classes_that_it_never_saw(trained: tuple[MAML, Path], tmp_path: Path) -> None:
    fitted, _ = trained
    assert not classes_said(fitted, data(), tmp_path)
    assert not classes_said(fitted, data(), tmp_path, "validate")
    # the labels are the same, but the images are not
    assert not classes_said(fitted, data(first=100), tmp_path)
    assert not classes_said(model(), data(split_seed=1), tmp_path)
    assert not classes_said(fitted, data(split_seed=1).test_dataloader(), tmp_path)


def test_a_second_run_adds_its_classes(trained: tuple[MAML, Path], tmp_path: Path) -> None:
    found = MAML.load_from_checkpoint(trained[1], network=MLP(4, 2, hidden=(3,)))
    trainer(tmp_path).fit(found, data(first=100))
    for module in (data(split_seed=1), data(first=100, split_seed=1)):
        assert classes_said(found, module, tmp_path)


def test_tasks_without_classes(tmp_path: Path) -> None:
    loss = torch.nn.functional.mse_loss
    found = MAML(MLP(1, 1, hidden=(3,)), inner_lr=0.01, train_steps=1, loss=loss)
    tasks = SinusoidDataModule(shots=2, train_batches=1, val_tasks=2, test_tasks=2)
    trainer(tmp_path).fit(found, tasks)
    assert not classes_said(found, tasks, tmp_path)


class Molecules(LightningDataModule):
    """A datamodule of the user's, with an attribute that has nothing to do with classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fingerprints = self.class_fingerprints = torch.rand(10, 4)

    def train_dataloader(self) -> Any:
        return data().train_dataloader()


class OwnLoader(EpisodicDataModule):
    """Has no images of its own."""

    def setup(self, stage: str | None = None) -> None:
        pass

    train_dataloader = Molecules.train_dataloader


@pytest.mark.parametrize("module", [Molecules, partial(OwnLoader, ways=2)])
def test_datamodules_of_users(module: Any, tmp_path: Path) -> None:
    trainer(tmp_path, limit_val_batches=0).fit(model(), module())


class Folds(EpisodicDataModule):
    """Five classes for training, five for testing; the first image of some is blank or missing."""

    def class_images(self, split: str) -> ClassImages:
        images = torch.rand(20, 1, 2, 2)
        images[:8] = 0
        members = [*np.split(np.arange(20), 5), np.array([], dtype=np.int64)]
        return ClassImages(images, members, [*"abcdef"])


def test_blank_images_and_empty_classes(tmp_path: Path) -> None:
    sizes = {"ways": 2, "shots": 1, "queries": 1, "train_batches": 1, "val_tasks": 2}
    module = Folds(**sizes, test_tasks=2, small_classes="drop")
    found = model()
    trainer(tmp_path).fit(found, module)
    assert not classes_said(found, module, tmp_path)


def test_a_run_that_validates_on_classes_of_an_earlier_one(
    trained: tuple[MAML, Path], tmp_path: Path
) -> None:
    _, path = trained
    for seed in (1, 0):
        loaded = MAML.load_from_checkpoint(path, network=MLP(4, 2, hidden=(3,)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path).fit(loaded, data(split_seed=seed))
        said = [str(each.message) for each in caught if "val classes" in str(each.message)]
        assert len(said) == seed
