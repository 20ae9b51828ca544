"""Files of torch.save that nobody vouches for, and parts of files that processes left."""

import contextlib
import os
import time
import zipfile
from pathlib import Path


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


def remove_abandoned(parts: Path) -> None:
    """Remove the parts of files that killed processes left, those to which nothing was written for an hour; ``parts`` ends in a pattern."""
    for part in parts.parent.glob(parts.name):
        with contextlib.suppress(OSError):  # another process may be as quick
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
