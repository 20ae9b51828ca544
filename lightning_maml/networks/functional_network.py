"""A network as a pure function of its trainable parameters, with a stated batch-norm policy."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointFunction
from typing_extensions import override

from lightning_maml.batches.outputs import logits_in, map_outputs, tensors_in
from lightning_maml.batches.trees import Inputs, call, cat, count, differentiable
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, set_generator_states, torch_random_state
from lightning_maml.core.tensors import nodes_of, raise_if_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.kernels.layers import (
    TaskConvolution,
    TaskEmbedding,
    TaskNorm,
    TaskPooling,
    is_padded_embedding,
    is_plain_convolution,
    is_plain_pooling,
)
from lightning_maml.kernels.recurrence import TaskRecurrence
from lightning_maml.networks.attributes import Kept, is_written, numbers_in
from lightning_maml.networks.batch_norm import batch_norms, forget_running_averages
from lightning_maml.networks.copies import copy_in_mode, structural_copy
from lightning_maml.networks.facts import Written, facts_of
from lightning_maml.networks.places import holding, places
from lightning_maml.networks.versions import Versions
from lightning_maml.networks.watching import Reading, Watching, reading

_CPU = torch.device("cpu")

BatchNormPolicy = Literal["batch", "support", "running", "per_step"]
"""Which statistics batch norm normalises by, see :class:`FunctionalNetwork`."""


class HeadDoesNotEndError(RuntimeError):
    """For some inputs the network's output is not that of its head, though it was for others."""


