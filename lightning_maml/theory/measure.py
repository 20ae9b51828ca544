"""The constants of the theory, measured on a model and its tasks: L, rho, sigma, sigma-tilde, sigma_H, b.

L, rho and sigma_H are suprema, and what is measured at some points in some directions is a lower
bound on them. They change during training, so measure again, and allow for a factor of 1.5 to 2.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.trees import map_tensors
from lightning_maml.core.hvp import default_probe_radius
from lightning_maml.core.inner_rates import rates_of_steps
from lightning_maml.core.objective import BatchLoss, Objective, twice_differentiable
from lightning_maml.core.params import Params, axpy, detached, dot, norm, scaled
from lightning_maml.core.task_axis import Stack
from lightning_maml.execution.task_map import TaskExecution, map_tasks
from lightning_maml.functional.adaptation import (
    Loss,
    QueryLoss,
    check_step_count,
    check_support_batches,
    inner_path,
    task_losses,
)

PlainLoss = Callable[[Params], Tensor]
"""Maps parameters to the loss of a fixed batch, a scalar."""

_HESSIAN_PRODUCT = 2
"""Gradient evaluations that one Hessian-vector product counts as."""


class Measured(NamedTuple):
    """A constant and what it cost.

    Attributes:
        value: The constant.
        gradient_evaluations: Gradients of one batch that were taken for it; a Hessian-vector
            product counts as two.
        direction: The unit vector that attains it.
    """

    value: float
    gradient_evaluations: int
    direction: Params


def smoothness(
    loss: PlainLoss, w: Params, *, tolerance: float = 1e-3, iterations: int = 50, seed: int = 0
) -> Measured:
    """Return the spectral norm of the Hessian at ``w``, the local L, by Lanczos' method on Hessian-vector products.

    This is power iteration with a memory: it needs fewer products, and does not settle on the
    second eigenvalue where two are close.

    Args:
        loss: The function.
        w: The parameters at which to measure.
        tolerance: Stop when the residual ``|H v - lambda v|`` is below this fraction of
            ``|lambda|``, which bounds the error of ``lambda``.
        iterations: Most products that are taken, and copies of the parameters that are kept.
        seed: Seed of the first direction.
    """
    hessian = _objective(loss).hessian(w)
    basis, matrix = (
        [_random_direction(w, seed)],
        torch.zeros(iterations + 1, iterations + 1, dtype=torch.float64),
    )
    for k in range(1, iterations + 1):
        product = hessian(basis[-1])
        for q in (*basis, *basis):  # twice, to stay orthogonal in spite of rounding
            overlap = float(dot(q, product))
            product = axpy(-overlap, q, product)
            matrix[k - 1, k - 1] += overlap if q is basis[-1] else 0.0
        rest = float(norm(product))
        if not math.isfinite(rest):
            return Measured(math.nan, 1 + k * _HESSIAN_PRODUCT, basis[0])
        values, vectors = torch.linalg.eigh(matrix[:k, :k])
        leading = int(values.abs().argmax())
        if k == iterations or rest * abs(float(vectors[-1, leading])) <= tolerance * abs(
            float(values[leading])
        ):
            break
        matrix[k, k - 1] = matrix[k - 1, k] = rest
        basis.append(scaled(1 / rest, product))
    direction = scaled(0.0, basis[0])
    for weight, q in zip(vectors[:, leading].tolist(), basis, strict=True):
        direction = axpy(weight, q, direction)
    return Measured(
        abs(float(values[leading])),
        1 + k * _HESSIAN_PRODUCT,
        scaled(1 / norm(direction), direction),
    )


def hessian_lipschitz(
    loss: PlainLoss,
    w: Params,
    *,
    leading: Measured | None = None,
    restarts: int = 8,
    iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Measured:
    """Return the norm of the third derivative at ``w``, the local rho, by the symmetric power method.

    The norm of a symmetric tensor is attained at a single vector (Banach), so ``u`` climbs
    ``|D^3 l[u, u, .]|``, each value from two Hessian-vector products,
    ``t = (H(w + h u) u - H(w - h u) u) / (2 h)``. It starts from the Hessian's leading eigenvector,
    then from random directions, and may stop at a local maximum each time. (Random directions
    alone, without the climb, give values that are too small by orders of magnitude in high
    dimension.)

    The radius h is a small fraction, the cube root of the machine epsilon, of the length L / rho
    over which the Hessian changes.

    Args:
        loss: The function, three times differentiable: with ReLU rho does not exist.
        w: The parameters at which to measure.
        leading: What :func:`lightning_maml.theory.measure.smoothness` returned there; computed if
            None.
        restarts: Number of starts; the largest value counts.
        iterations: Most steps from each start.
        tolerance: Stop when the norm changes by less than this, relative to itself.
        seed: Seed of the random directions.

    Returns:
        The norm; nan where something is not finite.
    """
    objective, dtype = _objective(loss), next(iter(w.values())).dtype
    largest = smoothness(loss, w, tolerance=1e-2, seed=seed) if leading is None else leading
    best, evaluations = (
        largest._replace(value=0.0),
        0 if leading is not None else largest.gradient_evaluations,
    )
    h = default_probe_radius(dtype)
    for restart in range(restarts):
        u, value = largest.direction if restart == 0 else _random_direction(w, seed + restart), 0.0
        for _ in range(iterations):
            ahead, behind = (
                objective.hessian_vector_product(axpy(side * h, u, w), u) for side in (1, -1)
            )
            evaluations += 2 * _HESSIAN_PRODUCT
            t = scaled(1 / (2 * h), axpy(-1.0, behind, ahead))
            before, value = value, float(norm(t))
            if not math.isfinite(value):
                return Measured(math.nan, evaluations, u)
            if value > best.value:
                best = Measured(value, 0, u)
            if not value or abs(value - before) <= tolerance * value:
                break
            h = max(
                largest.value / value * default_probe_radius(dtype),
                torch.finfo(dtype).eps ** (1 / 2),
            )
            climbed = axpy(value if dot(t, u) >= 0 else -value, u, t)
            u = scaled(1 / norm(climbed), climbed)
    return best._replace(gradient_evaluations=evaluations)


@contextmanager
def _differentiating() -> Iterator[None]:
    with torch.inference_mode(False), twice_differentiable():
        yield


class Curvature(NamedTuple):
    """The largest curvature of the task losses that was found.

    Attributes:
        L: Smoothness [loss / parameter^2].
        rho: Lipschitz constant of the Hessians [loss / parameter^3].
        gradient_evaluations: Spent on it.
    """

    L: float
    rho: float
    gradient_evaluations: int


class Spread(NamedTuple):
    """How the gradients of the tasks differ at one point [loss / parameter].

    Attributes:
        gradient_norm: Mean over tasks of ``|grad l_T|``, of the query loss.
        sigma: Standard deviation of that gradient over tasks, nan with one task; in the resampling
            case without what sampling the batch adds to it.
        sample_sigma: sigma-tilde or sigma_g, its standard deviation over the samples of a task; nan
            with one query sample. It is measured on halves of a query set: with batch norm, whose
            statistics are then the halves' own, it is not quite that of single samples.
        b: Mean over tasks of ``|grad l_S - grad l_T|``.
        mean_square_b: Mean of its square, b-tilde.
        gradient_evaluations: Spent on it.
    """

    gradient_norm: float
    sigma: float
    sample_sigma: float
    b: float
    mean_square_b: float
    gradient_evaluations: int


class Constants(NamedTuple):
    """All constants of the theory at one point, with the units of :mod:`lightning_maml.theory`.

    Attributes:
        L: Smoothness, the largest found over tasks, support and query losses, and the inner path.
        rho: Lipschitz constant of the Hessians, likewise.
        sigma: Standard deviation of the gradients over tasks.
        sample_sigma: Of the gradients over the samples of a task; nan with one query sample.
        hessian_sigma: Of the Hessians over the samples of a task; nan with one query sample.
        b: Mean distance between the gradients of support and query loss.
        mean_square_b: Mean of its square.
        gradient_norm: Mean norm of the task gradients.
        gradient_evaluations: Spent on all of them.
    """

    L: float
    rho: float
    sigma: float
    sample_sigma: float
    hessian_sigma: float
    b: float
    mean_square_b: float
    gradient_norm: float
    gradient_evaluations: int


class Probe:
    """Measures the constants of some tasks at some parameters.

    Args:
        loss: ``loss(params, x, y)``, the mean loss of one task's batch.
        params: The meta-parameters.
        episodes: The tasks, of either case; the more, the better the estimates.
        query_loss: As in :func:`lightning_maml.meta_gradient`.
        has_aux: The losses return ``(loss, aux)``.
        tasks: ``"loop"`` or ``"threads"``, see :func:`lightning_maml.execution.task_map.map_tasks`;
            for :meth:`gradient_norms` also ``"vmap"``.
        chunk_size: How many tasks are vectorised together, in :meth:`gradient_norms` alone.
        seed: Seed of the random directions and halves.
        progress: Show progress bars.

    Raises:
        ValueError: If the parameters are in half precision, or the tensors of ``episodes`` do not
            fit each other.
    """

    def __init__(
        self,
        loss: Loss,
        params: Params,
        episodes: AnyEpisodes,
        *,
        query_loss: QueryLoss | None = None,
        has_aux: bool = False,
        tasks: TaskExecution = "loop",
        chunk_size: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        check_episodes(episodes)
        dtype = next(iter(params.values())).dtype
        if torch.finfo(dtype).bits < 32:
            raise ValueError(
                f"Expected parameters in float32 or float64 to measure with but got {dtype}; use "
                "a mixed precision instead."
            )
        self._progress = progress
        self._loss, self._query_loss, self._has_aux = loss, query_loss, has_aux
        self._tasks, self._chunk_size, self._seed = tasks, chunk_size, seed
        with torch.inference_mode(False):
            self._params, self._episodes = detached((params, episodes))

    def constants(self, inner_lr: float, steps: int) -> Constants:
        """Return all the constants, with L and rho along the inner path."""
        curvature, spread = self.curvature(inner_lr, steps), self.spread()
        hessian_sigma, evaluations = self.hessian_deviation()
        return Constants(
            L=curvature.L,
            rho=curvature.rho,
            sigma=spread.sigma,
            sample_sigma=spread.sample_sigma,
            hessian_sigma=hessian_sigma,
            b=spread.b,
            mean_square_b=spread.mean_square_b,
            gradient_norm=spread.gradient_norm,
            gradient_evaluations=curvature.gradient_evaluations
            + spread.gradient_evaluations
            + evaluations,
        )

    @_differentiating()
    def gradient_norms(self) -> Tensor:
        """Return ``|grad l_i(w)|`` of each task's query loss, ``[T]``: what the adaptive meta-stepsize averages."""

        def of_tasks(task: AnyEpisodes, stack: Stack) -> Tensor:
            w = stack.shared(self._params)
            query = task_losses(
                self._loss, task, 0, self._query_loss, self._has_aux, None, stack
            ).query[0](w)
            norms: Tensor = stack.each(norm)(Objective(query, stack).gradient(w))
            return norms

        return torch.cat(
            list(
                map_tasks(of_tasks, self._episodes, tasks=self._tasks, chunk_size=self._chunk_size)
            )
        )

    @_differentiating()
    def curvature(
        self, inner_lr: float = 0.0, steps: int = 0, *, restarts: int = 3, tolerance: float = 1e-3
    ) -> Curvature:
        """Return the largest L and rho over the tasks, over their support and query losses, and over the inner path ``w_0 .. w_N``.

        Args:
            inner_lr: alpha.
            steps: N; 0 measures at the meta-parameters alone.
            restarts: See :func:`lightning_maml.theory.measure.hessian_lipschitz`; with 0 rho is not
                measured and comes out 0.
            tolerance: Relative change at which both iterations stop.

        Returns:
            The two; nan where a loss along the path is not finite.
        """
        check_step_count(steps)
        rates = rates_of_steps(inner_lr, self._params, steps)
        if isinstance(self._episodes, ResampledEpisodes) and steps:
            check_support_batches(self._episodes, steps)

        def of_one_task(task: AnyEpisodes) -> Tensor:
            losses = task_losses(self._loss, task, steps, self._query_loss, self._has_aux, None)
            found = []
            for w in inner_path(losses.support, Objective, self._params, rates).points:
                for batch_loss in map(_value, self._losses(task)):
                    largest = smoothness(batch_loss, w, tolerance=tolerance, seed=self._seed)
                    third = hessian_lipschitz(
                        batch_loss,
                        w,
                        leading=largest,
                        restarts=restarts,
                        tolerance=tolerance,
                        seed=self._seed,
                    )
                    found.append(
                        (
                            largest.value,
                            third.value,
                            largest.gradient_evaluations + third.gradient_evaluations,
                        )
                    )
            L, rho, evaluations = torch.tensor(found, dtype=torch.float64).T
            return torch.stack([L.max(), rho.max(), evaluations.sum() + steps])  # max keeps a nan

        rows = torch.cat(list(self._each("L and rho", of_one_task)))
        return Curvature(float(rows[:, 0].max()), float(rows[:, 1].max()), int(rows[:, 2].sum()))

    @_differentiating()
    def spread(self) -> Spread:
        """Return how the task gradients differ.

        Random halves D_1, D_2 of a query set give sigma-tilde:
        ``E|g(D_1) - g(D_2)|^2 = 2 sigma-tilde^2 / |D_1|``.
        """
        samples, half = self._episodes.query_y.shape[1], self._episodes.query_y.shape[1] // 2

        def of_one_task(task: AnyEpisodes) -> tuple[Params, Tensor]:
            support, query = (
                Objective(batch_loss).gradient(self._params) for batch_loss in self._losses(task)
            )
            between = torch.tensor(math.nan)
            if half:
                between = norm(
                    axpy(
                        -1.0,
                        *(Objective(part).gradient(self._params) for part in self._halves(task)),
                    )
                )
            distances = [
                float(norm(query)),
                float(norm(axpy(-1.0, support, query))),
                float(between),
            ]
            return query, torch.tensor(distances, dtype=torch.float64)

        total, rows = {name: torch.zeros_like(tensor) for name, tensor in self._params.items()}, []
        for gradient, distances in self._each("gradients", of_one_task):
            total = {name: tensor + gradient[name][0] for name, tensor in total.items()}
            rows.append(distances)
        norms, gaps, between = torch.cat(rows).T
        count = len(norms)
        sample_variance = float(between.square().mean()) * half / 2 if half else math.nan
        variance = (
            (float(norms.square().sum()) - float(norm(total)) ** 2 / count) / (count - 1)
            if count > 1
            else math.nan
        )
        if isinstance(self._episodes, ResampledEpisodes) and half:
            variance -= sample_variance / samples
        return Spread(
            gradient_norm=float(norms.mean()),
            sigma=math.sqrt(max(variance, 0.0)) if count > 1 else math.nan,
            sample_sigma=math.sqrt(sample_variance),
            b=float(gaps.mean()),
            mean_square_b=float(gaps.square().mean()),
            gradient_evaluations=count * (4 if half else 2),
        )

    @_differentiating()
    def hessian_deviation(self) -> tuple[float, int]:
        """Return sigma_H, the standard deviation of the samples' Hessians within a task [loss / parameter^2], and its cost in gradients.

        It is taken from random halves of the query sets, along the leading eigenvector of each
        task's Hessian, or along a random direction if that gives more: a lower bound on the
        spectral one (with batch norm only roughly, as for ``sample_sigma``). It is nan with one
        query sample.
        """
        half = self._episodes.query_y.shape[1] // 2
        if not half:
            return math.nan, 0

        def of_one_task(task: AnyEpisodes) -> Tensor:
            leading = smoothness(
                _value(self._losses(task)[1]), self._params, tolerance=1e-2, seed=self._seed
            )
            hessians = [Objective(part).hessian(self._params) for part in self._halves(task)]
            directions = (leading.direction, _random_direction(self._params, self._seed))
            along = [
                float(norm(axpy(-1.0, *(hessian(v) for hessian in hessians)))) for v in directions
            ]
            evaluations = leading.gradient_evaluations + 2 * (1 + 2 * _HESSIAN_PRODUCT)
            return torch.tensor([*along, evaluations], dtype=torch.float64)

        rows = torch.cat(list(self._each("sigma_H", of_one_task)))
        variance = float(rows[:, :2].square().mean(0).max()) * half / 2
        return math.sqrt(variance), int(rows[:, 2].sum())

    def _losses(self, task: AnyEpisodes) -> tuple[BatchLoss, BatchLoss]:
        """Return a task's support loss (where there are several batches, the first one's) and its query loss."""
        losses = task_losses(self._loss, task, 1, self._query_loss, self._has_aux, None)
        return losses.support[0](self._params), losses.query[0](self._params)

    def _halves(self, task: AnyEpisodes) -> tuple[BatchLoss, BatchLoss]:
        """Return the query losses of two random halves of a task's query set."""
        samples = len(task.query_y)
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(self._seed)).to(
            task.query_y.device
        )
        parts = order[: samples // 2], order[samples // 2 : 2 * (samples // 2)]
        sets = (
            (map_tensors(lambda tensor, rows=rows: tensor[rows], task.query_x), task.query_y[rows])
            for rows in parts
        )
        first, second = (self._losses(task._replace(query_x=x, query_y=y))[1] for x, y in sets)
        return first, second

    def _each(self, of: str, function: Callable[[AnyEpisodes], Any]) -> Iterator[Any]:
        results = map_tasks(
            lambda task, _: function(task),
            self._episodes,
            tasks="threads" if self._tasks == "threads" else "loop",
        )
        yield from tqdm(
            results,
            total=len(self._episodes.query_y),
            desc=f"Measuring {of}",
            unit="task",
            disable=not self._progress,
        )


def _value(batch_loss: BatchLoss) -> PlainLoss:
    return lambda w: batch_loss(w)[0]


def _objective(loss: PlainLoss) -> Objective:
    return Objective(lambda w: (loss(w), ()))


def _random_direction(like: Params, seed: int) -> Params:
    random = torch.Generator().manual_seed(seed)
    v = {
        name: torch.randn(tensor.shape, generator=random, dtype=tensor.dtype).to(tensor.device)
        for name, tensor in like.items()
    }
    return scaled(1 / norm(v), v)
