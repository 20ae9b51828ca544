"""Looks at a model on a batch of its data: whether its gradients are right, and what else one should know before training it."""

import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml.algorithms.maml import MAML
from lightning_maml.algorithms.metrics import with_accuracy
from lightning_maml.algorithms.variants import IMAML, MAMLPlusPlus, Reptile
from lightning_maml.batches.episodes import (
    AnyEpisodes,
    Episodes,
    check_episodes,
    first_task,
    support_set,
)
from lightning_maml.batches.outputs import tensors_in
from lightning_maml.batches.trees import call, cat, map_tensors, tensors
from lightning_maml.batches.trees import count as count_of
from lightning_maml.checks.findings import Findings
from lightning_maml.checks.loss_checks import ignored_label
from lightning_maml.checks.network_checks import NetworkInfo, first_support, sees_others
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.inner_rates import rates_of_steps
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.params import Params, dot, norm, subtract
from lightning_maml.core.rng import drops_blocks, generator_states, set_generator_states
from lightning_maml.errors import UserError, UserTypeError
from lightning_maml.execution.auto import (
    FEWEST_STACKED,
    LARGE_INPUTS,
    STACKED_INPUTS,
    STACKED_PARAMETERS,
    Execution,
    Executor,
)
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.networks.batch_norm import batch_norms
from lightning_maml.networks.copies import deep_copy
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import kinked_operations, kinks, weight_normed
from lightning_maml.networks.stacking_trial import Verdict as StackingVerdict
from lightning_maml.verification.cost import peak_bytes, seconds
from lightning_maml.verification.unrolled import unrolled_gradient, unrolled_way_back

Verdict = Literal["right", "wrong", "note"]

_TASKS = 3
"""How many tasks gradients are compared on."""

_SLOW_SECONDS = 1.0
"""With steps on so many that take longer, gradients are compared on two."""

_ROUNDING, _LOW, _AT_KINKS = 1e-6, 1e-2, 0.1
"""Largest relative errors of gradients that count as rounding: in float64, below, and where
rounding may cross a kink."""

_FAR = 0.3
"""A relative error from which on HF-MAML does not train by what it is meant to: first order would
be nearer."""

_TIMED_SECONDS = 0.5
"""The longest step, estimated from a few tasks, that is timed with the whole batch."""

_WAYS = {
    "loop": Execution("loop", None),
    "threads": Execution("threads", None),
    "vmap": Execution("vmap", None),
    "chunks of 2": Execution("loop", 2),
}

_WIDTH = 104


class Look(NamedTuple):
    """One thing that was looked at.

    Attributes:
        at: What it was.
        found: What was found.
        verdict: ``"right"``, ``"wrong"``, or ``"note"`` for what is no mistake, or was not
            compared.
    """

    at: str
    found: str
    verdict: Verdict


