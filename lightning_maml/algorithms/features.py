"""What a model whose head alone adapts computes once per task: the features that enter the head."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.params import Params
from lightning_maml.core.task_axis import TaskAxis
from lightning_maml.execution.auto import Execution
from lightning_maml.execution.task_map import are_stacked, cat_chunks, map_tasks
from lightning_maml.networks.functional_network import FunctionalHead, FunctionalNetwork


def functional_head(network: nn.Module, head: str, execution: Execution) -> FunctionalHead:
    """Return the head of a network as a function, for tasks that are run in some way."""
    return FunctionalHead(network, head, vectorised=are_stacked(*execution))


def encode(
    functional: FunctionalNetwork, head: str, params: Params, task: AnyEpisodes
) -> tuple[Tensor, Tensor]:
    """Return what enters the head for a task's support and query inputs."""
    statistics_of = task.support_x if functional.uses_support_statistics else None
    support = functional.features(params, task.support_x, head)
    query = functional.features(params, task.query_x, head, statistics_of=statistics_of)
    dtype = next(iter(params.values())).dtype
    return _in_full(support, dtype), _in_full(query, dtype)


def _in_full(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features, computed under autocast, as inputs of what runs without it."""
    both_real = features.is_floating_point() and dtype.is_floating_point
    return features.to(dtype) if both_real else features


def with_features(
    functional: FunctionalNetwork, head: str, execution: Execution, episodes: AnyEpisodes
) -> AnyEpisodes:
    """Return episodes with the features that enter the head in place of the inputs."""
    of_task = partial(encode, functional, head, functional.params)

    def of_tasks(task: AnyEpisodes, axis: TaskAxis) -> Any:
        return axis.vmap(of_task)(task)

    chunks = [*map_tasks(of_tasks, episodes, **execution._asdict())]
    support_x, query_x = cat_chunks(chunks)
    return episodes._replace(support_x=support_x, query_x=query_x)
