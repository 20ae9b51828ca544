"""What "auto" chooses on the CPU.

Small tasks are stacked where vmap takes the network, larger ones run one per core, the largest in a
loop.
"""

import gc
import logging
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn

from helpers.networks import build, make_episodes
from lightning_maml import ANIL, HFMAML, MAML, MLP, Conv4, Episodes, ResampledEpisodes, ResNet12
from lightning_maml.core.params import Params, norm, subtract
from lightning_maml.execution.auto import FEWEST_STACKED, Execution, Executor, for_cpu
from lightning_maml.execution.task_map import RandomInThreadsError, are_stacked
from lightning_maml.networks import stacking_trial
from lightning_maml.networks.functional_network import FunctionalNetwork, HeadDoesNotEndError
from lightning_maml.networks.stacking_trial import Verdict, compare_losses

PARAMETERS = 113_000
"""Those of a Conv4 of 64 channels."""


def images(tasks: int, per_task: int, size: int = 28, channels: int = 1) -> Episodes:
    x, y = (
        torch.zeros(tasks, per_task, channels, size, size),
        torch.zeros(tasks, per_task, dtype=torch.long),
    )
    return Episodes(x, y, x, y)


@pytest.fixture(params=[1, 2, 8])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_small_tasks_are_stacked_in_chunks_that_fit_the_caches_and_the_cores(cores: int) -> None:
    found = for_cpu(images(32, 5), PARAMETERS, lambda: True)
    assert (
        found
        == {1: Execution("loop", 8), 2: Execution("threads", 8), 8: Execution("threads", 4)}[cores]
    )


def test_every_core_has_as_many_stacks(cores: int) -> None:
    # 13 tasks would fit: on 2 cores 13, 13 and 6
    found = for_cpu(images(32, 3), PARAMETERS, lambda: True)
    assert found.chunk_size == {1: 11, 2: 8, 8: 4}[cores]


def test_a_few_small_tasks_are_one_stack(cores: int) -> None:
    assert for_cpu(images(8, 5), PARAMETERS, lambda: True) == Execution("vmap", None)


@pytest.mark.parametrize(
    ("episodes", "network"),
    [
        (images(32, 20), Conv4(1, 5, 28)),  # more images
        (images(4, 80, 28, 3), Conv4(3, 5, 28)),
        (images(4, 24, 84, 3), Conv4(3, 5, 84)),
        (images(32, 5), ResNet12(1, 5)),  # 8 million parameters
    ],
)
def test_larger_tasks_are_run_one_per_core(
    episodes: Episodes, network: nn.Module, cores: int
) -> None:
    expected = Execution("loop" if cores == 1 else "threads", None)
    assert for_cpu(episodes, sum(p.numel() for p in network.parameters()), lambda: True) == expected


@pytest.mark.parametrize(
    "episodes", [images(1, 80), images(1, 5), images(FEWEST_STACKED - 1, 5), images(4, 25, 84, 3)]
)
def test_one_task_a_few_small_ones_and_the_largest_have_all_cores(
    episodes: Episodes, cores: int
) -> None:
    assert for_cpu(episodes, PARAMETERS, lambda: True) == Execution("loop", None)


def test_networks_that_cannot_be_stacked_run_one_task_per_core(cores: int) -> None:
    assert for_cpu(images(32, 5), PARAMETERS, lambda: False) == Execution(
        "loop" if cores == 1 else "threads", None
    )


class Branching(nn.Module):
    """Looks at the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = build("mlp")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if x.mean() > 0 else -x)


class Noisy(Branching):
    """Random in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.01 * torch.randn_like(x))