class CheckReport(NamedTuple):
    """What :func:`lightning_maml.check` found; ``print`` it for a table.

    Attributes:
        algorithm: The class of the model.
        rows: What was looked at, one row for each look.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes, check
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks, three classes
        >>> report = check(MAML(MLP(4, 3), inner_lr=0.1), Episodes(x, y, x, y))
        >>> report.ok
        True
    """

    algorithm: str
    rows: tuple[Look, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(row.verdict == "wrong" for row in self.rows)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        count = {
            verdict: sum(row.verdict == verdict for row in self.rows)
            for verdict in ("right", "wrong", "note")
        }
        if self.ok:
            counts = f"{count['right']} looks, none wrong; {count['note']} notes"
            return (
                f"The gradients of {self.algorithm} are right on this network, loss and batch "
                f"({counts})."
            )
        first = next(row for row in self.rows if row.verdict == "wrong")
        others = f" ({count['wrong'] - 1} more below it)" if count["wrong"] > 1 else ""
        return (
            f"{self.algorithm} is wrong on this network, loss or batch, see '{first.at}'{others}: "
            f"{first.found}"
        )

    def __str__(self) -> str:
        first = max(len(row.at) for row in self.rows)
        lines = [line for row in self.rows for line in _lines(row, first)]
        return "\n".join([*lines, "", *textwrap.wrap(self.verdict, _WIDTH)])


def _lines(row: Look, width: int) -> Iterator[str]:
    verdict, at = row.verdict, row.at
    for part in textwrap.wrap(row.found, _WIDTH - width - 11) or [""]:
        yield f"  {verdict:<5}  {at:<{width}}  {part}"
        verdict, at = "", ""  # type: ignore[assignment]


def check(model: MAML, episodes: AnyEpisodes) -> CheckReport:
    """Look at a model on a batch of its data, before it is trained.

    The exact meta-gradient is compared with autograd through the unrolled inner loop, in float64
    and in the parameters' own precision, and every way of running tasks with a loop; the rest says
    what one should know of the network: buffers, random numbers, kinks, time, memory. The model and
    the random generators are left as they are. It takes some seconds for a small network, and under
    a minute for a Conv4 on Omniglot.

    Example:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes, check
        >>> model = MAML(MLP(2, 3, activation="gelu"), inner_lr=0.1)
        >>> labels = torch.arange(3).repeat(4, 2)
        >>> report = check(model, Episodes(torch.rand(4, 6, 2), labels, torch.rand(4, 6, 2), labels))
        >>> report.ok
        True

    Args:
        model: MAML or one of its variants, in the mode in which it is to be trained.
        episodes: A meta-batch like those that it is to be trained on.

    Returns:
        What was found. It is not ``ok`` if a gradient is wrong, or if the model cannot be trained
        on such batches.

    Raises:
        TypeError: If the model has no inner loop.
    """
    if not isinstance(model, MAML):
        raise UserTypeError(
            "Expected MAML or one of its variants, whose inner loop is checked, but got "
            f"{type(model).__name__}."
        )
    states = generator_states(model.device)
    try:
        # compilers know no second derivatives; and what warnings would say is in the rows
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return CheckReport(
                type(model).__name__, tuple(_looks(_Case(_copied(model), episodes, states)))
            )
    finally:
        set_generator_states(states, model.device)


def _copied(model: MAML) -> MAML:
    """Return a copy of the model that has seen nothing yet."""
    copied: Any = deep_copy(model)
    # which Lightning leaves out; it knows the epoch and the datamodule's ways
    copied._trainer = model._trainer
    copied._findings, copied._compiler = Findings(), None
    copied.zero_grad()
    if isinstance(copied, MAMLPlusPlus) and copied._trainer is None:
        copied.multi_step_epochs = copied.first_order_epochs = 0
    return copied  # type: ignore[no-any-return]


class _Case:
    """A copy of a model and some tasks in one precision.

    Args:
        model: The copy.
        episodes: The tasks.
        states: Of the random generators, from which every gradient starts.
    """

    def __init__(self, model: MAML, episodes: AnyEpisodes, states: dict[str, Any]) -> None:
        self.model, self.episodes, self.states = model, episodes, states
        self.dtype = next(model.network.parameters()).dtype
        self.channels_last = False
        """Whether the plain network's convolutions leave channels last in memory, as the library's
        do: dropout draws in that order."""

    def few(self, count: int = _TASKS) -> "_Case":
        """Return the same with few tasks, on which gradients are compared."""
        return _Case(
            self.model, map_tensors(lambda tensor: tensor[:count], self.episodes), self.states
        )

    def double(self) -> "_Case":
        """Return a copy in float64."""
        model = _copied(self.model).double()
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    setattr(module, name, value.double())
        episodes = map_tensors(
            lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, self.episodes
        )
        return _Case(model, episodes, self.states)

    def looked_at(self) -> NetworkInfo:
        """Return what the model sees of its network on such a batch, which it refuses if something is wrong."""
        model = self.model
        return model._check(
            FunctionalNetwork(model.network, model.batch_norm),
            self.episodes,
            model._kind(model.network, self.episodes),
        )

    def stacking(self) -> StackingVerdict:
        """Return whether the tasks can be stacked."""
        self.looked_at()
        network = self.model.network
        return self.model._verdict(self.episodes, network, self.model._kind(network, self.episodes))

    def gradient(
        self, curvature: CurvatureName | None = None, way: Execution = _WAYS["loop"]
    ) -> Params:
        """Return the network's meta-gradient as the library has it, by default that of the model's own algorithm."""
        self.start(way)
        with self.precision():
            gradient: Params = self.model.meta_gradient(self.episodes, curvature)
        return {f"network.{name}": g for name, g in gradient.items()}

    def arriving(self, *, as_asked: bool = False) -> Params:
        """Return the gradients that a training step gives the optimizer, those of the loss and of the inner rates included.

        Tasks are run in a loop, or before the first gradient as the model was asked to run them.
        """
        asked = self.model._executor
        self.start()
        model = _copied(self.model)  # whose buffers the step may change
        model._executor = asked if as_asked else self.model._executor
        with self.precision():
            model.meta_loss(self.episodes).backward()  # type: ignore[no-untyped-call]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()
        }

    def exact(self) -> Params:
        """Return the exact meta-gradient: of all that is trained if the model is trained by it, else of the network."""
        model = self.model
        trained_so = (
            model.curvature == "exact" and type(model)._gradient_function is MAML._gradient_function
        )
        return self.arriving() if trained_so else self.gradient("exact")

    def unrolled(self, *, curved: bool = True) -> Params:
        """Return the gradient by autograd, those of the loss and of the inner rates included."""
        besides: Params = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith("network.")
        }
        return self._by_autograd(partial(unrolled_gradient, curved=curved, besides=besides))

    def way_back(self) -> Params:
        """Return the inner path from its end to its start."""
        return self._by_autograd(unrolled_way_back)

    def _by_autograd(self, function: Callable[..., Params]) -> Params:
        self.start()
        model = self.model
        rates = rates_of_steps(model._rates(), model._adapting_parameters(), model.train_steps)
        with self.precision():
            found = function(
                self.plain_network(),
                self.plain_loss,
                self.episodes,
                rates,
                batch_norm=model.batch_norm,
            )
        own = {name for name, _ in model.network.named_parameters()}
        return {f"network.{name}" if name in own else name: g for name, g in found.items()}

    def plain_loss(self, outputs: Any, y: Tensor) -> Tensor:
        """Return the loss of what the network returned."""
        loss: Tensor = self.model.loss(self.model._loss_of_outputs().given(outputs), y)
        return loss

    def plain_network(self) -> nn.Module:
        """Return a copy of the network, to be called as it is."""
        network = deep_copy(self.model.network)
        if self.channels_last:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(
                        lambda _, __, x: x.contiguous(memory_format=torch.channels_last)
                    )
        return network

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 is not rounded by a mixed precision."""
        return (
            torch.autocast(self.model.device.type, enabled=False)
            if self.dtype == torch.float64
            else nullcontext()
        )

    def name(self) -> str:
        """Return the precision in words."""
        device, name = self.model.device.type, str(self.dtype).removeprefix("torch.")
        mixed = torch.is_autocast_enabled(device) and self.dtype != torch.float64
        return (
            f"mixed {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
            if mixed
            else name
        )

    def start(self, way: Execution = _WAYS["loop"]) -> None:
        """Set the random generators back, and choose how tasks are run."""
        set_generator_states(self.states, self.model.device)
        self.model._executor = Executor(*way, compiled=False)


def _looks(case: _Case) -> Iterator[Look]:
    for look in (_accepted, _first_step):
        found = look(case)
        yield found
        if found.verdict == "wrong":
            return
    few = case.few()
    if seconds(few.gradient, few.model.device) > _SLOW_SECONDS:
        few = case.few(2)
    draws = few.looked_at().draws
    yield from _as_far_as_it_goes("adaptation", map(_adaptation, [few]))
    yield from _as_far_as_it_goes("gradients", _of_gradients(few, draws))
    yield from _as_far_as_it_goes("ways of running tasks", _of_ways(case, few, draws))
    yield from _as_far_as_it_goes("the network", _of_network(few, draws))
    yield from _as_far_as_it_goes("tasks='auto'", _of_auto(case, draws))


def _as_far_as_it_goes(at: str, looks: Iterator[Look]) -> Iterator[Look]:
    try:
        yield from looks
    except Exception as error:  # noqa: BLE001 # what can be trained is not called wrong because a look fails
        yield Look(at, f"not looked at further: {_sentence(error)}", "note")


def _accepted(case: _Case) -> Look:
    """Say whether the model takes such batches."""
    at = "labels and shapes"
    try:
        check_episodes(case.episodes)
        few = case.few()
        case.looked_at()
        outputs = few.looked_at().outputs
    except Exception as error:  # noqa: BLE001 # any network and loss may raise anything
        return Look(at, _sentence(error), "wrong")
    shots, queries = len(support_set(first_task(few.episodes))[1]), few.episodes.query_y.shape[1]
    return Look(
        at,
        f"{_tasks(case.episodes)} of {shots} support and {queries} query examples, outputs "
        f"{list(outputs or ())} for each",
        "right",
    )


def _first_step(case: _Case) -> Look:
    """Take one training step on a few tasks."""
    at = "a training step"
    try:
        arriving = case.few().arriving(as_asked=True)
    except Exception as error:  # noqa: BLE001 # any network and loss may raise anything
        return Look(at, _sentence(error), "wrong")
    frozen = [name for name, p in case.model.network.named_parameters() if not p.requires_grad]
    beside = f"; frozen are {_named(frozen)}" if frozen else ""
    if idle := [name for name, gradient in arriving.items() if not gradient.any()]:
        reasons = "not used, detached, or behind what is zero on this batch"
        return Look(at, f"no gradient for {_named(idle)}: {reasons}{beside}", "note")
    return Look(at, f"every trainable parameter gets a gradient{beside}", "right")


def _adaptation(case: _Case) -> Look:
    """Say what adaptation does to the loss and the accuracy on the query sets, at these weights."""
    case.start()
    curve = case.model.evaluate(case.episodes)
    figures = with_accuracy(curve.loss, curve.aux, case.episodes, ignored_label(case.model.loss))
    means = {name: values.double().mean(0) for name, values in figures.items()}
    found = ", ".join(
        f"{name} {float(mean[0]):.3g} before and {float(mean[-1]):.3g} after"
        for name, mean in means.items()
    )
    return Look(
        "adaptation",
        f"query {found} {len(curve.loss[0]) - 1} steps, on {_tasks(case.episodes)} at these "
        "weights",
        "note",
    )


def _of_gradients(case: _Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Compare gradients with autograd through the unrolled loop, and approximate ones with exact ones."""
    at, own_at = "exact meta-gradient", f"{type(case.model).__name__}'s gradient"
    reason = _not_unrolled(case)
    double, exact, problem = _exact(case)
    if exact is None or reason:
        yield Look(at, f"not compared: {problem or reason}", "note")
    else:
        yield from _against_autograd(at, case, double, exact, draws)
    own = type(case.model)._gradient_function is MAML._gradient_function
    if case.model.curvature == "none" and own and not reason:
        yield _compared(
            f"{own_at}, {double.name()}",
            double,
            double.arriving,
            partial(double.unrolled, curved=False),
            draws,
        )
    if isinstance(case.model, MAMLPlusPlus):
        yield Look(
            own_at,
            "not compared: it anneals over the epochs of a training; the exact meta-gradient is "
            "what it ends with",
            "note",
        )
    if isinstance(case.model, Reptile) and not reason:
        yield _compared(
            f"{own_at}, {double.name()}", double, double.gradient, double.way_back, draws
        )
    if exact is not None:
        yield from _approximations(case, double, exact)


