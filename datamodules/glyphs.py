"""Glyphs: characters of curved strokes, generated from a seed. No download, so it runs anywhere."""

import numpy as np
import torch
from torch import Tensor

from lightning_maml.datamodules.base import EpisodicDataModule, Regime
from lightning_maml.datamodules.sampler import ClassImages, Rotations, check_seed
from lightning_maml.datamodules.transforms import EpisodeTransforms

CLASSES = {"train": 400, "val": 50, "test": 100}
"""Characters per split."""

DRAWINGS = 20
"""Images per character, as in Omniglot."""

_STROKES = 3
_POINTS = 24  # per stroke
_INK_RADIUS = 0.022  # of a pen, in image widths
_WOBBLE = 0.015  # standard deviation of a drawing's control points, in image widths
# standard deviations of a drawing's slant (radians), size (logarithm) and place
_TURN, _STRETCH, _SHIFT = 0.1, 0.08, 0.08


class GlyphsDataModule(EpisodicDataModule):
    """Few-shot episodes of generated characters, 28 x 28, ink = 1 on paper = 0.

    A character is three curved strokes; each of its 20 drawings wobbles, turns, stretches and
    shifts them anew, so that two drawings of one character differ by more than pixels: an untrained
    network that is adapted to one drawing mostly fails on the next.

    Args:
        ways: Classes per training episode.
        shots: Support images per class.
        queries: Query images per class.
        test_ways: Classes per validation and test episode; by default as in training.
        test_shots: Support images per class there; by default as in training.
        test_queries: Query images per class there; by default as in training.
        meta_batch_size: Tasks per optimizer step and process.
        train_batches: Meta-batches per epoch and process.
        val_tasks: Validation tasks over all processes together; the same ones each time.
        test_tasks: Test tasks over all processes together; the same ones each time.
        rotations: ``"classes"``, ``"augment"`` or ``"none"``, see :class:`EpisodicDataModule`.
        regime: ``"finite_sum"`` or ``"resampling"``, see :class:`EpisodicDataModule`.
        train_steps: N, the inner steps that ``"resampling"`` draws batches for: the model's
            ``train_steps``.
        hessian_shots: Images per class of the Hessian batches of ``"resampling"``; by default as
            many as ``shots``.
        transforms: Transforms of the images of whole episodes, on the device; by default none.
        glyph_seed: Seed of the characters and their drawings.
        seed: Seed of the episodes.
        num_workers: Loader processes.

    Raises:
        ValueError: If an argument is out of range, or a split cannot serve the episodes.
    """

    image_size = 28

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        test_ways: int | None = None,
        test_shots: int | None = None,
        test_queries: int | None = None,
        meta_batch_size: int = 16,
        train_batches: int = 200,
        val_tasks: int = 200,
        test_tasks: int = 600,
        rotations: Rotations = "none",
        regime: Regime = "finite_sum",
        train_steps: int = 1,
        hessian_shots: int | None = None,
        transforms: EpisodeTransforms | None = None,
        glyph_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            ways=ways,
            shots=shots,
            queries=queries,
            test_ways=test_ways,
            test_shots=test_shots,
            test_queries=test_queries,
            meta_batch_size=meta_batch_size,
            train_batches=train_batches,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            rotations=rotations,
            regime=regime,
            train_steps=train_steps,
            hessian_shots=hessian_shots,
            transforms=transforms,
            seed=seed,
            num_workers=num_workers,
        )
        check_seed("glyph_seed", glyph_seed)
        self.glyph_seed = glyph_seed

    def class_images(self, split: str) -> ClassImages:
        """Draw the characters of a split."""
        random = np.random.RandomState([self.glyph_seed, list(CLASSES).index(split)])
        images = torch.cat([draw_character(random, self.image_size) for _ in range(CLASSES[split])])
        return ClassImages(images, list(np.arange(len(images)).reshape(-1, DRAWINGS)))


def draw_character(random: np.random.RandomState, image_size: int) -> Tensor:
    """Invent a character and draw it 20 times.

    Returns:
        ``[20, 1, image_size, image_size]``, uint8 with ink = 255.
    """
    controls = random.uniform(0.15, 0.85, (_STROKES, 3, 2)) + random.normal(
        0, _WOBBLE, (DRAWINGS, _STROKES, 3, 2)
    )
    turn, slant = random.normal(0, _TURN, (2, DRAWINGS))
    size = np.exp(random.normal(0, _STRETCH, (DRAWINGS, 2)))
    matrix = (
        np.stack(
            [np.cos(turn), -np.sin(turn + slant), np.sin(turn), np.cos(turn + slant)], -1
        ).reshape(-1, 2, 2)
        * size[:, None]
    )
    shift = random.normal(0, _SHIFT, (DRAWINGS, 1, 1, 2)) + 0.5
    drawn = np.einsum("dij,dspj->dspi", matrix, controls - 0.5) + shift
    return _render(torch.from_numpy(drawn).float(), image_size)


def _render(controls: Tensor, image_size: int) -> Tensor:
    """Draw quadratic Bezier curves ``[drawings, strokes, 3 control points, xy]`` with a round pen: a sum of blots along each curve."""
    t = torch.linspace(0, 1, _POINTS)
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = torch.einsum("kt,dskc->dstc", basis, controls)
    spacing = (points[:, :, 1:] - points[:, :, :-1]).norm(dim=-1)
    blots = ((points[:, :, 1:] + points[:, :, :-1]) / 2).flatten(1, 2)
    pixels = (torch.arange(image_size) + 0.5) / image_size
    # [drawings, blots, xy, pixels]
    profile = torch.exp(-((blots[..., None] - pixels) ** 2) / (2 * _INK_RADIUS**2))
    ink = torch.einsum(
        "db,dby,dbx->dyx", spacing.flatten(1) / _INK_RADIUS, profile[:, :, 1], profile[:, :, 0]
    )
    return (ink.clamp(max=1) * 255).round().to(torch.uint8)[:, None]
