"""Files of torch.save: untrusted ones are checked before they are read, and ours are written whole or not at all."""

import contextlib
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PART = ".lightning_maml-part"


def check_archive(file: Path) -> None:
    """Check a file before ``torch.load(weights_only=True)``, which runs nothing in it but unpacks and allocates whatever it asks for.

    Raises:
        ValueError: If it is not an archive as torch.save has made them since 1.6, if it is
            compressed, which these never are, or if it asks for a bytearray: either of the last two
            can turn a few kilobytes into gigabytes.
        OSError: If it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch would look elsewhere for its parts
            if not entries or min(entry.header_offset for entry in entries) > 0:
                raise ValueError("it is no archive of torch.save")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > os.path.getsize(file):
                raise ValueError("it is compressed, as torch.save makes none")
            if any(
                b"bytearray" in archive.read(entry)
                for entry in entries
                if entry.filename.lower().endswith(".pkl")
            ):
                raise ValueError(
                    "it asks for bytes of its own, as torch.save does for none of ours"
                )
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeDecodeError,
        RuntimeError,
        EOFError,
    ) as error:  # what zipfile raises on damaged files
        raise ValueError(f"it is no archive of torch.save: {error}") from error


@contextlib.contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` once all of it is on the disk; if writing it fails, ``path`` is left as it was.

    Args:
        path: The file to be written.
        writer: A name unique to this process, needed if several may write to ``path`` at once; by
            default only this one does.

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
    """Remove partial files that killed processes left behind: those to which nothing was written for an hour."""
    for part in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):  # another process may have been quicker
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