def _exact(case: _Case) -> tuple[_Case, Params | None, str]:
    """Return the model in float64 if it runs so, its exact meta-gradient, and why it has none."""
    double = case
    try:
        double = case.double()
        return double, double.exact(), ""
    except NoSecondDerivativeError as error:
        return double, None, _sentence(error)
    except Exception:  # noqa: BLE001 # some networks run in their own type only
        try:
            return case, case.exact(), ""
        except Exception as error:  # noqa: BLE001 # and first-order algorithms without second derivatives
            return case, None, _sentence(error)


def _against_autograd(
    at: str, case: _Case, double: _Case, exact: Params, draws: tuple[str, ...]
) -> Iterator[Look]:
    """Compare the exact meta-gradient in float64, and say how far it is from that in the parameters' own type."""
    look = _compared(f"{at}, {double.name()}", double, lambda: exact, double.unrolled, draws)
    yield look
    if look.verdict == "note" or case.dtype == double.dtype:
        return
    case.channels_last = double.channels_last
    of_library, of_autograd = (
        _error(gradient, exact) for gradient in (case.exact(), case.unrolled())
    )
    found = (
        f"{of_library:.1g} from the one in float64; autograd in {case.name()} is "
        f"{of_autograd:.1g} from it"
    )
    most = max(_AT_KINKS if _kinks(case) else _LOW, 10 * of_autograd)
    yield Look(f"{at}, {case.name()}", found, "right" if of_library <= most else "wrong")


