"""The C library's allocator, set for a program that frees and allocates the same large blocks over and over."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
TRAINING, DRAWING = 1 << 30, 1 << 25
"""Largest blocks kept, in bytes. Drawing keeps those of the denoiser; the maps of an autoencoder at full resolution are
few, large and of many sizes: kept, they would leave gaps and take almost twice the memory that is in use."""


def keep_pages(limit: int = TRAINING) -> bool:
    """Let glibc keep freed blocks of up to `limit` bytes instead of giving them back to the kernel.

    By default a block of more than some megabytes is mapped when allocated and unmapped when freed, so each step of
    training on a CPU pays for zeroing the pages of its activations again: up to a tenth of a small network's step. The
    free end of the heap is kept up to TRAINING bytes, whatever `limit` is; `give_back` returns it.

    Returns:
        Whether it took effect; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, limit)) and bool(mallopt(M_TRIM_THRESHOLD, TRAINING))


def one_arena() -> None:
    """All threads allocate where the main thread does, so that `keep_pages` holds for those that start from now on;
    glibc gives each an arena of its own, whose blocks end at 64 MiB. Without effect where the C library is another."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Return the pages of freed blocks to the kernel, those between blocks in use too; without effect where the C
    library is no glibc. It takes milliseconds, and the pages are zeroed when they are next allocated."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
