"""The C library's allocator, set for a program that frees and allocates the same large blocks over and over."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LIMIT = 1 << 30


def keep_pages() -> bool:
    """Let glibc keep freed memory instead of giving it back to the kernel.

    By default a block of more than some megabytes is mapped when allocated and unmapped when freed, so each step of
    training on a CPU pays for zeroing the pages of its activations again: up to a tenth of a small network's step.

    Returns:
        Whether it took effect; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LIMIT)) and bool(mallopt(M_TRIM_THRESHOLD, LIMIT))
