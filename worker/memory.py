"""The garbage collector, set for processes that decode much and keep little."""

from __future__ import annotations

import gc

YOUNG, MIDDLE, OLD = 50_000, 20, 50


def settle() -> None:
    """Leave what was imported out of every collection, and collect the young ones less often.

    Decoding makes many containers that die by reference count; a fifth of its time went to the collector.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
