"""Images that are kept on the device give the same batches, bit for bit.

Where there is no GPU, the device is the CPU, as if it were another one.
"""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from helpers.images import numbered_images
from helpers.runs import Noise, is_same
from helpers.trainers import trainer
from lightning_maml import MAML, MLP
from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.batches.trees import map_tensors
from lightning_maml.datamodules import (
    ClassImages,
    EpisodeTransforms,
    EpisodicDataModule,
    FewShotDataModule,
    GlyphsDataModule,
    ImageFolderDataModule,
    base,
)
from lightning_maml.datamodules.on_device import ImagesOnDevice
from lightning_maml.datamodules.prefetch import PrefetchingLoader
from lightning_maml.datamodules.sampler import EpisodeDataset, Resampling

SMALL = {"ways": 2, "meta_batch_size": 2, "train_batches": 3, "val_tasks": 3, "test_tasks": 3}


class Mixed(EpisodicDataModule):
    """Classes of different sizes, whose images are not side by side, and share them with others."""

    def class_images(self, split: str) -> ClassImages:
        order = np.random.RandomState(0).permutation(60)
        images = torch.arange(60 * 4, dtype=torch.uint8).reshape(60, 1, 2, 2)
        starts = {"train": 0, "val": 20, "test": 40}
        own = order[starts[split] : starts[split] + 20]
        return ClassImages(images, [own[:4], own[4:10], own[10:]])


