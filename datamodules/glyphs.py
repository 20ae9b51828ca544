"""Glyphs: characters of curved strokes, generated from a seed and so without a download."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.sampler import ClassImages, check_seed

CLASSES = {"train": 400, "val": 50, "test": 100}
"""Characters per split."""

DRAWINGS = 20
"""Images per character, as in Omniglot."""

_STROKES = 3  # per character
_POINTS = 24  # per stroke, between which its blots of ink lie
_INK_RADIUS = 0.022  # of the pen, in image widths
_WOBBLE = 0.015  # standard deviation of a drawing's control points, in image widths
_TURN = 0.1  # standard deviation of a drawing's turn and slant, in radians
_STRETCH = 0.08  # standard deviation of the logarithm of a drawing's width and height
_SHIFT = 0.08  # standard deviation of a drawing's place, in image widths


class GlyphsDataModule(EpisodicDataModule):
    """Few-shot episodes of generated characters, 28 x 28, ink = 1 on paper = 0.

    A character consists of three curved strokes. Each of its 20 drawings wobbles, turns, stretches
    and shifts them differently, so drawings of one character differ by more than pixels: an
    untrained network that is adapted to one drawing mostly fails on the next.

    Args:
        meta_batch_size: Tasks per optimizer step and process.
        train_batches: Meta-batches per epoch and process.
        glyph_seed: Seed of the characters and their drawings.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, or a split has too few classes or images for its
            episodes.

    Examples:
        >>> from lightning_maml.datamodules import GlyphsDataModule
        >>> data = GlyphsDataModule(ways=5, shots=1, queries=3, meta_batch_size=4)
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch.support_x.shape
        torch.Size([4, 5, 1, 28, 28])
        >>> batch.query_x.shape
        torch.Size([4, 15, 1, 28, 28])
    """

    image_size = 28

    def __init__(
        self,
        *,
        meta_batch_size: int = 16,
        train_batches: int = 200,
        glyph_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(meta_batch_size=meta_batch_size, train_batches=train_batches, **options)
        check_seed("glyph_seed", glyph_seed)
        self.glyph_seed = glyph_seed

    @override
    def read_by(self) -> tuple[Any, ...]:
        return self.image_size, self.glyph_seed

    def class_images(self, split: str) -> ClassImages:
        """Draw the characters of a split."""
        random = np.random.RandomState([self.glyph_seed, list(CLASSES).index(split)])
        characters = [draw_character(random, self.image_size) for _ in range(CLASSES[split])]
        rows = np.arange(CLASSES[split] * DRAWINGS)
        return ClassImages(torch.cat(characters), list(rows.reshape(-1, DRAWINGS)))


def draw_character(random: np.random.RandomState, image_size: int) -> Tensor:
    """Invent a character and draw it 20 times.

    Args:
        random: Source of the character and of its drawings.
        image_size: Height and width of the images, in pixels.

    Returns:
        ``[20, 1, image_size, image_size]``, uint8 with ink = 255.
    """
    # The order of these draws is part of the data: for the same seed they give the same characters.
    character = random.uniform(0.15, 0.85, (_STROKES, 3, 2))
    controls = character + random.normal(0, _WOBBLE, (DRAWINGS, _STROKES, 3, 2))
    turn, slant = random.normal(0, _TURN, (2, DRAWINGS))
    size = np.exp(random.normal(0, _STRETCH, (DRAWINGS, 2)))
    rotation = np.stack(
        [np.cos(turn), -np.sin(turn + slant), np.sin(turn), np.cos(turn + slant)], -1
    )
    matrix = rotation.reshape(-1, 2, 2) * size[:, None]
    shift = random.normal(0, _SHIFT, (DRAWINGS, 1, 1, 2)) + 0.5
    # each drawing is turned and stretched about the middle of the image, 0.5
    drawn = np.einsum("dij,dspj->dspi", matrix, controls - 0.5) + shift
    return _render(torch.from_numpy(drawn).float(), image_size)


def _render(controls: Tensor, image_size: int) -> Tensor:
    """Draw quadratic Bezier curves with a round pen, as a sum of blots along each curve.

    Args:
        controls: Control points, ``[drawings, strokes, 3, xy]``, in image widths.
        image_size: Height and width of the images, in pixels.

    Returns:
        ``[drawings, 1, image_size, image_size]``, uint8.
    """
    t = torch.linspace(0, 1, _POINTS)
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = torch.einsum("kt,dskc->dstc", basis, controls)
    starts, ends = points[:, :, :-1], points[:, :, 1:]
    # as much ink as the piece of the curve is long, so that fast pieces are no thinner
    ink_of_blots = (ends - starts).norm(dim=-1).flatten(1) / _INK_RADIUS
    blots = ((ends + starts) / 2).flatten(1, 2)
    pixels = (torch.arange(image_size) + 0.5) / image_size
    # a blot is a Gaussian, hence the product of its profiles along x and y
    distances = blots[..., None] - pixels  # [drawings, blots, xy, pixels]
    profiles = torch.exp(-(distances**2) / (2 * _INK_RADIUS**2))
    along_x, along_y = profiles.unbind(2)
    ink = torch.einsum("db,dby,dbx->dyx", ink_of_blots, along_y, along_x)
    return (ink.clamp(max=1) * 255).round().to(torch.uint8)[:, None]