def _compared(
    at: str,
    case: _Case,
    of_library: Callable[[], Params],
    of_autograd: Callable[[], Params],
    draws: tuple[str, ...],
) -> Look:
    """Compare a gradient of the library with autograd's."""
    try:
        right = of_autograd()
    except Exception as error:  # noqa: BLE001 # a network may not allow what plain torch does with it
        return Look(
            at,
            f"not compared, as autograd through the unrolled loop fails: {_sentence(error)}",
            "note",
        )
    if not all(gradient.isfinite().all() for gradient in right.values()):
        return Look(
            at, "not compared: autograd through the unrolled loop gives no finite numbers", "note"
        )
    away, tolerance = _error(of_library(), right), _tolerance(case)
    if not away <= tolerance and draws and not _draws_alike(case):
        case.channels_last = True
        away = _error(of_library(), of_autograd())
        if not away <= tolerance:
            return Look(
                at,
                "not compared: called by the library, the network draws its random numbers in "
                "another order",
                "note",
            )
    found = (
        f"{away:.1g} from autograd through the unrolled loop, relative to its norm, on "
        f"{_tasks(case.episodes)}"
    )
    return Look(at, found, "right" if away <= tolerance else "wrong")


def _approximations(case: _Case, double: _Case, exact: Params) -> Iterator[Look]:
    if not float(norm(exact)):
        yield Look(
            "Hessian-free and first-order", "not compared: the exact meta-gradient is zero", "note"
        )
        return
    if isinstance(case.episodes, Episodes) or case.episodes.hessian_y.shape[2]:
        bent = _kinks(case)
        error = _error(case.gradient("finite_difference"), exact)
        smooth = f"kinks in {_named(bent)}" if bent else "no kinks found"
        close: Verdict = "right" if error <= 1e-2 and not bent else "note"
        if case.model.curvature == "finite_difference" and not error <= _FAR:
            close = "wrong"
        yield Look(
            f"Hessian-free, {case.name()}", f"{error:.1g} from the exact one; {smooth}", close
        )
    first_order = double.gradient("none")
    exact = {name: exact[name] for name in first_order}
    cosine = float(dot(first_order, exact) / (norm(first_order) * norm(exact)))
    yield Look("first order", f"cosine {cosine:.3f} with the exact one", "note")


