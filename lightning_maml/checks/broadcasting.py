"""Check that a loss does not broadcast targets over outputs."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import differentiable
from lightning_maml.checks.loss_checks import takes, unchanged_buffers
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory, memory
from lightning_maml.errors import UserValueError

_UNUSUAL = 13
"""The smallest number of examples by which their dimension is told from all others."""

_OF_CLASSES = re.compile("_?(nll|multi_margin|multilabel_margin|ctc)_loss|.*cross_entropy_loss")
"""Losses of class labels, which are not compared with outputs element by element."""

_SHORT = (torch.int8, torch.int16, torch.int32)
"""Types of integers that torch's losses do not take for labels."""

_EXPANDING = (
    Tensor.expand,
    Tensor.expand_as,
    Tensor.broadcast_to,
    torch.broadcast_to,
    torch.broadcast_tensors,
)


def check_broadcasting(
    loss: Callable[[Any, Tensor], Tensor],
    outputs: Callable[[int], Any],
    targets: tuple[Tensor, ...],
) -> None:
    """Check that a loss does not broadcast targets over outputs.

    With targets ``[B]`` and outputs ``[B, 1]``, for instance, ``mse_loss`` compares all pairs. The
    loss is called with a number of examples that no other dimension has, so that the dimension of
    the examples can be told from all others. A loss that takes only the batch's own number of
    examples is called with that.

    Args:
        loss: The loss.
        outputs: Maps the index of a batch to the network's outputs for it, tensors ``[B, ...]``.
        targets: Labels or targets of each batch, ``[B, ...]``.

    Raises:
        ValueError: If the loss broadcasts targets, or fails.
    """
    device = targets[0].device
    before = generator_states(device)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            unchanged_buffers(loss),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the first step will give the same warnings
            first = outputs(0)
            for number, y in enumerate(targets):
                _check_one_batch(loss, first, partial(outputs, number), differentiable(y))
    finally:
        set_generator_states(before, device)


def _check_one_batch(
    loss: Callable[[Any, Tensor], Tensor],
    outputs: Any,
    own_outputs: Callable[[], Any],
    targets: Tensor,
) -> None:
    """Check a loss on one batch of targets.

    Args:
        loss: The loss.
        outputs: Outputs of the network, for any batch.
        own_outputs: Computes the outputs for the batch of these targets.
        targets: Labels or targets ``[B, ...]``.

    Raises:
        ValueError: If the loss broadcasts targets, or fails on the batch's own outputs.
    """
    sizes = {size for tensor in (*tensors_in(outputs), targets) for size in tensor.shape}
    unusual = _UNUSUAL
    while unusual in sizes:
        unusual += 1
    try:
        _follow(loss, outputs, targets, unusual)
    except _Broadcast:
        raise _mismatch(outputs, targets) from None
    except Exception:  # noqa: BLE001 # a loss may need the number of examples that it is given
        outputs = own_outputs()
        try:
            _follow(loss, outputs, targets, len(targets))
        except _Broadcast:
            raise _mismatch(outputs, targets) from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            if _takes_targets_like_outputs(loss, outputs, targets):
                raise _mismatch(outputs, targets) from error
            raise _failure(outputs, targets, error) from error


def _failure(outputs: Any, targets: Tensor, error: Exception) -> UserValueError:
    """Return the error for a loss that fails on outputs and targets."""
    shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors_in(outputs))
    held = "" if isinstance(outputs, Tensor) else f", in {type(outputs).__name__},"
    cure = "; y.long() may be what it takes" if targets.dtype in _SHORT else ""
    return UserValueError(
        f"Expected a loss that takes outputs {shapes}{held} with targets {list(targets.shape)} of "
        f"{targets.dtype}, but it fails{cure}: {error}"
    )


def _takes_targets_like_outputs(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor
) -> bool:
    """Return whether a loss that fails would run with targets of the outputs' shape."""
    if not isinstance(outputs, Tensor) or outputs.shape == targets.shape:
        return False
    # the cross-entropy would take probabilities too, but what it needs are labels of type long
    if not targets.is_floating_point() and takes(loss, outputs, targets.long()):
        return False
    return takes(loss, outputs, torch.zeros_like(outputs))


def _follow(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor, examples: int
) -> None:
    """Call the loss on ``examples`` examples, and follow what it does with them.

    These are the examples at hand, repeated from the first one on if there are fewer.

    Raises:
        _Broadcast: If the loss broadcasts outputs and targets over one another.
    """
    number = max((len(tensor) for tensor in tensors_in(outputs) if tensor.ndim), default=0)

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != number:
            return tensor
        rows = tensor.detach()[torch.arange(examples, device=tensor.device) % number]
        return rows.requires_grad_(tensor.is_floating_point())

    of_outputs = map_outputs(repeated, outputs)
    of_targets = targets[torch.arange(examples, device=targets.device) % len(targets)]
    with _Following(tensors_in(of_outputs), of_targets, examples), _CopiesOfExpanded():
        loss(of_outputs, of_targets)


