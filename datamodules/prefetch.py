"""Batches prepared ahead of time, in an order that a resumed run takes up where it stopped."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader

from lightning_maml.datamodules.sampler import TaskSampler


class PrefetchingLoader(DataLoader[Any]):
    """A data loader that prepares the next batch while the current one is in use, in a thread if there are no worker processes.

    It begins when the first batch is asked for, not when Lightning makes its iterator, because
    Lightning sets the epoch only after that. With a
    :class:`lightning_maml.datamodules.TaskSampler`, checkpoints record how far the epoch has got,
    and a resumed run goes on from there.
    """

    _given = 0
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # DataLoader promises a class of its own
        """Yield the batches."""
        self._given = self._skip_what_was_given()
        batches = super().__iter__()
        for batch in _one_ahead(batches) if self.num_workers == 0 else batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return which epoch this is and how many of its batches were given out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the batches that were already given out, if the epoch is still the same."""
        self._resumed = state_dict

    def _skip_what_was_given(self) -> int:
        resumed, self._resumed = self._resumed, None
        if not isinstance(self.sampler, TaskSampler):
            return 0
        batches = (
            resumed["batches"]
            if resumed is not None and resumed["epoch"] == self.sampler.epoch
            else 0
        )
        self.sampler.given = batches * (self.batch_size or 1)
        return batches


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield batch
