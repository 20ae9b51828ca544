"""Callbacks for any run of :class:`lightning_maml.MAML` and its variants."""

from lightning_maml.callbacks.meta_stepsize import AdaptiveMetaStepsize as AdaptiveMetaStepsize
from lightning_maml.callbacks.pictures import EpisodePictures as EpisodePictures
from lightning_maml.callbacks.pictures import draw_adaptation as draw_adaptation
from lightning_maml.callbacks.pictures import draw_episode as draw_episode
from lightning_maml.callbacks.stationarity import StationarityMonitor as StationarityMonitor
