"""The chain of versions: the one rule that orders observations of a dataset. Pure.

`version` is the number of the observation that Postgres holds, `claimed` the number that was drawn last.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum


class Fate(Enum):
    """What becomes of an observation that arrives at Postgres."""

    APPLY = "apply"
    SEEN = "seen"
    RETURN = "return"


def draw(claimed: int, now: datetime) -> int:
    """Draw the next number of a dataset: above every earlier one, near the time in us for people's sake."""
    return max(claimed + 1, int(now.timestamp() * 1_000_000))


def fate(*, version: int, claimed: int, base: int, sequence: int) -> Fate:
    """Decide: whole and in its place, already here, or to be fetched again."""
    if sequence <= version:
        return Fate.SEEN
    if base == version and sequence == claimed:
        return Fate.APPLY
    return Fate.RETURN


def believed(*, snapshot: int | None, version: int) -> bool:
    """Tell whether a snapshot may serve as base: only when it is of the version that Postgres holds.

    Version 0 means that nothing was ever observed: there is nothing to believe.
    """
    return snapshot is not None and snapshot == version and version > 0
