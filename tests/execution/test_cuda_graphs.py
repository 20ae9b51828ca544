"""Training steps as CUDA graphs.

Without a GPU a recorded program takes the graph's place: as in a graph, numbers are what they were
when it was recorded, and tensors are read where they lay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader

from helpers.trainers import trainer
from lightning_maml import (
    ANIL,
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Episodes,
    InnerAdam,
    InnerSGD,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
    one_hot_mse,
)
from lightning_maml.core.objective import NoSecondDerivativeError
from lightning_maml.core.precision import full_precision
from lightning_maml.core.rng import draws_nothing
from lightning_maml.execution import cuda_graphs
from lightning_maml.networks import attributes

WAYS, FEATURES, STEPS = 3, 4, 2
GRAPHS: list["Program"] = []
RECORD_ON_A_GPU = cuda_graphs._record


class Program:
    """A recorded run, which writes its results to where the first ones lay."""

    def __init__(self, run: partial[Any]) -> None:
        leaves, structure = tree_flatten(run.keywords)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.replays = 0

        def of_tensors(*tensors: Tensor) -> list[Any]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            found, self.structure = tree_flatten(run.func(**tree_unflatten(filled, structure)))
            return found

        assert draws_nothing(), "a capture may not touch the generators"
        with torch.no_grad():
            self.program = make_fx(of_tensors)(*self.tensors)
            self.outputs = [output.clone() for output in self.program(*self.tensors)]
        GRAPHS.append(self)

    def replay(self) -> None:
        self.replays += 1
        for output, now in zip(self.outputs, self.program(*self.tensors), strict=True):
            output.copy_(now)


def record(run: partial[Any], device: torch.device) -> tuple[Program, Any]:
    program = Program(run)
    return program, tree_unflatten(program.outputs, program.structure)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Let programs take the place of graphs, and return those that were recorded."""
    GRAPHS.clear()
    monkeypatch.setattr(cuda_graphs, "works_on", lambda device: True)
    monkeypatch.setattr("lightning_maml.algorithms.adapting.works_on", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "_run_aside", lambda run, device: run())
    monkeypatch.setattr(cuda_graphs, "_record", record)
    return GRAPHS


def episodes(seed: int, tasks: int = 3) -> Episodes:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(tasks, 2, 2 * WAYS, FEATURES, generator=random, dtype=torch.float64)
    y = torch.stack([torch.randperm(WAYS, generator=random).repeat(2) for _ in range(tasks)])
    return Episodes(x[:, 0], y, x[:, 1], y)


class Shifts(list):
    """A list with an attribute."""

    factor = 1.0


