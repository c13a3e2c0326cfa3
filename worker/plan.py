"""Plans: which parts a run has, when a connector is due, what of a connector may be sent now. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from schemas.connectors import DIRECTORY, USAGE, Access, Dataset, RunKind, Status, StatusReason
from worker.elevenlabs.asking import Window

PLAN_RECHECK = timedelta(days=1)
RECONCILE_DAYS = 30
LANES = (1, 2)
"""A connector's places for a request in flight: the provider's other traffic is never displaced by more."""
POLLS_PER_MESSAGE, BULK_PER_MESSAGE = 25, 4
"""How many connectors' parts travel in one message. Of backfills and reconciles more would save little, and all their
answers are in memory at once; of a poll the message, its claim and its end are a good part of the cost."""
_PRIORITY = {RunKind.POLL: 0, RunKind.RECONCILE: 1, RunKind.BACKFILL: 2}


@dataclass(frozen=True, slots=True)
class Calendar:
    """How far back usage is asked for; all in whole UTC days.

    A part is of at most `part_days`; its requests of at most `window_days`.
    """

    lookback_days: int = 3
    backfill_days: int = 90
    window_days: int = 30
    part_days: int = 90


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One dataset, for usage one window of whole UTC days `[start, end)`."""

    dataset: Dataset
    start: date | None = None
    end: date | None = None


@dataclass(frozen=True, slots=True)
class AccessRow:
    """What is known of a connector's access to one dataset."""

    dataset: Dataset
    state: Access = Access.UNKNOWN
    reason: str | None = None
    missing_permission: str | None = None
    checked_at: datetime | None = None


def settled_before(as_of: datetime, calendar: Calendar) -> date:
    """Give the first day that is still inside the look-back; earlier days are settled."""
    return as_of.astimezone(UTC).date() - timedelta(days=calendar.lookback_days)


def plan(
    kind: RunKind, status: Status, access: Mapping[Dataset, AccessRow], *, as_of: datetime, calendar: Calendar
) -> list[PlannedPart]:
    """List the parts of a run, in the order they are wanted (newest usage first).

    It depends on the run's own `as_of`, never on the clock, so planning again gives the same parts. A
    disconnected connector is only probed. A dataset outside the customer's plan is asked again after a day; if
    that is all of them, the workspace is asked, since a run without parts would never end.
    """
    if status is Status.DISCONNECTED:
        return [PlannedPart(Dataset.WORKSPACE)]
    wanted = [d for d in (*DIRECTORY, *USAGE) if _worth_asking(access.get(d), as_of)] or [Dataset.WORKSPACE]
    parts = [PlannedPart(d) for d in wanted if not d.dimension]
    for window in windows(kind, as_of=as_of, calendar=calendar):
        parts += [PlannedPart(d, window.start, window.end) for d in wanted if d.dimension]
    return parts


def _worth_asking(row: AccessRow | None, as_of: datetime) -> bool:
    if row is None or row.checked_at is None or row.state is Access.GRANTED:
        return True
    rarely = row.state is Access.UNAVAILABLE or row.reason == StatusReason.PLAN_TOO_LOW
    return not rarely or as_of - row.checked_at >= PLAN_RECHECK


def windows(kind: RunKind, *, as_of: datetime, calendar: Calendar) -> list[Window]:
    """Cut the usage days a run asks for into windows, newest first; the last day is today."""
    end = as_of.astimezone(UTC).date() + timedelta(days=1)
    days = {
        RunKind.POLL: calendar.lookback_days + 1,
        RunKind.RECONCILE: max(RECONCILE_DAYS, calendar.lookback_days + 1),
        RunKind.BACKFILL: calendar.backfill_days,
    }[kind]
    return list(Window(end - timedelta(days=days), end).backwards(calendar.part_days))


def phase_s(connector_id: UUID, interval_s: int) -> int:
    """Spread connectors evenly over the interval, each always at its own place."""
    return zlib.crc32(connector_id.bytes) % interval_s


