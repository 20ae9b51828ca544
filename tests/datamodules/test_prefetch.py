"""The next batch is prepared while the current one is in use; batches stay the same."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from helpers.networks import build
from helpers.trainers import on_device
from lightning_maml import MAML
from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.prefetch import PrefetchingLoader
from lightning_maml.datamodules.sampler import ClassImages

pytestmark = pytest.mark.cpu_only  # loaders work on the CPU


class Numbers(Dataset):
    """Counts, and lets others wait for a number to be drawn."""

    def __init__(self, length: int = 6, broken: int | None = None) -> None:
        self.drawn = [threading.Event() for _ in range(length)]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, number: int) -> int:
        if number == self.broken:
            raise OSError("cannot be read")
        self.drawn[number].set()
        return number


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_a_data_loader(workers: int) -> None:
    prefetching = PrefetchingLoader(Numbers(), batch_size=4, num_workers=workers)
    assert len(prefetching) == 2
    for _ in range(2):  # epochs
        assert [batch.tolist() for batch in prefetching] == [
            batch.tolist() for batch in DataLoader(Numbers(), batch_size=4)
        ]


@pytest.mark.usefixtures("no_thread_is_left")
def test_the_next_batch_is_drawn_while_the_current_one_is_in_use() -> None:
    numbers = Numbers()
    batches = iter(PrefetchingLoader(numbers, batch_size=2))
    next(batches)
    assert numbers.drawn[3].wait(timeout=10)
    assert not numbers.drawn[4].is_set()  # and none after it
    batches.close()


@pytest.mark.usefixtures("no_thread_is_left")
def test_an_error_is_raised_when_its_batch_is_due() -> None:
    batches = iter(PrefetchingLoader(Numbers(broken=3), batch_size=2))
    assert next(batches).tolist() == [0, 1]
    with pytest.raises(OSError, match="cannot be read"):
        next(batches)


def test_prefetching_leaves_torchs_number_of_threads() -> None:
    """In a process of its own, as torch asks for the number of cores only once in a process."""
    script = """
import torch
from torch.utils.data import TensorDataset
from lightning_maml.datamodules.prefetch import PrefetchingLoader
list(PrefetchingLoader(TensorDataset(torch.zeros(8)), batch_size=2))
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    threads = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(threads) == len(os.sched_getaffinity(0))


def test_a_batch_of_none_does_not_end_the_epoch() -> None:
    numbers = PrefetchingLoader(
        Numbers(4), batch_size=2, collate_fn=lambda items: None if 0 in items else items
    )
    assert list(numbers) == [None, [2, 3]]


class Noise(EpisodicDataModule):
    def class_images(self, split: str) -> ClassImages:
        return ClassImages(torch.rand(12, 1, 8, 8), [range(4 * k, 4 * k + 4) for k in range(3)])


@pytest.mark.fits
@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("arguments", [{"limit_train_batches": 3}, {"fast_dev_run": True}])
def test_the_trainer_keeps_the_loader_when_it_limits_batches(
    arguments: dict, device: torch.device
) -> None:
    trainer = Trainer(
        **on_device(),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **arguments,
    )
    data = Noise(ways=3, meta_batch_size=2, train_batches=4, val_tasks=2, test_tasks=2)
    trainer.fit(MAML(build("mlp").float(), 0.1), data)
    assert type(trainer.train_dataloader) is PrefetchingLoader
    assert trainer.train_dataloader.pin_memory == (device.type == "cuda")


class Peek(Callback):
    """Goes through the training's loader beside the training, and saves then and a step later."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self._look(trainer)
        if trainer.global_step <= 2:
            self._save(trainer, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)
        self._save(trainer, trainer.global_step)

    @staticmethod
    def _look(trainer: Trainer) -> None:
        assert len([*trainer.train_dataloader]) == 4

    @staticmethod
    def _save(trainer: Trainer, batches: int) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{batches}.ckpt")


def test_a_pass_beside_the_training_does_not_move_it_on(tmp_path: Path) -> None:
    data = Noise(ways=3, shots=1, queries=1, meta_batch_size=2, train_batches=4)
    settings = {"default_root_dir": tmp_path, "max_epochs": 2, "logger": False, **on_device()}
    Trainer(**settings, callbacks=[Peek()], enable_checkpointing=False).fit(
        MAML(build("mlp").float()), data
    )
    for batches in (1, 2, 4, 8):
        found = torch.load(tmp_path / f"{batches}.ckpt", weights_only=False)
        [loader] = found["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert loader == {"epoch": (batches - 1) // 4, "batches": 4 if batches == 8 else batches}
