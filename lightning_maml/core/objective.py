"""The loss of one batch, or of one batch of each of several tasks, as a function of the parameters alone, with its derivatives.

Several tasks are stacked: they are the first dimension of parameters, gradients and values. As each
task's loss depends on its own parameters alone, the gradient of the sum of the losses holds the
gradients of all tasks, and one Hessian-vector product holds the products of all.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_maml.core.context import evaluating
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states, torch_random_state
from lightning_maml.core.task_axis import ONE, Stack

BatchLoss = Callable[[Params], tuple[Tensor, Any]]
"""Maps parameters to the loss of a fixed batch (a scalar) and anything else worth keeping (the
network's outputs, or ``()``)."""

Tensors = tuple[Tensor, ...]

_NO_SECOND_DERIVATIVE = re.compile(
    "derivative for .* is not implemented|differentiate twice|double backward|expected a proper "
    "tensor but got none",
    re.IGNORECASE,
)


class NoSecondDerivativeError(ValueError):
    """An operation of the network or of the loss cannot be differentiated twice."""


def twice_differentiable() -> AbstractContextManager[Any]:
    """Return a context in which attention has a second derivative: its fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)


class Objective:
    """The loss and its derivatives.

    Every evaluation draws the same random numbers (dropout masks) as the first one did, from torch,
    numpy and Python.

    Args:
        loss: The loss of one task; or of the tasks of ``stack``, with a value of ``[T]``.
        stack: The tasks.
    """

    def __init__(self, loss: BatchLoss, stack: Stack = ONE) -> None:
        self.stack = stack
        self._loss = loss
        self._random_state: dict[str, Any] | None = None
        self._kept: tuple[Params, Params, Params] | None = None

    def value_and_gradient(
        self, w: Params, names: Collection[str] | None = None
    ) -> tuple[Tensor, Any, Params]:
        """Return the loss at ``w`` (which has no graph), what the loss function returned besides it, and the gradient, all without a graph.

        With ``names``, the gradient is with respect to these parameters only.
        """
        names = w if names is None else names
        leaves, value, aux = self._evaluate(w, names)
        gradient = torch.autograd.grad(
            value, [leaves[name] for name in names], torch.ones_like(value), materialize_grads=True
        )
        aux = torch.utils._pytree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux
        )
        return value.detach(), aux, dict(zip(names, map(_dense, gradient), strict=True))

    def gradient(
        self, w: Params, names: Collection[str] | None = None, *, keep_graph: bool = False
    ) -> Params:
        """Return the gradient at ``w``; with ``keep_graph`` a Hessian-vector product at this same ``w`` may reuse the work."""
        if not keep_graph:
            return self.value_and_gradient(w, names)[2]
        leaves, gradient = self._differentiable_gradient(w, w if names is None else names)
        self._kept = (w, leaves, gradient)
        return {name: tensor.detach() for name, tensor in gradient.items()}

    def hessian_vector_product(self, w: Params, v: Params) -> Params:
        """Return the Hessian at ``w`` times ``v``, which counts as zero where it has no entry."""
        if self._kept is not None and self._kept[0] is w:
            _, leaves, gradient = self._kept
            self._kept = None
        else:
            leaves, gradient = self._differentiable_gradient(w, v)
        return _pull_back_gradient(leaves, gradient, v)

    @staticmethod
    def pull_back(
        function: Callable[[Params], Tensors], w: Params
    ) -> tuple[Tensors, Callable[[Tensors], Params]]:
        """Return ``function(w)``, without a graph, and a function that pulls gradients of these tensors back to those of ``w``."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in w.items()}
        with torch.enable_grad(), evaluating(derivatives=1):
            outputs = function(leaves)
        curved = [number for number, output in enumerate(outputs) if output.requires_grad]

        def back(gradients: Tensors) -> Params:
            found = torch.autograd.grad(
                [outputs[k] for k in curved],
                [*leaves.values()],
                [gradients[k] for k in curved],
                materialize_grads=True,
            )
            return dict(zip(leaves, found, strict=True))

        return tuple(output.detach() for output in outputs), back

    def hessian(self, w: Params) -> Callable[[Params], Params]:
        """Return the product with the Hessian at ``w`` as a function that keeps the gradient's graph, for many products at one point."""
        leaves, gradient = self._differentiable_gradient(w, w)
        return lambda v: _pull_back_gradient(leaves, gradient, v, retain_graph=True)

    def _differentiable_gradient(self, w: Params, names: Collection[str]) -> tuple[Params, Params]:
        leaves, value, _ = self._evaluate(w, w, times=2)
        at = [leaves[name] for name in names]
        with _second_derivatives():
            gradient = torch.autograd.grad(
                value, at, torch.ones_like(value), create_graph=True, materialize_grads=True
            )
        return leaves, dict(zip(names, map(_dense, gradient), strict=True))

    def _evaluate(
        self, w: Params, names: Collection[str], times: Literal[1, 2] = 1
    ) -> tuple[Params, Tensor, Any]:
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in w.items()}
        with torch.enable_grad(), self._same_randomness(w), evaluating(derivatives=times):
            value, aux = self._loss(leaves)
        if names and not value.requires_grad:
            raise ValueError(
                "Expected a loss that depends on the network's parameters but nothing leads from "
                "it to them; look for torch.no_grad, .detach() and .item() in the network and "
                "the loss, and where a task has no loss, return 0 * outputs.sum()."
            )
        return leaves, value, aux

    @contextmanager
    def _same_randomness(self, w: Params) -> Iterator[None]:
        device = next(iter(w.values())).device
        # stacked tasks draw from torch alone: the trial of stacking refuses networks that draw from
        # numpy or Python
        read = generator_states if self.stack.dim == 0 else torch_random_state
        now = read(device)
        if self._random_state is None:
            self._random_state = now
            yield
            return
        set_generator_states(self._random_state, device)
        try:
            yield
        finally:
            set_generator_states(now, device)


def _pull_back_gradient(
    leaves: Params, gradient: Params, v: Params, retain_graph: bool = False
) -> Params:
    curved = [(g, v[name]) for name, g in gradient.items() if g.requires_grad]
    if not curved:  # the loss is linear in the parameters
        return {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
    outputs, cotangents = zip(*curved, strict=True)
    with _second_derivatives():
        product = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            cotangents,
            retain_graph=retain_graph,
            materialize_grads=True,
        )
    return dict(zip(leaves, map(_dense, product), strict=True))


def _dense(gradient: Tensor) -> Tensor:
    # embeddings may have sparse ones
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Say in a sentence that an operation has no second derivative, for which torch has words but no type of exception."""
    try:
        yield
    except RuntimeError as error:
        if not _NO_SECOND_DERIVATIVE.search(str(error)):
            raise
        raise NoSecondDerivativeError(
            "Expected a network and a loss with second derivatives but torch has none for one of "
            f"their operations ({error}); train with FOMAML or HFMAML, which need none, or put "
            "another layer in its place (Hardswish or SiLU for Hardsigmoid, for instance)."
        ) from error