class Recorder(LightningModule):
    """Keeps the batches that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[str, AnyEpisodes]] = []
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(("train", batch))
        return self.weight * batch.query_x.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(("val", batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(("test", batch))

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(("predict", batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_on_device(monkeypatch)


def keep_on_device(monkeypatch: pytest.MonkeyPatch, kept: bool = True) -> None:
    monkeypatch.setattr(EpisodicDataModule, "_fits_on_device", lambda *_: kept)


def seen(folder: Path, data: EpisodicDataModule, **options: Any) -> list[tuple[str, AnyEpisodes]]:
    """Fit for three epochs, test and predict; return all batches."""
    torch.manual_seed(0)
    model, run = Recorder(), trainer(folder, max_epochs=3, num_sanity_val_steps=1, **options)
    run.fit(model, data)
    run.test(model, data)
    run.predict(model, data)
    return model.batches


def is_same_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Any, **options: Any
) -> list[tuple[str, AnyEpisodes]]:
    """Check that a datamodule gives the same batches if images are kept on the device."""
    keep_on_device(monkeypatch, kept=False)
    usual = seen(folder, make(), **options)
    sources: list[Any] = []
    keep_on_device(monkeypatch)
    init = PrefetchingLoader.__init__

    def noted(self: Any, dataset: Any, **arguments: Any) -> None:
        sources.append(dataset)
        init(self, dataset, **arguments)

    monkeypatch.setattr(PrefetchingLoader, "__init__", noted)
    there = seen(folder, make(), **options)
    assert all(isinstance(source, ImagesOnDevice) for source in sources)
    assert len(sources) >= 4
    assert len(usual) >= 3 * 3 + 2 * 2
    assert is_same(there, usual)
    assert [type(batch) for _, batch in there] == [type(batch) for _, batch in usual]
    return usual


@pytest.mark.parametrize("rotations", ["none", "classes", "augment"])
@pytest.mark.parametrize("regime", ["finite_sum", "resampling"])
def test_batches_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotations: Any, regime: Any
) -> None:
    options = {"rotations": rotations, "regime": regime, "train_steps": 1}
    batches = is_same_there(tmp_path, monkeypatch, lambda: Mixed(**SMALL, **options))
    kind = ResampledEpisodes if regime == "resampling" else Episodes
    assert all(type(batch) is kind for stage, batch in batches if stage == "train")
    assert not is_same(batches[1][1], batches[5][1]), "epochs differ"


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"precision": "64-true"},
        {"val_check_interval": 1},
    ],
    ids=str,
)
def test_batches_are_the_same_under_each_trainer_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    sizes = SMALL | {"train_batches": 6}
    is_same_there(tmp_path, monkeypatch, lambda: Mixed(**sizes, rotations="augment"), **options)


@pytest.mark.parametrize("rotations", ["none", "classes", "augment"])
@pytest.mark.parametrize("resampling", [None, Resampling(3, 2), Resampling(3, 0)])
def test_episodes_of_every_shape_are_the_same(
    rotations: Any, resampling: Any, device: torch.device
) -> None:
    shape = {"ways": 5, "shots": 1, "queries": 1, "resampling": resampling}
    episodes = EpisodeDataset(
        numbered_images(), **shape, rotations=rotations, seed=(0,), split="train"
    )
    there = ImagesOnDevice(episodes, device)
    keys = [(0, 3), (1, 0), (0, 0, 2)]
    numbers = there.__getitems__(keys)
    found = there.gather(numbers)
    assert {found.support_x.device.type, found.query_x.device.type} == {device.type}
    assert is_same([tensor.cpu() for tensor in found], episodes.__getitems__(keys))
    there.release()
    assert is_same(there.gather(numbers), episodes.__getitems__(keys))


def few_shot() -> FewShotDataModule:
    with torch.device("cpu"):
        images = torch.rand(120, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(images, torch.arange(120) % 12)
    return FewShotDataModule(data, **SMALL, queries=2)


def write_images(root: Path) -> Path:
    for number in range(12):
        place = root / "images" / f"class {number}"
        place.mkdir(parents=True)
        for image in range(3):
            Image.new("RGB", (9, 9), (20 * number, image, 0)).save(place / f"{image}.png")
    return root / "images"


def folder_of_images(root: Path) -> ImageFolderDataModule:
    transforms = EpisodeTransforms(resize=6, normalize="imagenet")
    return ImageFolderDataModule(str(root), **SMALL, image_size=8, queries=2, transforms=transforms)


@pytest.mark.parametrize("name", ["glyphs", "few shot", "folder", "own hook"])
def test_batches_of_every_datamodule_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = write_images(tmp_path)
    make = {
        "glyphs": lambda: GlyphsDataModule(**SMALL, rotations="classes"),
        "few shot": few_shot,
        "folder": lambda: folder_of_images(images),
        "own hook": lambda: Noise(0.1, train_batches=4),
    }[name]
    is_same_there(tmp_path, monkeypatch, make)


class StopsInTheMiddle(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


@pytest.mark.usefixtures("kept")
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole, rest = Recorder(), Recorder()
    options = {"max_epochs": 3, "limit_val_batches": 0}
    trainer(tmp_path, callbacks=[StopsInTheMiddle()], **options).fit(whole, Mixed(**SMALL))
    trainer(tmp_path, **options).fit(rest, Mixed(**SMALL), ckpt_path=tmp_path / "middle.ckpt")
    assert len(whole.batches) == 9
    assert is_same(rest.batches, whole.batches[4:])


@pytest.mark.usefixtures("kept")
def test_images_are_freed_where_training_ends_early(tmp_path: Path) -> None:
    class Failing(Recorder):
        def on_train_batch_end(self, *_: Any) -> None:
            assert data._on_device
            raise RuntimeError("on purpose")

    data = Mixed(**SMALL)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path).fit(Failing(), data)
    assert not data._on_device


@pytest.mark.usefixtures("kept")
def test_images_are_kept_once_and_freed_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Mixed(**SMALL, rotations="classes")
    run = trainer(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    with caplog.at_level(logging.INFO):
        run.fit(Recorder(), data)
    said = sorted(text for text in caplog.messages if "are kept on" in text)
    assert len(said) == 2, "train and val, however often loaders are made"
    # 20 images of 4 bytes, in four turns
    on = run.strategy.root_device
    assert said[0] == f"The images of split 'train' are kept on {on} (0.000305 MB)."
    source = run.train_dataloader.dataset
    assert isinstance(source, ImagesOnDevice)
    assert source._images is None
    assert not data._on_device


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("rotations", ["none", "augment"])
def test_a_loader_can_still_be_used_when_images_are_freed(tmp_path: Path, rotations: Any) -> None:
    data, model = Mixed(**SMALL, rotations=rotations), Recorder()
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(model, data)
    loader = run.train_dataloader
    assert isinstance(loader.dataset, ImagesOnDevice)
    loader.sampler.set_epoch(0)
    again = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    first = [map_tensors(lambda tensor: tensor.cpu(), batch) for _, batch in model.batches]
    assert is_same(again, first)


@pytest.mark.usefixtures("kept")
def test_loaders_give_batches_on_the_cpu_after_a_run(tmp_path: Path) -> None:
    data = Mixed(**SMALL)
    trainer(tmp_path).fit(Recorder(), data)
    assert data.trainer is not None
    assert not isinstance(data.train_dataloader().dataset, ImagesOnDevice)


@pytest.mark.usefixtures("kept")
def test_batches_of_a_test_can_be_differentiated(tmp_path: Path) -> None:
    """As a loader's own tensors can, also if the images were moved there in a test."""

    class Saved(Noise):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert not batch.support_x.is_inference()
            assert not batch.query_y.is_inference()
            return batch

    trainer(tmp_path).test(Recorder(), Saved(test_tasks=2))


