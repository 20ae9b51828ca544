"""Episodes are made on the CPU, as loaders make them, whatever torch's default device."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_maml.datamodules import (
    FewShotDataModule,
    GlyphsDataModule,
    ImageFolderDataModule,
    relabelled,
)
from lightning_maml.datamodules.adapters import task_of_easyfsl

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("rotations", ["none", "augment"])
def test_datamodules_draw_the_same_batches(rotations: str) -> None:
    def drawn() -> list[torch.Tensor]:
        data = GlyphsDataModule(ways=3, queries=2, rotations=rotations)
        return list(next(iter(data.train_dataloader())))

    expected = drawn()
    with torch.device("meta"):
        found = drawn()
    assert all(map(torch.equal, found, expected))


def test_images_are_decoded(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"class {number}").mkdir()
        Image.new("L", (9, 9), 20 * number).save(tmp_path / f"class {number}" / "image.png")
    data = ImageFolderDataModule(str(tmp_path), ways=2, shots=1, image_size=8)
    with torch.device("meta"):
        data.prepare_data()
    assert len(data.class_images("train").members) > 0


def test_datasets_are_read() -> None:
    images = torch.rand(60, 1, 4, 4)
    data = FewShotDataModule(TensorDataset(images, torch.arange(60) % 12), ways=2, queries=2)
    with torch.device("meta"):
        data.setup()
        (batch, *_) = data.train_dataloader()
    assert batch.support_x.device.type == "cpu"


def test_labels_are_numbered_alike() -> None:
    with torch.device("meta"):
        torch.manual_seed(0)
        numbers, _, classes = relabelled(["cat", "dog"], ["dog"])
    assert [classes[number] for number in numbers] == ["cat", "dog"]


def test_easyfsls_tasks_stay_on_the_cpu() -> None:
    x, y = torch.rand(3, 2), torch.tensor([0, 1, 2])
    with torch.device("meta"):
        task = task_of_easyfsl((x, y, x, y, [4, 7, 1]))
    assert task.support_y.sort().values.tolist() == [0, 1, 2]
    assert torch.equal(task.support_y, task.query_y)
