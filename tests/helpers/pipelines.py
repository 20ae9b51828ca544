"""Loaders as other libraries have them."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.networks import IMAGE
from helpers.random_numbers import drawn_on_cpu

WAYS, SHOTS, QUERIES = 3, 2, 4


def example(label: int, number: int) -> Tensor:
    return torch.tensor([float(label), float(number)])


class EasyFSLLoader:
    """Batches as easyfsl's TaskSampler collates them."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return self.tasks

    def __iter__(self) -> Iterator[tuple]:
        for _ in range(self.tasks):
            rows = [(label, number) for label in range(WAYS) for number in range(SHOTS + QUERIES)]
            support, query = (
                [row for row in rows if row[1] < SHOTS],
                [row for row in rows if row[1] >= SHOTS],
            )
            images = [torch.stack([example(*row) for row in part]) for part in (support, query)]
            labels = [torch.tensor([row[0] for row in part]) for part in (support, query)]
            yield images[0], labels[0], images[1], labels[1], [40, 7, 23]


def torchmeta_loader(batches: int, tasks: int) -> list[OrderedDict]:
    def part(numbers: range) -> list[Tensor]:
        rows = [(label, number) for label in range(WAYS) for number in numbers]
        x, y = torch.stack([example(*row) for row in rows]), torch.tensor([row[0] for row in rows])
        return [x.expand(tasks, *x.shape), y.expand(tasks, *y.shape)]

    return [
        OrderedDict(train=part(range(SHOTS)), test=part(range(SHOTS, SHOTS + QUERIES)))
    ] * batches


class NoiseTaskset:
    """Noise images in learn2learn's order: class by class."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.per_class = 5
        self.random, self.dtype = torch.Generator().manual_seed(seed), dtype

    def sample(self) -> tuple[Tensor, Tensor]:
        y = torch.arange(WAYS).repeat_interleave(self.per_class)
        return drawn_on_cpu(
            torch.rand, len(y), 1, IMAGE, IMAGE, generator=self.random, dtype=self.dtype
        ) + y.view(-1, 1, 1, 1), y
