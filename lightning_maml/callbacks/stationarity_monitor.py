"""How far a run is from a stationary point of the meta-objective."""

import math
from collections.abc import Iterable, Sequence

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.callbacks.independent_tasks import as_maml
from lightning_maml.callbacks.monitor import Monitor
from lightning_maml.core.params import Params, dot
from lightning_maml.errors import UserValueError


class StationarityMonitor(Monitor):
    """Estimates ``|grad F(w)|``, the norm of the exact meta-gradient, and may stop the run on it.

    Every ``n`` steps it draws some meta-batches independently of those trained on. The norm of
    their mean meta-gradient would be too large by what sampling adds, so the square is estimated by
    the mean inner product of different meta-batches, with a jackknife standard error. Logged:
    ``train/meta_gradient_norm`` and ``train/meta_gradient_norm_se``, and kept as ``norm`` and
    ``standard_error``.

    In the resampling case it is the norm of the expected meta-gradient that is estimated, which the
    sampled inner steps bias: with small support batches it is not ``|grad F|`` (Ji et al. 2022,
    Proposition 3).

    Args:
        every_n_steps: Optimizer steps between two estimates.
        stop_at: epsilon. Training stops when the estimate plus two standard errors is at most this:
            an epsilon-first-order stationary point (Fallah et al. 2020, Definition 4.1).
        meta_batches: Meta-batches per estimate, at least 3.
        tasks: Tasks per meta-batch and process.
        episodes: Meta-batches like those trained on, drawn independently of them and of one
            another. If there are so few that they repeat within an estimate, the standard error is
            too small. By default the datamodule's, if it is one of this package.

    Raises:
        ValueError: If an argument is out of range; when training starts, if there is nothing to
            draw tasks from, or no Hessian batches.
        TypeError: If the module is not a :class:`lightning_maml.MAML`.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes, StationarityMonitor
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)
        >>> batches = [Episodes(x, y, x, y)]
        >>> monitor = StationarityMonitor(every_n_steps=1, episodes=batches)
        >>> trainer = Trainer(callbacks=[monitor], max_epochs=1, barebones=True)
        >>> trainer.fit(MAML(MLP(4, 3)), DataLoader(batches, batch_size=None))
        >>> monitor.norm > 0
        True
    """

    purpose = "stationarity"

    def __init__(
        self,
        every_n_steps: int = 100,
        stop_at: float | None = None,
        meta_batches: int = 8,
        tasks: int = 32,
        episodes: Iterable[AnyEpisodes] | None = None,
    ) -> None:
        super().__init__(every_n_steps, tasks, episodes)
        if meta_batches < 3:
            raise UserValueError(
                "Expected `meta_batches` to be at least 3, for a standard error, but got "
                f"{meta_batches}."
            )
        if stop_at is not None and not stop_at > 0:
            raise UserValueError(f"Expected `stop_at` to be positive but got {stop_at}.")
        self.norm = math.nan
        self.standard_error = math.nan
        self._stop_at = stop_at
        self._meta_batches = meta_batches

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.norm = self.standard_error = math.nan

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check also that the norm is that of all that is trained, if it is to stop the run."""
        super().on_fit_start(trainer, pl_module)
        of_network = {id(p) for p in as_maml(self, pl_module).network.parameters()}
        others = [
            name
            for name, p in pl_module.named_parameters()
            if p.requires_grad and id(p) not in of_network
        ]
        if self._stop_at is not None and others:
            raise UserValueError(
                "Expected `stop_at` to be None where more than the network's parameters is "
                f"trained, as the norm is of their gradient alone, but got {self._stop_at} and "
                f"{others[:3]}; watch the norm without stopping at it."
            )

    @override
    def look(self, trainer: Trainer, module: MAML) -> None:
        """Estimate the norm, and stop the run if it is small enough."""
        gradients = []
        for _ in range(self._meta_batches):
            episodes = self._tasks.draw(trainer)
            gradients.append(self.meta_gradient(trainer, module, episodes, "exact"))
        self.norm, self.standard_error = norm_of_mean(gradients)
        module.log("train/meta_gradient_norm", self.norm)
        module.log("train/meta_gradient_norm_se", self.standard_error)
        if self._stop_at is not None and self.norm + 2 * self.standard_error <= self._stop_at:
            rank_zero_info(
                f"Stopped at step {trainer.global_step}: |grad F| = {self.norm:.3g} ± "
                f"{self.standard_error:.2g} (standard error), within stop_at = "
                f"{self._stop_at:.3g}."
            )
            trainer.should_stop = True


def norm_of_mean(samples: Sequence[Params]) -> tuple[float, float]:
    """Return an estimate of ``|E g|`` from independent samples of ``g``, and its standard error.

    ``|E g|^2`` is estimated without bias by the mean of ``<g_i, g_j>`` over ``i != j``, its
    standard error ``s`` by leaving out one sample at a time. The norm is the root ``x`` of the
    estimate (0 where that is negative), and its error ``sqrt(x^2 + s) - x``: about ``s / (2 x)``
    away from 0, and ``sqrt(s)`` there.

    Args:
        samples: At least three samples.

    Examples:
        >>> import torch
        >>> from lightning_maml.callbacks.stationarity_monitor import norm_of_mean
        >>> norm_of_mean([{"weight": torch.tensor([3.0, 4.0])}] * 3)
        (5.0, 0.0)
    """
    count = len(samples)
    products = torch.zeros(count, count, dtype=torch.float64)
    for i, a in enumerate(samples):
        for j, b in enumerate(samples):
            products[i, j] = dot(a, b)
    square = _mean_off_diagonal(products)

    without = []
    for left_out in range(count):
        kept = [i for i in range(count) if i != left_out]
        without.append(_mean_off_diagonal(products[kept][:, kept]))
    deviations = torch.stack(without) - torch.stack(without).mean()
    error = float((deviations.square().sum() * (count - 1) / count).sqrt())

    x = math.sqrt(max(float(square), 0.0))
    return x, math.sqrt(x**2 + error) - x


def _mean_off_diagonal(products: Tensor) -> Tensor:
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1))
