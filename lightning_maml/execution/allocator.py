"""What glibc, the C library of most Linux systems, does with freed memory."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Make this process keep the memory that CPU tensors free, and reuse it for the next ones.

    By default glibc gives large blocks back to Linux when they are freed, and gets them anew, page
    by page and zeroed: on a CPU this takes up to half of the time of a meta-gradient
    (benchmarks/README.md). Call this function before anything else, as the command
    ``lightning-maml`` does. The process then holds on to what it once needed until it ends. Blocks
    of more than 64 MB are kept in the main thread only; before glibc 2.35 no block of more than 32
    MB is kept. The function does nothing on other systems, nor if the environment has settings for
    glibc's allocator (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: 0)
    # before 2.35 glibc refuses more than 32 MB; the trim threshold alone would hold the mmap
    # threshold down
    if mallopt(_MMAP_THRESHOLD, _MOST) or mallopt(_MMAP_THRESHOLD, 2**25):
        mallopt(_TRIM_THRESHOLD, _MOST)
