"""The meta-gradient of a meta-batch, the mean over its tasks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes, check_episodes
from lightning_maml.batches.trees import detached, tensors
from lightning_maml.core.hvp import CurvatureName, hessian_vector_product
from lightning_maml.core.inner_loop import TaskLosses
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.core.inner_rates import InnerRates, Rates, rates_of_steps, tensor_rates
from lightning_maml.core.meta_gradient import (
    StepBack,
    TaskGradient,
    ThroughUpdate,
    rate_name,
    task_meta_gradient,
    through_step,
    with_query_losses,
    with_rate_gradients,
)
from lightning_maml.core.objective import twice_differentiable
from lightning_maml.core.params import Params, add, scale
from lightning_maml.core.precision import full_precision
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.core.tensors import memory
from lightning_maml.errors import UserValueError
from lightning_maml.execution.task_map import (
    TaskExecution,
    cat_chunks,
    mapper,
    split,
    with_task_dimension,
)
from lightning_maml.functional.arguments import check_step_count, check_support_batches
from lightning_maml.functional.features import Encode, with_features_once
from lightning_maml.functional.losses import Loss, LossFunctions, QueryLoss, Sample

Call = Callable[..., Any]
"""``call(function, *inputs)`` returns ``function(*inputs)``, where the function depends on no
tensors but those among its inputs.
"""


class MetaGradient(NamedTuple):
    """The meta-gradient of a meta-batch.

    Attributes:
        grad: Mean over the tasks, shaped like the parameters.
        query_loss: Query loss of each task after adaptation, ``[T]``.
        aux: What the loss function returned besides the query loss, each tensor ``[T, ...]``; empty
            without ``has_aux``.
        inner_lr: For each step the gradient with respect to the inner rates that are tensors, mean
            over the tasks, shaped like these rates.

    Examples:
        See :func:`lightning_maml.meta_gradient`, which returns it.

        >>> import torch
        >>> from lightning_maml import MetaGradient
        >>> result = MetaGradient({"w": torch.ones(2)}, torch.tensor([0.5]), aux=(), inner_lr=[])
        >>> result.grad["w"]
        tensor([1., 1.])
    """

    grad: Params
    query_loss: Tensor
    aux: Any
    inner_lr: list[Params]


def meta_gradient(
    loss: Loss | Sequence[Loss],
    params: Params,
    episodes: AnyEpisodes,
    *,
    inner_lr: InnerRates,
    steps: int,
    inner_optimizer: InnerOptimizer | None = None,
    curvature: CurvatureName = "exact",
    probe_radius: float | None = None,
    query_loss: QueryLoss | Sequence[QueryLoss] | None = None,
    has_aux: bool = False,
    sample: Sample | None = None,
    tasks: TaskExecution = "loop",
    chunk_size: int | None = None,
    step_weights: Sequence[float] | None = None,
    keep_graphs: bool | None = None,
    encode: Encode | None = None,
    call: Call | None = None,
) -> MetaGradient:
    """Return the mean over tasks of the meta-gradient.

    With :class:`lightning_maml.Episodes` it is the gradient of ``w -> q(w_N(w))`` (Ji et al. 2022,
    Algorithm 2). With :class:`lightning_maml.ResampledEpisodes` it is the estimate of Algorithm 1,
    whose Hessian batches are not those of the inner steps: autograd through the inner loop would
    give something else, unless D_j = S_j.

    Args:
        loss: ``loss(params, x, y)``, the mean loss of one task's batch as a scalar tensor; or a
            sequence of such for ``w_0 .. w_N``.
        params: The meta-parameters by name. They are not changed, and need not require gradients.
        episodes: The meta-batch of T tasks, of either case.
        inner_lr: alpha, the rate of the inner steps; or a dict by name with the rates of the
            parameters that adapt, each a number or a tensor that broadcasts to its parameter; or a
            sequence of such dicts, one per step, the last for all further steps. Tensors get a
            gradient.
        steps: N >= 0, the number of inner steps; 0 gives the ordinary gradient of the query loss.
            ``ResampledEpisodes`` must hold batches for N steps.
        inner_optimizer: What an inner step does with the gradient, :class:`lightning_maml.InnerSGD`
            or :class:`lightning_maml.InnerAdam` for instance; by default gradient descent.
        curvature: ``"exact"`` (MAML), ``"none"`` (FO-MAML) or ``"finite_difference"`` (HF-MAML).
        probe_radius: See :func:`lightning_maml.core.hvp.finite_difference`; only with that
            curvature.
        query_loss: ``query_loss(params, task)``, if the query loss is not
            ``loss(params, task.query_x, task.query_y)``; or a sequence.
        has_aux: The losses return ``(loss, aux)``; the query's aux is returned.
        sample: ``sample(params, x, y)``, if the data depend on the parameters, as in reinforcement
            learning (Ji et al. 2022, Appendix A.1): called once per batch at the point where it is
            used (w_j for S_j and D_j, w_N for the query batch), it returns what ``loss`` gets as
            ``x`` and ``y``. Give ``ResampledEpisodes`` noise as ``x``, and a ``loss`` that weights
            the samples by their likelihood ratio, so that its derivatives are unbiased.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
            ``"threads"`` needs a ``loss`` that several threads may call at once, which one through
            ``functional_call`` on a shared module is not.
        chunk_size: How many tasks are vectorised together.
        step_weights: Weights of the query losses after steps 1 .. N in what is differentiated (the
            multi-step loss of Antoniou et al. 2019, section 4); by default 0 .. 0, 1. The query
            losses returned are those after step N in any case.
        keep_graphs: Keep the graphs of all inner steps for the backward pass, which then need not
            be built again: faster, but they are all in memory at once. The numbers are the same.
            Only with exact curvature of the support sets themselves, and without ``sample``;
            elsewhere nothing is kept. By default only the graph of a single step.
        encode: ``encode(params, task)`` returns the features of a task's support and query inputs,
            which take the place of these inputs. For ``Episodes`` only, and only if what precedes
            the features does not adapt: they are computed once per task.
        call: Calls the function of each chunk; a compiler, for instance.

    Returns:
        The meta-gradient, the query losses ``[T]`` and aux, all detached.

    Raises:
        ValueError: If an argument is out of range, or the tensors of ``episodes`` do not fit each
            other.

    Examples:
        >>> import torch
        >>> from lightning_maml import Episodes, meta_gradient
        >>> x, y = torch.ones(2, 3, 1), torch.ones(2, 3, 1)  # two tasks of three examples
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean() / 2
        >>> result = meta_gradient(
        ...     loss, {"w": torch.zeros(())}, Episodes(x, y, x, y), inner_lr=0.5, steps=1
        ... )
        >>> result.grad, result.query_loss  # w_1 = 0.5, and (1 - 0.5) (w_1 - 1) = -0.25
        ({'w': tensor(-0.2500)}, tensor([0.1250, 0.1250]))
    """
    check_step_count(steps)
    rates = rates_of_steps(inner_lr, params, steps)
    check_episodes(episodes)
    hvp = hessian_vector_product(curvature, probe_radius)
    if step_weights is not None and len(step_weights) != steps:
        raise UserValueError(
            f"Expected `step_weights` to hold {steps} weights, one per inner step, but got "
            f"{len(step_weights)}."
        )
    _check_batches(episodes, steps, curvature)
    if encode is not None and (
        isinstance(episodes, ResampledEpisodes) or sample is not None or not callable(loss)
    ):
        raise UserValueError(
            "Expected `encode` with Episodes, whose features are computed once, and one loss, but "
            "got other data or losses."
        )
    functions = LossFunctions(loss, query_loss, has_aux, sample)
    if keep_graphs is None:
        keep_graphs = steps == 1  # it lies beside that of the query loss anyway
    keep_graphs = keep_graphs and curvature == "exact" and sample is None
    learns_rates = any(map(tensor_rates, rates))

    def step_back(losses: TaskLosses, axis: TaskAxis) -> StepBack | None:
        if curvature == "none" and not learns_rates and not step_weights:
            return None
        back: StepBack = partial(through_step, hvp=hvp)
        if inner_optimizer is not None:
            curved = None if curvature == "none" else hvp
            back = ThroughUpdate(inner_optimizer, axis, curved)
        elif learns_rates:
            back = with_rate_gradients(back)
        if step_weights:
            back = with_query_losses(back, losses, step_weights)
        return back

    def of_chunk(
        task: AnyEpisodes, axis: TaskAxis, params: Params, rates: list[Rates]
    ) -> TaskGradient:
        def at(w: Params, functions: LossFunctions) -> TaskGradient:
            losses = functions.of_task(task, steps, axis, keep_graphs=keep_graphs)
            back = step_back(losses, axis)
            return task_meta_gradient(losses, w, rates, back, inner_optimizer)

        w = axis.expand(params)
        if encode is None:
            found = at(w, functions)
        else:
            found = with_features_once(encode, functions, at, w, task, axis)
        return found._replace(grad=axis.sum(found.grad))

    attention = twice_differentiable() if curvature == "exact" else nullcontext()
    digits = full_precision() if curvature == "finite_difference" else nullcontext()
    with torch.inference_mode(False), attention, digits:
        episodes, params, rates = detached((episodes, params, rates))
        of_tasks = partial(of_chunk, params=params, rates=rates)
        if call is not None:
            of_tasks = partial(_called, call, of_chunk, params, rates)
        mean = mean_over_tasks(of_tasks, episodes, tasks, chunk_size)
    of_rates = [
        {name: mean.grad.pop(rate_name(j, name)) for name in tensor_rates(rates[j])}
        for j in range(steps)
    ]
    return MetaGradient(mean.grad, mean.query_loss, mean.aux, of_rates)


def mean_over_tasks(
    of_tasks: Callable[[AnyEpisodes, TaskAxis], TaskGradient],
    episodes: AnyEpisodes,
    tasks: TaskExecution,
    chunk_size: int | None,
) -> TaskGradient:
    """Return the mean of the tasks' gradients, with query losses ``[T]`` and aux of each task.

    Args:
        of_tasks: Returns the gradient of a task, or the sum of several tasks' gradients.
        episodes: The meta-batch.
        tasks: How tasks are run, see :func:`lightning_maml.execution.task_map.map_tasks`.
        chunk_size: How many tasks are vectorised together.
    """
    chunks = split(episodes, tasks, chunk_size)
    run = mapper(tasks, episodes.support_y.device)
    total: Params | None = None
    each = []
    for axis, found in zip(chunks.axes, run(of_tasks, *chunks), strict=True):
        of_chunk = found.grad
        if axis.size:
            of_chunk = {name: tensor[0] for name, tensor in of_chunk.items()}
        total = of_chunk if total is None else add(total, of_chunk)
        each.append(with_task_dimension((found.query_loss, found.aux), axis))
    assert total is not None, "there is at least one task"
    query_losses, aux = cat_chunks(each)
    if len(query_losses) > 1:
        total = scale(1 / len(query_losses), total)
    else:
        total = _of_their_own(total, tensors(episodes))
    return TaskGradient(total, query_losses, aux)


def _of_their_own(gradients: Params, others: Sequence[Tensor]) -> Params:
    """Return gradients that may be written to: copies of those that share memory with another."""
    taken = {memory(tensor) for tensor in others}
    own: Params = {}
    for name, gradient in gradients.items():
        where = memory(gradient)
        fills_its_memory = gradient.untyped_storage().nbytes() == gradient.nbytes
        own[name] = gradient if fills_its_memory and where not in taken else gradient.clone()
        taken.add(where)
    return own


def _called(
    call: Call,
    of_chunk: Callable[..., TaskGradient],
    params: Params,
    rates: list[Rates],
    task: AnyEpisodes,
    axis: TaskAxis,
) -> Any:
    """Call a function of tasks through ``call``, which is given all tensors that it depends on."""

    def of_tensors(params: Params, rates: list[Rates], task: AnyEpisodes) -> TaskGradient:
        return of_chunk(task, axis, params, rates)

    return call(of_tensors, params, rates, task)


def _check_batches(episodes: AnyEpisodes, steps: int, curvature: CurvatureName) -> None:
    check_support_batches(episodes, steps)
    if not isinstance(episodes, ResampledEpisodes) or curvature == "none" or steps == 0:
        return
    if episodes.hessian_y.shape[2] == 0:
        raise UserValueError(
            "Expected Hessian batches of at least one example with "
            f"`curvature={curvature!r}` but got none; draw some (a datamodule's `hessian_shots`), "
            "or train FO-MAML, which needs none."
        )