class FunctionalNetwork:
    """A network as a function of its trainable parameters, which several threads may call at once.

    Calls do not change the network. Each thread works on a structural copy of it: module objects of
    its own over the same tensors. Every call starts from the network's buffers, and what it writes
    to them is not kept. The same holds for frozen parameters, plain numbers and other attributes
    once :meth:`find_writes` has found that a forward pass writes to them.

    Args:
        network: Any module; its training mode (dropout) is kept.
        batch_norm: Which statistics the batch-norm layers normalise by:

            - ``"batch"``: those of the batch at hand, so queries are normalised by the query set
              (transductive, as in the MAML papers).
            - ``"support"``: those of the support set, on both sets.
            - ``"running"``: the running averages in layers in evaluation mode, and the batch's
              statistics in layers in training mode.
            - ``"per_step"``: as ``"running"``, but with the averages that are given to the call.
        vectorised: Whether it is called under ``vmap``.

    Raises:
        ValueError: If there is no such policy, or if it does not fit the network's batch norm:
            ``"running"`` and ``"per_step"`` need running averages, ``"support"`` needs layers
            without a forward pass of their own.

    Examples:
        >>> import torch
        >>> from lightning_maml import MLP
        >>> from lightning_maml.networks.functional_network import FunctionalNetwork
        >>> functional = FunctionalNetwork(MLP(4, 3))
        >>> zeros = {name: torch.zeros_like(p) for name, p in functional.params.items()}
        >>> functional(zeros, torch.ones(2, 4))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(
        self, network: nn.Module, batch_norm: BatchNormPolicy = "batch", *, vectorised: bool = False
    ) -> None:
        if batch_norm not in get_args(BatchNormPolicy):
            raise UserValueError(
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

    def stacked(self) -> "FunctionalNetwork":
        """Return the same function, to be called under ``vmap``."""
        other = copy.copy(self)
        other._vectorised = True
        other._own = threading.local()
        return other

    def in_mode(self, *, training: bool) -> "FunctionalNetwork":
        """Return the same function of a copy of the network in training or in evaluation mode."""
        copied = copy_in_mode(self.network, training=training)
        return FunctionalNetwork(copied, self.batch_norm, vectorised=self._vectorised)

    def __call__(
        self,
        params: Params,
        x: Inputs,
        *,
        statistics_of: Inputs | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the network's outputs for ``x``.

        Args:
            params: Values for the trainable parameters, by name.
            x: Inputs of one task, ``[B, ...]``.
            statistics_of: Inputs that are run along with ``x``, and whose batch-norm statistics are
                used in place of those of ``x``.
            averages: Running averages to use in place of the network's, by the names of its
                buffers.

        Returns:
            What the network returns, tensors ``[B, ...]``.
        """
        inputs, context = _with_context(x, statistics_of)
        outputs = self._run(params, inputs, context, averages or {})
        if not context:
            return outputs
        rows = count(inputs)

        def of_x(tensor: Tensor) -> Tensor:
            return tensor[context:] if tensor.ndim and len(tensor) == rows else tensor

        return map_outputs(of_x, outputs)

    def features(
        self, params: Params, x: Inputs, head: str, *, statistics_of: Inputs | None = None
    ) -> Tensor:
        """Return the features that the submodule ``head`` gets, ``[B, ...]``.

        Args:
            params: As for a call.
            x: As for a call.
            head: Name of the head; :meth:`ends_with` must be true for it.
            statistics_of: As for a call.

        Raises:
            HeadDoesNotEndError: If the network's output for these inputs is not that of the head.
        """
        inputs, context = _with_context(x, statistics_of)
        with self._calls_of(head) as calls:
            outputs = self._run(params, inputs, context, {})
        if len(calls) != 1 or calls[0][2] is not outputs:
            raise HeadDoesNotEndError
        features: Tensor = calls[0][0][0]
        return features[context:]

    def ends_with(self, head: str, x: Inputs, logits: Callable[[Any], Any] = logits_in) -> bool:
        """Return whether the logits for ``x`` are the output of the submodule ``head``.

        The head must be called once, with one tensor ``[B, ...]`` that does not depend on the
        head's own parameters.

        Args:
            head: Name of the submodule.
            x: Inputs of one task, ``[B, ...]``.
            logits: Takes the logits from what the network returns.
        """
        with torch.enable_grad(), self._calls_of(head) as calls:
            params = {name: differentiable(p).requires_grad_() for name, p in self.params.items()}
            outputs = self._run(params, x, 0, {})
        if len(calls) != 1:
            return False
        arguments, named, result = calls[0]
        if len(arguments) != 1 or named:
            return False
        features = arguments[0]
        if not isinstance(features, Tensor) or len(features) != count(x):
            return False
        of_head = [p for name, p in params.items() if name.startswith(f"{head}.")]
        if of_head and features.requires_grad:
            gradients = torch.autograd.grad(
                features, of_head, torch.ones_like(features), allow_unused=True
            )
            if any(gradient is not None for gradient in gradients):
                return False
        return result is logits(outputs)

    def names_read_in_backward(self, x: Inputs) -> set[str]:
        """Find parts of the network that run again in the backward pass.

        ``torch.utils.checkpoint`` runs them again, and by then the network no longer holds the
        values that the call was given.

        Returns:
            Names of parameters, and names of modules with a dot at the end.
        """
        runs: list[str] = []

        def note_run_of(name: str) -> Callable[..., None]:
            return lambda *_: runs.append(name and f"{name}.")

        hooks = []
        for name, module in self._copy_of_this_thread().named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # those take no hooks
                hooks.append(module.register_forward_pre_hook(note_run_of(name)))
        runs_forward, outputs = 0, None
        try:
            with torch.enable_grad():
                params = self._trainable_clones()
                outputs = self._run(params, x, 0, {})
                runs_forward = len(runs)
                curved = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
                if curved:
                    sums = [tensor.abs().sum() for tensor in curved]
                    with Reading(self.params, runs):
                        torch.autograd.grad(sums, [*params.values()], allow_unused=True)
        except RuntimeError:
            if not _has_reentrant_checkpoints(outputs):
                raise
            return set(runs)  # the older form of checkpoints allows no such backward pass
        finally:
            for hook in hooks:
                hook.remove()
        return set(runs[runs_forward:])

    def find_writes(self, x: Inputs) -> tuple[Params, Params]:
        """Find out what a forward pass changes in the network, and note it in its facts.

        Args:
            x: Inputs of one task, ``[B, ...]``.

        Returns:
            The tensors in plain attributes after one pass, and after another one with the same
            inputs and random numbers.

        Raises:
            ValueError: If a pass writes to its inputs, to a trainable parameter, or to buffers past
                the network's modules, or if it reads a parameter past them.
        """
        network = self._copy_of_this_thread()
        params = self._trainable_clones()
        inputs = Versions(enumerate(tensors_in(x)))
        device = tensors_in(x)[0].device
        states = generator_states(device)
        numbers, kept = numbers_in(network), Kept(network)
        modes = {name: norm.training for name, norm in batch_norms(network).items()}
        lies_at = {name: p.data_ptr() for name, p in params.items() if _is_in_one_place(p)}
        originals = Versions([*self.network.named_buffers(), *self.network.named_parameters()])
        written, read_elsewhere = self._watch_a_pass(params, x)
        if inputs.changed():
            raise UserValueError(
                "Expected a network that leaves its inputs as they are but it writes to them, "
                "which would change the batch for all that follows; let it work on a copy, "
                "x.clone()."
            )
        if past_modules := sorted(originals.changed()):
            raise UserValueError(
                "Expected a network that reaches its buffers through its modules but its forward "
                f"pass writes to {past_modules} from elsewhere (an object, a closure, a global), "
                "and would do so in every pass; write to the module's attributes."
            )
        if read_elsewhere:
            raise UserValueError(
                "Expected a network that reaches its parameters through its modules but its "
                f"forward pass reads {sorted(read_elsewhere)} from elsewhere (a tuple, a closure, "
                "a global), where adapted values cannot be put; read them from the module's "
                "attributes."
            )
        if self.batch_norm in ("running", "per_step"):
            _check_modes(network, modes, self.batch_norm)
        # `p.data = ...` with the same values, where a constraint does not bind yet
        written |= {name for name, place in lies_at.items() if params[name].data_ptr() != place}
        if trained := sorted(written & self.params.keys()):
            raise UserValueError(
                "Expected a forward pass that leaves the network's parameters as they are but it "
                f"writes to {trained}; run the network once before the model is made, if these "
                "are initialised by the first batch, make them buffers, or leave out what writes "
                "(an embedding's max_norm)."
            )
        moved = {key for key, number in numbers_in(network).items() if number != numbers.get(key)}
        changed, once = kept.changed(), self._tensor_attributes()
        if once:
            set_generator_states(states, device)
            self._run(params, x, 0, {})
        twice = self._tensor_attributes()
        facts = facts_of(self.network)
        before = facts.written or Written()
        facts.written = Written(
            before.tensors | written,
            before.numbers | moved,
            before.kept | changed,
            {**kept.empty(changed), **before.empty},
        )
        # the next call copies the network anew, with everything as it was
        del self._own.network
        return once, twice

    def _watch_a_pass(self, params: Params, x: Inputs) -> tuple[set[str], set[str]]:
        """Run one forward pass and note facts about it.

        Returns:
            Names of the tensors that it writes through its modules, and of the parameters that it
            reads past them.
        """
        network = self._copy_of_this_thread()
        facts = facts_of(self.network)
        frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        originals = {**self._own.buffers, **frozen, **self.params}
        written: set[str] = set()
        reads: list[str] = []
        read_elsewhere: set[str] = set()

        # called while the network still holds the tensors of the call
        def note_changes() -> None:
            # first, because the comparisons read the parameters too
            read_elsewhere.update(reads)
            for name, found in self._own.places.items():
                if not found or name not in originals:
                    continue
                holder, key = found[0]
                if is_written(holder[key], originals[name]):
                    written.add(name)

        def note_cache(*_: Any) -> None:
            if parametrize._cache_enabled:
                facts.caches_parametrizations = True

        hooks = [
            module.register_forward_pre_hook(note_cache)
            for module in network.modules()
            if isinstance(module, parametrize.ParametrizationList)
        ]
        # frozen parameters are cloned for the pass like buffers, so that writes to them show
        buffers = self._own.buffers
        self._own.buffers = {**buffers, **frozen}
        self._own.after_a_pass = note_changes
        try:
            with reading(self.params, reads), Watching() as watched:
                self._run(params, x, 0, {})
        finally:
            for hook in hooks:
                hook.remove()
            self._own.after_a_pass = None
            self._own.buffers = buffers
        if watched.views:
            facts.views_images = True
        if watched.hooks:
            facts.hooks_tensors = True
        return written, read_elsewhere

    def _trainable_clones(self) -> Params:
        return {name: differentiable(p).clone().requires_grad_() for name, p in self.params.items()}

    def _tensor_attributes(self) -> Params:
        """Return copies of the tensors that the modules hold in plain attributes."""
        copies: Params = {}
        for name, module in self._copy_of_this_thread().named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor):
                    copies[f"{name}.{key}".lstrip(".")] = value.detach().clone()
        return copies

    @contextmanager
    def _calls_of(self, head: str) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
        """Record positional and named arguments, and output, of each call of a submodule."""
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
        """Return the outputs for all inputs.

        If the network fails, it is tried once more with channels-first images: ``.view`` fails on
        channels-last tensors.

        Args:
            params: Values for the trainable parameters.
            inputs: Inputs ``[B, ...]``.
            context: How many of the inputs, from the first on, give the batch-norm statistics; 0 if
                all do.
            averages: Running averages to use in place of the network's.
        """
        self._copy_of_this_thread()
        on_cpu = tensors_in(inputs)[0].device.type == "cpu"
        converting = [
            convolution
            for convolution in self._own.convolutions
            if on_cpu and convolution.channels == "last"
        ]
        if not converting:
            return self._attempt(params, inputs, context, averages)
        facts = facts_of(self.network)
        # numpy's and Python's states take longer to read than small networks to run
        read = torch_random_state if facts.runs_channels_last else generator_states
        before = read(_CPU)
        try:
            outputs = self._attempt(params, inputs, context, averages)
            facts.runs_channels_last = True
        except Exception as error:  # noqa: BLE001 # a network may say in any way what it does not take
            raise_if_out_of_memory(error)
            set_generator_states(before, _CPU)
            for convolution in converting:
                convolution.channels = "first"
            outputs = self._attempt(params, inputs, context, averages)
            facts.views_images = True
        return outputs

    def _attempt(
        self, params: Params, inputs: Inputs, context: int, averages: Mapping[str, Tensor]
    ) -> Any:
        for norm in self._own.norms:
            norm.context = Fraction(context, count(inputs))
        buffers = {
            name: averages.get(name, buffer).clone()  # both may be written to
            for name, buffer in self._own.buffers.items()
        }
        with holding(self._own.places, {**buffers, **params}):
            outputs = call(self._own.network, inputs)
            if self._own.after_a_pass is not None:
                self._own.after_a_pass()
            written = self._newly_written(buffers)
        if written:
            facts = facts_of(self.network)
            before = facts.written or Written()
            facts.written = before._replace(tensors=before.tensors | written)
            self._own.unwritten -= written
        for attributes, key, number in self._own.numbers:
            attributes[key] = number
        if self._own.kept is not None:
            self._own.kept.put_back()
        return outputs

    def _newly_written(self, buffers: Params) -> set[str]:
        """Return the buffers that a pass has written, though :meth:`find_writes` saw no write.

        Whether a network writes to a buffer may depend on values.
        """
        written = set()
        for name in self._own.unwritten:
            if not self._own.places[name]:
                continue
            holder, key = self._own.places[name][0]
            if buffers[name]._version or holder[key] is not buffers[name]:
                written.add(name)
        return written

    def _copy_of_this_thread(self) -> nn.Module:
        if not hasattr(self._own, "network"):
            self._make_copy()
        network: nn.Module = self._own.network
        return network

    def _make_copy(self) -> None:
        """Make this thread's copy of the network, and note where it holds its tensors."""
        network = structural_copy(self.network)
        self._replace_layers(network)
        facts = facts_of(self.network)
        written = facts.written or Written()
        # written frozen parameters are cloned for each call like buffers
        frozen = {}
        if written.tensors:
            frozen = {
                name: p.detach()
                for name, p in network.named_parameters()
                if name in written.tensors
            }
        self._own.after_a_pass = None
        self._own.places = places(network)
        self._own.buffers = {**dict(network.named_buffers()), **frozen}
        self._own.unwritten = set()
        # before find_writes any buffer may be written, and under vmap writes are not watched
        if facts.written is not None and not self._vectorised:
            self._own.unwritten = self._own.buffers.keys() - written.tensors
        self._own.numbers = []
        modules = dict(network.named_modules()) if written.numbers else {}
        for name, key in written.numbers:
            attributes = vars(modules[name]) if name in modules else {}
            if key in attributes:
                self._own.numbers.append((attributes, key, attributes[key]))
        self._own.kept = Kept(network, written.kept) if written.kept else None
        self._own.network = network

    def _replace_layers(self, network: nn.Module) -> None:
        """Replace the forward passes of layers that the library computes itself."""
        self._own.norms, self._own.convolutions = [], []
        channels: Literal["first", "last"] = (
            "first" if facts_of(self.network).views_images else "last"
        )
        by_batch = self.batch_norm in ("batch", "support")
        for module in network.modules():
            if isinstance(module, _BatchNorm) and (module.training or by_batch):
                self._take_statistics_of_the_batch(module)
            elif is_plain_convolution(module):
                module.forward = TaskConvolution(module, channels, self._vectorised)
                self._own.convolutions.append(module.forward)
            elif isinstance(module, nn.RNNBase) and "forward" not in vars(module):
                module.forward = TaskRecurrence(module)
            elif is_plain_pooling(module):
                module.forward = TaskPooling(module)  # type: ignore[method-assign, assignment]
            elif self._vectorised and is_padded_embedding(module):
                module.forward = TaskEmbedding(module)  # type: ignore[method-assign, assignment]
            elif self._vectorised and getattr(module, "inplace", None) is True:
                # on a GPU, what is written in place in a stack has no second derivative; where a
                # network needs the writing, the trial of stacking finds it out
                with suppress(AttributeError, RuntimeError):  # read-only, or of TorchScript
                    module.inplace = False  # type: ignore[assignment]

    def _take_statistics_of_the_batch(self, norm: _BatchNorm) -> None:
        has_own_forward = _has_own_forward(norm)
        if has_own_forward and norm.training:
            return  # it may need its running averages, even if only to write them
        forget_running_averages(norm)
        if not has_own_forward:
            forward = TaskNorm(norm, self._vectorised)
            norm.forward = forward  # type: ignore[method-assign, assignment]
            self._own.norms.append(forward)


