"""Files of torch.save: those that nobody vouches for are checked, those that are written are whole or not there."""

import contextlib
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PART = ".lightning_maml-part"


def check_archive(file: Path) -> None:
    """Check a file before ``torch.load(weights_only=True)``, which runs nothing in it but unpacks and allocates whatever it says.

    Raises:
        ValueError: If it is not an archive as torch.save makes them since 1.6, or compressed, as these never are, or if it asks for empty
            bytes: of a few kilobytes either makes gigabytes.
        OSError: If it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if not entries or min(entry.header_offset for entry in entries) > 0:  # torch would look for its parts in other places
                raise ValueError("it is no archive of torch.save")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > os.path.getsize(file):
                raise ValueError("it is compressed, as torch.save makes none")
            if any(b"bytearray" in archive.read(entry) for entry in entries if entry.filename.lower().endswith(".pkl")):
                raise ValueError("it asks for bytes of its own, as torch.save does for none of ours")
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeDecodeError,
        RuntimeError,
        EOFError,
    ) as error:  # as zipfile raises on damaged ones
        raise ValueError(f"it is no archive of torch.save: {error}") from error


@contextlib.contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Give a file that takes the place of ``path`` when all of it is on the disk; where that fails, ``path`` is left as it was.

    Args:
        path: The file to be.
        writer: A name of this process alone, where several may write to ``path`` at once; by default none does.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    part = path.with_name(f".{path.name}{writer}{_PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the parts of files that killed processes left, those to which nothing was written for an hour."""
    for part in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):  # another process may be as quick
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
