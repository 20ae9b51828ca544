"""Checkpoint files that are either whole or absent."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_maml.archives import check_archive, whole_file


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, but a process that dies while writing one leaves the previous file, never half of a new one.

    Lightning first writes into the system's folder for temporary files; if that is on another file system than the checkpoints, a process
    killed while copying leaves half a file in place of a good one. The models of this package put this class in place of Lightning's
    default in a trainer.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a file beside ``path``, all of it to the disk, and then move it into place in one step.

        Raises:
            OSError: If it cannot be written; a file that was there before is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError if the disk is full
            raise OSError(
                f"Expected to write the checkpoint {path} but it cannot be written: {_first_line(error)}; "
                "make room and go on from the last checkpoint, which is as it was."
            ) from error

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint, without running anything in it unless ``weights_only=False``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not whole; the message names the newest whole one beside it.
        """
        return read_checkpoint(path, map_location, weights_only is None or weights_only)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path``, see :meth:`WholeCheckpoints.load_checkpoint`."""
    try:
        if weights_only and "://" not in str(path) and Path(path).is_file():
            check_archive(Path(path))
        checkpoint: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it holds {type(checkpoint).__name__}")  # noqa: TRY004  it is the file that is wrong
    except FileNotFoundError:
        raise
    except Exception as error:
        before = _newest_whole(Path(path))
        cure = f"go on from {before}, the newest whole one beside it" if before else "there is no whole one beside it"
        raise ValueError(f"Expected {path} to be a whole checkpoint but it cannot be read: {_first_line(error)}; {cure}.") from error
    return checkpoint


def _newest_whole(path: Path) -> Path | None:
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime_ns, reverse=True)
    return next((other for other in others if other.name != path.name and _is_whole(other)), None)


def _is_whole(path: Path) -> bool:
    try:
        check_archive(path)
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001 # whatever is wrong with it, it is not whole
        return False
    return True


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # whose message advises running what is in the file
        return "it is damaged or holds more than tensors and plain data, and nothing in it was run"
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
