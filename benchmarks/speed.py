"""Exact, first-order and Hessian-free meta-gradients against those of other libraries.

All have the same weights and tasks, and take turns in one process.

    make learn2learn
    .venv/bin/python -m pip install --group bench
    .venv/bin/python benchmarks/speed.py
    .venv/bin/python benchmarks/speed.py --workload omniglot_5w1s_q1 --json out.json

All workloads together take an hour or so on 2 cores, and several hours on older ones.
"""

import argparse
import copy
import ctypes
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18
from tqdm import tqdm

from lightning_maml import FOMAML, HFMAML, MAML, MLP, Conv4, Episodes, ResNet12, keep_freed_memory
from lightning_maml.core.params import Params, norm, subtract
from lightning_maml.core.precision import full_precision
from peers import PEERS

OURS = {
    "ours-exact": MAML,
    "ours-never": partial(MAML, keep_graphs="never"),
    "ours-eager": partial(MAML, cuda_graphs=False),
    "ours-fo": FOMAML,
    "ours-hf": HFMAML,
    "ours-compiled": partial(MAML, compiled=True),
    "ours-exact-tf32": MAML,
    "ours-fo-tf32": FOMAML,
    "ours-exact-bf16": MAML,
    "ours-fo-bf16": FOMAML,
}
FIRST_ORDER = ("ours-fo", "ours-fo-tf32", "ours-fo-bf16", "learn2learn-fo", "autograd-fo")
ON_GPUS = ("ours-eager", "ours-exact-tf32", "ours-fo-tf32")
"""Without CUDA graphs, and with products and convolutions in TF32. All others compute float32 in
full precision on a GPU too."""
TURN = 0.1
"""Shortest turn of a method, in seconds; in a turn, short calls follow each other as they do in
training."""
WARM = {"cpu": 1, "cuda": 3}
"""Calls before the clock starts: the first one compiles, and a GPU captures the third."""
INEXACT = (
    "ours-hf",
    "ours-compiled",
    "ours-exact-tf32",
    "ours-fo-tf32",
    "ours-exact-bf16",
    "ours-fo-bf16",
)
"""Methods not checked in float64: finite differences, which kinks disturb; fewer digits; and a
program that would have to be compiled again."""
# for the others, compiling takes minutes on a CPU and gains nothing there
COMPILED = ("omniglot_5w1s_q1", "sinusoid")


