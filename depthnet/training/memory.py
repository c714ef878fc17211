"""How a process that does nothing but train keeps its memory."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's mallopt, malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep all memory that it frees, for what it allocates next.

    glibc gives blocks of more than 32 MiB back to the system, and a training step that gets its arrays
    anew can spend half of its time on clearing pages.  Elsewhere than with glibc this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_MAX, 0)
