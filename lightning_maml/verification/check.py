"""Check a model on a batch of its data before training it: its gradients, and what else to know."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from lightning_maml.algorithms.maml import MAML
from lightning_maml.algorithms.metrics import with_accuracy
from lightning_maml.algorithms.variants import IMAML, MAMLPlusPlus, Reptile
from lightning_maml.batches.episodes import (
    AnyEpisodes,
    Episodes,
    first_task,
    support_set,
)
from lightning_maml.batches.meta_batch import even_meta_batch
from lightning_maml.checks.label_checks import ignored_label
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.params import Params, dot, norm
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.errors import UserTypeError
from lightning_maml.verification.agreement import (
    AT_KINKS,
    LOW,
    draws_alike,
    first_sentence,
    named,
    relative_error,
    tolerated_error,
)
from lightning_maml.verification.case import Case, copied_model, tasks_in_words
from lightning_maml.verification.cost import seconds
from lightning_maml.verification.facts import kinks_of, of_network
from lightning_maml.verification.report import CheckReport, Look, Verdict
from lightning_maml.verification.ways import compare_ways, explain_auto

_SLOW_SECONDS = 1.0
"""With steps on so many that take longer, gradients are compared on two."""

_FAR = 0.3
"""A relative error from which on HF-MAML does not train by what it is meant to: first order would
be nearer."""


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
        >>> x, labels = torch.rand(4, 6, 2), torch.arange(3).repeat(4, 2)
        >>> report = check(model, Episodes(x, labels, torch.rand(4, 6, 2), labels))
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
                type(model).__name__, tuple(_looks(Case(copied_model(model), episodes, states)))
            )
    finally:
        set_generator_states(states, model.device)


def _looks(case: Case) -> Iterator[Look]:
    for look in (_accepted, _first_step):
        found = look(case)
        yield found
        if found.verdict == "wrong":
            return
    few = case.few()
    if seconds(few.gradient, few.model.device) > _SLOW_SECONDS:
        few = case.few(2)
    draws = few.network_info().draws
    yield from _as_far_as_it_goes("adaptation", map(_adaptation, [few]))
    yield from _as_far_as_it_goes("gradients", _of_gradients(few, draws))
    yield from _as_far_as_it_goes("ways of running tasks", compare_ways(case, few, draws))
    yield from _as_far_as_it_goes("the network", of_network(few, draws))
    yield from _as_far_as_it_goes("tasks='auto'", explain_auto(case, draws))


def _as_far_as_it_goes(at: str, looks: Iterator[Look]) -> Iterator[Look]:
    try:
        yield from looks
    # a model that can be trained is not called wrong because a look fails
    except Exception as error:  # noqa: BLE001
        yield Look(at, f"not looked at further: {first_sentence(error)}", "note")


def _accepted(case: Case) -> Look:
    """Say whether the model takes such batches."""
    at = "labels and shapes"
    try:
        case.episodes = even_meta_batch(case.episodes)
        few = case.few()
        case.network_info()
        outputs = few.network_info().outputs
    except Exception as error:  # noqa: BLE001 # any network and loss may raise anything
        return Look(at, first_sentence(error), "wrong")
    shots, queries = len(support_set(first_task(few.episodes))[1]), few.episodes.query_y.shape[1]
    return Look(
        at,
        f"{tasks_in_words(case.episodes)} of {shots} support and {queries} query examples, outputs "
        f"{list(outputs or ())} for each",
        "right",
    )


def _first_step(case: Case) -> Look:
    """Take one training step on a few tasks."""
    at = "a training step"
    try:
        optimizer_gradients = case.few().optimizer_gradients(as_asked=True)
    except Exception as error:  # noqa: BLE001 # any network and loss may raise anything
        return Look(at, first_sentence(error), "wrong")
    frozen = [name for name, p in case.model.network.named_parameters() if not p.requires_grad]
    beside = f"; frozen are {named(frozen)}" if frozen else ""
    if idle := [name for name, gradient in optimizer_gradients.items() if not gradient.any()]:
        reasons = "not used, detached, or behind what is zero on this batch"
        return Look(at, f"no gradient for {named(idle)}: {reasons}{beside}", "note")
    return Look(at, f"every trainable parameter gets a gradient{beside}", "right")


def _adaptation(case: Case) -> Look:
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
        f"query {found} {len(curve.loss[0]) - 1} steps, on {tasks_in_words(case.episodes)} "
        "at these weights",
        "note",
    )


def _of_gradients(case: Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Compare gradients with the unrolled loop, and approximate gradients with exact ones."""
    at, own_at = "exact meta-gradient", f"{type(case.model).__name__}'s gradient"
    reason = _not_unrolled(case)
    double, exact, problem = _exact(case)
    own = type(case.model)._gradient_function is MAML._gradient_function
    if exact is None or reason:
        looks = iter([Look(at, f"not compared: {problem or reason}", "note")])
    else:
        looks = _against_autograd(at, case, double, exact, draws)
    trains_with_it = own and case.model.curvature == "exact"
    yield from (look._replace(is_own=trains_with_it) for look in looks)
    if case.model.curvature == "none" and own and not reason:
        yield _compared(
            f"{own_at}, {double.name()}",
            double,
            double.optimizer_gradients,
            partial(double.unrolled, curved=False),
            draws,
        )._replace(is_own=True)
    if isinstance(case.model, MAMLPlusPlus):
        yield Look(
            own_at,
            "not compared: it anneals over the epochs of a training; the exact meta-gradient is "
            "what it ends with",
            "note",
            is_own=True,
        )
    if isinstance(case.model, Reptile) and not reason:
        yield _compared(
            f"{own_at}, {double.name()}", double, double.gradient, double.way_back, draws
        )._replace(is_own=True)
    if exact is not None:
        yield from _approximations(case, double, exact)


