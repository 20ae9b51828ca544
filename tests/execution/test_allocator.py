"""What glibc is told to do with memory that is freed."""

import os
import sys

import pytest

from helpers import another_process

HELD = """
import os, sys, torch
from lightning_maml import keep_freed_memory

def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1024

for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
    del os.environ[name]
os.environ |= dict(setting.split("=", 1) for setting in sys.argv[1:])
{call}
before = resident()
tensor = torch.ones(75_000_000)
del tensor
print(resident() - before)
"""


def held(call: str, *environment: str) -> float:
    """Return the megabytes that a process holds after it made and freed a tensor of 300 MB."""
    return float(another_process.output(HELD.format(call=call), *environment).splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_freed_memory_is_kept_where_it_is_asked_for() -> None:
    assert held("") < 100
    assert held("keep_freed_memory()") > 250
    assert (
        held("from lightning_maml.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")
        > 250
    )


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_settings_of_the_environment_are_left_alone() -> None:
    assert held("keep_freed_memory()", "MALLOC_ARENA_MAX=4") < 100
    assert held("keep_freed_memory()", "GLIBC_TUNABLES=glibc.malloc.tcache_count=5") < 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_maml.execution import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("it was loaded"))
    allocator.keep_freed_memory()


def test_a_glibc_that_refuses_large_blocks_gets_the_largest_that_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_maml.execution import allocator

    taken = {}

    class Old:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            if parameter == -3 and value > 2**25:
                return 0
            taken[parameter] = value
            return 1

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Old)
    allocator.keep_freed_memory()
    assert taken == {-3: 2**25, -1: 2**31 - 1}
    taken.clear()
    monkeypatch.setattr(
        Old, "mallopt", staticmethod(lambda parameter, value: taken.update({parameter: value}) or 0)
    )
    allocator.keep_freed_memory()
    assert -1 not in taken, "alone it would hold the other threshold down"