class Workload(NamedTuple):
    """One meta-batch of noise: speed does not depend on what is in the images."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    tasks: int
    steps: int
    rate: float
    checked_shape: tuple[int, ...] | None = None
    """Shape of the images in the check, and so for error and peak, if with ``shape`` the check
    would take more than 24 GB or, on two cores, more than a quarter of an hour."""

    def episodes(self, device: str) -> Episodes:
        """Return the tasks; if inputs are single numbers, regression of sinusoids."""
        random = torch.Generator().manual_seed(0)

        def images(per_class: int) -> Tensor:
            return torch.rand(self.tasks, self.ways * per_class, *self.shape, generator=random).to(
                device
            )

        def labels(per_class: int) -> Tensor:
            return (
                torch.arange(self.ways)
                .repeat_interleave(per_class)
                .repeat(self.tasks, 1)
                .to(device)
            )

        support_x, query_x = images(self.shots), images(self.queries)
        if self.shape == (1,):
            phase = 3 * torch.rand(self.tasks, 1, 1, generator=random).to(device)
            return Episodes(
                10 * support_x - 5,
                torch.sin(10 * support_x - 5 + phase),
                10 * query_x - 5,
                torch.sin(10 * query_x - 5 + phase),
            )
        return Episodes(support_x, labels(self.shots), query_x, labels(self.queries))


WORKLOADS = {
    "omniglot_5w1s_q1": Workload(lambda: Conv4(1, 5, 28), (1, 28, 28), 5, 1, 1, 32, 1, 0.4),
    "omniglot_5w1s_q15": Workload(lambda: Conv4(1, 5, 28), (1, 28, 28), 5, 1, 15, 32, 1, 0.4),
    "omniglot_20w1s": Workload(lambda: Conv4(1, 20, 28), (1, 28, 28), 20, 1, 1, 16, 5, 0.1),
    "omniglot_pooled_5w1s": Workload(
        lambda: Conv4(1, 5, 28, downsample="max"), (1, 28, 28), 5, 1, 15, 32, 1, 0.4
    ),
    "mini_5w1s": Workload(
        lambda: Conv4(3, 5, 84, channels=32, downsample="max"), (3, 84, 84), 5, 1, 15, 4, 5, 0.01
    ),
    "mini_5w5s": Workload(
        lambda: Conv4(3, 5, 84, channels=32, downsample="max"), (3, 84, 84), 5, 5, 15, 4, 5, 0.01
    ),
    "resnet12_5w5s": Workload(
        lambda: ResNet12(3, 5), (3, 84, 84), 5, 5, 15, 1, 1, 0.01, checked_shape=(3, 42, 42)
    ),
    "sinusoid": Workload(lambda: MLP(1, 1), (1,), 10, 1, 1, 25, 1, 0.01),
}
LARGE = {
    "wide_n3": Workload(lambda: MLP(784, 5, (3500, 3500)), (1, 28, 28), 5, 1, 15, 1, 3, 0.01),
    "wide_n5": Workload(lambda: MLP(784, 5, (3500, 3500)), (1, 28, 28), 5, 1, 15, 1, 5, 0.01),
    "resnet12_n5": Workload(
        lambda: ResNet12(3, 5), (3, 84, 84), 5, 1, 15, 1, 5, 0.01, checked_shape=(3, 32, 32)
    ),
    "resnet18_n5": Workload(
        lambda: resnet18(num_classes=5),
        (3, 84, 84),
        5,
        1,
        15,
        1,
        5,
        0.01,
        # on 32 pixels its last maps are single pixels, and batch norm over five of these is so
        # ill-conditioned that one rounding of the images moves autograd's result by 4e-10, and all
        # roundings together ours by 4e-9
        checked_shape=(3, 64, 64),
    ),
}
"""Large networks with few tasks; with one task, and with four."""
WORKLOADS |= LARGE | {f"{name}_t4": of._replace(tasks=4) for name, of in LARGE.items()}


class Row(NamedTuple):
    """What was measured of one method on one workload."""

    workload: str
    method: str
    device: str
    median_ms: float
    iqr_ms: float
    relative_error: float
    peak_mb: float


def without_averages(network: nn.Module) -> nn.Module:
    """Return the network with batch norm by the statistics of each batch.

    Every library here then computes the same.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return network


def start(
    workload: Workload, device: str
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Episodes]:
    """Return the workload's network with its first weights, its loss and its tasks."""
    torch.manual_seed(0)
    loss = F.mse_loss if workload.shape == (1,) else F.cross_entropy
    return without_averages(workload.network()).to(device), loss, workload.episodes(device)


def method(
    name: str,
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    workload: Workload,
    episodes: Episodes,
) -> Any:
    """Return a function that computes the meta-gradient once, as tensors by parameter name."""
    if name in PEERS:
        peer = partial(PEERS[name], network, loss, episodes, workload.rate, workload.steps)
        return full_precision()(peer)
    device = episodes.support_x.device
    model = OURS[name](network, workload.rate, workload.steps, loss=loss).to(device)

    def gradient() -> Params:
        with torch.autocast(device.type, torch.bfloat16, enabled=name.endswith("bf16")):
            return model.meta_gradient(episodes)

    arithmetic = tf32 if name.endswith("tf32") else full_precision
    return arithmetic()(gradient)


