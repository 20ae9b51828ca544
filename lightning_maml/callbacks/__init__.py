"""Callbacks for any run of :class:`lightning_maml.MAML` and its variants."""

from lightning_maml.callbacks.best_checkpoints import KeepBestCheckpoints as KeepBestCheckpoints
from lightning_maml.callbacks.gradient_comparison import Fidelity as Fidelity
from lightning_maml.callbacks.gradient_comparison import MetaGradientMonitor as MetaGradientMonitor
from lightning_maml.callbacks.gradient_comparison import compare as compare
from lightning_maml.callbacks.interrupt import CheckpointOnInterrupt as CheckpointOnInterrupt
from lightning_maml.callbacks.loss_map import LossMapPicture as LossMapPicture
from lightning_maml.callbacks.loss_map import draw_loss_map as draw_loss_map
from lightning_maml.callbacks.loss_map import loss_map as loss_map
from lightning_maml.callbacks.meta_stepsize import AdaptiveMetaStepsize as AdaptiveMetaStepsize
from lightning_maml.callbacks.pictures import EpisodePictures as EpisodePictures
from lightning_maml.callbacks.pictures import draw_adaptation as draw_adaptation
from lightning_maml.callbacks.pictures import draw_episode as draw_episode
from lightning_maml.callbacks.skip_non_finite import SkipNonFinite as SkipNonFinite
from lightning_maml.callbacks.stationarity import StationarityMonitor as StationarityMonitor
from lightning_maml.callbacks.training_pictures import TrainingPictures as TrainingPictures
from lightning_maml.callbacks.training_pictures import draw_fidelity as draw_fidelity
from lightning_maml.callbacks.training_pictures import draw_learning as draw_learning
