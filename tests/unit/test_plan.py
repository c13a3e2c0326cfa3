"""Plans: what a run asks for, when a connector is due, what is sent next."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.connectors import DIRECTORY, USAGE, Access, Dataset, RunKind, Status, StatusReason
from schemas.messages import Fetch
from worker.plan import (
    BULK_PER_MESSAGE,
    LANES,
    POLLS_PER_MESSAGE,
    RECONCILE_DAYS,
    AccessRow,
    Calendar,
    OpenPart,
    PlannedPart,
    Sending,
    messages,
    next_due,
    next_probe,
    partition_of,
    phase_s,
    pick,
    plan,
    settled_before,
    windows,
)

NOW = datetime(2026, 4, 10, 12, 30, tzinfo=UTC)
TODAY = NOW.date()
CONNECTOR = UUID(int=7)
DAY = timedelta(days=1)
KINDS = st.sampled_from(RunKind)
TIMES = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone stands beside
CALENDARS = st.builds(Calendar, st.integers(1, 10), st.integers(1, 120), st.integers(1, 30), st.integers(1, 120))
ORDER = [RunKind.POLL, RunKind.RECONCILE, RunKind.BACKFILL]


def open_part(
    number: int, dataset: Dataset = Dataset.MEMBERS, kind: RunKind = RunKind.POLL, **more: object
) -> OpenPart:
    facts: dict[str, object] = {"start": None, "not_before": NOW, "lane": None, "asking": False, "applying": False}
    return OpenPart(UUID(int=number), UUID(int=99), kind, dataset, **(facts | more))  # type: ignore[arg-type] # by name


@st.composite
def open_parts(draw: st.DrawFn) -> list[OpenPart]:
    """Parts of a connector as a ledger may hold them: a part that is asked holds a lane."""
    found = []
    for number in range(draw(st.integers(0, 12))):
        dataset, asking = draw(st.sampled_from(Dataset)), draw(st.booleans()) and draw(st.booleans())
        found.append(
            open_part(
                number,
                dataset,
                draw(KINDS),
                start=TODAY - draw(st.integers(0, 3)) * DAY if dataset.dimension else None,
                not_before=NOW + draw(st.sampled_from([-1, 0, 1])) * DAY,
                lane=draw(st.sampled_from(LANES)) if asking else None,
                asking=asking,
                applying=draw(st.booleans()) and draw(st.booleans()),
            )
        )
    return found


@given(open_parts(), st.booleans())
def test_no_more_than_two_requests_are_in_flight(parts: list[OpenPart], allow_bulk: bool) -> None:
    """What is sent holds only lanes that nobody holds, of two."""
    sending = pick(CONNECTOR, parts, now=NOW, allow_bulk=allow_bulk)
    if sending is not None:
        assert set(sending.lanes.values()) <= set(LANES) - {part.lane for part in parts if part.asking}
        assert len(LANES) == 2


@given(open_parts(), st.booleans())
def test_a_dataset_is_observed_once_at_a_time(parts: list[OpenPart], allow_bulk: bool) -> None:
    """Never two parts of one dataset, neither in a message nor beside one under way."""
    sending = pick(CONNECTOR, parts, now=NOW, allow_bulk=allow_bulk)
    if sending is not None:
        by_id = {part.id: part for part in parts}
        sent = [by_id[part_id] for part_id in sending.lanes]
        assert sending.datasets == tuple(part.dataset for part in sent)
        under_way = [part.dataset for part in parts if part.asking or part.applying]
        assert max(Counter([*{*under_way}, *sending.datasets]).values()) == 1
        assert all(part.not_before <= NOW and not part.asking and not part.applying for part in sent)


@given(open_parts(), st.booleans())
def test_polls_go_first(parts: list[OpenPart], allow_bulk: bool) -> None:
    """A message has parts of one kind, and no part of an earlier kind could have gone; without room only polls."""
    sending = pick(CONNECTOR, parts, now=NOW, allow_bulk=allow_bulk)
    busy = {part.dataset for part in parts if part.asking or part.applying}
    ready = [part for part in parts if part.dataset not in busy and part.not_before <= NOW]
    kinds = [kind for kind in (ORDER if allow_bulk else ORDER[:1]) if any(part.kind is kind for part in ready)]
    full = {part.lane for part in parts if part.asking} >= set(LANES)
    if not kinds or full:
        assert sending is None
    else:
        assert sending is not None
        assert sending.kind is kinds[0]
        assert {part.kind for part in parts if part.id in sending.lanes} == {kinds[0]}


@given(st.lists(st.sampled_from(RunKind)))
@example([RunKind.POLL] * (POLLS_PER_MESSAGE + 1))
def test_connectors_share_messages(kinds: list[RunKind]) -> None:
    """Everybody travels once, in order; polls never beside others; full messages; and the largest is a valid one."""
    lanes = [{UUID(int=1_000 * n + place): 1 for place in range(len(Dataset))} for n in range(len(kinds))]
    sent = [Sending(UUID(int=n), kind, lanes[n], tuple(Dataset)) for n, kind in enumerate(kinds)]
    found = messages(sent)
    for polls in (True, False):
        mine = [message for message in found if (message[0].kind is RunKind.POLL) is polls]
        assert [s for message in mine for s in message] == [s for s in sent if (s.kind is RunKind.POLL) is polls]
        assert all(len(message) == (POLLS_PER_MESSAGE if polls else BULK_PER_MESSAGE) for message in mine[:-1])
    for message in found:
        Fetch(part_ids=[part_id for sending in message for part_id in sending.lanes])


@given(open_parts())
def test_every_dataset_that_may_go_goes(parts: list[OpenPart]) -> None:
    """A message takes one part of each dataset of its kind, of usage the newest window."""
    sending = pick(CONNECTOR, parts, now=NOW, allow_bulk=True)
    if sending is not None:
        busy = {part.dataset for part in parts if part.asking or part.applying}
        ready = [p for p in parts if p.kind is sending.kind and p.dataset not in busy and p.not_before <= NOW]
        assert set(sending.datasets) == {part.dataset for part in ready}
        for part in parts:
            if part.id in sending.lanes and part.start is not None:
                assert part.start == max(p.start for p in ready if p.dataset is part.dataset and p.start)


def test_directory_and_usage_go_side_by_side() -> None:
    """A poll's cheap directory requests share one lane, its usage requests the other."""
    parts = [open_part(n, dataset) for n, dataset in enumerate(Dataset)]
    sending = pick(CONNECTOR, parts, now=NOW, allow_bulk=True)
    assert sending is not None
    lanes = {dataset: sending.lanes[UUID(int=n)] for n, dataset in enumerate(Dataset)}
    assert {lanes[d] for d in DIRECTORY} == {1}
    assert {lanes[d] for d in USAGE} == {2}


