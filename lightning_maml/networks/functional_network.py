"""A network as a pure function of its trainable parameters, with a stated batch-norm policy."""

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain
from types import CellType, FunctionType
from typing import Any, Literal, NamedTuple, cast, get_args
from weakref import ReferenceType, WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_maml.batches.outputs import logits_in, map_outputs, takes_logits, tensors_in
from lightning_maml.batches.trees import Inputs, call, cat, count, differentiable
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory, memory
from lightning_maml.kernels.layers import (
    TaskConvolution,
    TaskEmbedding,
    TaskNorm,
    is_padded_embedding,
    is_plain_convolution,
)
from lightning_maml.networks.batch_norm import batch_norms, forget_running_averages
from lightning_maml.networks.places import OF_MODULES, holding, places

BatchNormPolicy = Literal["batch", "support", "running", "per_step"]

_CACHING: WeakSet[nn.Module] = WeakSet()
"""Networks found to compute parametrisations under ``torch.nn.utils.parametrize.cached``, a cache
that all threads share."""

_HOOKING: WeakSet[nn.Module] = WeakSet()
"""Networks found to register hooks on tensors in their forward pass."""

_VIEWING: WeakSet[nn.Module] = WeakSet()
"""Networks found to need their images' channels first in memory, because they view them as rows."""


class HeadDoesNotEndError(RuntimeError):
    """What a network returns for some inputs is not what its head returns, though it was for others."""


class Written(NamedTuple):
    """What a forward pass of a network changes in it.

    Attributes:
        tensors: Names of buffers and frozen parameters.
        numbers: Names of modules and of their attributes that are plain numbers.
        kept: The same of other attributes, in which it keeps something, by itself or in a list or a
            dict.
    """

    tensors: frozenset[str] = frozenset()
    numbers: frozenset[tuple[str, str]] = frozenset()
    kept: frozenset[tuple[str, str]] = frozenset()


_WRITTEN: WeakKeyDictionary[nn.Module, Written] = WeakKeyDictionary()
"""What networks and structural copies of them were found to write; those that were not looked at
have no entry."""


