"""Cutting time into buckets as the analytics endpoints do (official SDK)."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from zoneinfo import ZoneInfo

from worker.dev.simulator.usage import DAY_S

HOUR_S: Final = 3_600
WEEK_S: Final = 7 * DAY_S
# 1970-01-05, the first Monday of the epoch.
MONDAY_S: Final = 4 * DAY_S

Bucketer = Callable[[int], int]


def bucketer(interval_s: int, zone: str) -> Bucketer:
    """Give the function from a Unix second to the first second of its bucket.

    Week multiples start on a local Monday, other whole-day multiples at local midnight, whole hours up to a
    day on local hours counted from midnight; every other size is anchored in UTC.
    """
    anchor = MONDAY_S if interval_s % WEEK_S == 0 else 0
    if zone == "UTC":
        return lambda at: (at - anchor) // interval_s * interval_s + anchor
    local = ZoneInfo(zone)
    by_day = interval_s % DAY_S == 0
    if not by_day and (interval_s % HOUR_S or interval_s > DAY_S):
        return bucketer(interval_s, "UTC")

    def start(at: int) -> int:
        wall = datetime.fromtimestamp(at, local).replace(tzinfo=UTC)
        seconds = int(wall.timestamp())
        if by_day:
            floor = (seconds - anchor) // interval_s * interval_s + anchor
        else:
            midnight = seconds // DAY_S * DAY_S
            floor = midnight + (seconds - midnight) // interval_s * interval_s
        return int(datetime.fromtimestamp(floor, UTC).replace(tzinfo=local).timestamp())

    return start


def starts(first_s: int, last_s: int, interval_s: int, start: Bucketer) -> list[int]:
    """List the starts of all buckets that hold some second from first to last, both included."""
    found = []
    at = start(first_s)
    while at <= last_s:
        found.append(at)
        # A local bucket may be an hour longer than the interval; half a bucket further on it is over.
        following = start(at + interval_s)
        at = following if following > at else start(at + interval_s + interval_s // 2)
    return found