class FunctionalHead(FunctionalNetwork):
    """The head of a network as a function of its parameters and the features.

    Args:
        network: The whole network.
        head: Name of its head. Its parameters keep their names in the whole network.
        vectorised: Whether it is called under ``vmap``.

    Examples:
        >>> import torch
        >>> from lightning_maml import Conv4
        >>> from lightning_maml.networks.functional_network import FunctionalHead
        >>> head = FunctionalHead(Conv4(in_channels=1, ways=5, image_size=28), "head")
        >>> sorted(head.params)
        ['head.bias', 'head.weight']
        >>> head(head.params, torch.rand(2, 64)).shape  # two examples of 64 features
        torch.Size([2, 5])
    """

    def __init__(self, network: nn.Module, head: str, *, vectorised: bool = False) -> None:
        super().__init__(network.get_submodule(head), vectorised=vectorised)
        self._names = {f"{head}.{name}": name for name in self.params}
        self.params = {full: self.params[name] for full, name in self._names.items()}

    @override
    def _run(
        self, params: Params, inputs: Inputs, context: int, averages: Mapping[str, Tensor]
    ) -> Any:
        own = {name: params[full] for full, name in self._names.items()}
        return super()._run(own, inputs, context, averages)


def _with_context(x: Inputs, statistics_of: Inputs | None) -> tuple[Inputs, int]:
    """Return both inputs as one batch, and how many of it give the batch-norm statistics."""
    if statistics_of is None:
        return x, 0
    return cat([statistics_of, x]), count(statistics_of)