class Looping(Branching):
    """Has an operation for which vmap makes a loop over the tasks."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.head(x)
            + torch.histc(torch.zeros(3).to(x), 3, 0, 1)
            + torch.bincount(x.detach().flatten().long())[0]
        )


@pytest.mark.parametrize("name", ["mlp", "conv_batch_norm", "conv_max_pool"])
def test_usual_networks_take_stacks(name: str) -> None:
    assert _takes_stacks(build(name))


@pytest.mark.parametrize("network", [Branching, Looping])
def test_networks_that_vmap_refuses_or_slows_down_take_no_stacks(network: type[nn.Module]) -> None:
    assert not _takes_stacks(network())


def test_random_networks_can_be_stacked_if_all_tasks_draw_the_same_where_they_are_compared() -> (
    None
):
    network, state = Noisy(), torch.get_rng_state()
    assert _takes_stacks(network)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_that_looks_at_values_takes_no_stacks() -> None:
    assert not _takes_stacks(build("mlp"), lambda outputs, y: outputs[y == 0].mean())


def _takes_stacks(network: nn.Module, criterion=F.cross_entropy) -> bool:
    network, episodes = network.double(), make_episodes()
    single, stacked = FunctionalNetwork(network), FunctionalNetwork(network, vectorised=True)

    def loss(functional: FunctionalNetwork, w: Params, task: Episodes) -> Tensor:
        return criterion(functional(w, task.support_x), task.support_y)

    return not any(
        compare_losses(
            partial(loss, single), partial(loss, stacked), single.params, episodes, curved=True
        )
    )


@pytest.mark.parametrize("algorithm", [MAML, HFMAML])
@pytest.mark.parametrize("name", ["mlp", "conv_group_norm", "conv_batch_norm", "conv_max_pool"])
def test_auto_gives_the_gradients_of_a_loop(algorithm: type[MAML], name: str) -> None:
    network, episodes = build(name), make_episodes(tasks=6)
    of_loop = algorithm(network, 0.1, 2, tasks="loop").meta_gradient(episodes)
    auto = algorithm(network, 0.1, 2)
    assert auto._execution(episodes) == Execution("vmap", None)
    error = norm(subtract(auto.meta_gradient(episodes), of_loop)) / norm(of_loop)
    assert error < (1e-12 if algorithm is MAML else 1e-7)


def test_fresh_batches_are_stacked_too() -> None:
    episodes = make_episodes(tasks=4)
    x, y = (torch.stack([tensor, tensor.flip(1)], 1) for tensor in episodes[:2])
    resampled = ResampledEpisodes(x, y, x, y, *episodes[2:])
    network = build("conv_batch_norm")
    auto = MAML(network, 0.1, 2)
    assert auto._execution(resampled) == Execution("vmap", None)
    of_loop = MAML(network, 0.1, 2, tasks="loop").meta_gradient(resampled)
    assert norm(subtract(auto.meta_gradient(resampled), of_loop)) < 1e-12 * norm(of_loop)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("network", [Branching, Looping])
def test_auto_trains_a_network_that_vmap_does_not_take(network: type[nn.Module]) -> None:
    episodes = make_episodes(tasks=6)
    auto = MAML(network().double(), 0.1)
    assert auto._execution(episodes).tasks == "threads"
    auto.meta_loss(episodes).backward()
    assert all(p.grad is not None for p in auto.network.parameters())


def test_it_is_said_once_why_tasks_are_not_stacked(caplog: pytest.LogCaptureFixture) -> None:
    model = MAML(Branching().double(), 0.1)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.meta_loss(make_episodes(tasks=9))
    assert (
        caplog.text.count("Tasks are not stacked unless that is asked for: vmap does not take") == 1
    )


def test_on_an_accelerator_too_it_is_run_one_by_one() -> None:
    def on_gpu(chunk_size: int | None, verdict: Verdict) -> Execution:
        executor = Executor("auto", chunk_size, compiled=False)
        return executor(
            build("mlp"), torch.device("cuda"), make_episodes(), tuple, lambda: verdict, bool
        )

    assert on_gpu(None, Verdict()) == Execution("vmap", None)
    assert on_gpu(None, Verdict(wrong="they differ")) == Execution("loop", None)
    assert on_gpu(None, Verdict(slow="vmap would loop over them")) == Execution("loop", None)
    assert on_gpu(2, Verdict(slow="vmap would loop over them")) == Execution("vmap", 2), (
        "as the user has it"
    )
    with pytest.raises(
        ValueError, match="can be stacked with `chunk_size=2` but they differ; use tasks='loop'"
    ):
        on_gpu(2, Verdict(wrong="they differ"))


def test_dropout_keeps_its_loop() -> None:
    network = nn.Sequential(build("mlp"), nn.Dropout(0.5)).double()
    assert MAML(network, 0.1)._execution(make_episodes(tasks=6)) == Execution("loop", None)


@pytest.mark.parametrize("in_training", [True, False])
def test_what_fails_stacked_in_mixed_precision_is_not_stacked(in_training: bool) -> None:
    """Torch's batch norm by running averages in bf16 is such a thing."""
    episodes = Episodes(
        *(x.float() if x.is_floating_point() else x for x in make_episodes(tasks=8))
    )
    network = build("conv_batch_norm").float()
    model = MAML(network, 0.1, batch_norm="running", query_in_eval=in_training)
    model.train(in_training)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.evaluate(episodes).loss.isfinite().all()
        if in_training:
            model.meta_loss(episodes).backward()


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_stacked_tasks_are_halved_until_memory_suffices(
    full: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Accelerated(MAML):
        """Runs as on an accelerator whose memory is full with more than two tasks.

        No test machine has one that small.
        """

        device = torch.device("cuda")

        def _gradient_function(self, plan, episodes, curvature=None):
            if (plan.execution.chunk_size or len(episodes.support_x)) > 2:
                raise full
            return super()._gradient_function(plan, episodes, curvature)

    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    network, episodes = build("mlp"), make_episodes(tasks=9)
    model = Accelerated(network, 0.1)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.meta_loss(episodes)
    assert model._execution(episodes) == Execution("vmap", 2)
    assert caplog.text.count("memory") == 2  # 9 tasks, 4, 2
    for given in ({"chunk_size": 4}, {"tasks": "vmap"}):
        with pytest.raises(torch.OutOfMemoryError, match="Expected memory for 9 tasks") as raised:
            Accelerated(network, 0.1, **given).meta_loss(episodes)
        # it may have another cause, such as a wrong version
        assert str(full) in str(raised.value)
        if type(full) is not RuntimeError:
            assert is_oom_error(raised.value), "the batch-size finder takes a smaller batch then"


def test_stacking_is_tried_in_the_networks_own_type_if_there_is_no_memory_for_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where tasks of a ResNet that fit stacked would be run one by one for good."""

    def compared(alone: Any, together: Any, params: Params, *_: Any, **__: Any) -> Verdict:
        types.append(next(iter(params.values())).dtype)
        if types[-1] is torch.float64:
            return stacking_trial._failed(torch.OutOfMemoryError("full"))
        return Verdict()

    types: list[torch.dtype] = []
    monkeypatch.setattr("lightning_maml.checks.stacking_check.compare_losses", compared)
    x, y = torch.rand(9, 6, 4), torch.arange(3).repeat(9, 2)
    way = MAML(MLP(4, 3), 0.1)._execution(Episodes(x, y, x, y))
    assert types == [torch.float64, torch.float32]
    assert are_stacked(*way)


def test_tasks_in_a_loop_are_not_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    class Accelerated(MAML):
        """Runs as on an accelerator whose memory is full with one task."""

        device = torch.device("cuda")

        def _gradient_function(self, plan, episodes, curvature=None):
            calls.append(plan.execution.tasks)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(torch.OutOfMemoryError, match="Expected memory for 9 tasks"),
    ):
        Accelerated(Branching().double(), 0.1).meta_loss(make_episodes(tasks=9))
    assert calls == ["loop"]
    assert "at once" not in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_as_many_tasks_as_it_has_memory_for() -> None:
    torch.cuda.empty_cache()
    episodes = Episodes(*(tensor.cuda() for tensor in images(512, 40, 84, 3)))
    torch.cuda.set_per_process_memory_fraction(2**33 / torch.cuda.mem_get_info()[1])  # 8 GiB
    try:
        model = MAML(Conv4(3, 5, 84, downsample="max"), 0.01).cuda()
        model.meta_loss(episodes)
        assert model._execution(episodes).chunk_size in range(1, 512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_network_or_loss_put_in_anothers_place_is_tried_anew() -> None:
    episodes = make_episodes(tasks=6)
    model = MAML(build("mlp"), 0.1)
    assert model._execution(episodes).tasks == "vmap"
    model.network = Branching().double()
    assert model._execution(episodes).tasks != "vmap"
    model.meta_loss(episodes).backward()


class BranchingOnManyImages(Branching):
    """Looks at the values of query sets alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 6 else self.head(x)


def test_query_sets_are_tried_too() -> None:
    assert (
        MAML(BranchingOnManyImages().double(), 0.1)._execution(make_episodes(tasks=6)).tasks
        != "vmap"
    )


def test_a_head_put_in_anothers_place_is_seen() -> None:
    network, episodes = (
        nn.Sequential(build("mlp"), nn.Linear(3, 3).double()),
        make_episodes(tasks=2),
    )
    model = MAML(network, 0.1)
    model.meta_loss(episodes)
    model.evaluate(episodes)
    network[1] = nn.Linear(3, 2).double()
    with pytest.raises(
        ValueError, match="Expected labels from 0 to 1, the outputs of `network`, but got 0 to 2"
    ):
        model.meta_loss(episodes)


def test_an_empty_parameter_is_no_infinite_one() -> None:
    network = build("mlp")
    network.register_parameter("nothing", nn.Parameter(torch.zeros(0, dtype=torch.float64)))
    MAML(network, 0.1).meta_loss(make_episodes())


def test_a_first_batch_that_is_refused_does_not_decide_how_later_ones_are_run() -> None:
    episodes = make_episodes(tasks=6)
    model = MAML(build("mlp"), 0.1)
    with pytest.raises(ValueError, match="Expected labels from 0 to 2, the outputs of `network`"):
        model.meta_loss(episodes._replace(support_y=episodes.support_y + 5))
    assert model._execution(episodes).tasks == "vmap"


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("measured", ["meta_gradient", "probe"])
def test_what_is_measured_is_checked_as_a_step_is(tasks: str, measured: str) -> None:
    episodes = make_episodes(tasks=6)
    beyond = episodes._replace(query_y=episodes.query_y + 1)
    with pytest.raises(
        ValueError, match="Expected labels from 0 to 2, the outputs of `network`, but got 0 to 3"
    ):
        getattr(MAML(build("mlp"), 0.1, tasks=tasks), measured)(beyond)


def test_the_tensors_of_a_failed_attempt_are_gone_when_the_devices_cache_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[Tensor]] = []
    emptied: list[bool] = []

    class Module:
        @staticmethod
        def empty_cache() -> None:
            emptied.append(held[0]() is None)

    def fails() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    gc.disable()  # which would find them later
    try:
        for attempt in Executor("auto", None, compiled=False).attempts(9, torch.device("cuda")):
            with attempt:
                if not held:
                    fails()
    finally:
        gc.enable()
    assert emptied == [True]


@pytest.mark.parametrize("error", [RandomInThreadsError, HeadDoesNotEndError])
def test_an_error_that_its_cure_does_not_end_is_raised(error: type[Exception]) -> None:
    class Failing(ANIL):
        def _gradient_function(self, plan, episodes, curvature=None):
            tried.append(plan.execution.tasks)
            raise error("again")

    tried: list[str] = []
    with pytest.raises(error, match="again"):
        Failing(build("mlp"), 0.1, head="3").meta_loss(make_episodes())
    assert len(tried) == 2
