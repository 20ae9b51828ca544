"""Images that are kept on the device, so that only their numbers are sent there for each batch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.datamodules.drawing import TaskKey
from lightning_maml.datamodules.gathering import Drawn, as_episodes
from lightning_maml.datamodules.sampler import EpisodeDataset


class Numbers(NamedTuple):
    """A meta-batch before its images are gathered.

    Attributes:
        images: Numbers of the images, ``[n]``; turned images have numbers of their own.
        labels: Labels of each part, ``[T, examples]`` or ``[T, N, examples]``.
    """

    images: Tensor
    labels: list[Tensor]


class ImagesOnDevice(Dataset[Numbers]):
    """A split whose images are kept on a device, where its episodes are gathered from them.

    As a dataset it gives the numbers of images in place of the images, so that a thread can draw
    ahead and pin little memory without touching the device.
    :class:`~lightning_maml.datamodules.prefetch.PrefetchingLoader` hands out what :meth:`gather`
    makes of them.

    Args:
        episodes: The episodes of the split.
        device: The device.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from lightning_maml.datamodules import ClassImages
        >>> images = ClassImages(torch.zeros(12, 1, 8, 8), np.split(np.arange(12), 3))
        >>> shape = {"ways": 2, "shots": 1, "queries": 3, "rotations": "none"}
        >>> episodes = EpisodeDataset(images, **shape, seed=(0,), split="train")
        >>> on_device = ImagesOnDevice(episodes, torch.device("cpu"))
        >>> numbers = on_device.__getitems__([(0, 0), (0, 1)])
        >>> numbers.images.shape, on_device.gather(numbers).query_x.shape
        (torch.Size([16]), torch.Size([2, 6, 1, 8, 8]))
    """

    def __init__(self, episodes: EpisodeDataset, device: torch.device) -> None:
        self._episodes, self._device = episodes, device
        # what is made while testing is used in training too
        with torch.inference_mode(False):
            self._images: Tensor | None = episodes.images_on(device)

    def __getitems__(self, keys: list[TaskKey]) -> Numbers:
        """Draw a meta-batch."""
        rows, turns = self._episodes.draw(keys)
        images = turns * self._episodes.number_of_images + rows
        return Numbers(images, self._episodes.labels(len(keys)))

    def gather(self, numbers: Numbers) -> AnyEpisodes:
        """Return the meta-batch that the split's episodes have for the same keys.

        Args:
            numbers: What was drawn, on the CPU.

        Returns:
            The meta-batch, with its images on the device, or on the CPU after :meth:`release`. Its
            labels are left on the CPU, for the trainer to move: who checks them need not wait for
            the device then.
        """
        if self._images is None:
            per_angle = self._episodes.number_of_images
            rows, turns = numbers.images % per_angle, numbers.images // per_angle
            return self._episodes.gather(Drawn(rows, turns))
        # no inference tensors, as those that a loader collates in its thread are none
        with torch.inference_mode(False):
            there = numbers.images.to(self._device, non_blocking=True)
            return as_episodes(torch.index_select(self._images, 0, there), numbers.labels)

    def release(self) -> None:
        """Free the memory on the device."""
        self._images = None