def _check_running_averages(network: nn.Module, norms: list[str], policy: str) -> None:
    without = [name for name in norms if network.get_submodule(name).running_mean is None]
    if without:
        raise UserValueError(
            f"Expected the batch-norm layers to keep running averages for `batch_norm={policy!r}` "
            f"but {without} do not; build them with track_running_stats=True, or use 'batch' or "
            "'support'."
        )


def _check_modes(network: nn.Module, before: Mapping[str, bool], policy: str) -> None:
    """Check that a pass has left batch norm in its mode, which decides what it normalises by."""
    norms = batch_norms(network)
    changed = [name for name, mode in before.items() if norms[name].training != mode]
    if changed:
        raise UserValueError(
            "Expected a forward pass that leaves batch norm in its mode, by which "
            f"`batch_norm={policy!r}` goes, but it changes that of {changed}; do so in the "
            "network's train(mode)."
        )


def _is_in_one_place(p: Tensor) -> bool:
    # on a GPU recurrent layers move their weights into one block
    is_plain = type(p) in (Tensor, nn.Parameter)
    return is_plain and p.layout == torch.strided and p.device.type == "cpu"


def _has_reentrant_checkpoints(outputs: Any) -> bool:
    """Return whether outputs come from ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    for tensor in tensors_in(outputs):
        for node in nodes_of(tensor):
            if getattr(node, "_forward_cls", None) is CheckpointFunction:
                return True
    return False


def _has_own_forward(norm: nn.Module) -> bool:
    return "forward" in vars(norm) or type(norm).forward not in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def norms_with_own_forward(network: nn.Module, norms: Iterable[str]) -> list[str]:
    """Return those of the named batch-norm layers that have a forward pass of their own."""
    return [name for name in norms if _has_own_forward(network.get_submodule(name))]


def _check_own_forward(network: nn.Module, norms: list[str]) -> None:
    if own := norms_with_own_forward(network, norms):
        raise UserValueError(
            f"Expected plain batch-norm layers for `batch_norm='support'` but {own} have a "
            "forward pass of their own; use 'batch' or 'running'."
        )