@contextmanager
def tf32() -> Iterator[None]:
    """Let GPUs compute products in TF32 too, as they do convolutions by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def limit(name: str, key: str, device: str) -> float:
    """Return the milliseconds of a meta-gradient at the machine's best rate."""
    network, loss, episodes = start(WORKLOADS[name], device)
    model = OURS[key](
        network, WORKLOADS[name].rate, WORKLOADS[name].steps, loss=loss, tasks="loop"
    ).to(device)
    with FlopCounterMode(display=False) as counter:
        model.meta_gradient(episodes)
    return 1000 * counter.get_total_flops() / best_rate(device)


@cache
def best_rate(device: str) -> float:
    """Return the most floating-point operations per second that the machine was seen to do.

    It is that of a large matrix product or a large convolution, whichever has more.

    On CPUs the two come from different libraries: on an AMD EPYC, convolutions have 2.5 times the
    rate of products.
    """
    a, x, kernels = (
        torch.rand(shape, device=device)
        for shape in ((4096, 4096), (64, 128, 42, 42), (128, 128, 3, 3))
    )
    x, kernels = (tensor.to(memory_format=torch.channels_last) for tensor in (x, kernels))
    product = 2 * 4096**3 / min(seconds(lambda: a @ a, device, 1) for _ in range(5))
    convolution = (
        2
        * x.numel()
        * kernels[0].numel()
        / min(seconds(lambda: F.conv2d(x, kernels, padding=1), device, 1) for _ in range(5))
    )
    return max(product, convolution)


def peak_mb(function: Callable[[], object], device: str) -> float:
    """Return the peak memory of one call beyond what there was before.

    It is memory allocated on CUDA, and resident on the CPU.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back to Linux
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    function()
    return (_resident("VmHWM") - before) / 2**10


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def seconds(function: Callable[[], object], device: str, calls: int) -> float:
    """Return the mean time of a call, over ``calls`` in a row.

    It counts until all that they started on the device has ended.
    """
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def repeated(function: Callable[[], Any], calls: int) -> Any:
    """Call a function some times, and return what it returned last."""
    for _ in range(calls):
        result = function()
    return result


def relative_error(actual: Params, expected: Params) -> float:
    """Return the distance of ``actual`` from ``expected``, relative to the norm of ``expected``."""
    return float(
        norm(subtract({name: tensor.double() for name, tensor in actual.items()}, expected))
        / norm(expected)
    )


def errors_and_peaks(name: str, methods: list[str], device: str) -> dict[str, tuple[float, float]]:
    """Return how far each method is off in float32, and its peak memory in MB.

    One that fails, or is off in float64, is left out.

    The errors are relative to autograd through the unrolled loop in float64.
    """
    workload = WORKLOADS[name]
    workload = workload._replace(shape=workload.checked_shape or workload.shape)
    network, loss, episodes = start(workload, device)
    doubles = Episodes(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in episodes)
    )
    expected = {
        first_order: PEERS["torch-func"](
            copy.deepcopy(network).double(),
            loss,
            doubles,
            workload.rate,
            workload.steps,
            first_order,
        )
        for first_order in {key in FIRST_ORDER for key in methods}
    }
    found = {}
    for key in methods:
        of = expected[key in FIRST_ORDER]
        with going_on_without(name, key):
            if key not in INEXACT:
                in_double = relative_error(
                    method(key, copy.deepcopy(network).double(), loss, workload, doubles)(), of
                )
                if in_double > 1e-9:
                    raise RuntimeError(
                        "Expected a meta-gradient that is right but in float64 it is off by "
                        f"{in_double:.1e}."
                    )
            function = method(key, copy.deepcopy(network), loss, workload, episodes)
            found[key] = error_and_peak(function, of, device)
    return found


@contextmanager
def going_on_without(workload: str, key: str) -> Iterator[None]:
    """Print an error of a method, whose row is then missing, and let the others be measured."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 # a GPU may lack the memory, a peer the operation
        print(f"{workload}, {key} failed: {type(error).__name__}: {error}", flush=True)


