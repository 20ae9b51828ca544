"""Gradient-based few-shot meta-learning for PyTorch Lightning: multi-step MAML and its first-order and Hessian-free variants."""

from lightning_maml.adapt import AdaptationCurve as AdaptationCurve
from lightning_maml.adapt import adaptation_curve as adaptation_curve
from lightning_maml.algorithms import ANIL as ANIL
from lightning_maml.algorithms import BOIL as BOIL
from lightning_maml.algorithms import FOMAML as FOMAML
from lightning_maml.algorithms import HFMAML as HFMAML
from lightning_maml.algorithms import IMAML as IMAML
from lightning_maml.algorithms import LSLR as LSLR
from lightning_maml.algorithms import MAMLPlusPlus as MAMLPlusPlus
from lightning_maml.algorithms import MetaSGD as MetaSGD
from lightning_maml.algorithms import Reptile as Reptile
from lightning_maml.allocator import keep_freed_memory as keep_freed_memory
from lightning_maml.backbones import MLP as MLP
from lightning_maml.backbones import Conv4 as Conv4
from lightning_maml.backbones import ResNet12 as ResNet12
from lightning_maml.callbacks import AdaptiveMetaStepsize as AdaptiveMetaStepsize
from lightning_maml.callbacks import CheckpointOnInterrupt as CheckpointOnInterrupt
from lightning_maml.callbacks import KeepBestCheckpoints as KeepBestCheckpoints
from lightning_maml.callbacks import SkipNonFinite as SkipNonFinite
from lightning_maml.callbacks import StationarityMonitor as StationarityMonitor
from lightning_maml.check import CheckReport as CheckReport
from lightning_maml.check import check as check
from lightning_maml.deploy import AdaptedNetworks as AdaptedNetworks
from lightning_maml.episodes import Episodes as Episodes
from lightning_maml.episodes import ResampledEpisodes as ResampledEpisodes
from lightning_maml.losses import one_hot_mse as one_hot_mse
from lightning_maml.meta_gradient import MetaGradient as MetaGradient
from lightning_maml.meta_gradient import meta_gradient as meta_gradient
from lightning_maml.module import MAML as MAML
from lightning_maml.protonet import ProtoNet as ProtoNet

__version__ = "0.1.0"
