"""Validate a network once per batch shape and dtype, before it is trained on such batches."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.batches.outputs import are_tensors, tensors_in
from lightning_maml.batches.trees import Inputs, cat, count, detached, map_tensors, tensors
from lightning_maml.batches.trees import shapes as shapes_of
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, generators_drawn_from, set_generator_states
from lightning_maml.core.tensors import is_out_of_memory, raise_if_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import held_tensors, put_back
from lightning_maml.networks.batch_norm import batch_norms
from lightning_maml.networks.copies import structural_copy
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import (
    FunctionalHead,
    FunctionalNetwork,
    norms_with_own_forward,
)
from lightning_maml.networks.head_body import Part, adapting, head_of
from lightning_maml.networks.kinks import kinked_operations, kinks
from lightning_maml.networks.stacking_trial import first_difference


class NetworkInfo(NamedTuple):
    """What the checks found out about a network.

    Attributes:
        outputs: Shape of the logits, or of a regression's outputs, for one example; None if they
            are not a tensor.
        ends_with_head: Whether the features before the head may be computed once per task: the
            output is that of the head, and no random numbers are drawn. Checked only where head
            or body adapt; else False.
        draws: Names of the random generators that the network and the loss draw from.
    """

    outputs: torch.Size | None
    ends_with_head: bool
    draws: tuple[str, ...] = ()


class NetworkChecks:
    """Checks whether a network can be trained with its loss on batches like a given one.

    Args:
        part: Which parameters adapt: ``"all"``, ``"head"`` or ``"body"``, or names of them.
        head: Name of the head; None for the last layer.
        logits: Takes the logits from what the network returns.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning_maml import MLP, Episodes
        >>> from lightning_maml.batches.outputs import logits_in
        >>> from lightning_maml.checks.network_checks import NetworkChecks
        >>> from lightning_maml.networks.functional_loss import FunctionalLoss
        >>> from lightning_maml.networks.functional_network import FunctionalNetwork
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> network, loss = MLP(4, 3), FunctionalLoss(F.cross_entropy, logits_in)
        >>> check = NetworkChecks("head", None, logits_in)
        >>> functional, episodes = FunctionalNetwork(network), Episodes(x, y, x, y)
        >>> check(
        ...     network, functional, episodes, [loss], lambda outputs: None, lambda run: None
        ... )
        NetworkInfo(outputs=torch.Size([3]), ends_with_head=True, draws=())
    """

    def __init__(self, part: Part, head: str | None, logits: Callable[[Any], Any]) -> None:
        self._part = part
        self._head = head
        self._logits = logits

    def __call__(
        self,
        network: nn.Module,
        functional: FunctionalNetwork,
        episodes: AnyEpisodes,
        losses: Sequence[FunctionalLoss],
        check_labels: Callable[[torch.Size | None], None],
        inspect: Callable[[Callable[[], Tensor]], None],
    ) -> NetworkInfo:
        """Check the network on a meta-batch, and return what was found.

        Args:
            network: The model's network.
            functional: The network, or a copy of it, as a function.
            episodes: The meta-batch; its first task is used.
            losses: The model's losses.
            check_labels: Called with the shape of an example's outputs before a loss is called:
                labels that do not fit them would end all work on a GPU.
            inspect: Called with a function that runs the network, to watch it.

        Raises:
            ValueError: If layers that adapt run again in the backward pass, the batch-norm policy
                cannot govern the network, there are labels but no logits, a pass writes to
                parameters or inputs or cannot be repeated, or its mode is read past the modules.
        """
        info = self._inspected(functional, episodes, losses, check_labels)
        check_modes(network, functional, episodes)
        with first_support(functional, episodes) as x:
            inspect(partial(functional, functional.params, x))
        return info

    def _inspected(
        self,
        functional: FunctionalNetwork,
        episodes: AnyEpisodes,
        losses: Sequence[FunctionalLoss],
        check_labels: Callable[[torch.Size | None], None],
    ) -> NetworkInfo:
        # first, so that no other check changes the network
        check_writes(functional, episodes)
        check_policy(functional, episodes)
        with first_support(functional, episodes) as x:
            run_again = tuple(functional.names_read_in_backward(x))
        adapted = adapting(functional.network, self._part, self._head)
        if any(name.startswith(run_again) for name in adapted):
            raise UserValueError(
                "Expected a network whose adapting layers run once but got one with checkpoints "
                "(torch.utils.checkpoint), which run them again with other parameters than the "
                "adapted ones; take the checkpoints out, and for memory use `chunk_size`."
            )
        outputs = first_outputs(functional, episodes)
        logits = self._logits(outputs)
        first = first_task(episodes)
        support_y, query_y = support_set(first)[1], first.query_y
        check_logits(logits, None if support_y.is_floating_point() else support_y)
        if query_y.shape[1:] != support_y.shape[1:] or query_y.dtype != support_y.dtype:
            of_queries = self._logits(first_outputs(functional, episodes, of_queries=True))
            check_logits(of_queries, None if query_y.is_floating_point() else query_y)
        shape = logits.shape[1:] if isinstance(logits, Tensor) else None
        check_labels(shape)
        draws = generators_of(functional, episodes, losses)
        ends = self._part in ("head", "body") and self._ends_with_head(functional, episodes)
        # with random numbers, features computed once would have one dropout mask for all steps
        if logits is not outputs or draws:
            ends = False
        if ends:
            ends = self._head_alone_gives_the_outputs(functional, episodes)
        return NetworkInfo(shape, ends, draws)

    def _ends_with_head(self, functional: FunctionalNetwork, episodes: AnyEpisodes) -> bool:
        head = head_of(functional.network, self._head)
        with first_support(functional, episodes) as x, torch.no_grad():
            ends = functional.ends_with(head, x, self._logits)
        if self._head is None and not ends:
            rank_zero_warn(
                f"The last layer with trainable parameters, {head!r}, is taken for the network's "
                "head, but what it gives are not the network's outputs; name the head: "
                f"`head={head!r}`, if it is that."
            )
        return ends

    def _head_alone_gives_the_outputs(
        self, functional: FunctionalNetwork, episodes: AnyEpisodes
    ) -> bool:
        """Compare the outputs of the whole network with those of the head on the features.

        The head gets other parameters for it. They differ if the outputs are changed in place, if
        the network calls the head with other weights, or if it leaves something in the head.
        """
        head = head_of(functional.network, self._head)
        with first_support(functional, episodes) as x, torch.no_grad():
            features = functional.features(functional.params, x, head)
            of_head = {
                name: p
                for name, p in shifted(functional.params).items()
                if name.startswith(f"{head}.")
            }
            try:
                whole = self._logits(functional(functional.params | of_head, x))
                alone = FunctionalHead(functional.network, head)(of_head, features)
            except Exception as error:  # noqa: BLE001 # at other parameters it may raise anything
                raise_if_out_of_memory(error)
                return False
        return first_difference({"outputs": whole}, {"outputs": alone}, 1e-3) is None


def check_writes(functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Find out what a forward pass changes in the network, and refuse what would not be restored.

    It must be the first check, because any other pass changes the network too.

    Raises:
        ValueError: If a pass writes to its inputs or to a trainable parameter, or remembers
            something in a plain tensor.
    """
    # some layers write in training with gradients only
    with first_support(functional, episodes) as x, torch.enable_grad():
        once, twice = functional.find_writes(x)
    before = {name: tensor.double() for name, tensor in once.items()}
    after = {name: tensor.double() for name, tensor in twice.items()}
    # a tensor that is computed anew in each pass is the same again; one that remembers is not
    attribute = first_difference(before, after)
    if attribute is not None:
        raise UserValueError(
            "Expected a network that keeps what it remembers between calls in buffers but it has "
            f"the attribute {attribute!r}, a plain tensor, for it; make it a buffer, "
            "`register_buffer`, so that it is updated once per step and saved."
        )