class Learner:
    """Calls ``network`` with given values for its trainable parameters, from any number of threads, without changing it.

    Each thread works on a structural copy of the network: its own module objects over the same
    tensors. Frozen parameters are used as they are; every call starts from the network's buffers as
    they are, and what it writes to them is not kept. The same holds for frozen parameters, plain
    numbers and other attributes once :meth:`look_for_writes` has found that they are written to.

    Args:
        network: Any module; its training mode (dropout) is kept.
        batch_norm: Which statistics its batch-norm layers normalise by. ``"batch"``: those of the
            batch at hand, so on the query set its own (transductive, as in the MAML papers).
            ``"support"``: those of the support set, on both sets. ``"running"``: the running
            averages in the layers that are in evaluation mode, and the batch's in those in training
            mode. ``"per_step"``: the same, with the averages that are given to the call.
        vectorised: Whether it is called under ``vmap``.

    Raises:
        ValueError: If there is no such policy, or it does not fit the network's batch norm: no
            running averages for ``"running"``, or a class with a forward pass of its own for
            ``"support"``.
    """

    def __init__(
        self, network: nn.Module, batch_norm: BatchNormPolicy = "batch", *, vectorised: bool = False
    ) -> None:
        if batch_norm not in get_args(BatchNormPolicy):
            raise ValueError(
                "Expected `batch_norm` to be 'batch', 'support', 'running' or 'per_step' but got "
                f"{batch_norm!r}."
            )
        self.params: Params = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.network = network
        self.batch_norm = batch_norm
        self._vectorised = vectorised
        self._own = threading.local()
        norms = [] if batch_norm == "batch" else [*batch_norms(network)]
        self.uses_support_statistics = batch_norm == "support" and bool(norms)
        if batch_norm in ("running", "per_step"):
            _check_running_averages(network, norms, batch_norm)
        if batch_norm == "support":
            _check_own_forward(network, norms)

    def stacked(self) -> "Learner":
        """Return the same to be called under ``vmap``."""
        other = copy.copy(self)
        other._vectorised, other._own = True, threading.local()
        return other

    def __call__(
        self,
        params: Params,
        x: Inputs,
        *,
        statistics_of: Inputs | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the network's outputs for ``x``, tensors ``[B, ...]``.

        Args:
            params: Values for the trainable parameters.
            x: Inputs of one task, ``[B, ...]``.
            statistics_of: Inputs that are run along with ``x`` and give the batch-norm statistics
                in its place.
            averages: Running averages to use in place of the network's, by the names of its
                buffers.
        """
        inputs, context = (
            (x, 0) if statistics_of is None else (cat([statistics_of, x]), count(statistics_of))
        )
        outputs = self._run(params, inputs, context, averages or {})
        if not context:
            return outputs
        every = count(inputs)
        return map_outputs(
            lambda tensor: tensor[context:] if tensor.ndim and len(tensor) == every else tensor,
            outputs,
        )

    def features(
        self, params: Params, x: Inputs, head: str, *, statistics_of: Inputs | None = None
    ) -> Tensor:
        """Return what enters the submodule ``head``, for which :meth:`ends_with` must be true; the arguments are those of a call.

        Raises:
            HeadDoesNotEndError: If the outputs for these inputs are not those of the head.
        """
        inputs, context = (
            (x, 0) if statistics_of is None else (cat([statistics_of, x]), count(statistics_of))
        )
        with self._calls_of(head) as calls:
            outputs = self._run(params, inputs, context, {})
        if len(calls) != 1 or calls[0][2] is not outputs:
            raise HeadDoesNotEndError
        features: Tensor = calls[0][0][0]
        return features[context:]

    def ends_with(self, head: str, x: Inputs, logits: Callable[[Any], Any] = logits_in) -> bool:
        """Return whether the logits for ``x`` are those of the submodule ``head``.

        It must be called once and with one tensor ``[B, ...]``, which does not depend on the head's
        parameters.
        """
        with torch.enable_grad(), self._calls_of(head) as calls:
            params = {name: differentiable(p).requires_grad_() for name, p in self.params.items()}
            outputs = self._run(params, x, 0, {})
        if len(calls) != 1:
            return False
        arguments, named, result = calls[0]
        if (
            len(arguments) != 1
            or named
            or not isinstance(arguments[0], Tensor)
            or len(arguments[0]) != count(x)
        ):
            return False
        of_head = [p for name, p in params.items() if name.startswith(f"{head}.")]
        features = arguments[0]
        if of_head and features.requires_grad:
            along = torch.ones_like(features)
            if any(
                gradient is not None
                for gradient in torch.autograd.grad(features, of_head, along, allow_unused=True)
            ):
                return False
        return result is logits(outputs)

    def names_read_in_backward(self, x: Inputs) -> set[str]:
        """Return the names of parameters, or ending in a dot the prefixes of modules, that a backward pass reads from the network.

        It does so where ``torch.utils.checkpoint`` runs a part of the network again, which by then
        no longer holds the given values.
        """
        runs: list[str] = []
        every = self._copy_of_this_thread().named_modules()
        # these take no hooks
        modules = [
            (name, module)
            for name, module in every
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name and f"{name}."))
            for name, module in modules
        ]
        forward = 0
        try:
            with torch.enable_grad():
                params = {
                    name: differentiable(p).clone().requires_grad_()
                    for name, p in self.params.items()
                }
                outputs = self._run(params, x, 0, {})
                forward = len(runs)
                curved = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
                if curved:
                    with _Reading(self.params, runs):
                        torch.autograd.grad(
                            [tensor.abs().sum() for tensor in curved],
                            [*params.values()],
                            allow_unused=True,
                        )
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            return set(runs)  # the older form of checkpoints allows no such backward pass
        finally:
            for hook in hooks:
                hook.remove()
        return set(runs[forward:])

    def look_for_writes(self, x: Inputs) -> tuple[Params, Params]:
        """Find out what a forward pass changes in the network, see :func:`writes`.

        Returns:
            The tensors in plain attributes after one pass, and after another one with the same
            inputs and random numbers.

        Raises:
            ValueError: If it writes to its inputs or to a trainable parameter, or reads one from
                elsewhere than the network's modules.
        """
        network = self._copy_of_this_thread()
        frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        params = {
            name: differentiable(p).clone().requires_grad_() for name, p in self.params.items()
        }
        originals = {**self._own.buffers, **frozen, **self.params}
        tensors: set[str] = set()
        read_elsewhere: set[str] = set()
        reads: list[str] = []

        given = [(tensor, tensor._version) for tensor in tensors_in(x)]
        states = generator_states(given[0][0].device)

        def note() -> None:  # while the network still holds what was given to it
            read_elsewhere.update(reads)  # before they are read here
            held = (
                (name, place[0][0][place[0][1]])
                for name, place in self._own.places.items()
                if place
            )
            tensors.update(
                name
                for name, now in held
                if name in originals and _is_written(now, originals[name])
            )

        numbers, kept = _numbers(network), Kept(network)
        kept_tensors = {
            name: b
            for name, b in (*self.network.named_buffers(), *self.network.named_parameters())
            if not b.is_inference()
        }
        versions = {name: tensor._version for name, tensor in kept_tensors.items()}
        buffers, self._own.buffers = self._own.buffers, {**self._own.buffers, **frozen}
        self._own.after_a_pass = note

        def note_cache(*_: Any) -> None:
            if parametrize._cache_enabled:
                _CACHING.add(self.network)

        lists = [
            module
            for module in network.modules()
            if isinstance(module, parametrize.ParametrizationList)
        ]
        hooks = [module.register_forward_pre_hook(note_cache) for module in lists]
        try:
            with reading(self.params, reads), _Watching() as watched:
                self._run(params, x, 0, {})
        finally:
            for hook in hooks:
                hook.remove()
            self._own.after_a_pass = None
            self._own.buffers = buffers
        if watched.views:
            _VIEWING.add(self.network)
        if watched.hooks:
            _HOOKING.add(self.network)
        if any(tensor._version != version for tensor, version in given):
            raise ValueError(
                "Expected a network that leaves its inputs as they are but it writes to them, "
                "which would change the batch for all that follows; let it work on a copy, "
                "x.clone()."
            )
        if written := sorted(
            name for name, version in versions.items() if kept_tensors[name]._version != version
        ):
            raise ValueError(
                "Expected a network that reaches its buffers through its modules but its forward "
                f"pass writes to {written} from elsewhere (an object, a closure, a global), and "
                "would do so in every pass; write to the module's attributes."
            )
        if read_elsewhere:
            raise ValueError(
                "Expected a network that reaches its parameters through its modules but its "
                f"forward pass reads {sorted(read_elsewhere)} from elsewhere (a tuple, a closure, "
                "a global), where adapted values cannot be put; read them from the module's "
                "attributes."
            )
        if trained := sorted(tensors & self.params.keys()):
            raise ValueError(
                "Expected a forward pass that leaves the network's parameters as they are but it "
                f"writes to {trained}; run the network once before the model is made, if these "
                "are initialised by the first batch, make them buffers, or leave out what writes "
                "(an embedding's max_norm)."
            )
        moved = {key for key, number in _numbers(network).items() if number != numbers.get(key)}
        changed, once = kept.changed(), self._tensor_attributes()
        if once:
            set_generator_states(states, given[0][0].device)
            self._run(params, x, 0, {})
        twice = self._tensor_attributes()
        before = _WRITTEN.get(self.network, Written())
        _WRITTEN[self.network] = Written(
            before.tensors | tensors, before.numbers | moved, before.kept | changed
        )
        del self._own.network  # so that it is copied anew, with all as it was
        return once, twice

    def _tensor_attributes(self) -> Params:
        """Return copies of the tensors that the modules hold in plain attributes."""
        modules = self._copy_of_this_thread().named_modules()
        held = (
            (f"{name}.{key}".lstrip("."), value)
            for name, module in modules
            for key, value in vars(module).items()
        )
        return {name: value.detach().clone() for name, value in held if isinstance(value, Tensor)}

    @contextmanager
    def _calls_of(self, head: str) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        module = self._copy_of_this_thread().get_submodule(head)
        handle = module.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def _run(
        self, params: Params, inputs: Inputs, context: int, averages: Mapping[str, Tensor]
    ) -> Any:
        """Return the outputs for all inputs, of which the first ``context`` give the statistics, if there are any.

        If the network fails, it is tried once more with channels first, which a network that views
        its images as rows needs.
        """
        self._copy_of_this_thread()
        converting = [
            convolution for convolution in self._own.convolutions if convolution.channels == "last"
        ]
        random_state = torch.get_rng_state() if converting else None
        try:
            outputs = self._attempt(params, inputs, context, averages)
        except RuntimeError as error:
            if random_state is None or is_out_of_memory(error):
                raise
            torch.set_rng_state(random_state)
            for convolution in converting:
                convolution.channels = "first"
            outputs = self._attempt(params, inputs, context, averages)
            _VIEWING.add(self.network)
        return outputs

    def _attempt(
        self, params: Params, inputs: Inputs, context: int, averages: Mapping[str, Tensor]
    ) -> Any:
        for norm in self._own.norms:
            norm.context = Fraction(context, count(inputs))
        buffers = {
            name: averages[name] if name in averages else buffer.clone()
            for name, buffer in self._own.buffers.items()
        }
        with holding(self._own.places, {**buffers, **params}):
            outputs = call(self._own.network, inputs)
            if self._own.after_a_pass is not None:
                self._own.after_a_pass()
            held = {
                name: self._own.places[name][0]
                for name in self._own.unwritten
                if self._own.places[name]
            }
            found = [
                name
                for name, (holder, key) in held.items()
                if buffers[name]._version or holder[key] is not buffers[name]
            ]
        if found:
            # its look did not see this, because it depends on values
            before = _WRITTEN[self.network]
            _WRITTEN[self.network] = before._replace(tensors=before.tensors | {*found})
            self._own.unwritten -= {*found}
        for attributes, key, number in self._own.numbers:
            attributes[key] = number
        if self._own.kept is not None:
            self._own.kept.put_back()
        return outputs

    def _copy_of_this_thread(self) -> nn.Module:
        if not hasattr(self._own, "network"):
            network = structural_copy(self.network)
            self._own.norms, self._own.convolutions, self._own.after_a_pass = [], [], None
            for module in network.modules():
                if isinstance(module, _BatchNorm) and (
                    module.training or self.batch_norm in ("batch", "support")
                ):
                    self._take_statistics_of_the_batch(module)
                elif is_plain_convolution(module):
                    module.forward = TaskConvolution(
                        module, "first" if self.network in _VIEWING else "last", self._vectorised
                    )
                    self._own.convolutions.append(module.forward)
                elif self._vectorised and is_padded_embedding(module):
                    module.forward = TaskEmbedding(module)  # type: ignore[method-assign, assignment]
            written = _WRITTEN.get(self.network, Written())
            frozen = {}
            if written.tensors:
                frozen = {
                    name: p.detach()
                    for name, p in network.named_parameters()
                    if name in written.tensors
                }
            self._own.network, self._own.places, self._own.buffers = (
                network,
                places(network),
                {**dict(network.named_buffers()), **frozen},
            )
            unlooked = self.network not in _WRITTEN
            self._own.unwritten = (
                set()
                if unlooked or self._vectorised
                else self._own.buffers.keys() - written.tensors
            )
            attributes = [(vars(network.get_submodule(name)), key) for name, key in written.numbers]
            self._own.numbers = [
                (of_module, key, of_module[key])
                for of_module, key in attributes
                if key in of_module
            ]
            self._own.kept = Kept(network, written.kept) if written.kept else None
        own: nn.Module = self._own.network
        return own

    def _take_statistics_of_the_batch(self, norm: _BatchNorm) -> None:
        own = _has_own_forward(norm)
        if own and norm.training:
            return  # it may need its running averages, which it writes only
        forget_running_averages(norm)
        if not own:
            norm.forward = TaskNorm(norm, self._vectorised)  # type: ignore[method-assign, assignment]
            self._own.norms.append(norm.forward)


def held_tensors(module: Any) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Return where a module's parts hold tensors that are no trainable parameters, these tensors, and copies of them."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    holders = (holder for part in parts for holder in (part._buffers, part._parameters, vars(part)))
    held = ((holder, name, value) for holder in holders for name, value in holder.items())
    tensors = (
        (holder, name, value)
        for holder, name, value in held
        if isinstance(value, Tensor) and not value.requires_grad
    )
    return [(holder, name, tensor, tensor.clone()) for holder, name, tensor in tensors]


@torch.no_grad()
def put_back(before: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> list[str]:
    """Give a module the tensors that it held before, and return the names of those that changed."""
    written = []
    for holder, name, tensor, value in before:
        if _is_other(holder.get(name), value):
            written.append(name)
        tensor.copy_(value)
        holder[name] = tensor
    return written


def caches_parametrizations(network: nn.Module) -> bool:
    """Return whether a network was found to use torch's cache of parametrisations, which threads would share."""
    return network in _CACHING


def hooks_tensors(network: nn.Module) -> bool:
    """Return whether a network was found to register hooks on tensors in its forward pass."""
    return network in _HOOKING


def writes(network: nn.Module) -> bool | None:
    """Return whether a forward pass changes buffers, frozen parameters or plain numbers of a network; None before a look at it.

    What batch norm writes does not count: its policy says what becomes of it.
    """
    found = _WRITTEN.get(network)
    return None if found is None else bool(found.tensors or found.numbers)


def _is_written(now: Tensor | None, original: Tensor) -> bool:
    """Return whether ``now``, which was a clone of ``original``, was written to or replaced."""
    return now is None or now._version > 0 or _is_other(now, original)


def _is_other(now: Any, original: Tensor) -> bool:
    if not isinstance(now, Tensor) or now.shape != original.shape:
        return True
    now, original = (
        tensor if tensor.layout == torch.strided else tensor.to_dense()
        for tensor in (now, original)
    )
    both_nan = now.isnan() & original.isnan()
    return bool(((now != original) & ~both_nan).any())


def modes(network: nn.Module) -> tuple[Any, ...]:
    """Return what decides how a network runs, as far as it can be told without running it: what was found out about it depends on it.

    These are the classes of its modules, their modes, the flags, words and functions among their
    attributes, and their hooks.
    """
    found: list[Any] = []
    for module in network.modules():
        found.append(module.__class__)
        for key, value in vars(module).items():
            kind = value.__class__
            if kind is bool or kind is str:
                found.append(value)
            elif kind is FunctionType:
                found.append(value.__code__)
            elif kind is OrderedDict and value and key.endswith("_hooks"):
                # those of a copy are other functions with the same code
                found += [
                    key,
                    *(getattr(hook, "__code__", hook.__class__) for hook in value.values()),
                ]
    return tuple(found)


def trainable_besides_parameters(network: nn.Module) -> list[str]:
    """Return the names of buffers and attributes that are leaves and require a gradient, but are no parameters."""
    holders = (
        (name, holder)
        for name, module in network.named_modules()
        for holder in (module._buffers, vars(module))
    )
    held = (
        (f"{name}.{key}".lstrip("."), value)
        for name, holder in holders
        for key, value in holder.items()
    )
    return [
        name
        for name, value in held
        if isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.requires_grad
        and value.is_leaf
    ]


def _numbers(network: nn.Module) -> dict[tuple[str, str], int | float]:
    """Return the plain numbers and flags among the attributes of a network's modules."""
    attributes = (
        (name, key, value)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
    )
    return {(name, key): value for name, key, value in attributes if isinstance(value, int | float)}


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Kept:
    """What the modules of a network hold in attributes, besides parameters, buffers and other modules.

    Some networks keep there what they computed from their parameters (in evaluation mode timm's
    LeViT does, the biases of its attention). The next pass, which has other parameters, must not
    find it.

    Args:
        network: The network as it is before a pass.
        names: Names of the modules and of their attributes to put back; by default all that have
            changed.
    """

    def __init__(
        self, network: nn.Module, names: Collection[tuple[str, str]] | None = None
    ) -> None:
        self._modules = {name: vars(module) for name, module in network.named_modules()}
        self._names = names
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Return each attribute, and a copy of it if it is a list or a dict."""
        return {
            (name, key): (value, copy.copy(value) if isinstance(value, list | dict) else None)
            for name, attributes in self._modules.items()
            for key, value in attributes.items()
            if key not in _OF_EVERY_MODULE and (self._names is None or (name, key) in self._names)
        }

    def changed(self) -> frozenset[tuple[str, str]]:
        """Return the names of the modules and attributes that a pass has changed, other than from number to number."""
        now = self._now()
        return frozenset(
            key
            for key in self._before.keys() | now.keys()
            if not _are_same(self._before.get(key), now.get(key))
        )

    def put_back(self) -> None:
        """Undo what a pass has changed."""
        for name, key in self.changed() if self._names is None else self._names:
            if (name, key) not in self._before:
                self._modules[name].pop(key, None)
                continue
            value, content = self._before[name, key]
            self._modules[name][key] = value
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, dict):
                value.clear()
                value.update(content)


def _are_same(before: tuple[Any, Any] | None, now: tuple[Any, Any] | None) -> bool:
    """Return whether an attribute is still the same object and holds the same objects, or is still a number."""
    if before is None or now is None:
        return False
    if isinstance(before[0], dict) and before[0] is now[0]:
        return before[1].keys() == now[1].keys() and all(
            now[1][key] is value for key, value in before[1].items()
        )
    if isinstance(before[0], list) and before[0] is now[0]:
        return [*map(id, before[1])] == [*map(id, now[1])]
    return before[0] is now[0] or (
        isinstance(before[0], int | float) and isinstance(now[0], int | float)
    )


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which of some tensors, or views of them, are read, by their names."""

    def __init__(self, params: Params, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._seen = {memory(p): name for name, p in params.items()}, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = (memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self._seen += [self._names[place] for place in read if place in self._names]
        return func(*args, **(kwargs or {}))


@contextmanager
def reading(params: Params, seen: list[str]) -> Iterator[None]:
    """Add to ``seen`` the names of those of these tensors that are read meanwhile.

    Compiled functions, which allow none to watch, run uncompiled.
    """
    with torch.compiler.set_stance("force_eager"), _Reading(params, seen):
        yield


class HeadLearner(Learner):
    """Calls the head of ``network`` on features; its parameters keep the names that they have in the network.

    Args:
        network: The whole network.
        head: Name of its head.
        vectorised: As for the whole network.
    """

    def __init__(self, network: nn.Module, head: str, *, vectorised: bool = False) -> None:
        super().__init__(network.get_submodule(head), vectorised=vectorised)
        self._names = {f"{head}.{name}": name for name in self.params}
        self.params = {full: self.params[name] for full, name in self._names.items()}

    @override
    def _run(
        self, params: Params, inputs: Inputs, context: int, averages: Mapping[str, Tensor]
    ) -> Any:
        return super()._run(
            {name: params[full] for full, name in self._names.items()}, inputs, context, averages
        )


OF_LOSS = "(loss)."
"""What the names of a loss's parameters start with, among those of a network: no module has such a
name."""


class FunctionalLoss:
    """Calls a loss with given values for its trainable parameters, from any number of threads; a loss without any is just called.

    Args:
        loss: Maps outputs and labels to their mean loss. One of torch's is given the logits alone.
        logits: Takes the logits from what the network returned.
    """

    def __init__(self, loss: Callable[..., Any], logits: Callable[[Any], Any]) -> None:
        self.loss = loss
        self.given: Callable[[Any], Any] = logits if takes_logits(loss) else _as_they_are
        """What it is given of the network's outputs."""
        self.params: Params = {}
        """Its trainable parameters, by names that start with :data:`OF_LOSS`."""
        if isinstance(loss, nn.Module):
            self.params = {
                f"{OF_LOSS}{name}": p for name, p in loss.named_parameters() if p.requires_grad
            }
        self._own = threading.local()

    def __call__(self, params: Params, outputs: Any, y: Any) -> Any:
        """Return the loss, with its own values for what ``params`` lacks.

        Raises:
            TypeError: If it is no tensor.
        """
        value = self._value(params, self.given(outputs), y)
        if not isinstance(value, Tensor):
            raise TypeError(
                "Expected the loss of a task to be a scalar tensor but got "
                f"{type(value).__name__}; return the loss alone, without .item()."
            )
        return value

    def _value(self, params: Params, outputs: Any, y: Any) -> Any:
        if not self.params:
            return self.loss(outputs, y)
        if not hasattr(self._own, "loss"):
            self._own.loss = structural_copy(cast("nn.Module", self.loss))
            self._own.places = {
                f"{OF_LOSS}{name}": where for name, where in places(self._own.loss).items()
            }
        with holding(
            self._own.places, {name: params[name] for name in self.params if name in params}
        ):
            return self._own.loss(outputs, y)


def _as_they_are(outputs: Any) -> Any:
    return outputs


def structural_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return other module objects over the same tensors; those given to ``torch.compile`` run uncompiled.

    ``torch.compile`` would compile each copy anew, knows no second derivatives and fails under
    ``vmap``.

    Args:
        network: Any module.
        dtype: If given, floating-point tensors are copies of this type.
    """
    attributes = [value for module in network.modules() for value in vars(module).values()]
    tensors = chain(
        network.parameters(),
        network.buffers(),
        (value for value in attributes if isinstance(value, Tensor)),
    )
    memo: dict[int, Any] = {id(tensor): _of_type(tensor, dtype) for tensor in tensors}
    dicts = [value for value in attributes if type(value) in (dict, OrderedDict)]
    # these are dicts of hooks, of which there are many
    memo |= {id(value): type(value)() for value in dicts if not value}
    with _CopyingTensors(share=True), _saying_what_cannot_be_copied(network):
        copied = copy.deepcopy(network, memo)
    if any(
        _holds_functions(value)
        for value in attributes
        if value.__class__ in _WITH_FUNCTIONS and value
    ):
        _rebind_functions(copied, memo)
    run_uncompiled(copied)
    if network in _WRITTEN:
        _WRITTEN[copied] = _WRITTEN[network]
    return copied


@contextmanager
def _saying_what_cannot_be_copied(network: nn.Module) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        holders = (
            (f"{name}.{key}".lstrip("."), value)
            for name, module in network.named_modules()
            for key, value in vars(module).items()
        )
        failing = [
            name
            for name, value in holders
            if not isinstance(value, Tensor | nn.Module) and not _can_be_copied(value)
        ]
        if not failing:
            raise
        raise TypeError(
            "Expected a network that can be copied (copy.deepcopy), as adaptation needs copies, "
            f"but {failing} cannot be ({error}); make it where it is used, or leave it out of the "
            "network."
        ) from error


def _can_be_copied(value: Any) -> bool:
    if value.__class__ in (dict, OrderedDict) and any(
        isinstance(part, nn.Module | Tensor) for part in value.values()
    ):
        return True  # modules are looked at themselves
    try:
        copy.deepcopy(value)
    except TypeError:
        return False
    except Exception:  # noqa: BLE001 # fails otherwise, and so was not what failed
        return True
    return True


_WITH_FUNCTIONS = frozenset({FunctionType, ReferenceType, partial, list, tuple, dict, OrderedDict})


def _holds_functions(value: Any, depth: int = 4) -> bool:
    """Return whether a value is, or holds, a function or a weak reference, which ``copy.deepcopy`` leaves as they are."""
    kind = value.__class__
    if kind in (FunctionType, ReferenceType, partial):
        return True
    if kind not in _WITH_FUNCTIONS or not value or not depth:
        return False
    parts = value if kind in (list, tuple) else value.values()
    return any(_holds_functions(part, depth - 1) for part in parts)


def _rebind_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks and functions that the modules hold refer to the copies of what they refer to, which ``copy.deepcopy`` does not."""
    for module in copied.modules():
        attributes = vars(module)
        for key in [key for key in attributes if key not in OF_MODULES]:
            attributes[key] = _rebound_value(attributes[key], memo)


def _rebound_value(value: Any, memo: dict[int, Any], depth: int = 4) -> Any:
    """Return a value of a copy with functions and weak references that refer to copies; its lists and dicts are changed in place."""
    if not _holds_functions(value, depth):
        return value
    kind = value.__class__
    if kind is FunctionType:
        return _rebound(value, memo)
    if kind is ReferenceType:
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if kind is partial:
        function, *given = (_rebound_value(part, memo, depth) for part in (value.func, *value.args))
        return partial(
            function,
            *given,
            **{name: _rebound_value(part, memo, depth) for name, part in value.keywords.items()},
        )
    if kind is tuple:
        return tuple(_rebound_value(part, memo, depth - 1) for part in value)
    for key in range(len(value)) if kind is list else [*value]:
        value[key] = _rebound_value(value[key], memo, depth - 1)
    return value


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    def copy_of(value: Any) -> Any:
        if isinstance(value, FunctionType) and value is not function:
            return _rebound(value, memo)
        return memo.get(id(value), value)

    try:
        before = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is still empty
        return function
    defaults = function.__defaults__ or ()
    after, defaults_after = [*map(copy_of, before)], [*map(copy_of, defaults)]
    named = function.__kwdefaults__ or {}
    named_after = {name: copy_of(value) for name, value in named.items()}
    pairs = zip(
        (*before, *defaults, *named.values()),
        (*after, *defaults_after, *named_after.values()),
        strict=True,
    )
    if all(a is b for a, b in pairs):
        return function
    cells = tuple(map(CellType, after))
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, tuple(defaults_after), cells
    )
    made.__kwdefaults__ = named_after or None
    made.__dict__.update(function.__dict__)
    return made


def _of_type(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().to(dtype)
    return (
        nn.Parameter(converted, tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else converted
    )


def deep_copy(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy with tensors of its own, also where the network keeps results of its last pass, which are copied without graph.

    Args:
        network: Any module.
        memo: What stands for other objects in the copy, by their id.
    """
    memo = {} if memo is None else memo
    with _CopyingTensors(share=False):
        copied = copy.deepcopy(network, memo)
    _rebind_functions(copied, memo)
    return copied


class _Watching(TorchFunctionMode):
    """Notes what a forward pass does that depends on how it is run.

    Reading tensors by their place in memory, which is another one if images have channels last; and
    hooks on tensors, to which stacked tasks are one, or which are not registered for them at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.views = self.hooks = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.hooks |= func is Tensor.register_hook
        self.views |= func in (Tensor.as_strided, torch.as_strided)
        return func(*args, **(kwargs or {}))


class _CopyingTensors(TorchFunctionMode):
    """Lets ``copy.deepcopy`` go past tensors that have a graph, such as activations that a network keeps: torch copies only leaves.

    Args:
        share: Give the tensors themselves in place of copies of them.
    """

    def __init__(self, *, share: bool) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0]
        without_graph = tensor if tensor.is_leaf else tensor.detach()
        if self._share:
            return without_graph
        copied: Tensor = func(*args, **(kwargs or {})) if tensor.is_leaf else without_graph.clone()  # type: ignore[no-untyped-call]
        return copied


def run_uncompiled(network: nn.Module) -> None:
    """Make the parts of a network that were given to ``torch.compile`` run uncompiled."""
    for part in network.modules():
        if isinstance(part, OptimizedModule):
            part.forward = part._orig_mod.__call__


def _check_running_averages(network: nn.Module, norms: list[str], policy: str) -> None:
    without = [name for name in norms if network.get_submodule(name).running_mean is None]
    if without:
        raise ValueError(
            f"Expected the batch-norm layers to keep running averages for `batch_norm={policy!r}` "
            f"but {without} do not; build them with track_running_stats=True, or use 'batch' or "
            "'support'."
        )


def _has_own_forward(norm: nn.Module) -> bool:
    return "forward" in vars(norm) or type(norm).forward not in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def norms_with_own_forward(network: nn.Module, norms: Iterable[str]) -> list[str]:
    """Return the names of the batch-norm layers, among these, whose class defines a forward pass of its own."""
    return [name for name in norms if _has_own_forward(network.get_submodule(name))]


def _check_own_forward(network: nn.Module, norms: list[str]) -> None:
    if own := norms_with_own_forward(network, norms):
        raise ValueError(
            f"Expected plain batch-norm layers for `batch_norm='support'` but {own} have a "
            "forward pass of their own; use 'batch' or 'running'."
        )
