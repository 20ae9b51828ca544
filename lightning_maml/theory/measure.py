"""Measure the constants of the theory on a model and its tasks.

They are L, rho, sigma, sigma-tilde, sigma_H and b; :mod:`lightning_maml.theory` defines them. L,
rho and sigma_H are suprema, and what is measured at some points in some directions is a lower bound
on them. They change during training, so measure again, and allow for a factor of 1.5 to 2.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.trees import detached, map_tensors
from lightning_maml.core.inner_loop import inner_loop
from lightning_maml.core.inner_rates import rates_of_steps
from lightning_maml.core.objective import Objective, twice_differentiable
from lightning_maml.core.params import Params, add, norm, scale, subtract
from lightning_maml.core.precision import full_precision
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.errors import UserValueError
from lightning_maml.execution.task_map import TaskExecution, map_tasks, mapper, split
from lightning_maml.functional.arguments import check_step_count, check_support_batches
from lightning_maml.functional.losses import Loss, LossFunctions, QueryLoss
from lightning_maml.theory.curvature import (
    HESSIAN_PRODUCT,
    PlainLoss,
    hessian_lipschitz,
    random_direction,
    smoothness,
)


@contextmanager
def _differentiating() -> Iterator[None]:
    with torch.inference_mode(False), twice_differentiable(), full_precision():
        yield


class Curvature(NamedTuple):
    """The largest curvature of the task losses that was found.

    Attributes:
        L: Smoothness [loss / parameter^2].
        rho: Lipschitz constant of the Hessians [loss / parameter^3].
        gradient_evaluations: Spent on it.

    Examples:
        >>> from lightning_maml.theory.measure import Curvature
        >>> Curvature(L=2.0, rho=0.5, gradient_evaluations=100).L
        2.0
    """

    L: float
    rho: float
    gradient_evaluations: int


class Spread(NamedTuple):
    """How the gradients of the tasks differ at one point [loss / parameter].

    Attributes:
        gradient_norm: Mean over tasks of ``|grad l_T|``, of the query loss.
        sigma: Standard deviation of that gradient over tasks, nan with one task; in the resampling
            case without what sampling the batch adds to it, as far as that is known: where all
            query sets have one sample of each class it is not, and this is an upper bound.
        sample_sigma: sigma-tilde or sigma_g, its standard deviation over the samples of a task; nan
            where no task has two query samples. It is measured on halves of a query set: with batch
            norm, whose statistics are then the halves' own, it is only roughly that of single
            samples.
        b: Mean over tasks of ``|grad l_S - grad l_T|``.
        mean_square_b: Mean of its square, b-tilde.
        gradient_evaluations: Spent on it.

    Examples:
        >>> from lightning_maml.theory.measure import Spread
        >>> spread = Spread(1.0, 0.5, 0.2, b=0.1, mean_square_b=0.02, gradient_evaluations=8)
        >>> spread.sigma
        0.5
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
        sample_sigma: Of the gradients over the samples of a task; nan where no task has two query
            samples.
        hessian_sigma: Of the Hessians over the samples of a task; nan there too.
        b: Mean distance between the gradients of support and query loss.
        mean_square_b: Mean of its square.
        gradient_norm: Mean norm of the task gradients.
        gradient_evaluations: Spent on all of them.

    Examples:
        >>> from lightning_maml.theory.measure import Constants
        >>> Constants(2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 1.0, gradient_evaluations=100).rho
        1.0
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


class _Halves(NamedTuple):
    """Two halves of a query set.

    Attributes:
        losses: Their losses.
        size: Samples of each; 0 where the query set has fewer than two that count.
        samples: Samples of the whole query set.
    """

    losses: tuple[Objective, Objective]
    size: int
    samples: int


