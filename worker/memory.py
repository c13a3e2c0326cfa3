"""Memory, set for processes that decode much and keep little."""

from __future__ import annotations

import ctypes
import gc

YOUNG, MIDDLE, OLD = 50_000, 20, 50

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (its malloc.h)."""
_MiB = 1024 * 1024


def settle() -> None:
    """Leave what was imported out of every collection, collect the young ones less often, and keep freed memory.

    Decoding makes many containers that die by reference count; a fifth of its time went to the collector. And a
    tenth of the worker's went into getting the same pages from the system again and again: by default glibc maps
    each buffer above 128 KiB anew, and gives the end of its heap back. Another libc is left as it is.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 4 * _MiB)
        mallopt(_TRIM_THRESHOLD, 16 * _MiB)
        mallopt(_TOP_PAD, 4 * _MiB)
