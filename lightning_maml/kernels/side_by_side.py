"""One call of torch for a layer of all tasks in a stack."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def for_all_tasks(
    stacked: Callable[..., Tensor],
    alone: Callable[..., Tensor],
    x: Tensor,
    *parameters: Tensor | None,
) -> Tensor:
    """Run a layer once for all tasks of a stack, outside of ``vmap``.

    It is called under ``vmap`` with the ``x``, ``[B, C, ...]``, and the parameters of one task. So
    ``stacked`` may use operations that ``vmap`` does not support.

    Args:
        stacked: Computes the layer from ``x`` as ``[B, T, C, ...]``, and parameters that are all
            ``[T, ...]`` or all shared.
        alone: Computes the layer as without ``vmap``, where no tensor has a task dimension.
        x: The layer's input.
        *parameters: Its parameters.

    Returns:
        The layer's result for one task.

    Examples:
        >>> import torch
        >>> from lightning_maml.kernels.side_by_side import for_all_tasks
        >>> def scaled(x, weight):
        ...     print(list(x.shape), list(weight.shape))
        ...     return x * weight[:, None]
        >>> x, weight = torch.ones(5, 2, 3), torch.ones(5)  # five tasks, two examples each
        >>> run = torch.func.vmap(lambda x, weight: for_all_tasks(scaled, torch.mul, x, weight))
        >>> run(x, weight).shape
        [2, 5, 3] [5]
        torch.Size([5, 2, 3])
    """
    try:
        y: Tensor = _StackedLayer.apply(stacked, x, *parameters)
    except _NothingIsStackedError:
        return alone(x, *parameters)
    return y


class _NothingIsStackedError(Exception):
    """No tensor of a layer has a task dimension."""


class _StackedLayer(torch.autograd.Function):
    """Torch's way of saying what a call does under ``vmap``."""

    @staticmethod
    def forward(stacked: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Always raise: torch calls it only if no tensor has a task dimension."""
        raise _NothingIsStackedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """No context is saved; ``forward`` always raises."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        stacked: Callable[..., Tensor],
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, int]:
        """Return the layer's results for all tasks, and 1 for their task dimension.

        Args:
            info: Torch's information about the transform; has the number of tasks.
            in_dims: The task dimension of each argument, None if it has none.
            stacked: The layer.
            x: Its input.
            *parameters: Its parameters.
        """
        _, dim_of_x, *dims = in_dims
        tasks: int = info.batch_size
        if dim_of_x is None:
            x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:])
        else:
            x = x.movedim(dim_of_x, 1)
        if all(dim is None for dim in dims):
            return stacked(x, *parameters), 1
        with_tasks: list[Tensor | None] = []
        for p, dim in zip(parameters, dims, strict=True):
            if p is None:
                with_tasks.append(None)
            elif dim is None:
                with_tasks.append(p.expand(tasks, *p.shape))
            else:
                with_tasks.append(p.movedim(dim, 0))
        return stacked(x, *with_tasks), 1