def _exact(case: Case) -> tuple[Case, Params | None, str]:
    """Return the model in float64 if it runs so, its exact meta-gradient, and why it has none."""
    double = case
    try:
        double = case.double()
        return double, double.exact(), ""
    except NoSecondDerivativeError as error:
        return double, None, first_sentence(error)
    except Exception:  # noqa: BLE001 # some networks run in their own type only
        try:
            return case, case.exact(), ""
        # first-order algorithms may train networks that have no second derivatives
        except Exception as error:  # noqa: BLE001
            return case, None, first_sentence(error)


def _against_autograd(
    at: str, case: Case, double: Case, exact: Params, draws: tuple[str, ...]
) -> Iterator[Look]:
    """Compare the exact meta-gradient with autograd in float64.

    Also say how far it is from the gradient in the parameters' own precision.
    """
    look = _compared(f"{at}, {double.name()}", double, lambda: exact, double.unrolled, draws)
    yield look
    if look.verdict == "note" or case.dtype == double.dtype:
        return
    case.channels_last = double.channels_last
    of_library, of_autograd = (
        relative_error(gradient, exact) for gradient in (case.exact(), case.unrolled())
    )
    found = (
        f"{of_library:.1g} from the one in float64; autograd in {case.name()} is "
        f"{of_autograd:.1g} from it"
    )
    most = max(AT_KINKS if kinks_of(case) else LOW, 10 * of_autograd)
    yield Look(f"{at}, {case.name()}", found, "right" if of_library <= most else "wrong")


def _compared(
    at: str,
    case: Case,
    of_library: Callable[[], Params],
    of_autograd: Callable[[], Params],
    draws: tuple[str, ...],
) -> Look:
    """Compare a gradient of the library with autograd's."""
    try:
        right = of_autograd()
    # a network may not allow what plain torch does with it
    except Exception as error:  # noqa: BLE001
        return Look(
            at,
            f"not compared, as autograd through the unrolled loop fails: {first_sentence(error)}",
            "note",
        )
    if not all(gradient.isfinite().all() for gradient in right.values()):
        return Look(
            at, "not compared: autograd through the unrolled loop gives no finite numbers", "note"
        )
    away, tolerance = relative_error(of_library(), right), tolerated_error(case)
    if not away <= tolerance and draws and not draws_alike(case):
        case.channels_last = True
        away = relative_error(of_library(), of_autograd())
        if not away <= tolerance:
            return Look(
                at,
                "not compared: called by the library, the network draws its random numbers in "
                "another order",
                "note",
            )
    found = (
        f"{away:.1g} from autograd through the unrolled loop, relative to its norm, on "
        f"{tasks_in_words(case.episodes)}"
    )
    return Look(at, found, "right" if away <= tolerance else "wrong")


def _approximations(case: Case, double: Case, exact: Params) -> Iterator[Look]:
    if not float(norm(exact)):
        yield Look(
            "Hessian-free and first-order", "not compared: the exact meta-gradient is zero", "note"
        )
        return
    if isinstance(case.episodes, Episodes) or case.episodes.hessian_y.shape[2]:
        bent = kinks_of(case)
        error = relative_error(case.gradient("finite_difference"), exact)
        smooth = f"kinks in {named(bent)}" if bent else "no kinks found"
        close: Verdict = "right" if error <= 1e-2 and not bent else "note"
        if case.model.curvature == "finite_difference" and not error <= _FAR:
            close = "wrong"
        yield Look(
            f"Hessian-free, {case.name()}",
            f"{error:.1g} from the exact one; {smooth}",
            close,
            is_own=case.model.curvature == "finite_difference",
        )
    first_order = double.gradient("none")
    exact = {name: exact[name] for name in first_order}
    cosine = float(dot(first_order, exact) / (norm(first_order) * norm(exact)))
    yield Look("first order", f"cosine {cosine:.3f} with the exact one", "note")


def _not_unrolled(case: Case) -> str:
    """Return why the plain unrolled loop does not give this gradient; empty if it does."""
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
