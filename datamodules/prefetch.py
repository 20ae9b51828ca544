"""Batches that are prepared ahead of time, from where an interrupted run stopped."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_maml.datamodules.on_device import ImagesOnDevice
from lightning_maml.datamodules.sampler import TaskSampler


class PrefetchingLoader(DataLoader[Any]):
    """A data loader that prepares the next batch while the current one is in use.

    Without worker processes, a thread does so. It starts when the first batch is asked for, not
    when Lightning makes the iterator, because Lightning sets the epoch only after that. With a
    :class:`~lightning_maml.datamodules.sampler.TaskSampler`, checkpoints record how many batches of
    the epoch were given out, and a resumed run continues after them.

    Batches of :class:`~lightning_maml.datamodules.on_device.ImagesOnDevice` are gathered on the
    device when they are asked for.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> loader = PrefetchingLoader(TensorDataset(torch.arange(4)), batch_size=2)
        >>> [batch.tolist() for (batch,) in loader]
        [[0, 1], [2, 3]]
    """

    _position: dict[str, int] | None = None
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # not torch's own iterator
        """Yield the batches."""
        before = self._skip_what_was_given()
        # Under a trainer, which sets the epoch beforehand; not where a callback goes through the
        # loader beside the training.
        is_recorded = not isinstance(self.sampler, TaskSampler) or self.sampler.is_announced
        # torch's iterator draws from the loader's generator, which is the CPU's whatever torch's
        # default device
        with torch.device("cpu"):
            batches: Iterator[Any] = super().__iter__()
        if self.num_workers == 0:
            batches = _one_ahead(batches)
        source = self.dataset
        epoch = None
        for given, batch in enumerate(batches, before + 1):
            # not from the sampler each time, which another pass moves on
            epoch = getattr(self.sampler, "epoch", 0) if epoch is None else epoch
            if is_recorded:
                self._position = {"epoch": epoch, "batches": given}
            # not in the thread, whose work on the device would not wait for that of this one
            yield source.gather(batch) if isinstance(source, ImagesOnDevice) else batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were given out."""
        return self._position or {"epoch": getattr(self.sampler, "epoch", 0), "batches": 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the recorded epoch after the batches that were given out before.

        Where another epoch is set until then, it is gone through from its start.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self._resumed = state_dict
        if isinstance(self.sampler, TaskSampler):
            self.sampler.begin_with(state_dict["epoch"])

    def _skip_what_was_given(self) -> int:
        resumed, self._resumed = self._resumed, None
        if not isinstance(self.sampler, TaskSampler):
            return 0
        batches = 0
        if resumed is not None and resumed["epoch"] == self.sampler.epoch:
            batches = resumed["batches"]
        self.sampler.given = batches * (self.batch_size or 1)
        return batches


def as_it_is(batch: Any) -> Any:
    """Pass on a batch that needs no collating, as its dataset gave it whole."""
    return batch


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches, and draw one ahead in a thread."""
    end = object()  # not None, which may be a batch
    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield batch
