"""Checks that labels and targets fit a network's outputs, and that the loss is right for them."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_maml.batches.episodes import (
    AnyEpisodes,
    ResampledEpisodes,
    first_task,
    support_set,
)
from lightning_maml.batches.losses import one_hot_mse
from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import detached, differentiable
from lightning_maml.checks.network_checks import first_support
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory, leaves_of, memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import held_tensors, put_back
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.watching import reading

_UNUSUAL = 13
"""The smallest number of examples by which their dimension is told from all others."""

_OF_CLASSES = re.compile("_?(nll|multi_margin|multilabel_margin|ctc)_loss|.*cross_entropy_loss")
"""Losses of class labels, which are not compared with outputs element by element."""

_PADDING = -100
"""The label that torch's losses ignore by default."""

_UNLABELLED = 255
"""The label of pixels without one, in many datasets."""

_SHORT = (torch.int8, torch.int16, torch.int32)
"""Types of integers that torch's losses do not take for labels."""


def ignored_label(loss: Any) -> int | None:
    """Return the label of the examples that a loss leaves out, its ``ignore_index``.

    Returns:
        None if the loss leaves none out, or does not say so.
    """
    while isinstance(loss, partial):
        if "ignore_index" in loss.keywords:
            return int(loss.keywords["ignore_index"])
        loss = loss.func
    if loss is F.cross_entropy or loss is F.nll_loss or loss is one_hot_mse:
        return _PADDING
    index = getattr(loss, "ignore_index", None)
    return index if isinstance(index, int) else None


def check_labels(
    episodes: AnyEpisodes,
    ways: int,
    ignored: int | None = None,
    names: Collection[str] = ("support_y", "hessian_y", "query_y"),
) -> None:
    """Check that labels are from 0 to ``ways - 1``, but for those that the loss ignores.

    Args:
        episodes: The meta-batch.
        ways: Number of outputs of the network.
        ignored: The label of the examples that the loss leaves out; None if there is none.
        names: The sets whose labels are checked; by default all.

    Raises:
        ValueError: If a label is out of range, or if all labels of a set are ignored.
    """
    of_sets = {name: y for name, y in episodes._asdict().items() if name in names}
    labels = torch.cat([y.flatten() for y in of_sets.values()])
    low, high = int(labels.min()), int(labels.max())
    if ignored is not None and low <= ignored <= high:
        _check_that_some_count(of_sets, isinstance(episodes, ResampledEpisodes), ignored)
        counted = labels[labels != ignored]
        low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= ways:
        cure = ""
        if (low == _PADDING and ignored is None) or high == _UNLABELLED:
            cure = (
                "; for padding take a loss that says which label it ignores, in an attribute "
                "`ignore_index` or by functools.partial"
            )
        elif low == 0 and ways == 1:
            cure = (
                "; give its head an output per class, or give the targets of one output as "
                "floats, y.float()"
            )
        raise UserValueError(
            f"Expected labels from 0 to {ways - 1}, the outputs of `network`, but got {low} to "
            f"{high}{cure}."
        )


def _check_that_some_count(of_sets: Mapping[str, Tensor], steps: bool, ignored: int) -> None:
    """Refuse sets whose labels are all ignored, as the mean of no losses is nan."""
    for name, y in of_sets.items():
        # in the resampling case, each batch of each inner step
        of_batches = y.flatten(2 if steps and not name.startswith("query") else 1)
        empty = (of_batches == ignored).all(-1).reshape(len(y), -1).any(-1)
        if y.numel() and empty.any():
            raise UserValueError(
                f"Expected a label in `{name}` of each task that the loss does not ignore but got "
                f"{ignored} alone in tasks {empty.nonzero().flatten().tolist()}; leave these out."
            )


