"""Whether the graphs of all inner steps fit into memory, so that none has to be built twice."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
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
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where the two versions of Linux's groups, by the name of the controller, say what a container or
a job of a batch system may use and uses, and what of that are files that can be read again."""


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
        self._has_kept = False

    def drop(self) -> bool:
        """Keep none from here on; return whether any were kept that need not be."""
        if self._keep != "auto" or not self._has_kept:
            return False
        rank_zero_info("There is no memory for the graphs of all inner steps; none are kept.")
        self._keep = "never"
        return True

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
                f"{'kept' if kept else 'built again in the backward pass'} (keep_graphs='auto')."
            )
            self._said = kept
        self._has_kept |= kept
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
    """Return the memory that this process can still have on a device; None if that is unknown.

    Several processes of a machine share what its CPU has.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused - _unused_of_graphs(device))
    if device.type != "cpu":
        return None
    known = [value for value in (_free_of_system(), _free_of_group()) if value is not None]
    return min(known) // _processes_here() if known else None


def _unused_of_graphs(device: torch.device) -> int:
    """Return what CUDA graphs keep for their next run, which nothing else can have."""
    if torch.cuda.get_allocator_backend() != "native":  # whose segments are not known
        return 0
    own = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == own and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _processes_here() -> int:
    """Return how many processes train on this machine; on all, where only that is known."""
    if local := os.environ.get("LOCAL_WORLD_SIZE"):  # torchrun's
        return int(local)
    distributed = torch.distributed
    known = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if known else 1


def _free_of_system() -> int | None:
    """Return what Linux calls available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _free_of_group() -> int | None:
    """Return what the limits of a container or of a job leave; None if there is no limit."""
    found = [_free_below_limit(folder, *_FILES[kind]) for kind, folder in _groups_of_process()]
    return min((free for free in found if free is not None), default=None)


def _groups_of_process() -> Iterator[tuple[str, Path]]:
    """Yield the groups whose limits hold for this process: its own, and those that it lies in."""
    try:
        lines = _GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for kind in {"", "memory"} & set(controllers.split(",")):
            own = PurePosixPath(path.lstrip("/"))
            # in a container, its group may be the root of what can be seen
            yield from ((kind, _GROUPS / kind / group) for group in (own, *own.parents))


def _free_below_limit(folder: Path, limit: str, used: str, files: str) -> int | None:
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        statistics = (folder / "memory.stat").read_text().split()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    counts = dict(zip(statistics[::2], statistics[1::2], strict=False))
    return max(0, most - now + int(counts.get(files, 0)))