class Network(nn.Module):
    """A network that reads a number, a flag, a list and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 5), nn.Linear(5, WAYS)
        self.scale, self.squares, self.shifts = 1.0, False, Shifts([0.0, 0.0])
        self.shifted = partial(torch.add, other=0.0)
        self.factors = {"all": np.float64(1.0), "each": [torch.ones(5, dtype=torch.float64)]}
        self.mask = torch.ones(5, dtype=torch.float64)
        self.register_buffer("shift", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x) * self.scale) * self.mask + self.shift + self.shifts[0]
        hidden = hidden * float(self.factors["all"]) * self.factors["each"][0]
        hidden = self.shifted(hidden * self.shifts.factor)
        return self.head(hidden.square() if self.squares else hidden)


def model_of(algorithm: Callable[..., MAML], captures: bool, **options: Any) -> MAML:
    torch.manual_seed(0)
    options = {"inner_lr": 0.1, "train_steps": STEPS, "tasks": "vmap"} | options
    return algorithm(Network().double(), **options, cuda_graphs=captures).double()


def trained(
    model: MAML, change: Callable[[MAML, int], None] | None = None, steps: int = 8
) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    for step in range(steps):
        if change is not None:
            change(model, step)
        optimizer.zero_grad()
        model.meta_loss(episodes(step)).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)


@pytest.mark.parametrize(
    ("algorithm", "tasks"),
    [
        *((each, "vmap") for each in (MAML, FOMAML, HFMAML, ANIL, LSLR, MetaSGD, IMAML, Reptile)),
        *((each, "loop") for each in (MAML, HFMAML, Reptile)),
        *(
            pytest.param(each, "loop", marks=pytest.mark.slow)
            for each in (FOMAML, ANIL, LSLR, MetaSGD, IMAML)
        ),
    ],
)
def test_steps_are_the_same_by_graphs(
    algorithm: type[MAML], tasks: str, recorded: list[Program]
) -> None:
    by_graphs, usual = (
        trained(model_of(algorithm, captures, tasks=tasks)) for captures in (True, False)
    )
    assert largest_difference(by_graphs, usual) < 1e-12
    assert [program.replays for program in recorded] == [8 - cuda_graphs.CALLS_BEFORE]


CHANGES: dict[str, Callable[[MAML, int], None]] = {
    "inner rate": lambda model, step: setattr(model, "inner_lr", 0.1 if step < 5 else 0.3),
    "inner steps": lambda model, step: setattr(model, "train_steps", 2 if step < 5 else 1),
    "number": lambda model, step: setattr(model.network, "scale", 1.0 if step < 5 else 2.0),
    "flag": lambda model, step: setattr(model.network, "squares", step >= 5),
    "list": lambda model, step: model.network.shifts.__setitem__(0, float(step >= 5)),
    "number of numpy in a dict": lambda model, step: model.network.factors.update(
        all=np.float64(1.0 + (step >= 5))
    ),
    "tensor in a list": lambda model, step: model.network.factors.update(
        each=[torch.full((5,), 1.0 + (step >= 5), dtype=torch.float64)]
    ),
    "mode": lambda model, step: model.train(step < 5),
    "replaced tensor": lambda model, step: setattr(
        model.network, "mask", torch.full((5,), 1.0 + (step >= 5), dtype=torch.float64)
    ),
    "replaced buffer": lambda model, step: setattr(
        model.network, "shift", torch.full((5,), 1.0 * (step >= 5), dtype=torch.float64)
    ),
    "written buffer": lambda model, step: model.network.shift.fill_(0.1 * step),
    "replaced data": lambda model, step: setattr(
        model.network.head.bias, "data", model.network.head.bias.data.clone()
    ),
    "written weight": lambda model, step: model.network.head.weight.data.mul_(0.9),
    "frozen": lambda model, step: model.network.body.requires_grad_(step < 5) and None,
    "partial": lambda model, step: setattr(
        model.network, "shifted", partial(torch.add, other=float(step >= 5))
    ),
    "attribute of a list": lambda model, step: setattr(
        model.network.shifts, "factor", 1.0 + (step >= 5)
    ),
    "smoothing": lambda model, step: setattr(model.loss, "label_smoothing", 0.1 * (step >= 5)),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_changes_between_steps_counts(changed: str, recorded: list[Program]) -> None:
    by_graphs, usual = (
        trained(model_of(MAML, captures, loss=nn.CrossEntropyLoss()), CHANGES[changed], steps=10)
        for captures in (True, False)
    )
    assert largest_difference(by_graphs, usual) < 1e-12
    assert recorded or changed.startswith(("replaced", "tensor")), (
        "what has moved in each step is not captured"
    )


def test_changes_matter() -> None:
    usual = trained(model_of(MAML, False, loss=nn.CrossEntropyLoss()), steps=10)
    for name, change in CHANGES.items():
        changed = trained(model_of(MAML, False, loss=nn.CrossEntropyLoss()), change, steps=10)
        assert (largest_difference(changed, usual) > 1e-6) == (
            name not in ("mode", "replaced data")
        ), name


def test_annealing_over_epochs_is_followed(tmp_path: Any, recorded: list[Program]) -> None:
    def weights(captures: bool) -> dict[str, Tensor]:
        model = model_of(
            MAMLPlusPlus, captures, multi_step_epochs=3, batch_norm="batch", inner_rates="fixed"
        )
        loader = [episodes(number) for number in range(4)]
        trainer(tmp_path, max_epochs=4, precision="64-true").fit(model, train_dataloaders=loader)
        return model.state_dict()

    assert largest_difference(weights(True), weights(False)) < 1e-12
    assert len(recorded) > 1, "each epoch has weights of its own"


def test_a_later_replay_leaves_what_was_returned(recorded: list[Program]) -> None:
    model = model_of(MAML, True)
    for step in range(4):
        model.meta_loss(episodes(step))
    assert recorded
    found = model.meta_gradient(episodes(5))
    together = model.meta_loss(episodes(5)) + model.meta_loss(episodes(6))
    together.backward()
    expected = model.meta_gradient(episodes(6))
    for name, p in model.network.named_parameters():
        assert torch.allclose(p.grad, found[name] + expected[name], rtol=1e-12, atol=1e-14), name


def test_a_graph_is_of_one_shape(recorded: list[Program]) -> None:
    by_graphs, usual = (model_of(MAML, captures) for captures in (True, False))
    for step in range(12):
        batch = episodes(step, tasks=2 + step % 2)
        losses = [model.meta_loss(batch) for model in (by_graphs, usual)]
        assert float((losses[0] - losses[1]).abs()) < 1e-14
    assert [program.replays for program in recorded] == [4, 4]


def losses_over_averages(captures: bool) -> list[float]:
    """Return losses in evaluation mode, before and after the averages of a step are replaced."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, WAYS)).double()
    options = {"inner_lr": 0.1, "train_steps": STEPS, "tasks": "vmap", "batch_norm": "per_step"}
    model = MAML(network, **options, cuda_graphs=captures).double().eval()
    losses = []
    for step in range(8):
        if step == 5:
            averages = model.step_statistics.running_mean_0
            model.step_statistics.running_mean_0 = averages + 0.5
        losses.append(float(model.meta_loss(episodes(0)).detach()))
    return losses


