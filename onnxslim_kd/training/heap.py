"""The memory that a step frees, kept for the next one."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""The names that mallopt has for them."""
LARGEST = 2**25
"""Bytes of a block up to which the heap may serve it; glibc takes no more."""


def keep_freed_memory() -> None:
    """Let this process keep what it frees, from now on.

    glibc gives free memory at the end of the heap back to the system, and the next step gets it
    anew, page by page and zeroed: up to a tenth of the time of a step. What is allocated before
    the call may still stand apart from the heap, and leaves no holes there. Other C libraries
    have no such setting; with them nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
