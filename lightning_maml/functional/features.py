"""Features computed once per task, where what precedes them does not adapt (ANIL)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.context import evaluating
from lightning_maml.core.meta_gradient import TaskGradient
from lightning_maml.core.params import Params, add
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.functional.losses import LossFunctions

Encode = Callable[[Params, Any], tuple[Tensor, Tensor]]
"""``encode(params, task)``: the features of one task's support and query inputs."""

# names that no parameters have
_FEATURES = ("(features of the support set)", "(features of the query set)")


def with_features_once(
    encode: Encode,
    functions: LossFunctions,
    gradient_at: Callable[[Params, LossFunctions], TaskGradient],
    w: Params,
    task: AnyEpisodes,
    axis: TaskAxis,
) -> TaskGradient:
    """Return the meta-gradient with the features in place of the inputs.

    The features are treated as parameters that do not adapt; their gradient is then taken back to
    the parameters that they were computed from, by the chain rule.

    Args:
        encode: Computes the features.
        functions: The losses of features and labels.
        gradient_at: Returns the meta-gradient at some parameters, with some losses.
        w: The meta-parameters.
        task: One task; with a task axis, several.
        axis: The task axis.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in w.items()}
    with torch.enable_grad(), evaluating(derivatives=1):
        features = axis.vmap(encode)(leaves, task)
    by_name = dict(zip(_FEATURES, features, strict=True))
    at = w | {name: tensor.detach() for name, tensor in by_name.items()}
    found = gradient_at(at, _of_features(functions))
    curved = {name: tensor for name, tensor in by_name.items() if tensor.requires_grad}
    through = torch.autograd.grad(
        [*curved.values()],
        [*leaves.values()],
        [found.grad[name] for name in curved],
        materialize_grads=True,
    )
    own = {name: tensor for name, tensor in found.grad.items() if name not in _FEATURES}
    return found._replace(grad=add(own, dict(zip(leaves, through, strict=True))))


def _of_features(functions: LossFunctions) -> LossFunctions:
    """Return the losses with the features, which are among the parameters, for the inputs."""
    support, query = _FEATURES
    loss: Any = functions.loss
    query_loss: Any = functions.query_loss

    def of_support(w: Params, _: Any, y: Tensor) -> Any:
        return loss(w, w[support], y)

    def of_query(w: Params, task: AnyEpisodes) -> Any:
        if query_loss is None:
            return loss(w, w[query], task.query_y)
        return query_loss(w, task._replace(query_x=w[query]))

    return functions._replace(loss=of_support, query_loss=of_query)