def check_policy(functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Refuse a network that does not keep what its batch-norm policy promises.

    ``"support"`` promises that queries do not see one another; ``"running"`` and ``"per_step"``
    promise it in evaluation mode. An output must then not change with the other inputs. ``"batch"``
    and ``"support"`` promise that no running averages are used.

    Args:
        functional: The network.
        episodes: The meta-batch; its first task is used.

    Raises:
        ValueError: If the network breaks such a promise.
    """
    policy = functional.batch_norm
    in_evaluation = FunctionalNetwork(structural_copy(functional.network).eval(), policy)
    with first_support(functional, episodes) as support, torch.no_grad():
        queries = detached(first_task(episodes).query_x)
        # a single query has no others that it could see
        x = queries if count(queries) > 1 else cat([queries, queries])
        statistics_of = support if functional.uses_support_statistics else None
        _check_sizes(functional, support, queries)
        if statistics_of is not None and not all(_outputs_of_examples(functional, x)):
            raise UserValueError(
                "Expected outputs with the examples in front for `batch_norm='support'`, which "
                "takes the queries' part of them, but one has another first dimension; leave it "
                "out, or use `batch_norm='batch'`."
            )
        if policy in ("batch", "support"):
            _check_that_no_averages_are_used(in_evaluation, x, statistics_of)
        # "support" promises it in training too
        promises = functional if policy == "support" else in_evaluation
        if policy != "batch" and sees_others(promises, x, statistics_of):
            raise UserValueError(
                "Expected outputs that do not depend on the other queries, as "
                f"`batch_norm={policy!r}` promises, but the first one changes with them: the "
                "network normalises by the batch, or looks at it, outside of batch-norm layers; "
                "use nn.BatchNorm layers for it, or `batch_norm='batch'`, whose figures are "
                "transductive."
            )


def _check_sizes(functional: FunctionalNetwork, support: Inputs, queries: Inputs) -> None:
    policy = functional.batch_norm
    runs_both_together = policy in ("support", "per_step") and batch_norms(functional.network)
    if runs_both_together and shapes_of(queries) != shapes_of(support):
        raise UserValueError(
            f"Expected support and query inputs of one size for `batch_norm={policy!r}`, "
            "which runs both together, but got others; pad them, or use `batch_norm='batch'`."
        )


def _check_that_no_averages_are_used(
    in_evaluation: FunctionalNetwork, x: Inputs, statistics_of: Inputs | None
) -> None:
    """Run a network in evaluation mode, where its layers would use running averages if any did."""
    policy = in_evaluation.batch_norm
    try:
        with _FunctionalBatchNorm() as calls:
            in_evaluation(in_evaluation.params, x, statistics_of=statistics_of)
    except (TypeError, AttributeError) as error:
        # the averages were taken from the layers, and a forward pass of their own may miss them
        network = in_evaluation.network
        own = norms_with_own_forward(network, batch_norms(network))
        if not own:
            raise
        raise UserValueError(
            "Expected batch norm that needs no running averages in evaluation, as "
            f"`batch_norm={policy!r}` has it, but {own} need theirs; use "
            "`batch_norm='running'`."
        ) from error
    if calls.with_running_averages:
        raise UserValueError(
            f"Expected batch norm that follows `batch_norm={policy!r}` but in evaluation "
            "mode the network calls torch.nn.functional.batch_norm with training=False, "
            "which uses running averages; use nn.BatchNorm layers, or "
            "`batch_norm='running'`."
        )


def sees_others(functional: FunctionalNetwork, x: Inputs, statistics_of: Inputs | None) -> bool:
    """Return whether the output for the first example depends on the other examples.

    It is computed again with all examples replaced by the first one, and compared up to rounding.

    Args:
        functional: The network.
        x: Inputs ``[B, ...]``.
        statistics_of: Inputs whose batch-norm statistics are used in place of those of ``x``.
    """
    params, device = functional.params, tensors(x)[0].device
    before = generator_states(device)
    has_examples = _outputs_of_examples(functional, x)

    def outputs(x: Inputs) -> list[Tensor]:
        set_generator_states(before, device)
        found = tensors_in(functional(params, x, statistics_of=statistics_of))
        return [
            tensor
            for tensor, of_examples in zip(found, has_examples, strict=True)
            if of_examples and tensor.is_floating_point()
        ]

    # a last layer of zeros would hide what the layers before it do
    if all(torch.equal(tensor, tensor[:1].expand_as(tensor)) for tensor in outputs(x)):
        params = shifted(params)
    first_alone = map_tensors(lambda tensor: tensor[:1].expand_as(tensor), x)
    pairs = zip(outputs(x), outputs(first_alone), strict=True)
    set_generator_states(before, device)
    for with_others, alone in pairs:
        difference = (with_others[0] - alone[0]).abs().max()
        rounding = torch.finfo(with_others.dtype).eps ** 0.5
        if difference > rounding * with_others[0].abs().max():
            return True
    return False


def _outputs_of_examples(functional: FunctionalNetwork, x: Inputs) -> list[bool]:
    """Return for each output tensor whether its first dimension is that of the examples.

    It is if it doubles with the number of examples.
    """
    number = count(x)
    once = tensors_in(functional(functional.params, x))
    lengths = [len(tensor) if tensor.ndim else 0 for tensor in once]
    try:
        twice = tensors_in(functional(functional.params, cat([x, x])))
    except Exception:  # noqa: BLE001 # a network may be made for this number of examples only
        return [length == number for length in lengths]
    doubled = [len(tensor) if tensor.ndim else 0 for tensor in twice]
    return [
        length == number and double == 2 * number
        for length, double in zip(lengths, doubled, strict=True)
    ]


class _FunctionalBatchNorm(TorchFunctionMode):
    """Records whether ``torch.nn.functional.batch_norm`` is called with running averages."""

    def __init__(self) -> None:
        super().__init__()
        self.with_running_averages = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.batch_norm:
            training = args[5] if len(args) > 5 else named.get("training", False)
            self.with_running_averages |= not training
        return func(*args, **named)


def check_modes(network: nn.Module, functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Refuse a network whose copies read the training mode of the original.

    Adaptation may run a copy in another mode than the original.

    Args:
        network: The original; its modes are reversed for a pass of a copy.
        functional: The network, or a copy of it, as a function.
        episodes: The meta-batch; its first task is used.

    Raises:
        ValueError: If the outputs of the copy change with the modes of the original.
    """
    with_modes = [
        module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    copied = FunctionalNetwork(functional.network, functional.batch_norm)
    device = episodes.support_y.device
    before = generator_states(device)
    with first_support(functional, episodes) as x, torch.no_grad():
        once = _floats(copied(copied.params, x))
        set_generator_states(before, device)
        try:
            for module in with_modes:
                module.training = not module.training
            again = _floats(copied(copied.params, x))
        finally:
            for module in with_modes:
                module.training = not module.training
    if first_difference(once, again, 1e-5) is not None:
        raise UserValueError(
            "Expected a network that reads its mode from its own modules but its outputs change "
            "with a mode that it reads from elsewhere (a function in a named tuple, a deque or "
            "another object), which copies cannot be given; make such functions methods."
        )


def shifted(params: Params) -> Params:
    """Return ``params`` with normal noise of standard deviation 0.01, the same in each call."""
    # a generator of its own, so that the run's random numbers stay what they are
    noise = torch.Generator().manual_seed(0)
    return {
        name: p.detach() + 0.01 * torch.randn(p.shape, generator=noise, device="cpu").to(p)
        for name, p in params.items()
    }


def first_outputs(
    functional: FunctionalNetwork, episodes: AnyEpisodes, *, of_queries: bool = False
) -> Any:
    """Return the network's outputs for the first task's support set, or for its query set."""
    with first_support(functional, episodes) as x, torch.no_grad():
        if not of_queries:
            return functional(functional.params, x)
        queries = map_tensors(torch.clone, detached(first_task(episodes).query_x))
        statistics_of = x if functional.uses_support_statistics else None
        return functional(functional.params, queries, statistics_of=statistics_of)


def check_logits(outputs: Any, labels: Tensor | None) -> None:
    """Check the logits that were taken from a network's outputs.

    Args:
        outputs: The logits, or the outputs for a regression.
        labels: Labels of the same examples, ``[S]``, or ``[S, ...]`` with one for each pixel or
            token; None for a regression.

    Raises:
        ValueError: If the logits are no tensor ``[S, ways]``, or ``[S, ways, ...]`` with the
            dimensions of the labels, or if the outputs for a regression are made of other things
            than tensors.
    """
    got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    cure = (
        "wrap it in a module that does, or let a subclass of the model take them from its "
        "outputs, in a static method `logits(outputs)`"
    )
    if labels is not None:
        positions = labels.shape[1:]
        is_tensor = isinstance(outputs, Tensor) and outputs.ndim > 1
        if not is_tensor or outputs.shape[2:] != positions or len(outputs) != len(labels):
            shape = ", ".join(["examples", "ways", *map(str, positions)])
            of_labels = f" for labels {list(labels.shape)}" if is_tensor else ""
            raise UserValueError(
                f"Expected `network` to return logits [{shape}]{of_labels}, as a tensor or as the "
                f"attribute or entry `logits` of its outputs, but got {got}; "
                f"{_cure_of_positions(outputs, labels) or cure}."
            )
    if not are_tensors(outputs):
        raise UserValueError(
            "Expected `network` to return tensors, alone or in a dict, tuple or list, or outputs "
            f"with `logits`, but got {got}; {cure}."
        )


def _cure_of_positions(outputs: Any, labels: Tensor) -> str:
    """Return what to do about logits that do not fit labels of more than one dimension."""
    if labels.ndim == 1 or not isinstance(outputs, Tensor):
        return ""
    if outputs.shape == labels.shape:
        return (
            "for several labels per example give floats, y.float(), with a loss such as "
            "binary_cross_entropy_with_logits"
        )
    if labels.ndim == outputs.ndim and labels.shape[1] == 1 != outputs.shape[1]:
        return "leave the labels' channel out, y.squeeze(1)"
    if outputs.shape[:-1] == labels.shape:
        return (
            "torch's losses take the classes second: let the network, or a static method "
            "`logits(outputs)` of a subclass of the model, return outputs.movedim(-1, 1)"
        )
    return "give a label for each position that the network has outputs for"


def generators_of(
    functional: FunctionalNetwork, episodes: AnyEpisodes, losses: Sequence[FunctionalLoss]
) -> tuple[str, ...]:
    """Return the names of the random generators that the network and the losses draw from.

    Raises:
        ValueError: If a loss writes to its tensors, or if an evaluation from the same random
            state gives another result after one with other parameters: derivatives need
            evaluations that can be repeated.
    """
    fresh = FunctionalNetwork(functional.network, functional.batch_norm)
    used = FunctionalNetwork(functional.network, functional.batch_norm)
    device = episodes.support_y.device
    before = generator_states(device)
    y = detached(support_set(first_task(episodes))[1])

    def evaluated(functional: FunctionalNetwork, x: Inputs) -> list[dict[str, Tensor]]:
        set_generator_states(before, device)
        outputs = functional(functional.params, x)
        values = []
        for loss in losses:
            try:
                values.append(loss({}, outputs, y))
            except Exception:  # noqa: BLE001 # the checks of the loss will say what is wrong
                values.append(None)
        return [_floats(outputs), _floats(values)]

    held = [held for loss in losses for held in held_tensors(loss.loss)]
    with first_support(functional, episodes) as x, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first step will give the same warnings
        once = evaluated(fresh, x)
        written = put_back(held)
        draws = tuple(generators_drawn_from(before, device))
        try:
            used(shifted(used.params), x)
        except Exception:  # noqa: BLE001 # with other parameters a network may raise anything
            used = FunctionalNetwork(functional.network, functional.batch_norm)
            used(used.params, x)
        again = evaluated(used, x)
        put_back(held)
    if written:
        raise UserValueError(
            f"Expected a loss that leaves its tensors as they are but it writes to {written}, and "
            "would do so several times a step; put what writes into evaluation mode (a frozen "
            "teacher's batch norm), or into the network, whose buffers are written once a step."
        )
    outputs = first_difference(once[0], again[0], 1e-5)
    value = first_difference(once[1], again[1], 1e-5)
    if outputs is not None or value is not None:
        raise UserValueError(
            f"Expected a {'loss' if outputs is None else 'network'} that returns the same for the "
            "same inputs, parameters and random state but got another result the second time; "
            "let it draw from the global random generators of torch, numpy or Python, not from "
            "one of its own, keep what it remembers between calls in buffers, and compute anew "
            "what depends on its parameters (no functools.lru_cache, no results in nested dicts "
            "or other objects)."
        )
    return draws


def _floats(outputs: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of ``outputs`` by their numbers."""
    return {
        str(number): tensor
        for number, tensor in enumerate(tensors_in(outputs))
        if tensor.is_floating_point()
    }


def find_kinks(functional: FunctionalNetwork, episodes: AnyEpisodes) -> list[str]:
    """Return the layers with kinks, or where there are none, the operations with kinks.

    Args:
        functional: The network.
        episodes: A meta-batch; the network runs on its first support set.
    """
    if layers := kinks(functional.network):
        return layers
    with first_support(functional, episodes) as x:
        operations: list[str] = kinked_operations(lambda: functional(functional.params, x))
    return operations


@contextmanager
def first_support(functional: FunctionalNetwork, episodes: AnyEpisodes) -> Iterator[Any]:
    """Give the first task's support inputs to a check, and explain why the network fails on them.

    Args:
        functional: The network.
        episodes: The meta-batch.

    Yields:
        A copy of the inputs, ``[S, ...]``.

    Raises:
        ValueError: If the network takes its inputs in another form or of another dtype, or fails
            where no gradients are taken.
    """
    device = episodes.support_y.device
    # restored at the end: a resumed run repeats the checks but must draw the same numbers
    before = generator_states(device)
    with torch.inference_mode(False):
        # a copy, in case the network writes to it
        x = map_tensors(torch.clone, detached(support_set(first_task(episodes))[0]))
        try:
            yield x
        except TypeError as error:
            if isinstance(x, Tensor) or _takes(functional.network, x):
                raise
            form = f"network(*x) with {len(x)} tensors"
            if isinstance(x, dict):
                form = "network(**x) with " + ", ".join(map(repr, x))
            raise UserValueError(
                f"Expected a network that takes its inputs as {form} but it does not: {error}; "
                "put a module around it that does."
            ) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _explain_a_failing_network(functional, x, error)
            raise
        finally:
            set_generator_states(before, device)


def _takes(network: nn.Module, x: Any) -> bool:
    """Return whether a network can be called with the entries of a dict, or the items of a list."""
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # some callables have no signature
        return True
    try:
        signature.bind(**x) if isinstance(x, dict) else signature.bind(*x)
    except TypeError:
        return False
    return True


def _explain_a_failing_network(
    functional: FunctionalNetwork, x: Inputs, error: RuntimeError
) -> None:
    """Find out why a network fails on its inputs, and say what to do.

    Raises:
        ValueError: If the network runs with gradients, or on inputs of its parameters' dtype.
    """
    if _runs(functional, x) and not _runs(functional, x, grad=False):
        raise UserValueError(
            "Expected a network and a loss that can be called where no gradients are taken, as "
            f"evaluation does, but they differentiate there ({error}); put `with "
            "torch.enable_grad():` around what they differentiate."
        ) from error
    given = {tensor.dtype for tensor in tensors(x)}
    dtype = next((p.dtype for p in functional.network.parameters()), None)
    others = sorted(str(other) for other in given if other != dtype)
    if dtype is None or not others or _runs(functional, x):
        return
    if _runs(functional, map_tensors(lambda tensor: tensor.to(dtype), x)):
        of_bytes = " / 255" if torch.uint8 in given else ""
        raise UserValueError(
            f"Expected inputs of the network's type, {dtype}, but it fails on "
            f"{' and '.join(others)}; give it x.to({dtype}){of_bytes}."
        ) from error


def _runs(functional: FunctionalNetwork, x: Inputs, *, grad: bool = True) -> bool:
    try:
        with torch.set_grad_enabled(grad):
            functional(functional.params, x)
    except Exception:  # noqa: BLE001 # a network may raise anything
        return False
    return True
