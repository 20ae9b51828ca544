"""Transforms of the images of an episode on the device, and normalisation of their colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.errors import UserTypeError, UserValueError

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "metaoptnet": (
        (120.39586 / 255, 115.59361 / 255, 104.54012 / 255),
        (70.68188 / 255, 68.27635 / 255, 72.54505 / 255),
    ),
}
"""Means and standard deviations of the three colours of images in 0 .. 1.

Those of ImageNet are used by torchvision's networks, those of mini-ImageNet's training classes by
MetaOptNet (Lee et al. 2019) and its descendants."""


@dataclass(frozen=True)
class EpisodeTransforms:
    """Transforms of the images of whole episodes, on the device that they are trained on.

    The transforms get float images ``[n, C, H, W]`` in 0 .. 1; those of
    ``torchvision.transforms.v2`` can be used.

    Args:
        resize: Height and width that all images are resized to first, in pixels; by default they
            keep their size.
        train: Transforms in training, applied one after the other, such as random crop, flip and
            colour jitter.
        test: Transforms in validation, test and prediction. They get many images at once, so what
            they draw at random is the same for all of them.
        vary: ``"image"``: ``train`` draws anew for each image (it is called once for each, which
            takes half a millisecond for crop, flip and jitter on a CPU); ``"task"``: it draws once
            for each task, for all of its images alike.
        normalize: Normalisation after the transforms, in training and testing: ``"imagenet"`` or
            ``"metaoptnet"``, by these statistics of the three colours, see
            :data:`lightning_maml.datamodules.transforms.STATISTICS`; with ``"none"`` images stay in
            0 .. 1, as in the MAML paper. For other statistics, put ``v2.Normalize`` in both lists.

    Raises:
        TypeError: If ``train`` or ``test`` is not a list.
        ValueError: If ``resize`` is not positive, or ``vary`` or ``normalize`` is unknown; when
            called, if images are to be normalised that do not have three channels.

    Examples:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.datamodules import EpisodeTransforms
        >>> transforms = EpisodeTransforms(resize=32, train=[v2.RandomCrop(28)])
        >>> images, labels = torch.rand(1, 2, 3, 84, 84), torch.tensor([[0, 1]])
        >>> episodes = Episodes(images, labels, images, labels)
        >>> transforms(episodes, training=True).query_x.shape
        torch.Size([1, 2, 3, 28, 28])
        >>> transforms(episodes, training=False).query_x.shape
        torch.Size([1, 2, 3, 32, 32])
    """

    resize: int | None = None
    train: Sequence[nn.Module] = ()
    test: Sequence[nn.Module] = ()
    vary: Literal["image", "task"] = "image"
    normalize: Literal["none", "imagenet", "metaoptnet"] = "none"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise UserValueError(f"Expected `resize` to be at least 1 but got {self.resize}.")
        for name in ("train", "test"):
            transforms = getattr(self, name)
            if not isinstance(transforms, Sequence):
                raise UserTypeError(
                    f"Expected `{name}` to be a list of transforms but got "
                    f"{type(transforms).__name__}; put it in a list."
                )
        if self.vary not in ("image", "task"):
            raise UserValueError(f"Expected `vary` to be 'image' or 'task' but got {self.vary!r}.")
        if self.normalize != "none" and self.normalize not in STATISTICS:
            raise UserValueError(
                f"Expected `normalize` to be 'none', {' or '.join(map(repr, STATISTICS))} but got "
                f"{self.normalize!r}."
            )

    def __call__(self, episodes: AnyEpisodes, training: bool) -> AnyEpisodes:
        """Transform the images of a meta-batch.

        Args:
            episodes: The meta-batch, with float images ``[T, ..., C, H, W]``.
            training: Whether to apply ``train`` or ``test``.

        Returns:
            The meta-batch with its images transformed.
        """
        transforms = list(self.train if training else self.test)
        if self.resize is None and not transforms and self.normalize == "none":
            return episodes
        names = episodes._fields[::2]  # images and labels take turns
        parts = [self._resized(getattr(episodes, name)) for name in names]
        if transforms:
            of_tasks = [self._task(task, transforms, training) for task in zip(*parts, strict=True)]
            parts = [torch.stack(part) for part in zip(*of_tasks, strict=True)]
        parts = [self._normalized(part) for part in parts]
        return episodes._replace(**dict(zip(names, parts, strict=True)))

    def _resized(self, images: Tensor) -> Tensor:
        """Resize images ``[..., C, H, W]``."""
        if self.resize is None:
            return images
        resized: Tensor = resize(images, [self.resize, self.resize], antialias=True)
        return resized

    def _task(
        self, parts: Sequence[Tensor], transforms: list[nn.Module], training: bool
    ) -> list[Tensor]:
        """Transform the support, query and Hessian images of one task together."""
        images = torch.cat([part.flatten(0, -4) for part in parts])
        if training and self.vary == "image":
            images = torch.cat([_apply(transforms, image) for image in torch.split(images, 1)])
        else:
            images = _apply(transforms, images)
        pieces = torch.split(images, [part[..., 0, 0, 0].numel() for part in parts])
        return [
            torch.unflatten(piece, 0, part.shape[:-3])
            for piece, part in zip(pieces, parts, strict=True)
        ]

    def _normalized(self, images: Tensor) -> Tensor:
        """Normalise images ``[..., C, H, W]``."""
        if self.normalize == "none":
            return images
        if images.shape[-3] != 3:
            raise UserValueError(
                f"Expected images of 3 channels for normalize={self.normalize!r} but got "
                f"{images.shape[-3]}; use v2.Normalize instead."
            )
        mean, std = _statistics(self.normalize, images.device, images.dtype)
        return images.sub(mean).div_(std)


@cache
def _statistics(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations ``[3, 1, 1]``, which are sent to a device only once."""
    # made in a test, they are used in training too
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(values, dtype=dtype)[:, None, None] for values in STATISTICS[name]
        )
        return mean.to(device), std.to(device)


def _apply(transforms: list[nn.Module], images: Tensor) -> Tensor:
    for transform in transforms:
        images = transform(images)
    return images