@given(KINDS, TIMES, CALENDARS)
def test_windows_cover_their_days_once(kind: RunKind, as_of: datetime, calendar: Calendar) -> None:
    """Whole days, each once, at most `part_days` in a window, newest first, today included."""
    found = [(window.start, window.end) for window in windows(kind, as_of=as_of, calendar=calendar)]
    days = [start + n * DAY for start, end in found for n in range((end - start).days)]
    wanted = {
        RunKind.POLL: calendar.lookback_days + 1,
        RunKind.RECONCILE: max(RECONCILE_DAYS, calendar.lookback_days + 1),
        RunKind.BACKFILL: calendar.backfill_days,
    }[kind]
    assert sorted(days) == [as_of.date() - n * DAY for n in range(wanted - 1, -1, -1)]
    assert all(0 < (end - start).days <= calendar.part_days for start, end in found)
    assert found == sorted(found, reverse=True)


@given(TIMES, CALENDARS)
def test_a_poll_asks_for_every_day_that_is_not_settled(as_of: datetime, calendar: Calendar) -> None:
    """A day is settled when no poll asks for it any more."""
    start = min(window.start for window in windows(RunKind.POLL, as_of=as_of, calendar=calendar))
    assert start == settled_before(as_of, calendar)


@given(st.uuids(), st.integers(1, 86_400), TIMES)
def test_the_next_due_time_keeps_its_phase(connector_id: UUID, interval_s: int, now: datetime) -> None:
    """It lies after now, within an interval, always at the connector's own place."""
    due = next_due(connector_id, interval_s, now=now)
    assert now < due <= now + timedelta(seconds=interval_s)
    assert int(due.timestamp()) % interval_s == phase_s(connector_id, interval_s)
    assert next_due(connector_id, interval_s, now=due) == due + timedelta(seconds=interval_s)