def _of_ways(case: _Case, few: _Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Compare every way of running tasks with a loop, and measure what a step takes."""
    try:
        double = few.double()
        right = double.gradient()
    except Exception:  # noqa: BLE001 # some networks run in their own type only
        double, right = few, few.gradient()
    timed = _timed(case, few)
    for name, way in _WAYS.items():
        at = f"tasks in {'a loop' if name == 'loop' else name}"
        try:
            found, verdict = (
                _same(double, way, right, draws)
                if name != "loop"
                else ("the others are compared with it", "note")
            )
            cost = _cost(timed, way)
        except Exception as error:  # noqa: BLE001 # what fails here is to be shown
            refused = isinstance(error, UserError)
            yield Look(
                at,
                f"{'refused' if refused else 'fails'}: {_sentence(error)}",
                "note" if refused else "wrong",
            )
            continue
        yield Look(at, f"{found}; {cost}", verdict)
    if case.model.hparams.get("compiled"):
        yield Look(
            "compiled=True", "not looked at: these are the same computations uncompiled", "note"
        )


def _same(
    case: _Case, way: Execution, right: Params, draws: tuple[str, ...]
) -> tuple[str, Verdict]:
    gradient = case.gradient(way=way)
    if draws and are_stacked(*way):
        return "not compared, as each task draws random numbers of its own", "note"
    error = _error(gradient, right)
    return f"{error:.1g} from the loop's gradient", "right" if error <= _tolerance(
        case
    ) else "wrong"


def _timed(case: _Case, few: _Case) -> _Case:
    """Return the whole batch if a step on it does not take long, else a few tasks."""
    of_few = seconds(few.gradient, case.model.device)
    return (
        case
        if of_few * len(case.episodes.query_y) / len(few.episodes.query_y) <= _TIMED_SECONDS
        else few
    )


def _cost(case: _Case, way: Execution) -> str:
    """Return the memory and the time of one meta-gradient."""
    gradient, device = partial(case.gradient, way=way), case.model.device
    if are_stacked(*way):
        case.stacking()  # the trial of stacking is no part of a step
    peak = peak_bytes(gradient, device)
    took = seconds(gradient, device)
    if took < _TIMED_SECONDS:  # the first times take longer
        took = min(took, seconds(gradient, device))
    found = f"{_tasks(case.episodes)}: {took:.2g} s"
    # what other threads hold
    unseen = peak is None or (way.tasks == "threads" and device.type == "cpu")
    return found if unseen else f"{found}, tensors of {(peak or 0) / 2**20:.2g} MB"


def _of_network(case: _Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Say what the network does besides mapping inputs to outputs."""
    model = case.model
    written = _written(case)
    policy = (
        f"batch norm's averages follow batch_norm={model.batch_norm!r}"
        if batch_norms(model.network)
        else ""
    )
    yield Look(
        "buffers written",
        "; ".join(filter(None, [_named(written) if written else "none", policy])),
        "note",
    )
    yield Look(
        "random numbers", f"drawn from {' and '.join(draws)}" if draws else "none are drawn", "note"
    )
    others = "change with" if _sees_others(case) else "do not depend on"
    yield Look(
        "normalisation",
        f"outputs {others} the other "
        f"{'queries' if model.batch_norm == 'support' else 'inputs of the batch'}",
        "note",
    )
    bent = _kinks(case)
    yield Look(
        "kinks",
        f"in {_named(bent)}: HFMAML needs a network without them" if bent else "none found",
        "note",
    )
    if layers := weight_normed(model.network):
        found = (
            "torch's second derivative of weight norm is wrong, and so is the exact "
            f"meta-gradient through {_named(layers)}"
        )
        yield Look("weight norm", found, "wrong" if model.curvature == "exact" else "note")


def _written(case: _Case) -> list[str]:
    """Return the names of the buffers that a forward pass writes, without those of batch norm."""
    network = deep_copy(case.model.network)
    of_norms = {
        f"{layer}.{name}"
        for layer, module in batch_norms(network).items()
        for name, _ in module.named_buffers()
    }
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        call(network, support_set(first_task(case.episodes))[0])
    now = dict(network.named_buffers())
    return [
        name
        for name, buffer in before.items()
        if name not in of_norms and not torch.equal(buffer, now[name])
    ]


def _sees_others(case: _Case) -> bool:
    functional = FunctionalNetwork(case.model.network, case.model.batch_norm)
    with first_support(functional, case.episodes) as support, torch.no_grad():
        queries = first_task(case.episodes).query_x
        x = queries if count_of(queries) > 1 else cat([queries, queries])
        return sees_others(functional, x, support if functional.uses_support_statistics else None)


def _kinks(case: _Case) -> list[str]:
    network = case.model.network
    if found := kinks(network):
        return found
    functional = FunctionalNetwork(network, case.model.batch_norm)
    with first_support(functional, case.episodes) as x:
        operations: list[str] = kinked_operations(lambda: functional(functional.params, x))
    return operations


def _of_auto(case: _Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Say how ``tasks="auto"`` runs the whole batch, and why."""
    model = case.model
    case.start()
    way = Executor("auto", None, compiled=False)(
        model.network, model.device, case.episodes, draws, case.stacking
    )
    chunks = f" in chunks of {way.chunk_size}" if way.chunk_size else ""
    yield Look(
        "tasks='auto' chooses", f"{way.tasks}{chunks}, because {_why(case, draws, way)}", "note"
    )


def _why(case: _Case, draws: tuple[str, ...], way: Execution) -> str:
    """Return the reason, in the order in which :mod:`lightning_maml.execution` decides."""
    model, on_cpu = case.model, case.model.device.type == "cpu"
    if drops_blocks(model.network):
        return "DropBlock does not run under vmap"
    if draws and on_cpu:
        return f"threads would share the random generator of {' and '.join(draws)}"
    inputs = max(1, sum(tensor[0].numel() for tensor in tensors(case.episodes[::2])))
    if on_cpu and inputs >= LARGE_INPUTS:
        return f"one task, with {inputs} numbers in its inputs, keeps all cores busy"
    if are_stacked(*way):
        return (
            f"a task has only {inputs} numbers in its inputs"
            if on_cpu
            else "the tasks can be stacked"
        )
    parameters = sum(p.numel() for p in model.network.parameters())
    if (
        on_cpu
        and min(STACKED_INPUTS // inputs, STACKED_PARAMETERS // max(1, parameters)) < FEWEST_STACKED
    ):
        return (
            f"a task, with {inputs} numbers in its inputs and {parameters} in its parameters, is "
            "too large to be stacked"
        )
    if on_cpu and len(case.episodes.query_y) < FEWEST_STACKED:
        return f"{_tasks(case.episodes)} are too few to stack"
    verdict = case.stacking()
    return f"stacked, {verdict.wrong or verdict.slow}"


def _not_unrolled(case: _Case) -> str:
    """Return why autograd through the plain inner loop does not give this model's gradient; empty if it does."""
    kind = type(case.model)
    if isinstance(case.model, IMAML):
        return "iMAML's is implicit, and that of the inner path is another one"
    known = (algorithm._gradient_function for algorithm in (MAML, MAMLPlusPlus, Reptile))
    if kind._losses is not MAML._losses or kind._gradient_function not in known:
        return f"{type(case.model).__name__} has losses or gradients of its own"
    if case.model.batch_norm == "per_step":
        return "batch_norm='per_step' gives each inner step a network of its own"
    if not isinstance(case.episodes, Episodes):
        return "with ResampledEpisodes the Hessian batches are not those of the inner steps"
    return ""


def _draws_alike(case: _Case) -> bool:
    """Return whether the network draws the same random numbers in the library as alone."""
    functional, task = (
        FunctionalNetwork(case.model.network, case.model.batch_norm),
        first_task(case.episodes),
    )

    def outputs(network: Callable[[Any], Any]) -> Tensor:
        case.start()
        found = (network(x) for x in (support_set(task)[0], task.query_x))
        return torch.cat(
            [
                tensor.flatten()
                for each in found
                for tensor in tensors_in(each)
                if tensor.is_floating_point()
            ]
        )

    with torch.no_grad(), case.precision():
        return torch.allclose(
            outputs(partial(functional, functional.params)),
            outputs(partial(call, case.plain_network())),
            rtol=1e-4,
        )


def _tolerance(case: _Case) -> float:
    """Return the largest relative error that counts as rounding."""
    return _LOW if case.dtype != torch.float64 or _rounds(case) else _ROUNDING


def _rounds(case: _Case) -> bool:
    """Return whether the network or the loss rounds to less than float64 on its way."""
    x, y = support_set(first_task(case.episodes))
    with torch.no_grad(), case.precision(), _Types() as seen:
        case.plain_loss(call(case.plain_network(), x), y)
    return bool(seen.found - {torch.float64})


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the floating-point types of what operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {
            leaf.dtype
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        return result


def _error(gradient: Params, right: Params) -> float:
    """Return the distance of a gradient from the right one, relative to the norm of the latter, over the parameters that both have."""
    both = [name for name in gradient if name in right]
    gradient, right = (
        {name: each[name].detach().double() for name in both} for each in (gradient, right)
    )
    size, distance = float(norm(right)), float(norm(subtract(gradient, right)))
    return distance / size if size else distance


def _tasks(episodes: AnyEpisodes) -> str:
    number = len(episodes.query_y)
    return f"{number} task{'s' if number > 1 else ''}"


def _named(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _sentence(error: BaseException) -> str:
    """Return what an error says in its first line."""
    return (str(error) or type(error).__name__).splitlines()[0]
