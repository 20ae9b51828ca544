"""What several files of tests share."""

from collections.abc import Iterator

import pytest
import torch


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
    of_test = getattr(request.node, "callspec", None)
    if of_test is not None and "'threads'" in repr(of_test.params):
        request.getfixturevalue("two_threads")


@pytest.fixture(autouse=True)
def compiler_without_a_past() -> None:
    """Let torch's compiler forget what other tests compiled.

    It would otherwise make programs for any shape, and remember code that it gave up on.
    """
    torch.compiler.reset()
