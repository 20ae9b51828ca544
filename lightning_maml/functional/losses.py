"""The loss functions that users give, and the losses of a task's batches that they make."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes
from lightning_maml.batches.trees import detached, map_tensors
from lightning_maml.core.inner_loop import TaskLosses
from lightning_maml.core.objective import BatchLoss, Objective
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import SINGLE_TASK, TaskAxis
from lightning_maml.errors import UserValueError

Loss = Callable[[Params, Any, Tensor], Any]
"""``loss(params, x, y)`` of one task's batch: a scalar, or with ``has_aux`` the scalar and anything
else worth keeping.
"""

QueryLoss = Callable[[Params, Any], Any]
"""``query_loss(params, task)``, for a query loss that also looks at the support set."""

Sample = Callable[[Params, Any, Tensor], tuple[Any, Any]]
"""``sample(params, x, y)`` returns what ``loss`` gets in place of ``x`` and ``y``, for data that
depend on the parameters they are drawn at.
"""


class LossFunctions(NamedTuple):
    """The loss functions of one task.

    Attributes:
        loss: ``loss(params, x, y)``, or a sequence of such for the points ``w_0 .. w_N``.
        query_loss: ``query_loss(params, task)`` or a sequence, if the query loss is not
            ``loss(params, task.query_x, task.query_y)``.
        has_aux: Whether they return ``(loss, aux)``.
        sample: Draws data at a point, see :data:`Sample`.
    """

    loss: Loss | Sequence[Loss]
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None
    has_aux: bool = False
    sample: Sample | None = None

    def of_task(
        self,
        task: AnyEpisodes,
        steps: int,
        axis: TaskAxis = SINGLE_TASK,
        *,
        keep_graphs: bool = False,
    ) -> TaskLosses:
        """Return the losses of a task's batches as functions of the parameters alone.

        Args:
            task: The batches of one task; with a task axis, of several tasks.
            steps: N.
            axis: The task axis.
            keep_graphs: Keep the graphs of the support set's gradients, see
                :class:`lightning_maml.core.objective.Objective`.
        """
        losses = _for_each_point(self.loss, steps)
        query_losses = _for_each_point(self.query_loss, steps)

        def objective(function: Callable[..., Any], *data: Any, **options: bool) -> Objective:
            return self._objective(function, data, axis, **options)

        def of_support(j: int, x: Any, y: Any, keep_graph: bool = False) -> Objective:
            loss = _without_aux(losses[j]) if self.has_aux else losses[j]
            return objective(loss, x, y, keep_graph=keep_graph)

        query = []
        for of_point, query_loss in zip(losses, query_losses, strict=True):
            function = partial(_of_query, of_point, query_loss)
            data = (task.query_x, task.query_y, task)
            query.append(objective(function, *data, has_aux=self.has_aux))
        if isinstance(task, ResampledEpisodes):
            batches = [_of_step(task, j, axis) for j in range(steps)]
            support = [of_support(j, x, y) for j, (x, y, _, _) in enumerate(batches)]
            hessian = [of_support(j, x, y) for j, (_, _, x, y) in enumerate(batches)]
            return TaskLosses(support, hessian, query)
        batch = (task.support_x, task.support_y)
        support = [of_support(j, *batch, keep_graph=keep_graphs) for j in range(steps)]
        return TaskLosses(support, support, query)

    def _objective(
        self,
        function: Callable[..., Any],
        data: tuple[Any, ...],
        axis: TaskAxis,
        *,
        has_aux: bool = False,
        keep_graph: bool = False,
    ) -> Objective:
        if self.sample is not None:
            return SampledObjective(function, self.sample, data, axis, has_aux=has_aux)
        loss = _batch_loss(function, data, axis, has_aux=has_aux)
        return Objective(loss, axis, keep_graph=keep_graph)


class SampledObjective(Objective):
    """The loss of a batch that is drawn at the first point at which it is evaluated.

    So it is in reinforcement learning (Ji et al. 2022, Appendix A.1): S_j and D_j are drawn at w_j,
    the query batch at w_N.

    Args:
        function: The loss of one task.
        sample: Draws the batch, see :data:`Sample`.
        data: The arguments of ``function`` besides the parameters; ``sample`` replaces the first
            two.
        axis: The task axis.
        has_aux: Whether ``function`` returns more than the loss.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        sample: Sample,
        data: tuple[Any, ...],
        axis: TaskAxis,
        *,
        has_aux: bool,
    ) -> None:
        super().__init__(self._loss_of_drawn, axis)
        self._function, self._has_aux = function, has_aux
        self._sample, self._data = sample, data
        self._drawn: BatchLoss | None = None

    @override
    def draw(self, w: Params) -> None:
        if self._drawn is None:
            x, y, *rest = self._data
            drawn = self.axis.vmap(self._sample)(w, x, y)
            data = (*detached(drawn), *rest)
            self._drawn = _batch_loss(self._function, data, self.axis, has_aux=self._has_aux)

    @override
    def value(self, w: Params) -> tuple[Tensor, Any]:
        self.draw(w)
        return super().value(w)

    @override
    def _evaluate(
        self, w: Params, names: Collection[str], times: Literal[1, 2] = 1
    ) -> tuple[Params, Tensor, Any]:
        self.draw(w)
        return super()._evaluate(w, names, times)

    def _loss_of_drawn(self, params: Params) -> tuple[Tensor, Any]:
        assert self._drawn is not None
        return self._drawn(params)


def _batch_loss(
    function: Callable[..., Any], data: tuple[Any, ...], axis: TaskAxis, *, has_aux: bool
) -> BatchLoss:
    """Return the loss of a fixed batch: ``function(params, *data)`` for each task.

    Raises:
        ValueError: In a call, if the loss of a task is no scalar.
    """

    def loss(params: Params) -> tuple[Tensor, Any]:
        found = axis.vmap(function)(params, *data)
        value, aux = found if has_aux else (found, ())
        if value.ndim != axis.size:
            raise UserValueError(
                "Expected the loss of a task to be a scalar but got shape "
                f"{list(value.shape[axis.size :])}; use reduction='mean'."
            )
        return value, aux

    return loss


def _of_query(
    loss: Loss, query_loss: QueryLoss | None, params: Params, x: Any, y: Any, task: Any
) -> Any:
    if query_loss is None:
        return loss(params, x, y)
    return query_loss(params, task._replace(query_x=x, query_y=y))


def _of_step(task: ResampledEpisodes, step: int, axis: TaskAxis) -> tuple[Any, Tensor, Any, Tensor]:
    """Return the support and the Hessian batch of one inner step."""
    batches: tuple[Any, Tensor, Any, Tensor] = map_tensors(
        lambda tensor: tensor.select(axis.size, step), task[:4]
    )
    return batches


def _without_aux(loss: Loss) -> Loss:
    return lambda *arguments: loss(*arguments)[0]


def _for_each_point(functions: Any, steps: int) -> list[Any]:
    """Return one function, or None, for each of ``w_0 .. w_N``."""
    if functions is None or callable(functions):
        return [functions] * (steps + 1)
    return list(functions)
