"""Gradient-based few-shot learning for PyTorch Lightning: multi-step MAML and its variants."""

from lightning_maml.algorithms.maml import MAML as MAML
from lightning_maml.algorithms.protonet import ProtoNet as ProtoNet
from lightning_maml.algorithms.variants import ANIL as ANIL
from lightning_maml.algorithms.variants import BOIL as BOIL
from lightning_maml.algorithms.variants import FOMAML as FOMAML
from lightning_maml.algorithms.variants import HFMAML as HFMAML
from lightning_maml.algorithms.variants import IMAML as IMAML
from lightning_maml.algorithms.variants import LSLR as LSLR
from lightning_maml.algorithms.variants import MAMLPlusPlus as MAMLPlusPlus
from lightning_maml.algorithms.variants import MetaSGD as MetaSGD
from lightning_maml.algorithms.variants import Reptile as Reptile
from lightning_maml.batches.episodes import Episodes as Episodes
from lightning_maml.batches.episodes import ResampledEpisodes as ResampledEpisodes
from lightning_maml.batches.losses import one_hot_mse as one_hot_mse
from lightning_maml.batches.meta_batch import UnevenEpisodes as UnevenEpisodes
from lightning_maml.batches.mini_batches import mini_batches as mini_batches
from lightning_maml.callbacks import AdaptiveMetaStepsize as AdaptiveMetaStepsize
from lightning_maml.callbacks import CheckpointOnInterrupt as CheckpointOnInterrupt
from lightning_maml.callbacks import KeepBestCheckpoints as KeepBestCheckpoints
from lightning_maml.callbacks import SkipNonFinite as SkipNonFinite
from lightning_maml.callbacks import StationarityMonitor as StationarityMonitor
from lightning_maml.core.inner_optimizers import InnerAdam as InnerAdam
from lightning_maml.core.inner_optimizers import InnerOptimizer as InnerOptimizer
from lightning_maml.core.inner_optimizers import InnerSGD as InnerSGD
from lightning_maml.execution.allocator import keep_freed_memory as keep_freed_memory
from lightning_maml.functional.adaptation import AdaptationCurve as AdaptationCurve
from lightning_maml.functional.adaptation import adaptation_curve as adaptation_curve
from lightning_maml.functional.meta_gradient import MetaGradient as MetaGradient
from lightning_maml.functional.meta_gradient import meta_gradient as meta_gradient
from lightning_maml.networks.adapted import AdaptedNetworks as AdaptedNetworks
from lightning_maml.networks.backbones import MLP as MLP
from lightning_maml.networks.backbones import Conv4 as Conv4
from lightning_maml.networks.backbones import ResNet12 as ResNet12
from lightning_maml.verification.check import check as check
from lightning_maml.verification.report import CheckReport as CheckReport

__version__ = "0.1.0"