def next_due(connector_id: UUID, interval_s: int, *, now: datetime) -> datetime:
    """Give the connector's next place in the interval after `now`."""
    at, phase = int(now.timestamp()), phase_s(connector_id, interval_s)
    return datetime.fromtimestamp(at + 1 + (phase - at - 1) % interval_s, UTC)


def next_probe(probes: int, *, now: datetime, interval_s: int, jitter: float) -> datetime:
    """Give the next re-probe of a disconnected key: hourly at first, doubling to daily; `jitter` is 0..1."""
    wait_s = min(interval_s * 2 ** min(probes, 5), 86_400)
    return now + timedelta(seconds=wait_s * (0.9 + 0.2 * jitter))


def partition_of(connector_id: UUID, partitions: int) -> int:
    """Map a connector to its stream, always the same."""
    return zlib.crc32(connector_id.bytes) % partitions


@dataclass(frozen=True, slots=True)
class OpenPart:
    """An unfinished part, as the ledger holds it. `asking`: it holds `lane`; `applying`: published."""

    id: UUID
    run_id: UUID
    kind: RunKind
    dataset: Dataset
    start: date | None
    not_before: datetime
    lane: int | None
    asking: bool
    applying: bool


@dataclass(frozen=True, slots=True)
class Sending:
    """Parts of one connector that travel together, each with the lane it will hold."""

    connector_id: UUID
    kind: RunKind
    lanes: Mapping[UUID, int]
    datasets: tuple[Dataset, ...]


def pick(connector_id: UUID, parts: Sequence[OpenPart], *, now: datetime, allow_bulk: bool) -> Sending | None:
    """Choose what of a connector is sent now: parts of one run, one of a dataset, over the free lanes.

    Polls come before reconciles before backfills, so a poll waits for one part at most. Nothing is sent of a
    dataset that has an observation under way. `allow_bulk` False: no room for backfills and reconciles.
    """
    busy = {p.lane for p in parts if p.asking}
    free = [lane for lane in LANES if lane not in busy]
    if not free:
        return None
    open_datasets = {p.dataset for p in parts if p.asking or p.applying}
    ready = [
        p
        for p in parts
        if not p.asking
        and not p.applying
        and p.not_before <= now
        and p.dataset not in open_datasets
        and (allow_bulk or p.kind is RunKind.POLL)
    ]
    if not ready:
        return None
    kind = min((p.kind for p in ready), key=_PRIORITY.__getitem__)
    return _spread(connector_id, kind, _one_each(p for p in ready if p.kind is kind), free)


def messages(sendings: Iterable[Sending]) -> list[list[Sending]]:
    """Group what travels together: a message costs the same whatever it carries, and its connectors are asked at once.

    Polls never share a message with backfills and reconciles.
    """
    polls: list[Sending] = []
    bulk: list[Sending] = []
    for sending in sendings:
        (polls if sending.kind is RunKind.POLL else bulk).append(sending)
    return [
        some[at : at + most]
        for some, most in ((polls, POLLS_PER_MESSAGE), (bulk, BULK_PER_MESSAGE))
        for at in range(0, len(some), most)
    ]


def _one_each(parts: Iterable[OpenPart]) -> list[OpenPart]:
    newest: dict[Dataset, OpenPart] = {}
    for part in parts:
        known = newest.get(part.dataset)
        if known is None or (part.start or date.min) > (known.start or date.min):
            newest[part.dataset] = part
    order = list(Dataset)
    return sorted(newest.values(), key=lambda p: order.index(p.dataset))


def _spread(connector_id: UUID, kind: RunKind, parts: Sequence[OpenPart], free: Sequence[int]) -> Sending:
    lanes = {
        part.id: free[(1 if part.dataset.dimension else 0) % len(free)]
        if any(not p.dataset.dimension for p in parts)
        else free[i % len(free)]
        for i, part in enumerate(parts)
    }
    return Sending(connector_id, kind, lanes, tuple(p.dataset for p in parts))