def check_targets(targets: Tensor, loss: Any) -> None:
    """Refuse the cross-entropy for a regression on one output, where it is always zero.

    Args:
        targets: Regression targets, ``[B, ...]``.
        loss: The loss of outputs and targets.

    Raises:
        ValueError: If ``loss`` is the cross-entropy and there is one target per example.
    """
    while isinstance(loss, partial):
        loss = loss.func
    is_cross_entropy = loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    if is_cross_entropy and targets.shape[1:] in ((), (1,)):
        raise UserValueError(
            "Expected integer labels for the cross-entropy but got floats, one per example; if "
            "these are classes, make them integers, y.long(), or for a regression give the model "
            "`loss=torch.nn.functional.mse_loss`."
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
            _unchanged_buffers(loss),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the first step will give the same warnings
            first = outputs(0)
            for number, y in enumerate(targets):
                _check_one_batch(loss, first, partial(outputs, number), differentiable(y))
    finally:
        set_generator_states(before, device)


def check_loss_value(
    of_outputs: FunctionalLoss,
    functional: FunctionalNetwork,
    episodes: AnyEpisodes,
    trained: Iterable[nn.Parameter],
) -> None:
    """Check that the loss of a task is a scalar, and that its gradient misses no parameters.

    The loss must not read parameters of the network, nor its own past its modules, because adapted
    values cannot be put there.

    Args:
        of_outputs: The loss.
        functional: The network.
        episodes: The meta-batch.
        trained: The parameters that the meta-optimizer trains.

    Raises:
        ValueError: If the loss is no scalar, reads parameters in one of these ways, depends on a
            trainable tensor that would get no gradient, or fails where no gradients are taken.
    """
    read: list[str] = []
    y = detached(support_set(first_task(episodes))[1])
    with first_support(functional, episodes) as x, torch.no_grad():
        leaves = {
            name: p.detach().clone().requires_grad_() for name, p in functional.params.items()
        }
        outputs = functional(leaves, x)
        with reading(functional.params, read):
            _call_without_gradients(partial(of_outputs, {}), outputs, y)
    if read:
        raise UserValueError(
            "Expected a loss of outputs and labels but it reads the network's parameters "
            f"{sorted(set(read))} from outside, where adapted values cannot be put; let the "
            "network return what the loss needs of them."
        )
    with first_support(functional, episodes), torch.enable_grad():
        outputs = map_outputs(_leaf, outputs)
        own_values = {name: p.detach() for name, p in of_outputs.params.items()}
        value = of_outputs(own_values, outputs, y)
    if value.ndim:
        raise UserValueError(
            "Expected the loss of a task to be a scalar but got shape "
            f"{list(value.shape)}; use reduction='mean'."
        )
    leaf_ids = leaves_of(value)
    # the call was given copies, so a loss with a leaf of its own has read it past its modules
    own = {id(p): name.removeprefix(of_outputs.prefix) for name, p in of_outputs.params.items()}
    if past_modules := sorted(own[leaf] for leaf in leaf_ids & own.keys()):
        raise UserValueError(
            "Expected a loss that reaches its parameters through its modules but it reads "
            f"{past_modules} from elsewhere (a tuple, a closure, a global), where adapted values "
            "cannot be put; read them from the module's attributes."
        )
    # trained parameters without a gradient are refused elsewhere, by their names
    known = (*tensors_in(outputs), *trained)
    if leaf_ids - {id(tensor) for tensor in known}:
        raise UserValueError(
            "Expected a loss whose trainable parameters are those of an nn.Module but it depends "
            "on one from elsewhere (a closure, a global), which would get no gradient; make the "
            "loss a module that has it as a parameter, or detach it."
        )


def _call_without_gradients(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor
) -> None:
    """Call a loss as evaluation does, and explain why one that differentiates fails."""
    try:
        loss(outputs, targets)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        with torch.enable_grad():
            differentiates = _takes(loss, map_outputs(_leaf, outputs), targets)
        if not differentiates:
            raise
        raise UserValueError(
            "Expected a loss that can be called where no gradients are taken, as evaluation does, "
            f"but it differentiates there ({error}); let it do so under `torch.enable_grad()`, and "
            "with respect to outputs.detach().requires_grad_() where the outputs have no graph."
        ) from error


def _leaf(output: Tensor) -> Tensor:
    return output.detach().requires_grad_(output.is_floating_point())


@contextmanager
def _unchanged_buffers(loss: Any) -> Iterator[None]:
    """Restore the buffers and other tensors of a loss module at the end."""
    held = held_tensors(loss)
    try:
        yield
    finally:
        put_back(held)


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
    if not targets.is_floating_point() and _takes(loss, outputs, targets.long()):
        return False
    return _takes(loss, outputs, torch.zeros_like(outputs))


def _takes(loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor) -> bool:
    try:
        loss(outputs, targets)
    except Exception:  # noqa: BLE001 # a loss may raise anything
        return False
    return True


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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


_EXPANDING = (
    Tensor.expand,
    Tensor.expand_as,
    Tensor.broadcast_to,
    torch.broadcast_to,
    torch.broadcast_tensors,
)


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
