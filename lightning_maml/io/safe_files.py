"""Files of torch.save, safely read and written.

Untrusted ones are checked before they are read, and ours are written whole or not at all.
"""

import contextlib
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PART = ".lightning_maml-part"


def check_archive(file: Path) -> None:
    """Check a file before ``torch.load(weights_only=True)`` reads it.

    That runs nothing in the file, but unpacks and allocates whatever the file asks for.

    Args:
        file: The file.

    Raises:
        ValueError: If it is not an archive as torch.save has made them since 1.6, if it is
            compressed, which these never are, or if it asks for a bytearray: either of the last two
            can turn a few kilobytes into gigabytes.
        OSError: If it cannot be read.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_maml.io.safe_files import check_archive
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "notes.txt"
        ...     _ = path.write_text("hello")
        ...     try:
        ...         check_archive(path)
        ...     except ValueError as error:
        ...         print(error)
        it is no archive of torch.save: File is not a zip file
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive, os.path.getsize(file))
    # what zipfile raises on damaged files
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeDecodeError,
        RuntimeError,
        EOFError,
    ) as error:
        raise ValueError(f"it is no archive of torch.save: {error}") from error


def _check_entries(archive: zipfile.ZipFile, file_size: int) -> None:
    entries = archive.infolist()
    # with something in front of the archive, torch would look for its parts elsewhere than zipfile
    if not entries or min(entry.header_offset for entry in entries) > 0:
        raise ValueError("it is no archive of torch.save")
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    # entries that overlap unpack to more than there is
    if not is_stored or sum(entry.file_size for entry in entries) > file_size:
        raise ValueError("it is compressed, as torch.save makes none")
    for entry in entries:
        is_pickle = entry.filename.lower().endswith(".pkl")
        if is_pickle and b"bytearray" in archive.read(entry):
            raise ValueError("it asks for bytes of its own, as torch.save does for none of ours")


@contextlib.contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` once all of it is on the disk.

    If writing it fails, ``path`` is left as it was.

    Args:
        path: The file to be written.
        writer: A name unique to this process, needed if several may write to ``path`` at once; by
            default only this one does.

    Raises:
        OSError: If it cannot be written.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_maml.io.safe_files import whole_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "greeting.txt"
        ...     with whole_file(path) as file:
        ...         _ = file.write(b"hello")
        ...     print(path.read_text())
        hello
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
    """Remove the partial files of killed processes: those not written to for an hour."""
    for part in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):  # another process may have been quicker
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