def _mismatch(outputs: Any, targets: Tensor) -> UserValueError:
    """Return the error for a loss that broadcasts targets over outputs."""
    found = tensors_in(outputs)
    is_one = len(found) == 1
    shape = found[0].shape[1:] if is_one else torch.Size()
    are_labels = not targets.is_floating_point() and targets.ndim == 1
    if is_one and are_labels and len(shape) == 1:
        return UserValueError(
            "Expected a loss of labels but got one that fits labels [examples] to outputs "
            f"[examples, {shape[0]}] element by element; use `loss=lightning_maml.one_hot_mse` or "
            "the cross-entropy, or if there is one output, outputs[:, 0] in the loss."
        )
    expected = f"[{', '.join(['examples', *map(str, shape)])}]" if is_one else "the same"
    return UserValueError(
        f"Expected targets of the shape of the network's outputs, {expected}, but got "
        f"{list(targets.shape)}; reshape them, y[..., None] for instance, or the outputs; if the "
        "loss is to broadcast them, let it say so, y.expand_as(outputs)."
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _CopiesOfExpanded(TorchFunctionMode):
    """Copies tensors that a loss itself expands, so that they no longer look broadcast.

    Such a loss means to broadcast, unlike torch's losses, which expand tensors inside of them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _EXPANDING:
            return result
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)


class _Broadcast(Exception):
    """Outputs and targets were broadcast over one another."""


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which tensors are computed from outputs and which from targets.

    They are told by their memory, which views share.

    Args:
        outputs: Outputs of the network.
        targets: Labels or targets.
        examples: The number of examples, unlike all other sizes if possible.

    Raises:
        _Broadcast: If an elementwise operation fits one to the other only by broadcasting.
    """

    def __init__(self, outputs: list[Tensor], targets: Tensor, examples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._examples = examples
        self._shape = tuple(targets.shape)
        # references, so that no other tensor gets the same memory
        self._kept: list[Tensor] = [*outputs, targets]
        self._from_outputs = {memory(tensor) for tensor in outputs}
        self._from_targets = {memory(targets)}
        self._casts = {memory(targets)}  # the targets themselves, perhaps of another type

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = _tensors((args, kwargs or {}))
        of_outputs = [tensor for tensor in tensors if memory(tensor) in self._from_outputs]
        of_targets = [tensor for tensor in tensors if memory(tensor) in self._from_targets]
        if of_outputs and of_targets and _is_elementwise(func):
            for one in of_outputs:
                for other in of_targets:
                    self._check(one, other)
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        self._kept += made
        memories = {memory(tensor) for tensor in made}
        if of_outputs:
            self._from_outputs |= memories
        if of_targets:
            self._from_targets |= memories
        is_cast = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone)
        if is_cast and memory(tensors[0]) in self._casts:
            self._casts |= memories
        return result

    def _check(self, one: Tensor, other: Tensor) -> None:
        """Check a tensor made from outputs against one made from targets alone.

        Args:
            one: Computed from outputs.
            other: Computed from targets.

        Raises:
            _Broadcast: If they fit only by broadcasting.
        """
        if memory(other) in self._from_outputs:
            return
        a, b, n = _unexpanded(one), _unexpanded(other), self._examples
        if not a or not b:
            return
        try:
            together = tuple(torch.broadcast_shapes(a, b))  # type: ignore[no-untyped-call]
        except RuntimeError:
            return  # torch will refuse it with an error of its own
        differ = len(a) != len(b)
        # [n, 1] against [n] gives [n, n]: all pairs of examples
        pairs_examples = differ and together.count(n) > max(a.count(n), b.count(n))
        # what was computed from both, such as a weighted loss, may be broadcast on purpose
        is_pure = memory(one) not in self._from_targets
        both_lead = is_pure and a[0] == b[0] == n
        # the targets as they were given must have the shape of the outputs
        are_targets = memory(other) in self._casts and b == self._shape
        if pairs_examples or (both_lead and (differ or (are_targets and a != b))):
            raise _Broadcast


def _is_elementwise(func: Any) -> bool:
    name = func.__name__
    is_elementwise_loss = "loss" in name and not _OF_CLASSES.match(name)
    return torch.Tag.pointwise in func.tags or is_elementwise_loss


def _unexpanded(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor before it was expanded.

    Torch's losses expand outputs and targets before they compare them. Expanded dimensions have
    strides of zero.
    """
    sizes = [
        1 if stride == 0 else size
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    # expand also adds dimensions in front
    first = next((dim for dim, stride in enumerate(tensor.stride()) if stride != 0), 0)
    return tuple(sizes[first:])