def cuda(data: EpisodicDataModule, model: LightningModule | None = None) -> torch.device:
    """Let a datamodule believe that it has a trainer on a GPU."""
    device = torch.device("cuda", 0)
    strategy = SimpleNamespace(root_device=device)
    data.trainer = SimpleNamespace(strategy=strategy, lightning_module=model)  # type: ignore[assignment]
    return device


@pytest.mark.cpu_only
@pytest.mark.parametrize(("rotations", "size"), [("none", 80), ("augment", 320)])
def test_a_quarter_of_the_free_memory_may_be_taken(
    monkeypatch: pytest.MonkeyPatch, rotations: Any, size: int
) -> None:
    data = Mixed(**SMALL, rotations=rotations)
    episodes, device = data._dataset("train"), cuda(data)
    for free, fits in ((4 * size, True), (4 * size - 1, False), (None, False)):
        monkeypatch.setattr(base, "free_bytes", lambda _, free=free: free)
        assert data._fits_on_device(episodes, device) is fits
    assert not data._fits_on_device(episodes, torch.device("cpu"))


@pytest.mark.cpu_only
def test_loader_processes_and_hooks_before_the_transfer_get_batches_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "free_bytes", lambda _: 10**9)

    class Looks(Mixed):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    class LooksToo(Recorder):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    def fits(data: EpisodicDataModule, model: LightningModule | None) -> bool:
        return data._fits_on_device(data._dataset("train"), cuda(data, model))

    assert fits(Mixed(**SMALL), None)
    assert fits(Mixed(**SMALL), MAML(MLP(4, 2), 0.1)), "its own hooks are made for this"
    assert fits(Noise(), Recorder()), "on_after_batch_transfer gets batches on the device anyway"
    assert not fits(Mixed(**SMALL, num_workers=1), Recorder())
    assert not fits(Looks(**SMALL), Recorder())
    assert not fits(Mixed(**SMALL), LooksToo())


@pytest.mark.cpu_only  # names its devices
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rotations", ["none", "classes"])
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path: Path, rotations: Any) -> None:
    batches = {
        device: seen(tmp_path, Mixed(**SMALL, rotations=rotations), accelerator=device, devices=1)
        for device in ("cpu", "gpu")
    }
    for (_, there), (_, here) in zip(batches["gpu"], batches["cpu"], strict=True):
        assert there.query_x.is_cuda
        assert is_same([part.cpu() for part in there], list(here))
