"""Checks that labels and targets fit the outputs of a network, and are not broadcast by the loss."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
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

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.losses import one_hot_mse
from lightning_maml.batches.outputs import map_outputs, tensors_in
from lightning_maml.batches.trees import detached, differentiable
from lightning_maml.checks.network_checks import first_support
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory, leaves_of, memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.functional_loss import OF_LOSS, FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.watching import reading

_UNUSUAL = 13
"""A number of examples that is no other size, or the next ones."""


_OF_CLASSES = re.compile("_?(nll|multi_margin|multilabel_margin|ctc)_loss|.*cross_entropy_loss")
"""Losses that take classes, or several of them per example."""

_PADDING = -100
"""The label that losses of torch ignore unless they are told another."""

_SHORT = (torch.int8, torch.int16, torch.int32)


def ignored_label(loss: Any) -> int | None:
    """Return the label of the examples that a loss leaves out, its ``ignore_index``; None if it has none that is known."""
    while isinstance(loss, partial):
        if "ignore_index" in loss.keywords:
            return int(loss.keywords["ignore_index"])
        loss = loss.func
    if loss is F.cross_entropy or loss is F.nll_loss or loss is one_hot_mse:
        return _PADDING
    index = getattr(loss, "ignore_index", None)
    return index if isinstance(index, int) else None


def check_labels(episodes: AnyEpisodes, ways: int, ignored: int | None = None) -> None:
    """Check that labels are from 0 to ``ways - 1``, except for those that the loss ignores.

    Args:
        episodes: The tasks.
        ways: How many classes there can be.
        ignored: The label of examples that the loss leaves out; None if it takes all.

    Raises:
        ValueError: If a label is not in that range, or if a set has no label that counts.
    """
    labels = torch.cat([y.flatten() for y in episodes[1::2]])
    low, high = int(labels.min()), int(labels.max())
    if ignored is not None and low <= ignored <= high:
        _check_that_some_count(episodes, ignored)
        counted = labels[labels != ignored]
        low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= ways:
        cure = ""
        if low == _PADDING and ignored is None:
            cure = (
                "; for padding take a loss that says which label it ignores, in an attribute "
                "`ignore_index`"
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


def _check_that_some_count(episodes: AnyEpisodes, ignored: int) -> None:
    for name, y in zip(episodes._fields[1::2], episodes[1::2], strict=True):
        empty = (y == ignored).all(-1).reshape(len(y), -1).any(-1)
        if y.numel() and empty.any():
            raise UserValueError(
                f"Expected a label in `{name}` of each task that the loss does not ignore but got "
                f"{ignored} alone in tasks {empty.nonzero().flatten().tolist()}; leave these out."
            )


def check_targets(targets: Tensor, loss: Any) -> None:
    """Refuse the cross-entropy of one output, which is always zero.

    Args:
        targets: Regression targets, ``[B, ...]``.
        loss: The loss of outputs and targets.

    Raises:
        ValueError: If it is that.
    """
    while isinstance(loss, partial):
        loss = loss.func
    if (loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)) and targets.shape[1:] in (
        (),
        (1,),
    ):
        raise UserValueError(
            "Expected a loss for regression but got the cross-entropy, which of one output is "
            "always 0; give the model `loss=torch.nn.functional.mse_loss`, or if these are "
            "classes, labels of integers."
        )


def check_broadcasting(
    loss: Callable[[Any, Tensor], Tensor],
    outputs: Callable[[int], Any],
    targets: tuple[Tensor, ...],
) -> None:
    """Check that a loss does not broadcast targets over outputs.

    It is called once with an unusual number of examples, by which the dimension of the examples can
    be told from all others; a loss that takes only the number at hand is called with that.

    Args:
        loss: The loss.
        outputs: Returns the network's outputs for the examples of the batch of this number, tensors
            ``[B, ...]``.
        targets: Labels or targets of some batches, each ``[B', ...]``.

    Raises:
        ValueError: If it broadcasts targets, or fails.
    """
    device = targets[0].device
    before = generator_states(device)
    gradients = torch.inference_mode(False), torch.enable_grad()
    try:
        with gradients[0], gradients[1], _unchanged(loss), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first step has them
            found = outputs(0)
            for number, y in enumerate(targets):
                _look(loss, found, partial(outputs, number), differentiable(y))
    finally:
        set_generator_states(before, device)


def check_loss_value(
    of_outputs: FunctionalLoss,
    functional: FunctionalNetwork,
    episodes: AnyEpisodes,
    trained: Iterable[nn.Parameter],
) -> None:
    """Check that the loss of a task is a scalar whose gradient would be the right one.

    It may not read parameters of the network, or its own past its modules: adapted ones cannot be
    put there.

    Args:
        of_outputs: The loss.
        functional: The network.
        episodes: The batch.
        trained: The parameters that get a gradient.

    Raises:
        ValueError: If it is not so.
    """
    read: list[str] = []
    y = detached(support_set(first_task(episodes))[1])
    with first_support(functional, episodes) as x, torch.no_grad():
        leaves = {
            name: p.detach().clone().requires_grad_() for name, p in functional.params.items()
        }
        outputs = functional(leaves, x)
        with reading(functional.params, read):
            of_outputs({}, outputs, y)
    if read:
        raise UserValueError(
            "Expected a loss of outputs and labels but it reads the network's parameters "
            f"{sorted(set(read))} from outside, where adapted values cannot be put; let the "
            "network return what the loss needs of them."
        )
    with first_support(functional, episodes), torch.enable_grad():
        outputs = map_outputs(Tensor.detach, outputs)
        own_values = {name: p.detach() for name, p in of_outputs.params.items()}
        value = of_outputs(own_values, outputs, y)
    if value.ndim:
        raise UserValueError(
            "Expected the loss of a task to be a scalar but got shape "
            f"{list(value.shape)}; use reduction='mean'."
        )
    found = leaves_of(value)
    own = {id(p): name.removeprefix(OF_LOSS) for name, p in of_outputs.params.items()}
    if past_modules := sorted(own[leaf] for leaf in found & own.keys()):
        raise UserValueError(
            "Expected a loss that reaches its parameters through its modules but it reads "
            f"{past_modules} from elsewhere (a tuple, a closure, a global), where adapted values "
            "cannot be put; read them from the module's attributes."
        )
    # those of a subclass are refused by their names
    known = (*tensors_in(outputs), *trained)
    if found - {id(tensor) for tensor in known}:
        raise UserValueError(
            "Expected a loss whose trainable parameters are those of an nn.Module but it depends "
            "on one from elsewhere (a closure, a global), which would get no gradient; make the "
            "loss a module that has it as a parameter, or detach it."
        )


@contextmanager
def _unchanged(loss: Any) -> Iterator[None]:
    """Give a loss module back the buffers that it writes."""
    buffers = [*loss.buffers()] if isinstance(loss, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _look(
    loss: Callable[[Any, Tensor], Tensor],
    outputs: Any,
    own_outputs: Callable[[], Any],
    targets: Tensor,
) -> None:
    sizes = {size for tensor in (*tensors_in(outputs), targets) for size in tensor.shape}
    unusual = next(
        number for number in range(_UNUSUAL, _UNUSUAL + len(sizes) + 1) if number not in sizes
    )
    try:
        _follow(loss, outputs, targets, unusual)
    except _Broadcast:
        raise _sentence(outputs, targets) from None
    except Exception:  # noqa: BLE001 # a loss may need the number of examples that it is given
        outputs = own_outputs()
        try:
            _follow(loss, outputs, targets, len(targets))
        except _Broadcast:
            raise _sentence(outputs, targets) from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            cure = "; y.long() may be what it takes" if targets.dtype in _SHORT else ""
            if _takes_targets_like_outputs(loss, outputs, targets):
                raise _sentence(outputs, targets) from error
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors_in(outputs))
            held = "" if isinstance(outputs, Tensor) else f", in {type(outputs).__name__},"
            raise UserValueError(
                f"Expected a loss that takes outputs {shapes}{held} with targets "
                f"{list(targets.shape)} of {targets.dtype}, but it fails{cure}: {error}"
            ) from error


def _takes_targets_like_outputs(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor
) -> bool:
    """Return whether a loss that fails would run with targets of the outputs' shape."""
    if not isinstance(outputs, Tensor) or outputs.shape == targets.shape:
        return False
    # the cross-entropy takes probabilities too; what it lacks are labels of another type
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
    """Call the loss on ``examples`` examples, the first ones and these again, and follow what it does with them."""
    number = max((len(tensor) for tensor in tensors_in(outputs) if tensor.ndim), default=0)

    def rows(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != number:
            return tensor
        taken = tensor.detach()[torch.arange(examples, device=tensor.device) % number]
        return taken.requires_grad_(tensor.is_floating_point())

    of_outputs = map_outputs(rows, outputs)
    of_targets = targets[torch.arange(examples, device=targets.device) % len(targets)]
    with _Following(tensors_in(of_outputs), of_targets, examples), _Expanding():
        loss(of_outputs, of_targets)


def _sentence(outputs: Any, targets: Tensor) -> ValueError:
    found = tensors_in(outputs)
    shape = found[0].shape[1:] if len(found) == 1 else torch.Size()
    if (
        len(found) == 1
        and not targets.is_floating_point()
        and targets.ndim == 1
        and len(shape) == 1
    ):
        return UserValueError(
            "Expected a loss of labels but got one that fits labels [examples] to outputs "
            f"[examples, {shape[0]}] element by element; use `loss=lightning_maml.one_hot_mse` or "
            "the cross-entropy, or if there is one output, outputs[:, 0] in the loss."
        )
    expected = (
        f"[examples{''.join(f', {size}' for size in shape)}]" if len(found) == 1 else "the same"
    )
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


class _Expanding(TorchFunctionMode):
    """Makes a tensor that a loss itself expands as large as it looks: it is meant so, unlike what torch's losses expand inside of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return (
            tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
            if func in _EXPANDING
            else result
        )


class _Broadcast(Exception):
    """Outputs and targets were broadcast over one another."""


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which tensors derive from outputs and which from targets, by their memory, which views share.

    Raises:
        _Broadcast: If an elementwise operation fits one to the other only by broadcasting.
    """

    def __init__(self, outputs: list[Tensor], targets: Tensor, examples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._examples, self._shape = examples, tuple(targets.shape)
        self._kept: list[Tensor] = [*outputs, targets]  # so that no other tensor gets their memory
        self._from_outputs = {memory(tensor) for tensor in outputs}
        self._from_targets = {memory(targets)}
        self._casts = {memory(targets)}

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
        self._from_outputs |= memories if of_outputs else set()
        self._from_targets |= memories if of_targets else set()
        is_cast = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone)
        self._casts |= memories if is_cast and memory(tensors[0]) in self._casts else set()
        return result

    def _check(self, one: Tensor, other: Tensor) -> None:
        """Check outputs, or what was made of them, against what was made of targets alone."""
        if memory(other) in self._from_outputs:
            return
        a, b, n = _unexpanded(one), _unexpanded(other), self._examples
        if not a or not b:
            return
        pure, differ = memory(one) not in self._from_targets, len(a) != len(b)
        try:
            together = tuple(torch.broadcast_shapes(a, b))  # type: ignore[no-untyped-call]
        except RuntimeError:
            return  # torch refuses it in its own words
        outer = differ and together.count(n) > max(a.count(n), b.count(n))
        both_lead = pure and a[0] == b[0] == n
        raw = memory(other) in self._casts and b == self._shape
        if outer or (both_lead and (differ or (raw and a != b))):
            raise _Broadcast


def _is_elementwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or (
        "loss" in func.__name__ and not _OF_CLASSES.match(func.__name__)
    )


def _unexpanded(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape before an ``expand``, which leaves strides of zero; losses expand both before they compare."""
    sizes = [
        1 if stride == 0 else size
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    leading = next((place for place, stride in enumerate(tensor.stride()) if stride != 0), 0)
    return tuple(sizes[leading:])
