"""The loss of a batch as a function of the parameters alone, with its derivatives.

With a task axis it holds the losses of several tasks, each of its own batch, and parameters and
gradients have the tasks in front too. As each task's loss depends on its own parameters alone, the
gradient of the sum of the losses holds the gradients of all tasks, and one Hessian-vector product
holds the products of all.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from lightning_maml.core.context import evaluating
from lightning_maml.core.params import Params
from lightning_maml.core.rng import (
    draws_nothing,
    generator_states,
    set_generator_states,
    torch_random_state,
)
from lightning_maml.core.task_axis import SINGLE_TASK, TaskAxis
from lightning_maml.core.tensors import is_out_of_memory
from lightning_maml.errors import UserError, UserValueError

BatchLoss = Callable[[Params], tuple[Tensor, Any]]
"""Maps parameters to the loss of a fixed batch, a scalar, and anything else worth keeping.

That is the network's outputs, or ``()``.
"""


class NoSecondDerivativeError(UserValueError):
    """An operation of the network or of the loss cannot be differentiated twice."""


def twice_differentiable() -> AbstractContextManager[Any]:
    """Return a context in which attention has a second derivative: its fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)


class Objective:
    """The loss of a batch and its derivatives.

    Every evaluation draws the same random numbers (dropout masks) as the first one did, from torch,
    numpy and Python.

    Args:
        loss: The loss of one task; with a task axis, of all tasks, with a value of ``[T]``.
        axis: The task axis.
        keep_graph: Keep the graph of a gradient for a Hessian-vector product at the same point,
            which then need not build it again.

    Examples:
        >>> import torch
        >>> from lightning_maml.core.objective import Objective
        >>> cube = Objective(lambda w: ((w["x"] ** 3).sum(), ()))
        >>> w = {"x": torch.tensor([2.0, 1.0])}
        >>> cube.gradient(w)
        {'x': tensor([12.,  3.])}
        >>> cube.hessian_vector_product(w, {"x": torch.tensor([1.0, 1.0])})
        {'x': tensor([12.,  6.])}
    """

    def __init__(
        self, loss: BatchLoss, axis: TaskAxis = SINGLE_TASK, *, keep_graph: bool = False
    ) -> None:
        self.axis = axis
        self._loss = loss
        self._keep_graph = keep_graph
        self._kept: tuple[Params, Params, dict[str, GradientEdge]] | None = None
        self._random_state: dict[str, Any] | None = None

    def draw(self, w: Params) -> None:
        """Draw the batch at ``w``, unless it was drawn before; here it is fixed."""

    def value(self, w: Params) -> tuple[Tensor, Any]:
        """Return the loss at ``w``, and what the loss function returned besides it."""
        return self._loss(w)

    def value_and_gradient(
        self, w: Params, names: Collection[str] | None = None
    ) -> tuple[Tensor, Any, Params]:
        """Return the loss at ``w``, what the loss function returned besides it, and the gradient.

        Args:
            w: The point; its tensors have no graph.
            names: The parameters to differentiate with respect to; by default all.

        Returns:
            Three trees of tensors without graphs.
        """
        names = w if names is None else names
        leaves, value, aux = self._evaluate(w, names)
        at = [leaves[name] for name in names]
        found = torch.autograd.grad(value, at, torch.ones_like(value), materialize_grads=True)
        aux = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)
        return value.detach(), aux, _by_name(names, found)

    def gradient(self, w: Params, names: Collection[str] | None = None) -> Params:
        """Return the gradient at ``w``, for the parameters ``names`` or for all of them."""
        if not self._keep_graph:
            return self.value_and_gradient(w, names)[2]
        leaves, gradient = self._differentiable_gradient(w, w if names is None else names)
        # the place of the gradient in its graph, without its numbers
        edges = {name: get_gradient_edge(g) for name, g in gradient.items() if g.requires_grad}
        self._kept = (w, leaves, edges)
        return {name: tensor.detach() for name, tensor in gradient.items()}

    def hessian_vector_product(self, w: Params, v: Params) -> Params:
        """Return the Hessian at ``w`` times ``v``, which counts as zero where it has no entry."""
        if self._kept is not None and self._kept[0] is w:
            _, leaves, edges = self._kept
            self._kept = None
            return self._pull_back_gradient(w, leaves, edges, v)
        return self._pull_back_gradient(w, *self._differentiable_gradient(w, v), v)

    def hessian(self, w: Params) -> Callable[[Params], Params]:
        """Return the product with the Hessian at ``w`` as a function, for many products."""
        leaves, gradient = self._differentiable_gradient(w, w)
        return lambda v: self._pull_back_gradient(w, leaves, gradient, v, retain_graph=True)

    def _differentiable_gradient(self, w: Params, names: Collection[str]) -> tuple[Params, Params]:
        leaves, value, _ = self._evaluate(w, w, times=2)
        at = [leaves[name] for name in names]
        with self._second_derivatives(w):
            gradient = torch.autograd.grad(
                value, at, torch.ones_like(value), create_graph=True, materialize_grads=True
            )
        return leaves, _by_name(names, gradient)

    def _pull_back_gradient(
        self,
        w: Params,
        leaves: Params,
        gradient: Mapping[str, Tensor | GradientEdge],
        v: Params,
        *,
        retain_graph: bool = False,
    ) -> Params:
        curved = [
            (g, v[name])
            for name, g in gradient.items()
            if isinstance(g, GradientEdge) or g.requires_grad
        ]
        if not curved:  # the loss is linear in the parameters
            return {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        outputs, cotangents = zip(*curved, strict=True)
        with self._second_derivatives(w):
            product = torch.autograd.grad(
                outputs,
                list(leaves.values()),
                cotangents,
                retain_graph=retain_graph,
                materialize_grads=True,
            )
        return _by_name(leaves, product)

    @contextmanager
    def _second_derivatives(self, w: Params) -> Iterator[None]:
        """Say in a sentence that an operation has no second derivative.

        Torch has no type of error for it. That is what failed if first derivatives do not.
        """
        try:
            yield
        except RuntimeError as error:
            # torch raises the death of a loader's process wherever the main thread is
            of_a_loader = str(error).startswith("DataLoader worker")
            if isinstance(error, UserError) or is_out_of_memory(error) or of_a_loader:
                raise
            try:
                self.value_and_gradient(w)
            except Exception:  # noqa: BLE001 # the first error says what is wrong
                raise error from None
            raise NoSecondDerivativeError(
                "Expected a network and a loss with second derivatives but one of their operations "
                f"has none ({error}); train with FOMAML or HFMAML, which need none, or put another "
                "layer in its place (Hardswish or SiLU for Hardsigmoid, for instance)."
            ) from error

    def _evaluate(
        self, w: Params, names: Collection[str], times: Literal[1, 2] = 1
    ) -> tuple[Params, Tensor, Any]:
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in w.items()}
        with torch.enable_grad(), self._same_randomness(w), evaluating(derivatives=times):
            value, aux = self._loss(leaves)
        if names and not value.requires_grad:
            raise UserValueError(
                "Expected a loss that depends on the network's parameters but nothing leads from "
                "it to them; look for torch.no_grad, .detach() and .item() in the network and "
                "the loss, and where a task has no loss, return 0 * outputs.sum()."
            )
        return leaves, value, aux

    @contextmanager
    def _same_randomness(self, w: Params) -> Iterator[None]:
        if draws_nothing():
            yield
            return
        device = next(iter(w.values())).device
        # stacked tasks draw from torch alone: the trial of stacking refuses networks that draw from
        # numpy or Python
        read = generator_states if self.axis.size == 0 else torch_random_state
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


def _by_name(names: Collection[str], gradients: Iterable[Tensor]) -> Params:
    # embeddings may have sparse gradients
    dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in gradients]
    return dict(zip(names, dense, strict=True))
