"""What an inner step does with a gradient, where it is more than gradient descent.

An inner step is ``(w_{j+1}, s_{j+1}) = U(w_j, s_j, g_j, A_j)`` with ``g_j = grad l(w_j; S_j)`` and
the optimizer's state s, which starts anew for each task.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_maml.errors import UserTypeError, UserValueError, check_truth

Slots = tuple[Tensor, ...]
"""The optimizer's state of one parameter: momentum, for instance."""


class InnerOptimizer(ABC):
    """What an inner step does with a gradient; subclasses define it for one parameter tensor.

    Meta-gradients are taken through :meth:`step` by autograd, so it must not write to its arguments
    or draw random numbers, and should be differentiable wherever the inner steps come. What it
    remembers belongs in the state that it returns: all parameters and tasks share the optimizer and
    its attributes. It sees one parameter at a time, without its name: what needs several at once
    (the norm of all gradients) or some alone (no decay of biases) cannot be written as one.

    Examples:
        >>> import torch
        >>> from lightning_maml import FOMAML, MLP, InnerOptimizer
        >>> class SignDescent(InnerOptimizer):
        ...     def step(self, w, gradient, rate, slots, number):
        ...         return w - rate * gradient.sign(), slots
        >>> model = FOMAML(MLP(4, 3), inner_lr=0.01, inner_optimizer=SignDescent())
    """

    def __repr__(self) -> str:
        """Return the class and its settings, which checkpoints record."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def start(self, w: Tensor) -> Slots:
        """Return the state before the first step, constants; by default there is none.

        Args:
            w: A parameter.
        """
        return ()

    @abstractmethod
    def step(
        self, w: Tensor, gradient: Tensor, rate: Tensor | float, slots: Slots, number: int
    ) -> tuple[Tensor, Slots]:
        """Return the parameter and its state after an inner step.

        Args:
            w: The parameter.
            gradient: The support loss's gradient for it, of the same shape.
            rate: Its inner rate: a number, or a tensor that broadcasts to it.
            slots: Its state.
            number: 0 for the first step.
        """


@dataclass(frozen=True)
class InnerSGD(InnerOptimizer):
    """Gradient descent with momentum and weight decay, as ``torch.optim.SGD`` takes it.

    There is no ``dampening``.

    Args:
        momentum: Factor of the previous steps' gradients; by default 0.
        weight_decay: Adds this multiple of the parameter to its gradient; by default 0.
        nesterov: Nesterov's momentum.

    Raises:
        TypeError: If ``nesterov`` is neither True nor False.
        ValueError: If a number is negative, or Nesterov's momentum is 0.

    Examples:
        >>> from lightning_maml import MAML, MLP, InnerSGD
        >>> model = MAML(MLP(4, 3), inner_lr=0.1, inner_optimizer=InnerSGD(momentum=0.9))
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_numbers(momentum=self.momentum, weight_decay=self.weight_decay)
        check_truth(nesterov=self.nesterov)
        if self.nesterov and not self.momentum:
            raise UserValueError(
                "Expected a `momentum` above 0 with `nesterov=True` but got 0; give one, or leave "
                "`nesterov` out."
            )

    @override
    def start(self, w: Tensor) -> Slots:
        return (torch.zeros_like(w),) if self.momentum else ()

    @override
    def step(
        self, w: Tensor, gradient: Tensor, rate: Tensor | float, slots: Slots, number: int
    ) -> tuple[Tensor, Slots]:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * w
        if not self.momentum:
            return w - rate * gradient, ()
        velocity = self.momentum * slots[0] + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return w - rate * direction, (velocity,)


@dataclass(frozen=True)
class InnerAdam(InnerOptimizer):
    """Adam, as ``torch.optim.Adam`` takes it; with decoupled weight decay ``AdamW``.

    There is no ``amsgrad``, and the decay is 0 unless it is given (0.01 in ``torch.optim.AdamW``).

    Where all gradients of an element were 0 so far, its derivative is that of the limit: the step
    is then linear in the gradient, with a slope of about ``inner_lr / eps``. The exact
    meta-gradient is as steep there, so that an ``eps`` of 1e-3 or more is advisable with it.

    Args:
        betas: Factors of the averages of gradients and of their squares.
        eps: Added to the root of the mean square; above 0.
        weight_decay: Adds this multiple of the parameter to its gradient; by default 0.
        decoupled_weight_decay: Subtract this multiple of the parameter, times the rate, from the
            parameter instead (Loshchilov and Hutter 2019).

    Raises:
        TypeError: If ``decoupled_weight_decay`` is neither True nor False, or, at the first batch,
            if parameters are complex.
        ValueError: If a number is negative, or a beta is not below 1.

    Examples:
        >>> from lightning_maml import FOMAML, MLP, InnerAdam
        >>> model = FOMAML(MLP(4, 3), inner_lr=1e-3, inner_optimizer=InnerAdam(betas=(0.0, 0.999)))
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        pair = self.betas if isinstance(self.betas, tuple | list) else ()
        if len(pair) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in pair):
            raise UserValueError(
                f"Expected `betas` to be two numbers in [0, 1) but got {self.betas}."
            )
        object.__setattr__(self, "betas", tuple(pair))  # a list has no hash
        _check_numbers(eps=self.eps, weight_decay=self.weight_decay)
        check_truth(decoupled_weight_decay=self.decoupled_weight_decay)
        if not self.eps:
            raise UserValueError(
                "Expected `eps` to be above 0, because an element without gradient is divided by "
                "it, but got 0."
            )

    @override
    def start(self, w: Tensor) -> Slots:
        if w.is_complex():
            raise UserTypeError(
                "Expected real parameters with InnerAdam but got complex ones; use InnerSGD, or "
                "parameters that are real, of which the network makes complex numbers."
            )
        return torch.zeros_like(w), torch.zeros_like(w)

    @override
    def step(
        self, w: Tensor, gradient: Tensor, rate: Tensor | float, slots: Slots, number: int
    ) -> tuple[Tensor, Slots]:
        if self.weight_decay and self.decoupled_weight_decay:
            w = w - rate * self.weight_decay * w
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * w
        beta, beta_of_squares = self.betas
        mean = beta * slots[0] + (1 - beta) * gradient
        square = beta_of_squares * slots[1] + (1 - beta_of_squares) * gradient.square()
        corrected = mean / (1 - beta ** (number + 1))
        scale = _root(square / (1 - beta_of_squares ** (number + 1))) + self.eps
        return w - rate * corrected / scale, (mean, square)


def _root(square: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 at 0.

    A mean square is 0 where the mean is, and the derivative of their quotient does not depend on
    that of the root.
    """
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def check_inner_optimizer(optimizer: Any) -> None:
    """Check an argument called ``inner_optimizer``.

    Raises:
        TypeError: If it is none, one of torch's for instance.
    """
    if optimizer is None or isinstance(optimizer, InnerOptimizer):
        return
    got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    raise UserTypeError(
        "Expected `inner_optimizer` to be an InnerOptimizer, whose steps can be differentiated, "
        f"but got {got}; give InnerSGD(momentum=0.9), InnerAdam(), or one of your own."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise UserValueError(
                f"Expected `{name}` to be a finite number of at least 0 but got {value}."
            )