def _of_one_sample(between: Tensor, sizes: Tensor) -> float:
    """Return the variance of one sample's gradient, from the distances of halves of some sizes."""
    known = sizes > 0
    return float((between.square() * sizes / 2)[known].mean())


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
        ignored: The label that the losses skip; such samples are not counted. None if they skip
            none.

    Raises:
        ValueError: If a parameter is in half precision, or the tensors of ``episodes`` do not
            fit each other.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes
        >>> from lightning_maml.theory.measure import Probe
        >>> def loss(params, x, y):
        ...     return ((params["w"] - x) ** 2).mean() / 2
        >>> x = torch.tensor([[[0.0], [2.0]], [[1.0], [3.0]]])
        >>> y = torch.zeros(2, 2, 1)  # not used by this loss
        >>> probe = Probe(loss, {"w": torch.zeros(1)}, Episodes(x, y, x, y))
        >>> probe.gradient_norms()
        tensor([1., 2.])
        >>> round(probe.curvature().L, 3)
        1.0
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
        ignored: int | None = None,
    ) -> None:
        check_episodes(episodes)
        _check_precision(params)
        self._progress = progress
        self._ignored = ignored
        self._functions = LossFunctions(loss, query_loss, has_aux)
        self._tasks, self._chunk_size, self._seed = tasks, chunk_size, seed
        with torch.inference_mode(False):
            self._params, self._episodes = detached((params, episodes))

    def constants(self, inner_lr: float, steps: int) -> Constants:
        """Return all the constants, with L and rho along the inner path.

        Args:
            inner_lr: alpha.
            steps: N.
        """
        curvature = self.curvature(inner_lr, steps)
        spread = self.spread()
        hessian_sigma, evaluations = self.hessian_deviation()
        evaluations += curvature.gradient_evaluations + spread.gradient_evaluations
        return Constants(
            L=curvature.L,
            rho=curvature.rho,
            sigma=spread.sigma,
            sample_sigma=spread.sample_sigma,
            hessian_sigma=hessian_sigma,
            b=spread.b,
            mean_square_b=spread.mean_square_b,
            gradient_norm=spread.gradient_norm,
            gradient_evaluations=evaluations,
        )

    @_differentiating()
    def gradient_norms(self) -> Tensor:
        """Return ``|grad l_i(w)|`` of each task's query loss, ``[T]`` [loss / parameter].

        The adaptive meta-stepsize averages them.
        """

        def norms_of_chunk(task: AnyEpisodes, axis: TaskAxis) -> Tensor:
            query = self._functions.of_task(task, 0, axis).query[0]
            norms: Tensor = axis.vmap(norm)(query.gradient(axis.expand(self._params)))
            return norms

        chunks = map_tasks(
            norms_of_chunk, self._episodes, tasks=self._tasks, chunk_size=self._chunk_size
        )
        return torch.cat(list(chunks))

    @_differentiating()
    def curvature(
        self, inner_lr: float = 0.0, steps: int = 0, *, restarts: int = 3, tolerance: float = 1e-3
    ) -> Curvature:
        """Return the largest L and rho of the task losses along the inner path ``w_0 .. w_N``.

        Each task has two losses, of its support and of its query set.

        Args:
            inner_lr: alpha.
            steps: N; 0 measures at the meta-parameters alone.
            restarts: See :func:`lightning_maml.theory.curvature.hessian_lipschitz`; with 0 rho is
                not measured and comes out 0.
            tolerance: Relative change at which both iterations stop.

        Returns:
            The two; nan where a loss along the path is not finite.
        """
        check_step_count(steps)
        rates = rates_of_steps(inner_lr, self._params, steps)
        if isinstance(self._episodes, ResampledEpisodes) and steps:
            check_support_batches(self._episodes, steps)

        def measure_task(task: AnyEpisodes, number: int) -> Tensor:
            path, w_N = inner_loop(self._functions.of_task(task, steps), self._params, rates)
            points = [*(step.w for step in path), w_N]
            found = [
                self._curvature_at(w, objective, restarts, tolerance)
                for w in points
                for objective in self._losses(task)
            ]
            L, rho, evaluations = torch.tensor(found, dtype=torch.float64).T
            # unlike Python's, torch's max keeps a nan
            return torch.stack([L.max(), rho.max(), evaluations.sum() + steps])

        rows = torch.stack(list(self._for_each_task("L and rho", measure_task)))
        L, rho, evaluations = rows.T
        return Curvature(float(L.max()), float(rho.max()), int(evaluations.sum()))

    @_differentiating()
    def objective(self, inner_lr: float, steps: int) -> float:
        """Return F(w), the mean over tasks of the query loss after N inner steps [loss].

        Args:
            inner_lr: alpha.
            steps: N.
        """
        check_step_count(steps)
        rates = rates_of_steps(inner_lr, self._params, steps)

        def of_task(task: AnyEpisodes, number: int) -> Tensor:
            losses = self._functions.of_task(task, steps)
            _, w_N = inner_loop(losses, self._params, rates)
            return _value(losses.query[-1])(w_N).detach()

        return float(torch.stack(list(self._for_each_task("F", of_task))).mean())

    def _curvature_at(
        self, w: Params, objective: Objective, restarts: int, tolerance: float
    ) -> Curvature:
        loss = _value(objective)
        largest = smoothness(loss, w, tolerance=tolerance, seed=self._seed)
        third = hessian_lipschitz(
            loss, w, leading=largest, restarts=restarts, tolerance=tolerance, seed=self._seed
        )
        evaluations = largest.gradient_evaluations + third.gradient_evaluations
        return Curvature(largest.value, third.value, evaluations)

    @_differentiating()
    def spread(self) -> Spread:
        """Return how the task gradients differ.

        Random halves D_1, D_2 of a query set give sigma-tilde:
        ``E|g(D_1) - g(D_2)|^2 = 2 sigma-tilde^2 / |D_1|``. What sampling adds to sigma is given by
        halves that are drawn as the query sets are: with as many samples of each class, if these
        have so.
        """
        is_resampled = isinstance(self._episodes, ResampledEpisodes)
        by_class = is_resampled and self._have_equal_classes()
        measure_task = partial(self._distances, by_class=by_class)
        first: Params = {}
        total = scale(0.0, self._params)
        rows = []
        for query, figures in self._for_each_task("gradients", measure_task):
            # differences from the first gradient: sums of large, nearly equal gradients would keep
            # only rounding
            first = first or query
            from_first = subtract(query, first)
            total = add(total, from_first)
            rows.append(torch.cat([figures, norm(from_first)[None]]))
        # fetched together
        columns = torch.stack(rows).cpu().double().T
        norms, gaps, between, between_alike, size, size_alike, samples, from_firsts = columns
        count = len(norms)

        sample_variance = _of_one_sample(between, size)
        variance = math.nan
        if count > 1:
            sum_of_squares = float(from_firsts.square().sum())
            variance = (sum_of_squares - float(norm(total)) ** 2 / count) / (count - 1)
        if is_resampled and (size_alike > 0).any():
            by_sampling = _of_one_sample(between_alike, size_alike)
            variance -= by_sampling * float((1 / samples.clamp(min=1)).mean())
        return Spread(
            gradient_norm=float(norms.mean()),
            # what sampling adds is an estimate too, and may exceed the variance of a few tasks
            sigma=math.sqrt(variance if math.isnan(variance) else max(variance, 0.0)),
            sample_sigma=math.sqrt(sample_variance),
            b=float(gaps.mean()),
            mean_square_b=float(gaps.square().mean()),
            gradient_evaluations=2 * count
            + 2 * int((size > 0).sum())
            + 2 * by_class * int((size_alike > 0).sum()),
        )

    def _distances(
        self, task: AnyEpisodes, number: int, *, by_class: bool
    ) -> tuple[Params, Tensor]:
        """Return a task's query gradient, and the figures of :meth:`spread`.

        The figures are its norm, its distance from the support gradient, those of two halves and of
        two halves that are drawn like the query set, the sizes of both kinds of halves, and the
        number of samples.
        """
        support, query = (objective.gradient(self._params) for objective in self._losses(task))
        distances = [norm(query), norm(subtract(query, support))]
        halves = self._halves(task, number)
        drawn_alike = self._halves(task, number, by_class=True) if by_class else halves
        distances.append(self._apart(halves, distances[0]))
        distances.append(self._apart(drawn_alike, distances[0]) if by_class else distances[-1])
        sizes = torch.tensor([halves.size, drawn_alike.size, halves.samples]).to(distances[0])
        return query, torch.cat([torch.stack(distances), sizes])

    def _apart(self, halves: _Halves, like: Tensor) -> Tensor:
        """Return the distance of the gradients of two halves; 0 where there are none."""
        if not halves.size:
            return torch.zeros_like(like)
        first, second = (part.gradient(self._params) for part in halves.losses)
        return norm(subtract(second, first))

    @_differentiating()
    def hessian_deviation(self) -> tuple[float, int]:
        """Return sigma_H, the standard deviation of the samples' Hessians within a task.

        It is taken from random halves of the query sets, along the leading eigenvector of each
        task's Hessian, or along a random direction if that gives more: a lower bound on the
        spectral one (with batch norm only roughly, as for ``sample_sigma``).

        Returns:
            sigma_H [loss / parameter^2], nan where no task has two query samples; and the gradients
            it cost.
        """

        def measure_task(task: AnyEpisodes, number: int) -> Tensor:
            halves = self._halves(task, number)
            if not halves.size:
                return torch.zeros(4, dtype=torch.float64, device="cpu")
            query_loss = _value(self._losses(task)[1])
            leading = smoothness(query_loss, self._params, tolerance=1e-2, seed=self._seed)
            first, second = (part.hessian(self._params) for part in halves.losses)
            directions = (leading.direction, random_direction(self._params, self._seed))
            along = torch.stack([norm(subtract(first(v), second(v))) for v in directions])
            evaluations = leading.gradient_evaluations + 2 * (1 + 2 * HESSIAN_PRODUCT)
            figures = [*along.tolist(), halves.size, evaluations]
            return torch.tensor(figures, dtype=torch.float64, device="cpu")

        rows = torch.stack(list(self._for_each_task("sigma_H", measure_task)))
        known = rows[rows[:, 2] > 0]
        if not len(known):
            return math.nan, 0
        variances = known[:, :2].square() * known[:, 2:3] / 2
        return math.sqrt(float(variances.mean(0).max())), int(known[:, 3].sum())

    def _losses(self, task: AnyEpisodes) -> tuple[Objective, Objective]:
        """Return a task's support loss (that of the first step's batch) and its query loss."""
        losses = self._functions.of_task(task, 1)
        return losses.support[0], losses.query[0]

    def _halves(self, task: AnyEpisodes, number: int, *, by_class: bool = False) -> _Halves:
        """Return two random halves of a task's query set; of an odd number, one is left out.

        Each task has other halves: query sets come with their classes in the same order.

        Args:
            task: The task.
            number: Its number.
            by_class: Whether each half has as many samples of each class.
        """
        rows = self._samples(task.query_y)
        strata = [rows]
        if by_class:
            labels = task.query_y[rows]
            strata = [rows[labels == label] for label in torch.unique(labels)]
        random = torch.Generator().manual_seed(
            (self._seed * len(self._episodes.query_y) + number) % 2**63
        )
        first, second = [], []
        for stratum in strata:
            half = len(stratum) // 2
            order = torch.randperm(len(stratum), generator=random, device="cpu").to(rows.device)
            first.append(stratum[order[:half]])
            second.append(stratum[order[half : 2 * half]])
        losses = self._query_loss(task, torch.cat(first)), self._query_loss(task, torch.cat(second))
        return _Halves(losses, sum(map(len, first)), len(rows))

    def _have_equal_classes(self) -> bool:
        """Return whether each query set has as many samples of each of its classes."""
        labels = self._episodes.query_y
        if labels.ndim > 2 or labels.is_floating_point():
            return False
        counts = (torch.unique(y[self._samples(y)], return_counts=True)[1] for y in labels)
        return all(bool((of_task == of_task[0]).all()) for of_task in counts)

    def _samples(self, labels: Tensor) -> Tensor:
        """Return the rows of the samples whose labels, or some of them, the losses count."""
        if self._ignored is None:
            return torch.arange(len(labels), device=labels.device)
        return (labels != self._ignored).reshape(len(labels), -1).any(1).nonzero()[:, 0]

    def _query_loss(self, task: AnyEpisodes, rows: Tensor) -> Objective:
        x = map_tensors(lambda tensor: tensor[rows], task.query_x)
        return self._losses(task._replace(query_x=x, query_y=task.query_y[rows]))[1]

    def _for_each_task(
        self, what: str, function: Callable[[AnyEpisodes, int], Any]
    ) -> Iterator[Any]:
        """Yield the results of a function of a task and its number."""
        # the searches take different numbers of steps per task, so tasks cannot be vectorised
        way: TaskExecution = "threads" if self._tasks == "threads" else "loop"
        tasks = split(self._episodes, way, None).tasks
        results = mapper(way, self._episodes.query_y.device)(function, tasks, range(len(tasks)))
        yield from tqdm(
            results,
            total=len(tasks),
            desc=f"Measuring {what}",
            unit="task",
            disable=not self._progress,
        )


def _check_precision(params: Params) -> None:
    for name, tensor in params.items():
        if torch.finfo(tensor.dtype).bits < 32:
            raise UserValueError(
                "Expected parameters in float32 or float64 to measure with but got "
                f"{tensor.dtype} in {name!r}; use a mixed precision instead."
            )


def _value(objective: Objective) -> PlainLoss:
    return lambda w: objective.value(w)[0]
