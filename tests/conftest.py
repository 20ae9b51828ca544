"""What several files of tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ON_EVERY_DEVICE = {
    "algorithms",
    "batches",
    "callbacks",
    "checks",
    "core",
    "datamodules",
    "functional",
    "kernels",
    "networks",
}
"""The folders whose tests run on CUDA too where there is a GPU, unless marked ``cpu_only``."""


@pytest.hookimpl(trylast=True)  # so that the device comes last in names
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of these folders once per device; those on the CPU keep their names."""
    if _can_use_a_gpu(metafunc) and torch.cuda.is_available():
        devices = [pytest.param("cpu", id=pytest.HIDDEN_PARAM), "cuda"]
        metafunc.parametrize("device", devices, indirect=True)


def _can_use_a_gpu(test: pytest.Metafunc) -> bool:
    folder, marked = Path(test.module.__file__).parent.name, test.definition.get_closest_marker
    # a GPU's tasks are not run in threads
    on_cpu = "two_threads" in test.fixturenames or (marked("cpu_only") and not marked("fits"))
    return folder in ON_EVERY_DEVICE and not on_cpu


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Let the tensors and networks that a test makes lie on its device; return the device."""
    device = torch.device(getattr(request, "param", "cpu"))
    if device.type == "cpu":  # torch's own default
        yield device
        return
    if _runs_in_threads(request):
        pytest.skip("threads do not inherit torch's default device")
    with device:
        yield device


def _runs_in_threads(request: pytest.FixtureRequest) -> bool:
    """Return whether ``tasks="threads"`` is among the parameters of a test."""
    of_test = getattr(request.node, "callspec", None)
    return of_test is not None and "'threads'" in repr(of_test.params)


@pytest.fixture(autouse=True)
def random_numbers() -> None:
    """Let a test draw the same numbers of torch whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give a test two threads: ``make test`` leaves each one, and runs two at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def threads_for_tasks(request: pytest.FixtureRequest) -> None:
    """Give those two that have ``tasks="threads"`` among their parameters."""
    if _runs_in_threads(request):
        request.getfixturevalue("two_threads")


@pytest.fixture(autouse=True)
def compiler_without_a_past() -> None:
    """Let torch's compiler forget what other tests compiled.

    It would otherwise make programs for any shape, and remember code that it gave up on.
    """
    torch.compiler.reset()
