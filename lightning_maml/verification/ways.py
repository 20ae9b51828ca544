"""Checks of every way of running tasks: the same gradients, their cost, and what is chosen."""

from collections.abc import Iterator
from functools import partial

from lightning_maml.batches.trees import tensors
from lightning_maml.core.params import Params
from lightning_maml.core.rng import drops_blocks
from lightning_maml.errors import UserError
from lightning_maml.execution.auto import (
    FEWEST_STACKED,
    LARGE_INPUTS,
    STACKED_INPUTS,
    STACKED_PARAMETERS,
    Execution,
    Executor,
)
from lightning_maml.execution.cuda_graphs import CALLS_BEFORE, works_on
from lightning_maml.execution.task_map import are_stacked
from lightning_maml.verification.agreement import first_sentence, relative_error, tolerated_error
from lightning_maml.verification.case import WAYS, Case, tasks_in_words
from lightning_maml.verification.cost import peak_bytes, seconds
from lightning_maml.verification.report import Look, Verdict

_TIMED_SECONDS = 0.5
"""The longest step, estimated from a few tasks, that is timed with the whole batch."""


def compare_ways(case: Case, few: Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Compare every way of running tasks with a loop, and measure what a step takes."""
    try:
        double = few.double()
        right = double.gradient()
    except Exception:  # noqa: BLE001 # some networks run in their own type only
        double, right = few, few.gradient()
    timed = _timed(case, few)
    for name, way in WAYS.items():
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
                f"{'refused' if refused else 'fails'}: {first_sentence(error)}",
                "note" if refused else "wrong",
            )
            continue
        yield Look(at, f"{found}; {cost}", verdict)
    if case.model.hparams.get("compiled"):
        yield Look(
            "compiled=True", "not looked at: these are the same computations uncompiled", "note"
        )


def _same(case: Case, way: Execution, right: Params, draws: tuple[str, ...]) -> tuple[str, Verdict]:
    gradient = case.gradient(way=way)
    if draws and are_stacked(*way):
        return "not compared, as each task draws random numbers of its own", "note"
    error = relative_error(gradient, right)
    verdict: Verdict = "right" if error <= tolerated_error(case) else "wrong"
    return f"{error:.1g} from the loop's gradient", verdict


def _timed(case: Case, few: Case) -> Case:
    """Return the whole batch if a step on it does not take long, else a few tasks."""
    of_few = seconds(few.gradient, case.model.device)
    times_as_many = len(case.episodes.query_y) / len(few.episodes.query_y)
    return case if of_few * times_as_many <= _TIMED_SECONDS else few


def _cost(case: Case, way: Execution) -> str:
    """Return the memory and the time of one meta-gradient."""
    gradient, device = partial(case.gradient, way=way), case.model.device
    if are_stacked(*way):
        case.stacking()  # the trial of stacking is no part of a step
    peak = peak_bytes(gradient, device)
    if works_on(device) and way.tasks != "threads":
        for _ in range(CALLS_BEFORE):  # as a graph, as in training
            gradient()
    took = seconds(gradient, device)
    if took < _TIMED_SECONDS:  # the first times take longer
        took = min(took, seconds(gradient, device))
    found = f"{tasks_in_words(case.episodes)}: {took:.2g} s"
    # what other threads hold
    unseen = peak is None or (way.tasks == "threads" and device.type == "cpu")
    if unseen:
        return found
    mb = (peak or 0) / 2**20
    return f"{found}, tensors of {mb:.2f} MB" if mb < 1 else f"{found}, tensors of {mb:.0f} MB"


def explain_auto(case: Case, draws: tuple[str, ...]) -> Iterator[Look]:
    """Say how ``tasks="auto"`` runs the whole batch, and why."""
    model = case.model
    case.start()
    way = Executor("auto", None, compiled=False)(
        model.network, model.device, case.episodes, draws, case.stacking, case.tasks_share_state
    )
    chunks = f" in chunks of {way.chunk_size}" if way.chunk_size else ""
    yield Look(
        "tasks='auto' chooses", f"{way.tasks}{chunks}, because {_why(case, draws, way)}", "note"
    )


def _why(case: Case, draws: tuple[str, ...], way: Execution) -> str:
    """Return the reason, in the order in which :mod:`lightning_maml.execution` decides."""
    model, on_cpu = case.model, case.model.device.type == "cpu"
    if drops_blocks(model.network):
        return "DropBlock does not run under vmap"
    if draws and on_cpu:
        return f"threads would share the random generator of {' and '.join(draws)}"
    inputs = max(1, sum(tensor[0].numel() for tensor in tensors(case.episodes[::2])))
    if on_cpu and inputs >= LARGE_INPUTS:
        return f"one task, with {inputs} numbers in its inputs, keeps all cores busy"
    if on_cpu and way.tasks == "loop" and case.tasks_share_state():
        return "threads would share what its hooks or its loss write to"
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
        return f"{tasks_in_words(case.episodes)} are too few to stack"
    verdict = case.stacking()
    return f"stacked, {verdict.wrong or verdict.slow}"
