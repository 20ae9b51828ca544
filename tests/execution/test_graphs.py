"""Graphs of inner steps that are kept: the same numbers, and kept only where memory allows."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.networks import build, make_episodes
from lightning_maml import ANIL, FOMAML, LSLR, MAML, InnerSGD, MAMLPlusPlus
from lightning_maml.execution import graphs
from lightning_maml.execution.graphs import bytes_of_graph, free_bytes

RATE, STEPS = 0.2, 4


def gradients(algorithm: type[MAML], keep: str, tasks: str, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(build("conv_batch_norm"), nn.Dropout(0.2 if tasks == "loop" else 0.0))
    settings = {"head": "0.5"} if algorithm is ANIL else {}
    model = algorithm(network, RATE, STEPS, tasks=tasks, keep_graphs=keep, **settings, **options)
    torch.manual_seed(1)
    model.meta_loss(make_episodes()).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (MAML, {}),
        (MAML, {"inner_optimizer": InnerSGD(momentum=0.9)}),
        (ANIL, {}),
        (LSLR, {}),
        (FOMAML, {}),
    ],
)
def test_the_numbers_are_the_same_to_the_last_bit(
    algorithm: type[MAML], options: dict, tasks: str
) -> None:
    kept, built_again = (
        gradients(algorithm, keep, tasks, **options) for keep in ("always", "never")
    )
    for one, other in zip(kept, built_again, strict=True):
        assert torch.equal(one, other)


def counted(model: MAML) -> int:
    """Return how often a step calls the network."""
    calls = []
    model.meta_loss(make_episodes())
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if isinstance(module, nn.Flatten) else None
    )
    model.meta_loss(make_episodes())
    handle.remove()
    return len(calls)


@pytest.mark.parametrize(("share", "kept"), [(2.1, True), (1.9, False)])
def test_they_are_kept_if_they_take_half_of_the_free_memory(
    share: float, kept: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = MAML(build("mlp"), RATE, STEPS, tasks="loop")
    # by hand: inputs to the first layer are known, what follows is 6 x 6 hidden and 6 x 3 outputs
    sizes: list[int] = []
    measured = graphs.bytes_of_graph

    def noted(*arguments: Any) -> int:
        sizes.append(measured(*arguments))
        return sizes[-1]

    monkeypatch.setattr("lightning_maml.functional.graph_size.bytes_of_graph", noted)
    monkeypatch.setattr(graphs, "free_bytes", lambda device: share * STEPS * sizes[-1])
    with caplog.at_level(logging.INFO):
        assert counted(model) == 3 * (STEPS + 1 if kept else 2 * STEPS + 1)
    assert caplog.text.count("kept (keep" if kept else "built again in the backward pass") == 1
    assert len(sizes) == 1
    outputs = 6 * (6 + 3) * 8
    assert outputs < sizes[0] < 50 * outputs


def test_more_tasks_at_once_are_decided_on_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    measured = graphs.bytes_of_graph

    def noted(*arguments: Any) -> int:
        sizes.append(measured(*arguments))
        return sizes[-1]

    monkeypatch.setattr("lightning_maml.functional.graph_size.bytes_of_graph", noted)
    model = MAML(build("mlp"), RATE, STEPS, tasks="vmap")
    for tasks in (2, 8, 2, 8):
        model.meta_loss(make_episodes(tasks=tasks))
    few, many = sizes
    assert many > 3 * few


def test_the_user_decides() -> None:
    for keep, evaluations in (("always", STEPS + 1), ("never", 2 * STEPS + 1)):
        model = MAML(build("mlp"), RATE, STEPS, tasks="loop", keep_graphs=keep)
        assert counted(model) == 3 * evaluations
    with pytest.raises(ValueError, match="'auto', 'always' or 'never' but got 'yes'"):
        MAML(build("mlp"), keep_graphs="yes")


def test_losses_on_the_way_are_the_same() -> None:
    found = []
    for keep in ("always", "never"):
        model = MAMLPlusPlus(build("mlp"), RATE, 3, multi_step_epochs=0, keep_graphs=keep)
        model.step_weights = lambda epoch: [0.2, 0.3, 0.5]
        model.meta_loss(make_episodes()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_what_a_graph_keeps_is_counted_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    known = torch.ones(1000)
    # sin keeps x, which is known; the product keeps both its factors, 4 kB each
    assert bytes_of_graph(lambda: x.sin() * x.cos(), [x]) == 8000
    assert bytes_of_graph(lambda: (x * known).sum(), [x, known]) == 0
    assert bytes_of_graph(lambda: (x * known).sum(), [x]) == 4000


@pytest.mark.parametrize(
    ("line", "job", "files"),
    [
        ("0::/system.slice/job_7", "system.slice/job_7", ("memory.max", "memory.current")),
        (
            "4:cpu,memory:/slurm/job_7",
            "memory/slurm/job_7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
        ("0::/of_the_host/not_seen_inside", ".", ("memory.max", "memory.current")),
    ],
)
def test_limits_of_containers_and_jobs_count(
    line: str, job: str, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(graphs, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(graphs, "_GROUPS_OF_PROCESS", tmp_path / "cgroup")
    without = free_bytes(device)
    assert without is None or without > 0
    (tmp_path / "cgroup").write_text(f"9:pids:/elsewhere\n{line}\n")
    folder = tmp_path / "groups" / job
    folder.mkdir(parents=True)
    limit, used = (folder / name for name in files)
    used.write_text("600\n")
    # of what is used, 50 are files that can be read again
    (folder / "memory.stat").write_text("anon 500\ninactive_file 50\ntotal_inactive_file 50\n")
    limit.write_text("max")
    assert free_bytes(device) == pytest.approx(without, rel=0.5)
    limit.write_text("1000\n")
    assert free_bytes(device) == 450


def test_what_cuda_graphs_keep_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle memory of their pools is reserved and not allocated, but nothing else can have it."""
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 300, "allocated_size": 100},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 80, "allocated_size": 30},
        {"device": 1, "segment_pool_id": (0, 1), "total_size": 70, "allocated_size": 10},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300 + 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 + 30)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert free_bytes(torch.device("cuda", 0)) == 1000 + 200
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert free_bytes(torch.device("cuda", 0)) == 1000 + 250


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_free_of_group", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 250
    assert free_bytes(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("kind", "full"),
    [
        ("cuda", torch.OutOfMemoryError("full")),
        ("cuda", RuntimeError("GET was unable to find an engine to execute this computation")),
        ("cpu", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you")),
    ],
)
def test_out_of_memory_they_are_dropped_first(
    kind: str,
    full: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Accelerated(MAML):
        """Runs as on a device whose memory is full with graphs; no test machine has a GPU."""

        device = torch.device(kind)

        def _gradient_function(self, plan, episodes, curvature=None):
            function = super()._gradient_function(plan, episodes, curvature)
            if function.keywords["keep_graphs"]:
                raise full
            return function

    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    monkeypatch.setattr(graphs, "free_bytes", lambda device: 2**40)
    episodes = make_episodes(tasks=9)
    model = Accelerated(build("mlp"), RATE, STEPS)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.meta_loss(episodes)
    assert caplog.text.count("no memory for the graphs") == 1
    assert "tasks at once" not in caplog.text


class RunsOut(MAML):
    """Has no memory for kept graphs, as it finds out at the end of a step."""

    def _gradient_function(self, plan, episodes, curvature=None):
        function = super()._gradient_function(plan, episodes, curvature)
        if not function.keywords["keep_graphs"]:
            return function

        def computed_in_vain(*arguments: Any) -> None:
            function(*arguments)
            raise torch.OutOfMemoryError("full")

        return computed_in_vain


class Noisy(nn.Module):
    """Draws from a generator, which may be one of another library than torch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw, self.layer = draw, build("mlp")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1 + self.draw())


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), lambda: np.random.rand(), lambda: random.random()],
    ids=["torch", "numpy", "Python"],
)
def test_a_step_that_is_taken_again_draws_the_same_numbers(
    draw: Callable[[], float], caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for algorithm in (RunsOut, MAML):
        torch.manual_seed(0)
        network = Noisy(draw)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(1)
        with caplog.at_level(logging.INFO):
            losses.append(algorithm(network, RATE, STEPS).meta_loss(make_episodes()).item())
    assert caplog.text.count("no memory for the graphs") == 1
    assert losses[0] == losses[1]


def test_nothing_is_tried_again_where_none_are_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First-order MAML keeps none, so that dropping them would change nothing."""
    calls = []

    def full(self: Any, plan: Any, episodes: Any, curvature: Any = None) -> Any:
        calls.append(1)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(FOMAML, "_gradient_function", full)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="Expected memory for 3"):
        FOMAML(build("mlp"), RATE, STEPS).meta_loss(make_episodes())
    assert len(calls) == 1
    assert not caplog.text
