"""Few-shot datamodules: each gives meta-batches of :class:`lightning_maml.Episodes`."""

from lightning_maml.batches.meta_batch import meta_batch as meta_batch
from lightning_maml.datamodules.adapters import EasyFSLDataModule as EasyFSLDataModule
from lightning_maml.datamodules.adapters import Learn2LearnDataModule as Learn2LearnDataModule
from lightning_maml.datamodules.adapters import TorchmetaDataModule as TorchmetaDataModule
from lightning_maml.datamodules.adapters import relabelled as relabelled
from lightning_maml.datamodules.adapters import task_of_examples as task_of_examples
from lightning_maml.datamodules.base import EpisodicDataModule as EpisodicDataModule
from lightning_maml.datamodules.cifar100 import CIFARFSDataModule as CIFARFSDataModule
from lightning_maml.datamodules.cifar100 import FC100DataModule as FC100DataModule
from lightning_maml.datamodules.cub import CUBDataModule as CUBDataModule
from lightning_maml.datamodules.few_shot import FewShotDataModule as FewShotDataModule
from lightning_maml.datamodules.glyphs import GlyphsDataModule as GlyphsDataModule
from lightning_maml.datamodules.image_folder import ImageFolderDataModule as ImageFolderDataModule
from lightning_maml.datamodules.imagenet.mini_imagenet import (
    MiniImageNetDataModule as MiniImageNetDataModule,
)
from lightning_maml.datamodules.imagenet.tiered_imagenet import (
    TieredImageNetDataModule as TieredImageNetDataModule,
)
from lightning_maml.datamodules.images.files import load_images as load_images
from lightning_maml.datamodules.omniglot import OmniglotDataModule as OmniglotDataModule
from lightning_maml.datamodules.sampler import ClassImages as ClassImages
from lightning_maml.datamodules.sinusoid import SinusoidDataModule as SinusoidDataModule
from lightning_maml.datamodules.transforms import EpisodeTransforms as EpisodeTransforms
