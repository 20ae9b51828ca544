"""Files of torch.save that nobody vouches for ask for no more memory than they have bytes."""

import os
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
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl") and _is_stored(entry)]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeDecodeError,
        RuntimeError,
        EOFError,
    ) as error:  # as zipfile raises on damaged ones
        raise ValueError(f"it is no archive of torch.save: {error}") from error
    if not all(map(_is_stored, entries)) or sum(entry.file_size for entry in entries) > os.path.getsize(file):
        raise ValueError("it is compressed, as torch.save makes none")
    if any(b"bytearray" in content for content in pickles):
        raise ValueError("it asks for bytes of its own, as torch.save does for none of ours")


def _is_stored(entry: zipfile.ZipInfo) -> bool:
    return entry.compress_type == zipfile.ZIP_STORED
