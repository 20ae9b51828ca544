"""Few-shot datamodules: each gives meta-batches of :class:`lightning_maml.Episodes`."""

from lightning_maml.datamodules.episodic import EpisodicDataModule as EpisodicDataModule
from lightning_maml.datamodules.glyphs import GlyphsDataModule as GlyphsDataModule
from lightning_maml.datamodules.omniglot import OmniglotDataModule as OmniglotDataModule
from lightning_maml.datamodules.sampler import ClassImages as ClassImages
