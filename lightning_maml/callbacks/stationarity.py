"""How far from a stationary point of the meta-objective a run is."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_maml.callbacks.independent_tasks import IndependentTasks, as_maml
from lightning_maml.episodes import AnyEpisodes
from lightning_maml.functional import Params, dot


class StationarityMonitor(Callback):
    """Estimates ``|grad F(w)|``, the norm of the exact meta-gradient, on tasks of its own, and may stop there.

    Every ``n`` steps it draws some meta-batches independently of those trained on. The norm of their mean meta-gradient would be too
    large by what sampling adds, so its square is estimated by the mean inner product of different meta-batches, with a jackknife standard
    error. Logged: ``train/meta_gradient_norm`` and ``train/meta_gradient_norm_se``, and kept as ``norm`` and ``standard_error``.

    In the resampling case it is the norm of the expected meta-gradient that is estimated, which the sampled inner steps bias: with small
    support batches it is not ``|grad F|`` (Ji et al. 2022, Proposition 3).

    Args:
        every_n_steps: Optimizer steps between two estimates.
        stop_at: epsilon. Training stops when the estimate plus two standard errors is at most this: an epsilon-first-order stationary point
            (Fallah et al. 2020, Definition 4.1).
        meta_batches: Meta-batches per estimate, at least 3.
        tasks: Tasks per meta-batch and process.
        episodes: Meta-batches like those trained on, drawn independently of them and of one another: with too few, which come again, the
            standard error is too small. By default the datamodule's, if it is one of this package.

    Raises:
        ValueError: If an argument is out of range; when training starts, if there is nothing to draw tasks from, or no Hessian batches.
        TypeError: If the module is not a :class:`lightning_maml.MAML`.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        stop_at: float | None = None,
        meta_batches: int = 8,
        tasks: int = 32,
        episodes: Iterable[AnyEpisodes] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` to be at least 1 but got {every_n_steps}.")
        if meta_batches < 3:
            raise ValueError(f"Expected `meta_batches` to be at least 3, for a standard error, but got {meta_batches}.")
        if stop_at is not None and not stop_at > 0:
            raise ValueError(f"Expected `stop_at` to be positive but got {stop_at}.")
        self.norm, self.standard_error = math.nan, math.nan
        self._every_n_steps, self._stop_at, self._meta_batches = every_n_steps, stop_at, meta_batches
        self._tasks = IndependentTasks("stationarity", tasks, episodes)
        self._last_step = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are tasks to draw, and that they have what the exact meta-gradient needs."""
        as_maml(self, pl_module)
        self._tasks.check(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "regime", None) == "resampling" and data.hessian_shots == 0:
            raise ValueError(
                "Expected `hessian_shots` to be at least 1 for StationarityMonitor, which takes the exact meta-gradient, but got 0."
            )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Estimate the norm, where it is time to."""
        if trainer.global_step % self._every_n_steps or trainer.global_step == self._last_step:  # the second: accumulated batches
            return
        self._last_step = trainer.global_step
        module = as_maml(self, pl_module)
        gradients = [module.meta_gradient(self._tasks.draw(trainer), "exact") for _ in range(self._meta_batches)]
        if trainer.world_size > 1:
            gradients = [{name: trainer.strategy.reduce(g, reduce_op="mean") for name, g in gradient.items()} for gradient in gradients]
        self.norm, self.standard_error = norm_of_mean(gradients)
        module.log_dict({"train/meta_gradient_norm": self.norm, "train/meta_gradient_norm_se": self.standard_error})
        if self._stop_at is not None and self.norm + 2 * self.standard_error <= self._stop_at:
            rank_zero_info(
                f"Stopped at step {trainer.global_step}: |grad F| = {self.norm:.3g} ± {self.standard_error:.2g} (standard error), "
                f"within stop_at = {self._stop_at:.3g}."
            )
            trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how far the tasks are drawn."""
        return {"drawn": self._tasks.drawn, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        self._tasks.drawn, self._last_step = state_dict["drawn"], state_dict["last_step"]


def norm_of_mean(samples: Sequence[Params]) -> tuple[float, float]:
    """Return an estimate of ``|E g|`` from independent samples of ``g``, and its standard error.

    ``|E g|^2`` is estimated without bias by the mean of ``<g_i, g_j>`` over ``i != j``, its standard error ``s`` by leaving out one
    sample at a time. The norm is the root ``x`` of the estimate (0 where that is negative), and its error ``sqrt(x^2 + s) - x``: about
    ``s / (2 x)`` away from 0, and ``sqrt(s)`` there.
    """
    products = torch.stack([torch.stack([dot(a, b).double() for b in samples]) for a in samples])
    square = _mean_off_diagonal(products)
    count = len(samples)
    keep = [[j for j in range(count) if j != i] for i in range(count)]
    without = torch.stack([_mean_off_diagonal(products[rows][:, rows]) for rows in keep])
    error = float(((without - without.mean()).square().sum() * (count - 1) / count).sqrt())
    x = math.sqrt(max(float(square), 0.0))
    return x, math.sqrt(x**2 + error) - x


def _mean_off_diagonal(products: Tensor) -> Tensor:
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1))
