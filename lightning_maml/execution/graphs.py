"""Whether the graphs of all inner steps fit into memory, so that none has to be built twice."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_maml.core.tensors import memory
from lightning_maml.errors import UserValueError

KeepGraphs = Literal["auto", "always", "never"]

_SHARE = 0.5
"""How much of the free memory graphs may take."""

_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    (_GROUPS / "memory.max", _GROUPS / "memory.current"),
    (_GROUPS / "memory/memory.limit_in_bytes", _GROUPS / "memory/memory.usage_in_bytes"),
)
"""What containers and batch systems may use, and use, in both versions of Linux's groups."""


class Graphs:
    """Decides whether a model keeps the graphs of its inner steps.

    Args:
        keep: ``"always"``, ``"never"``, or ``"auto"``: if they fit into half of the memory that is
            free.

    Raises:
        ValueError: If it is none of the three.

    Examples:
        >>> import torch
        >>> from lightning_maml.execution.graphs import Graphs
        >>> Graphs("auto").fit(5, torch.device("cpu"), lambda: 10**15)
        False
    """

    def __init__(self, keep: KeepGraphs) -> None:
        if keep not in get_args(KeepGraphs):
            raise UserValueError(
                f"Expected `keep_graphs` to be 'auto', 'always' or 'never' but got {keep!r}."
            )
        self._keep = keep
        self._said: bool | None = None

    @property
    def may_be_dropped(self) -> bool:
        """Whether it is left open if they are kept."""
        return self._keep == "auto"

    def drop(self) -> None:
        """Keep none from here on."""
        rank_zero_info("There is no memory for the graphs of all inner steps; none are kept.")
        self._keep = "never"

    def fit(self, steps: int, device: torch.device, size: Callable[[], int]) -> bool:
        """Return whether the graphs are kept; what their size decides is logged when it changes.

        Args:
            steps: N. The graph of a single step lies beside that of the query loss anyway.
            device: Where they are.
            size: Measures the bytes of one step's graphs.
        """
        if self._keep != "auto" or steps <= 1:
            return self._keep != "never"
        needed, free = steps * size(), free_bytes(device)
        kept = free is not None and needed <= _SHARE * free
        if kept != self._said:  # tasks of many sizes are measured many times
            rank_zero_info(
                f"The graphs of {steps} inner steps take {needed / 2**30:.2g} GB: they are "
                f"{'kept' if kept else 'built again on the way back'} (keep_graphs='auto')."
            )
            self._said = kept
        return kept


def bytes_of_graph(build: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return how much memory autograd keeps for the graph of what ``build`` returns.

    Args:
        build: Builds it.
        known: Tensors that exist anyway: parameters and inputs.
    """
    sizes: dict[int, int] = {}
    others = {memory(tensor) for tensor in known}

    def note(tensor: Tensor) -> Tensor:
        where = memory(tensor)
        if where not in others and not tensor.is_sparse:
            sizes[where] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        built = build()  # held, so that no two tensors have the same memory one after the other
    del built
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still have on a device; None if that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type != "cpu":
        return None
    known = [value for value in (_free_of_system(), _free_of_group()) if value is not None]
    return min(known, default=None)


def _free_of_system() -> int | None:
    """Return what Linux calls available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _free_of_group() -> int | None:
    """Return what the limit of a container leaves; None if there is no limit."""
    for limit, used in _LIMITS:
        try:
            return max(0, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None
