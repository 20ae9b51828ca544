"""Checkpoint files that are either whole or absent."""

import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_maml.errors import UserOSError, UserTypeError, UserValueError
from lightning_maml.io.plain import plain
from lightning_maml.io.safe_files import check_archive, whole_file


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all.

    A process that dies while writing one leaves the previous file, never half of a new one.
    Lightning itself first writes into the system's folder for temporary files; if that is on
    another file system than the checkpoints, a process killed while copying leaves half a file in
    place of a good one. The models of this package put this class in place of Lightning's default
    in a trainer.

    Every file is read back once it is written, without running anything in it; weights are only
    mapped, not read. Where that fails, a warning names the entry.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_maml.io.checkpoints import WholeCheckpoints
        >>> checkpoint = {"epoch": 3, "pytorch-lightning_version": "2.6.0"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.ckpt"
        ...     WholeCheckpoints().save_checkpoint(checkpoint, path)
        ...     print(WholeCheckpoints().load_checkpoint(path)["epoch"])
        3
    """

    _has_warned = False

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file beside ``path`` to the disk, and then move it into place in one step.

        Numbers of numpy are written as Python's.

        Args:
            checkpoint: What to write.
            path: Where to; URLs are left to Lightning.
            storage_options: Passed to Lightning with URLs.

        Raises:
            OSError: If it cannot be written; a file that was there before is unchanged.
            TypeError: If something in it cannot be saved at all; the message names it.
        """
        checkpoint = plain(checkpoint)
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
        # what Python raises for objects that it cannot pickle
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            name, entry = _innermost_unreadable(checkpoint, "checkpoint")
            raise UserTypeError(
                f"Expected to save the checkpoint {path} but `{name}` is a "
                f"{type(entry).__name__}, which cannot be saved ({_first_line(error)}); have what "
                "it belongs to save numbers, strings, lists, dicts or tensors."
            ) from error
        # torch's writer raises a RuntimeError if the disk is full
        except (OSError, RuntimeError) as error:
            raise UserOSError(
                f"Expected to write the checkpoint {path} but it cannot be written: "
                f"{_first_line(error)}; make room and go on from the last checkpoint, which is as "
                "it was."
            ) from error
        if not self._has_warned and not _is_whole(Path(path), mapped=True):
            self._has_warned = True
            self._warn_of_unreadable_entry(checkpoint, path)

    def _warn_of_unreadable_entry(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        name, entry = _innermost_unreadable(checkpoint, "checkpoint")
        rank_zero_warn(
            f"Expected the checkpoint {path} to hold tensors and plain data but `{name}` is a "
            f"{type(entry).__name__}, so it can only be read with `weights_only=False`, which "
            "runs what is in it: have what it belongs to save numbers, strings, lists, dicts or "
            "tensors, or give `weights_only=False` to `fit`, `test` and `load_from_checkpoint` "
            "where you trust the file."
        )

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint, without running anything in it unless ``weights_only=False``.

        Args:
            path: The file.
            map_location: Device of its tensors, as for ``torch.load``.
            weights_only: Allow only tensors and plain data, which is the default.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not whole; the message names the newest whole one beside it. If it
                holds weights but was not written by a trainer; the message has the lines that load
                them.
        """
        return read_trained(path, map_location, weights_only is None or weights_only)


def read_trained(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Return the checkpoint of a trainer at ``path``.

    Arguments and errors are those of :meth:`WholeCheckpoints.load_checkpoint`.
    """
    checkpoint = read_checkpoint(path, map_location, weights_only)
    if "pytorch-lightning_version" in checkpoint:
        return checkpoint
    index, weights = _weights_in(checkpoint)
    if not weights:
        raise UserValueError(
            f"Expected {path} to be a checkpoint of a trainer but it holds only {[*checkpoint]}."
        )
    # tell apart what `torch.save(model.state_dict())` and `torch.save(network.state_dict())` wrote
    line = f"load_state_dict(torch.load({str(path)!r}, weights_only=True){index})`"
    if any(str(name).startswith("network.") for name in weights):
        first, second = "`model = MAML(network, ...)`, or the class that it was", f"`model.{line}"
    else:
        first = f"`network.{line}"
        second = "`model = MAML(network, ...)`, or the class that you train"
    raise UserValueError(
        f"Expected {path} to be a checkpoint of a trainer but it holds weights saved without one; "
        f"load them by {first}, and then {second}."
    )


def _weights_in(checkpoint: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the index of the weights in ``checkpoint``, as code, and the weights."""
    candidates = [("", checkpoint)]
    candidates += [(f"[{name!r}]", entry) for name, entry in checkpoint.items()]
    for index, found in candidates:
        if isinstance(found, dict) and any(isinstance(tensor, Tensor) for tensor in found.values()):
            return index, found
    return "", {}


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Return the checkpoint at ``path``, whether or not a trainer wrote it.

    Args:
        path: The file, or a URL.
        map_location: Device of its tensors, as for ``torch.load``.
        weights_only: Allow only tensors and plain data.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not whole, or holds something other than a dict; the message names the
            newest whole one beside it.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning_maml.io.checkpoints import read_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "weights.pt"
        ...     torch.save({"weight": torch.ones(2)}, path)
        ...     print(read_checkpoint(path))
        {'weight': tensor([1., 1.])}
    """
    try:
        if weights_only and "://" not in str(path) and Path(path).is_file():
            check_archive(Path(path))
        checkpoint: dict[str, Any] = TorchCheckpointIO().load_checkpoint(
            path, map_location, weights_only
        )
        if not isinstance(checkpoint, dict):
            # not a TypeError: it is the file that is wrong
            raise ValueError(f"it holds {type(checkpoint).__name__}")  # noqa: TRY004
    except FileNotFoundError:
        raise
    except Exception as error:
        cure = "there is no whole one beside it"
        if before := _newest_whole(Path(path)):
            cure = f"go on from {before}, the newest whole one beside it"
        raise UserValueError(
            f"Expected {path} to be a whole checkpoint but it cannot be read: "
            f"{_why(error, path)}; {cure}."
        ) from error
    return checkpoint


def _why(error: Exception, path: str | Path) -> str:
    """Return why a file cannot be read, with the classes and functions that it asks for."""
    why = _first_line(error)
    if not isinstance(error, pickle.UnpicklingError):
        return why
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 # whatever is wrong with it, it is damaged
        asked = []
    if asked:
        why += (
            f" (it asks for {', '.join(asked)[:200]}; where you trust it, read it with "
            "`weights_only=False`)"
        )
    return why


def _newest_whole(path: Path) -> Path | None:
    """Return the newest whole checkpoint beside ``path``."""
    others = [other for other in path.parent.glob("*.ckpt") if other.name != path.name]
    others.sort(key=lambda other: other.stat().st_mtime_ns, reverse=True)
    return next((other for other in others if _is_whole(other)), None)


def _innermost_unreadable(entry: Any, name: str) -> tuple[str, Any]:
    """Return name and value of the first entry in ``entry`` that cannot be written and read back.

    Dicts, lists and tuples are searched through, so that the name leads to the culprit itself.
    """
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(entry, dict):
        inside = entry.items()
    elif isinstance(entry, list | tuple):
        inside = enumerate(entry)
    for key, value in inside:
        if not _can_be_read_back(value):
            return _innermost_unreadable(value, f"{name}[{key!r}]")
    return name, entry


def _can_be_read_back(entry: Any) -> bool:
    if type(entry) in (Tensor, int, float, bool, str):
        return True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entry"
        try:
            torch.save(entry, path)
        except Exception:  # noqa: BLE001 # what cannot be pickled raises errors of every kind
            return False
        return _is_whole(path, mapped=True)


def _is_whole(path: Path, mapped: bool = False) -> bool:
    try:
        check_archive(path)
        torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception:  # noqa: BLE001 # whatever is wrong with it, it is not whole
        return False
    return True


def _first_line(error: Exception) -> str:
    # torch's own message advises running what is in the file
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged or holds more than tensors and plain data, and nothing in it was run"
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