def error_and_peak(
    function: Callable[[], Params], expected: Params, device: str
) -> tuple[float, float]:
    """Return the relative error of a method in float32, and its peak memory in MB.

    On a GPU both are the graph's, whose capture is among the calls.
    """
    function()  # with checks, which take memory of their own
    calls = WARM[torch.device(device).type]
    results: list[Params] = []
    peak = peak_mb(lambda: results.append(repeated(function, calls)), device)
    return relative_error(results[0], expected), peak


def measure(name: str, methods: list[str], device: str, rounds: int) -> list[Row]:
    """Check every method's meta-gradient, then time them, in float32, in turns.

    The check runs in a process of its own, so that it leaves no memory behind. Freed memory is not
    kept there: it would hide the peaks.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        found = apart.submit(errors_and_peaks, name, methods, device).result()
    workload = WORKLOADS[name]
    network, loss, episodes = start(workload, device)
    functions = {}
    for key in found:
        with going_on_without(name, key):
            function = method(key, copy.deepcopy(network), loss, workload, episodes)
            repeated(function, WARM[torch.device(device).type])
            functions[key] = function
    calls = {
        key: max(1, int(TURN / seconds(function, device, 1))) for key, function in functions.items()
    }
    times: dict[str, list[float]] = {key: [] for key in functions}
    for _ in tqdm(range(rounds), desc=name):
        for key, function in functions.items():
            times[key].append(1000 * seconds(function, device, calls[key]))
    rows = []
    for key, values in times.items():
        first, median, third = statistics.quantiles(values, n=4)
        rows.append(Row(name, key, device, median, third - first, *found[key]))
    return rows


def main() -> None:
    """Measure, print the table, write the rows."""
    # for all methods, as the command `lightning-maml` does: then what one method leaves to the next
    # is the same
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--method", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    rows: list[Row] = []
    asked = 0
    for name in arguments.workload:
        methods = arguments.method
        if arguments.device == "cpu":
            left_out = ON_GPUS if name in COMPILED else (*ON_GPUS, "ours-compiled")
            methods = [key for key in methods if key not in left_out]
        asked += len(methods)
        with going_on_without(name, "the workload"):
            rows += measure(name, methods, arguments.device, arguments.rounds)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores\n")
    print(
        "| workload | method | device | median, ms | quartiles apart, ms | relative error | "
        "peak, MB |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row.workload} | {row.method} | {row.device} | {row.median_ms:.3g} | "
            f"{row.iqr_ms:.2g} | {row.relative_error:.1e} | {row.peak_mb:.0f} |"
        )
    print(
        "\n| workload | method | its operations at the machine's best rate, ms | times as long "
        "|\n|---|---|---|---|"
    )
    for name in arguments.workload:
        medians = {row.method: row.median_ms for row in rows if row.workload == name}
        for key in [key for key in ("ours-exact", "ours-fo") if key in medians]:
            at_best = limit(name, key, arguments.device)
            print(f"| {name} | {key} | {at_best:.3g} | {medians[key] / at_best:.2g} |")
    print("\n| workload | method | fastest of the others | its time over ours |\n|---|---|---|---|")
    for name in arguments.workload:
        medians = {row.method: row.median_ms for row in rows if row.workload == name}
        for key in {"ours-exact", "ours-fo"} & medians.keys():
            others = [peer for peer in PEERS if (peer in FIRST_ORDER) == (key in FIRST_ORDER)]
            fastest = min(medians.keys() & others, key=medians.__getitem__, default=None)
            if fastest is not None:
                print(f"| {name} | {key} | {fastest} | {medians[fastest] / medians[key]:.2f} |")
    if len(rows) < asked:
        raise SystemExit(f"{asked - len(rows)} of {asked} rows are missing: see the errors above.")


if __name__ == "__main__":
    main()
