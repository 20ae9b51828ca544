"""Callbacks for any run of :class:`lightning_maml.MAML` and its variants."""

from lightning_maml.callbacks.best_checkpoint import BestCheckpoint as BestCheckpoint
from lightning_maml.callbacks.checkpoint_on_interrupt import (
    CheckpointOnInterrupt as CheckpointOnInterrupt,
)
from lightning_maml.callbacks.episode_pictures import EpisodePictures as EpisodePictures
from lightning_maml.callbacks.episode_pictures import draw_adaptation as draw_adaptation
from lightning_maml.callbacks.episode_pictures import draw_curve as draw_curve
from lightning_maml.callbacks.episode_pictures import draw_episode as draw_episode
from lightning_maml.callbacks.gradient_comparison import GradientComparison as GradientComparison
from lightning_maml.callbacks.gradient_comparison import compare as compare
from lightning_maml.callbacks.keep_best_checkpoints import (
    KeepBestCheckpoints as KeepBestCheckpoints,
)
from lightning_maml.callbacks.loss_map_picture import LossMapPicture as LossMapPicture
from lightning_maml.callbacks.loss_map_picture import draw_loss_map as draw_loss_map
from lightning_maml.callbacks.loss_map_picture import loss_map as loss_map
from lightning_maml.callbacks.meta_gradient_monitor import (
    MetaGradientMonitor as MetaGradientMonitor,
)
from lightning_maml.callbacks.meta_stepsize import AdaptiveMetaStepsize as AdaptiveMetaStepsize
from lightning_maml.callbacks.skip_non_finite import SkipNonFinite as SkipNonFinite
from lightning_maml.callbacks.stationarity_monitor import StationarityMonitor as StationarityMonitor
from lightning_maml.callbacks.training_pictures import TrainingPictures as TrainingPictures
from lightning_maml.callbacks.training_pictures import draw_fidelity as draw_fidelity
from lightning_maml.callbacks.training_pictures import draw_learning as draw_learning

Fidelity = GradientComparison
"""The old name of :class:`GradientComparison`."""