def test_averages_of_steps_that_were_replaced_count(recorded: list[Program]) -> None:
    by_graphs, usual = (losses_over_averages(captures) for captures in (True, False))
    assert by_graphs == pytest.approx(usual, abs=1e-12)
    assert abs(usual[5] - usual[4]) > 1e-3
    assert recorded


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_networks_that_draw_are_not_captured(
    tasks: str, recorded: list[Program], caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(0.5), nn.Linear(5, WAYS)).double()
    model = MAML(network, 0.1, STEPS, tasks=tasks)
    with caplog.at_level("INFO"):
        for step in range(5):
            model.meta_loss(episodes(step))
    assert not recorded
    assert caplog.text.count("is not run as a CUDA graph: network or loss draw random numbers") == 1


def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, label_smoothing=0.1)


STRENGTH = [1.0]


@pytest.mark.parametrize(
    "loss",
    [smoothed, lambda outputs, y: STRENGTH[0] * F.cross_entropy(outputs, y), partial(smoothed)],
)
def test_functions_of_users_are_not_captured(
    loss: Any, recorded: list[Program], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(MAML, True, loss=loss)
    with caplog.at_level("INFO"):
        for step in range(5):
            model.meta_loss(episodes(step))
    assert not recorded
    assert caplog.text.count("the loss is a function that may read what changes") == 1


class Settings:
    """What many networks keep their numbers in."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_settings_in_an_object_count(recorded: list[Program]) -> None:
    class Configured(Network):
        def __init__(self) -> None:
            super().__init__()
            self.settings: Any = Settings(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.settings.scale

    def trained_with(captures: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = MAML(Configured().double(), 0.1, STEPS, tasks="vmap", cuda_graphs=captures)

        def change(model: Any, step: int) -> None:
            model.network.settings.scale = 1.0 + (step >= 5)
            if step == 8:
                model.network.settings = Settings(3.0)

        return trained(model, change, steps=12)

    assert largest_difference(trained_with(True), trained_with(False)) < 1e-12
    assert len(recorded) == 2


class Words(set):
    """A set of a user's own, which has an empty ``__dict__``."""


class Image(np.ndarray):
    """An array of a user's own."""


HIDING = [Words("a"), np.ones(3).view(Image), [nn.Linear(1, 1)]]


@pytest.mark.parametrize("value", [np.ones(3), {1, 2}, iter([1]), lambda: STRENGTH, *HIDING])
def test_networks_with_what_cannot_be_compared_are_not_captured(
    value: Any, recorded: list[Program], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(MAML, True)
    if callable(value):
        model.network.register_forward_hook(lambda *_: None)
    else:
        model.network.value = value
    with caplog.at_level("INFO"):
        by_graphs = trained(model)
    assert largest_difference(by_graphs, trained(model_of(MAML, False))) < 1e-12
    assert not recorded
    assert "value is a" in caplog.text or "Network has hooks" in caplog.text


def test_values_of_tensors_on_the_cpu_count() -> None:
    network = Network()
    network.register_buffer("temperature", torch.tensor(1.0))
    elsewhere = torch.device("meta")
    before = attributes.plain_state(nn.Sequential(nn.ReLU()), elsewhere)
    assert before == attributes.plain_state(nn.Sequential(nn.ReLU()), elsewhere)
    layer = nn.Module()
    layer.temperature = torch.tensor(1.0)
    before = attributes.plain_state(layer, elsewhere)
    layer.temperature.fill_(2.0)
    assert attributes.plain_state(layer, elsewhere) != before
    layer.temperature = torch.ones(100)
    with pytest.raises(attributes.NotComparableError, match="temperature is a tensor on another"):
        attributes.plain_state(layer, elsewhere)


class Tempered(MAML):
    """Has logits of its own, which depend on a number that callbacks change."""

    weight = 1.0

    def logits(self, outputs: Any) -> Any:
        return outputs * self.weight


class Weighted(MAML):
    """Has a loss of its own, which depends on a number that callbacks change."""

    weight = 1.0

    def _losses(self, *arguments: Any, **options: Any) -> Any:
        losses = super()._losses(*arguments, **options)

        def query(*given: Any) -> Any:
            value, outputs = losses.query(*given)
            return self.weight * value, outputs

        return losses._replace(query=query)


class Halved(InnerSGD):
    """Takes half the step."""

    def step(self, w: Any, gradient: Any, rate: Any, state: Any, number: int) -> Any:
        return super().step(w, gradient / 2, rate, state, number)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(Weighted, {}), (Tempered, {}), (MAML, {"inner_optimizer": Halved()})],
)
def test_what_users_define_anew_is_not_captured(
    algorithm: type[MAML],
    options: dict[str, Any],
    recorded: list[Program],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def change(model: Any, step: int) -> None:
        model.weight = 1.0 + step

    with caplog.at_level("INFO"):
        by_graphs, usual = (
            trained(model_of(algorithm, captures, **options), change) for captures in (True, False)
        )
    assert largest_difference(by_graphs, usual) < 1e-12
    assert not recorded
    assert caplog.text.count("are defined outside the library") == 1


@pytest.mark.parametrize("optimizer", [InnerSGD(momentum=0.5), InnerAdam()])
def test_inner_optimizers_are_captured(optimizer: Any, recorded: list[Program]) -> None:
    by_graphs, usual = (
        trained(model_of(MAML, captures, inner_optimizer=optimizer)) for captures in (True, False)
    )
    assert largest_difference(by_graphs, usual) < 1e-12
    assert recorded


@pytest.mark.parametrize(
    "loss", [one_hot_mse, F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_functions_of_torch_and_this_library_are_captured(
    loss: Any, recorded: list[Program]
) -> None:
    by_graphs, usual = (trained(model_of(MAML, captures, loss=loss)) for captures in (True, False))
    assert largest_difference(by_graphs, usual) < 1e-12
    assert recorded


def test_a_capture_that_fails_is_said_and_the_step_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: partial[Any], device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "_record", fails)
    with caplog.at_level("INFO"):
        found = trained(model_of(MAML, True))
    assert largest_difference(found, trained(model_of(MAML, False))) < 1e-12
    assert caplog.text.count("CUDA graph: operation not permitted when stream is capturing.") == 1


def test_random_numbers_drawn_before_a_failure_are_drawn_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(run: partial[Any], device: torch.device) -> None:
        torch.rand(3)
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(cuda_graphs, "_run_aside", fails)
    graphs = cuda_graphs.CudaGraphs()
    call = partial(plain, episodes=episodes(0), inner_lr=0.1, params={"w": torch.ones(1)})
    before = torch.get_rng_state()
    for _ in range(cuda_graphs.CALLS_BEFORE + 2):
        graphs(call, ())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_graphs_of_a_run_that_ends_early_are_freed(
    tmp_path: Any, recorded: list[Program]
) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("on purpose")

    model = model_of(MAML, True)
    loader = DataLoader([episodes(number) for number in range(6)], batch_size=None)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, precision="64-true", callbacks=[Failing()]).fit(model, loader)
    assert recorded
    assert not model._cuda_graphs._captured


def test_a_model_that_is_moved_has_no_graphs_of_where_it_was() -> None:
    model = model_of(MAML, True)
    trained(model)
    assert model._cuda_graphs._captured
    model.cpu()
    assert not model._cuda_graphs._captured


def test_another_shape_of_the_same_memory_counts() -> None:
    layer = nn.ReLU()
    layer.weights = torch.arange(6.0).reshape(2, 3)
    before = attributes.plain_state(layer, torch.device("cpu"))
    layer.weights.data = layer.weights.data.view(3, 2)
    assert attributes.plain_state(layer, torch.device("cpu")) != before


def test_objects_that_hold_themselves_are_compared() -> None:
    class Config(dict):
        """Knows who holds it, as configurations do."""

    layer = nn.ReLU()
    layer.config = Config(slope=0.1, inner=Config(more=[1.0]))
    layer.config.me, layer.config["inner"].parent = layer.config, layer.config
    before = attributes.plain_state(layer, torch.device("cpu"))
    assert before == attributes.plain_state(layer, torch.device("cpu"))
    layer.config["inner"]["more"][0] = 2.0
    assert before != attributes.plain_state(layer, torch.device("cpu"))


def test_a_step_is_taken_without_graphs_if_memory_runs_out_at_a_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: partial[Any], device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "_record", fails)
    graphs = cuda_graphs.CudaGraphs()
    call = partial(plain, episodes=episodes(0), inner_lr=0.1, params={"w": torch.ones(1)})
    with caplog.at_level("INFO"):
        for _ in range(cuda_graphs.CALLS_BEFORE + 2):
            assert torch.equal(graphs(call, ()), plain(**call.keywords))
    assert caplog.text.count("CUDA graph: there is no memory for it.") == 1


