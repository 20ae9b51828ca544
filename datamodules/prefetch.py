"""Batches prepared ahead of time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader


class PrefetchingLoader(DataLoader[Any]):
    """A data loader that prepares the next batch while the current one is in use: in a thread, where there are no worker processes to do it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # DataLoader promises a class of its own
        """Yield the batches."""
        batches = super().__iter__()
        return _one_ahead(batches) if self.num_workers == 0 else batches


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield batch
