"""Data of one's own: any LightningDataModule whose loaders give tasks."""

import math

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Tones(Dataset[tuple[Tensor, ...]]):
    """Tasks of telling tones apart: each class is a mixture of overtones, heard in any phase.

    Args:
        first: Number of the first task, which seeds it.
        tasks: How many tasks there are.
        shots: Support signals per class.
        ways: Classes per task.
        queries: Query signals per class.
    """

    def __init__(self, first: int, tasks: int, shots: int, ways: int = 3, queries: int = 5) -> None:
        self.first, self.tasks = first, tasks
        self.shots, self.ways, self.queries = shots, ways, queries

    def __len__(self) -> int:
        """Return the number of tasks."""
        return self.tasks

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        """Return support signals ``[S, 1, 64]`` and labels, query signals and labels."""
        random = torch.Generator().manual_seed(self.first + number)
        overtones = torch.rand(self.ways, 5, generator=random) ** 3
        support_y = torch.arange(self.ways).repeat_interleave(self.shots)
        query_y = torch.arange(self.ways).repeat_interleave(self.queries)
        support_x, query_x = (
            self._signals(overtones[labels], random) for labels in (support_y, query_y)
        )
        return support_x, support_y, query_x, query_y

    def _signals(self, overtones: Tensor, random: torch.Generator) -> Tensor:
        examples = len(overtones)
        time = torch.linspace(0, 2 * math.pi, 64) + 6 * torch.rand(examples, 1, generator=random)
        waves = torch.sin(torch.arange(1, 6)[:, None] * time[:, None])  # [S, 5, 64]
        noise = 0.2 * torch.randn(examples, 64, generator=random)
        return ((overtones[:, :, None] * waves).sum(1) + noise)[:, None]


class ToneData(LightningDataModule):
    """Other tones for training, validation and test.

    Args:
        shots: Support signals per class.
        batch_size: Tasks per meta-batch.
        train_tasks: Training tasks per epoch.
    """

    def __init__(self, shots: int = 2, batch_size: int = 16, train_tasks: int = 800) -> None:
        super().__init__()
        self.shots, self.batch_size, self.train_tasks = shots, batch_size, train_tasks

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training tasks."""
        tones = Tones(0, self.train_tasks, self.shots)
        return DataLoader(tones, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation tasks."""
        return DataLoader(Tones(10**6, 100, self.shots), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test tasks."""
        return DataLoader(Tones(2 * 10**6, 200, self.shots), batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the tasks to predict, here those of the test."""
        return self.test_dataloader()