def test_phases_spread_connectors() -> None:
    """A thousand connectors do not come due in the same minutes of a quarter of an hour."""
    minutes = Counter(phase_s(UUID(int=n), 900) // 60 for n in range(1000))
    assert len(minutes) == 15
    assert max(minutes.values()) < 120


@given(st.integers(0, 50), st.floats(0, 1), st.integers(60, 7200))
def test_a_dead_key_is_probed_ever_less(probes: int, jitter: float, interval_s: int) -> None:
    """The wait doubles from the interval to a day, a tenth more or less."""
    wait_s = (next_probe(probes, now=NOW, interval_s=interval_s, jitter=jitter) - NOW).total_seconds()
    assert 0.9 * interval_s <= wait_s + 1e-6
    assert wait_s <= 1.1 * 86_400
    assert wait_s == pytest.approx(min(interval_s * 2 ** min(probes, 5), 86_400), rel=0.101)


@given(st.uuids(), st.integers(1, 16))
def test_a_connector_keeps_its_partition(connector_id: UUID, partitions: int) -> None:
    """One of them, always the same."""
    assert partition_of(connector_id, partitions) == partition_of(connector_id, partitions) in range(partitions)


def access(dataset: Dataset, state: Access, reason: str | None = None, *, hours: int = 1) -> dict[Dataset, AccessRow]:
    return {dataset: AccessRow(dataset, state, reason, None, NOW - timedelta(hours=hours))}


def datasets(parts: list[PlannedPart]) -> set[Dataset]:
    return {part.dataset for part in parts}


@given(KINDS, TIMES, CALENDARS)
def test_a_run_asks_for_everything(kind: RunKind, as_of: datetime, calendar: Calendar) -> None:
    """Each directory once and each usage window once per dimension; planning again gives the same parts."""
    parts = plan(kind, Status.CONNECTED, {}, as_of=as_of, calendar=calendar)
    spans = windows(kind, as_of=as_of, calendar=calendar)
    expected = [PlannedPart(d) for d in DIRECTORY] + [PlannedPart(d, s.start, s.end) for s in spans for d in USAGE]
    assert Counter(parts) == Counter(expected)
    assert parts == plan(kind, Status.CONNECTED, {}, as_of=as_of, calendar=calendar)


@given(
    KINDS,
    st.dictionaries(
        st.sampled_from(Dataset), st.tuples(st.sampled_from(Access), st.sampled_from([None, "plan_too_low"]))
    ),
)
def test_what_is_granted_changes_no_plan(kind: RunKind, known: dict[Dataset, tuple[Access, str | None]]) -> None:
    """A plan is the same without the rows of what is granted: so they need not be read."""
    rows = {d: AccessRow(d, state, reason, None, NOW) for d, (state, reason) in known.items()}
    others = {d: row for d, row in rows.items() if row.state is not Access.GRANTED}
    plans = [plan(kind, Status.CONNECTED, some, as_of=NOW, calendar=Calendar()) for some in (rows, others)]
    assert plans[0] == plans[1]


def test_a_disconnected_connector_is_only_probed() -> None:
    """One cheap request tells whether the key lives again."""
    parts = plan(RunKind.POLL, Status.DISCONNECTED, {}, as_of=NOW, calendar=Calendar())
    assert parts == [PlannedPart(Dataset.WORKSPACE)]


@pytest.mark.parametrize(
    ("state", "reason", "hours", "asked"),
    [
        (Access.GRANTED, None, 1, True),
        (Access.UNKNOWN, None, 1, True),
        (Access.DENIED, StatusReason.SCOPE_MISSING, 1, True),
        (Access.DENIED, StatusReason.ROLE_OR_IP, 1, True),
        (Access.DENIED, StatusReason.QUOTA, 1, True),
        (Access.DENIED, StatusReason.PLAN_TOO_LOW, 23, False),
        (Access.DENIED, StatusReason.PLAN_TOO_LOW, 24, True),
        (Access.UNAVAILABLE, "not_found", 23, False),
        (Access.UNAVAILABLE, "not_found", 24, True),
    ],
)
def test_what_the_plan_does_not_offer_is_asked_daily(
    state: Access, reason: str | None, hours: int, asked: bool
) -> None:
    """A missing permission may be added any minute; a plan or an absent endpoint is looked at once a day."""
    known = access(Dataset.SERVICE_ACCOUNTS, state, reason, hours=hours)
    parts = plan(RunKind.POLL, Status.DEGRADED, known, as_of=NOW, calendar=Calendar())
    assert (Dataset.SERVICE_ACCOUNTS in datasets(parts)) is asked
    assert datasets(parts) | {Dataset.SERVICE_ACCOUNTS} == set(Dataset)


def test_settled_days_are_counted_in_utc() -> None:
    """The look-back ends at a UTC midnight, wherever the clock's zone is."""
    assert settled_before(NOW, Calendar(lookback_days=3)) == date(2026, 4, 7)
