"""How glibc, the C library of most Linux systems, deals with memory that is freed."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep the memory that tensors on the CPU free, for the next ones.

    By itself glibc gives large blocks back to Linux when they are freed, and gets them anew, page by page and zeroed: on a CPU that is up to a
    fifth of the time of a meta-gradient (benchmarks/README.md). Call it first; the command ``lightning-maml`` does. The process then holds
    to its end what it needed once. It does nothing on other systems, nor where the environment has settings
    for glibc's allocator (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(threshold, _MOST)