def test_other_kinds_keep_their_graphs_if_one_finds_no_memory(
    monkeypatch: pytest.MonkeyPatch, recorded: list[Program]
) -> None:
    def fits(run: partial[Any], device: torch.device) -> Any:
        if len(run.keywords["episodes"].support_x) > 3:
            attempts.append(run)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(run, device)

    attempts: list[Any] = []
    monkeypatch.setattr(cuda_graphs, "_record", fits)
    graphs, params = cuda_graphs.CudaGraphs(), {"w": torch.ones(1)}
    for tasks in (3, 5, 3):
        call = partial(plain, episodes=episodes(0, tasks), inner_lr=0.1, params=params)
        for _ in range(cuda_graphs.CALLS_BEFORE + 2):
            assert torch.equal(graphs(call, ()), plain(**call.keywords))
    assert len(attempts) == 1
    assert len(recorded) == 1
    assert recorded[0].replays == 2 + cuda_graphs.CALLS_BEFORE + 2


def test_a_step_whose_second_derivative_alone_fetches_a_number_is_taken_without_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(run: partial[Any], device: torch.device) -> Any:
        raise NoSecondDerivativeError("one of the operations has none")

    monkeypatch.setattr(cuda_graphs, "_run_aside", fails)
    graphs = cuda_graphs.CudaGraphs()
    call = partial(plain, episodes=episodes(0), inner_lr=0.1, params={"w": torch.ones(1)})
    for _ in range(cuda_graphs.CALLS_BEFORE + 1):
        assert torch.equal(graphs(call, ()), plain(**call.keywords))


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_has_a_workspace_of_its_own_and_leaves_device_and_stream(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        done.append(what)
        try:
            yield
        finally:
            done.append(f"end of {what}")

    def run() -> int:
        done.append("run")
        if fails:
            raise RuntimeError("on purpose")
        return 1

    monkeypatch.setattr(cuda_graphs, "_side_stream", lambda device: "aside")
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("clear"), raising=False
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: noted(str(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", done.append)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: noted("capture"))
    with pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext():
        RECORD_ON_A_GPU(run, torch.device("cuda:1"))
    assert done == [
        "cuda:1",
        "clear",
        *("capture", "run", "end of capture"),
        *("stream before", "clear"),
        "end of cuda:1",
    ]


def test_batches_that_are_never_alike_are_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_KINDS", 5)

    def change(model: Any, step: int) -> None:
        model.network.scale = 1.0 + step

    with caplog.at_level("INFO"):
        trained(model_of(MAML, True), change, steps=10)
    assert caplog.text.count("of 5 kinds of batches none came 3 times") == 1


def test_it_is_said_that_no_more_kinds_are_captured(
    recorded: list[Program], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_CAPTURES", 1)
    model = model_of(MAML, True)
    with caplog.at_level("INFO"):
        for tasks in (2, 3, 2, 3, 2, 3, 2, 3):
            model.meta_loss(episodes(0, tasks=tasks))
    assert len(recorded) == 1
    assert caplog.text.count("Batches of new kinds are not run as CUDA graphs") == 1


def test_threads_are_said_not_to_be_captured(
    recorded: list[Program], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trained(model_of(MAML, True, tasks="threads"))
    assert not recorded
    assert caplog.text.count("is not run as a CUDA graph: tasks='threads'.") == 1


class Tokens(dict):
    """A dict of a tokenizer's own."""


class Pair(tuple):
    """Two inputs."""

    __slots__ = ()


class OfInputs(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, WAYS)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.layer(torch.tanh(one * two))


@pytest.mark.parametrize(
    "inputs", [lambda x: Tokens(one=x, two=x + 1), lambda x: Pair((x, x + 1)), lambda x: [x, x + 1]]
)
def test_inputs_in_containers_of_users_are_captured(
    inputs: Callable[[Tensor], Any], recorded: list[Program]
) -> None:
    def weights(captures: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = MAML(OfInputs().double(), 0.1, STEPS, tasks="vmap", cuda_graphs=captures)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            batch = episodes(step)
            given = Episodes(
                inputs(batch.support_x), batch.support_y, inputs(batch.query_x), batch.query_y
            )
            optimizer.zero_grad()
            model.meta_loss(given).backward()
            optimizer.step()
        return dict(model.state_dict())

    assert largest_difference(weights(True), weights(False)) < 1e-12
    assert len(recorded) == 1


def plain(episodes: Episodes, inner_lr: float, params: dict[str, Tensor]) -> Tensor:
    return episodes.support_x.sum()


def test_the_graph_that_was_not_used_longest_goes(recorded: list[Program]) -> None:
    graphs = cuda_graphs.CudaGraphs()

    def calls(number: int, times: int) -> None:
        call = partial(plain, episodes=episodes(0), inner_lr=number, params={"w": torch.ones(1)})
        for _ in range(times):
            graphs(call, ("w",))

    for number in range(cuda_graphs.MOST_GRAPHS):
        calls(number, cuda_graphs.CALLS_BEFORE + 1)
    calls(0, 1)  # used again, so that 1 is the oldest
    calls(100, cuda_graphs.CALLS_BEFORE + 1)
    assert len(graphs._captured) == cuda_graphs.MOST_GRAPHS
    before = len(recorded)
    calls(0, 1)
    assert len(recorded) == before
    calls(1, cuda_graphs.CALLS_BEFORE + 1)
    assert len(recorded) == before + 1


def test_random_numbers_are_those_of_a_run_without_graphs(recorded: list[Program]) -> None:
    def weights(captures: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, 5), nn.Dropout(0.5), nn.Linear(5, WAYS)
        network = nn.Sequential(*layers).double()
        model = MAML(network, 0.1, STEPS, tasks="vmap", cuda_graphs=captures)
        return trained(model)

    assert largest_difference(weights(True), weights(False)) < 1e-12
    assert not recorded


def test_graphs_of_inference_mode_serve_training(recorded: list[Program]) -> None:
    model = model_of(MAML, True)
    batches = [episodes(step) for step in range(4)]
    with torch.inference_mode():
        for batch in batches:
            assert not model.meta_gradient(batch)["head.bias"].is_inference()
    found = model.meta_loss(episodes(7))
    assert len(recorded) == 1
    assert float(found) == pytest.approx(float(model_of(MAML, False).meta_loss(episodes(7))))


def test_graphs_are_freed_after_training(tmp_path: Any, recorded: list[Program]) -> None:
    model = model_of(MAML, True)
    loader = [episodes(number) for number in range(5)]
    trainer(tmp_path, max_epochs=1, precision="64-true").fit(model, train_dataloaders=loader)
    assert recorded
    assert not model._cuda_graphs._captured


def test_finite_differences_have_graphs_of_their_precision() -> None:
    seen = []

    class Watching(Network):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(precision())
            return super().forward(x)

    def precision() -> Any:
        return cuda_graphs.precision()

    model = HFMAML(Watching().double(), 0.1, STEPS)
    model.meta_gradient(episodes(0))
    seen.clear()
    model.meta_gradient(episodes(0))
    with full_precision():
        full = precision()
    assert {*seen} == {full}
    assert precision() != full, "which is put back"


def test_captured_graphs_go_before_those_of_inner_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both may fill the memory; without CUDA graphs a step is slower, and needs no more of it."""
    monkeypatch.setattr("lightning_maml.execution.graphs.free_bytes", lambda device: 2**40)
    model = model_of(MAML, True)
    trained(model)
    assert model._cuda_graphs._captured
    kept: list[bool] = []
    fitting = [False, True]

    class Full(MAML):
        def _gradient_function(self, plan, episodes, curvature=None):
            function = super()._gradient_function(plan, episodes, curvature)
            kept.append(function.keywords["keep_graphs"])
            if not fitting.pop(0):
                raise torch.OutOfMemoryError("full")
            return function

    model.__class__ = Full
    with caplog.at_level("INFO"):
        model.meta_loss(episodes(0, tasks=5))
        assert not model._cuda_graphs._captured
        assert kept == [True, True]
        assert "no memory for the graphs" not in caplog.text
        fitting += [False, True]
        model.meta_loss(episodes(0, tasks=5))
    assert kept == [True, True, True, False]
    assert caplog.text.count("no memory for the graphs") == 1
