"""Entries: an observation goes to the stream in pieces and comes back whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import Dataset
from schemas.events import MAX_BATCH, CloudEvent, Op, RecordChange, UsageDayChange
from worker.changes import Change
from worker.entries import Entry, Observation, Report, assemble, batches
from worker.usage import usage_day

BEGAN = datetime(2026, 4, 10, 12, tzinfo=UTC)
CONNECTOR, PART, RUN = UUID(int=1), UUID(int=2), UUID(int=3)
COUNTS = st.sampled_from([0, 1, MAX_BATCH - 1, MAX_BATCH, MAX_BATCH + 1, 2 * MAX_BATCH + 1])
ANNOUNCEMENT = {b"ce": b"[]"}


def member(n: int) -> dict[str, Any]:
    return {
        "user_id": f"u{n}",
        "email": "ana@example.com",
        "first_name": None,
        "seat_type": None,
        "is_owner": n == 0,
        "is_locked": False,
    }


def written(count: int, *, sequence: int = 9, held: dict[str, tuple[int, str]] | None = None) -> list[Entry]:
    """Write an observation of so many new members; the stream numbers its entries."""
    changes = [Change(f"member/u{n}", Op.CREATED, None, member(n), ()) for n in range(count)]
    report = Report(run_id=RUN, records=count, changes=count, known=5, held=held or {}, incomplete=None)
    return numbered(batches_of(changes, report, sequence), sequence * 100)


def batches_of(changes: Sequence[Change], report: Report, sequence: int = 9) -> list[Entry]:
    return batches(
        changes,
        tenant_id="acme",
        connector_id=CONNECTOR,
        dataset=Dataset.MEMBERS,
        base=4,
        sequence=sequence,
        part_id=PART,
        began=BEGAN,
        report=report,
    )


def numbered(entries: Sequence[Entry], first: int) -> list[Entry]:
    return [Entry(entry.fields, f"{first + n}-0") for n, entry in enumerate(entries)]


def ids(entries: Sequence[Entry]) -> list[str]:
    return [entry.id for entry in entries]


def subjects(observation: Observation) -> list[str]:
    return [event.subject for event in observation.records]


@given(COUNTS)
def test_an_observation_comes_back_whole(count: int) -> None:
    """What was written is read again, whatever its size, with the entries it came in."""
    entries = written(count, held={"member/x": (2, "run")})
    reading = assemble(entries)
    (found,) = reading.whole
    assert (found.connector_id, found.dataset, found.part_id) == (CONNECTOR, Dataset.MEMBERS, PART)
    assert (found.base, found.sequence) == (4, 9)
    assert (found.report.records, found.report.known, found.report.held) == (count, 5, {"member/x": (2, "run")})
    assert subjects(found) == [f"member/u{n}" for n in range(count)]
    assert list(found.entries) == entries
    assert (reading.broken, reading.passed, reading.tail) == ([], [], [])


@given(COUNTS)
def test_an_entry_holds_at_most_one_batch(count: int) -> None:
    """Up to 500 events stand in an entry; all name their place in the chain, only the last one the part."""
    entries = written(count)
    sizes = [len(orjson.loads(entry.fields[b"ce"])) for entry in entries]
    assert sum(sizes) == count
    assert all(size == MAX_BATCH for size in sizes[:-1])
    assert len(entries) == max(1, -(-count // MAX_BATCH))
    assert all(entry.fields[b"base"] == b"4" and entry.fields[b"sequence"] == b"9" for entry in entries)
    assert [b"part" in entry.fields for entry in entries] == [False] * (len(entries) - 1) + [True]


def test_an_event_is_a_cloud_event_of_its_subject() -> None:
    """Its id is deterministic and its sequence sorts as text."""
    (entry,) = written(1)
    (event,) = orjson.loads(entry.fields[b"ce"])
    read = CloudEvent.model_validate(event)
    assert (read.id, read.subject) == ("member/u0@00000000000000000009", "member/u0")
    assert read.type == "io.rollcall.elevenlabs.member.changed.v1"
    assert (read.source, read.tenantid) == (f"/tenants/acme/connectors/{CONNECTOR}", "acme")
    assert (read.partitionkey, read.connectorid) == (str(CONNECTOR), str(CONNECTOR))
    assert (read.correlationid, read.time) == (str(RUN), BEGAN)
    assert RecordChange.model_validate(read.data).op is Op.CREATED
    assert written(1)[0] == entry


def test_an_update_tells_both_states_and_a_usage_day_the_whole_day() -> None:
    """`data` of a record has before, after and changed; that of a day is the day itself."""
    day = usage_day(
        "product", "2026-04-01", [{"key": "tts", "label": None, "unit": "credits", "amount": "5"}], settled=True
    )
    changes = [
        Change("member/u1", Op.UPDATED, member(1), member(1) | {"is_locked": True}, ("is_locked",)),
        Change("usage/product/2026-04-01", Op.UPDATED, None, day, ()),
    ]
    (entry,) = batches_of(changes, Report(run_id=RUN, records=2, changes=2))
    first, second = orjson.loads(entry.fields[b"ce"])
    assert first["data"]["changed"] == ["is_locked"]
    assert (first["data"]["before"]["is_locked"], first["data"]["after"]["is_locked"]) == (False, True)
    assert second["type"] == "io.rollcall.elevenlabs.usage_day.changed.v1"
    assert second["data"] == {"op": "u", **day}
    assert UsageDayChange.model_validate(second["data"]).settled


@given(st.data())
def test_it_does_not_matter_how_the_stream_is_cut_into_reads(data: st.DataObject) -> None:
    """A tail that is carried on gives the same observations as one read."""
    stream = [
        *written(2 * MAX_BATCH + 1, sequence=7),
        *numbered([Entry(ANNOUNCEMENT)], 5),
        *written(0),
        *written(501, sequence=11),
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    found: list[Observation] = []
    tail: list[Entry] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reading = assemble([*tail, *stream[start:end]])
        found, tail = [*found, *reading.whole], reading.tail
    assert [one.sequence for one in found] == [7, 9, 11]
    assert [one.changes for one in found] == [1001, 0, 501]
    assert tail == []


def test_announcements_need_nothing() -> None:
    """They are passed, even between the pieces of an observation."""
    first, last = written(MAX_BATCH + 1)
    reading = assemble([first, Entry(ANNOUNCEMENT, "950-0"), last])
    assert reading.passed == ["950-0"]
    assert len(reading.whole) == 1


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_observation_with_a_lost_piece_is_not_applied(lost: int) -> None:
    """Another reader took a piece, or the stream lost it: the rest says nothing, and neighbours stay whole."""
    pieces = written(2 * MAX_BATCH + 1)
    torn = [piece for n, piece in enumerate(pieces) if n != lost]
    reading = assemble([*torn, *written(1, sequence=11)])
    assert [one.sequence for one in reading.whole] == [11]
    assert reading.passed == ids(torn)
    assert (reading.broken, reading.tail) == ([], [])


@pytest.mark.parametrize("repeated", [0, 1])
def test_a_piece_that_comes_twice_counts_once(repeated: int) -> None:
    """A stream that was rolled back between two reads shows a piece again."""
    pieces = written(2 * MAX_BATCH + 1)
    (found,) = assemble([*pieces[: repeated + 1], *pieces]).whole
    assert found.changes == len({*subjects(found)}) == 2 * MAX_BATCH + 1


def test_a_repeated_piece_does_not_stand_in_for_a_lost_one() -> None:
    """The number of different events decides, not the number of events."""
    first, second, last = written(2 * MAX_BATCH + 1)
    assert second != first
    assert assemble([first, first, last]).whole == []


@pytest.mark.parametrize(
    "wrong",
    [
        {b"ce": b"no json"},
        {b"ce": b"{}"},
        {b"ce": b"[1]"},
        {b"ce": b"[{}]"},
        {b"base": b"x"},
        {b"report": b"{}"},
        {b"connector": b"nobody"},
        {b"dataset": b"weather"},
        {b"part": b"7"},
    ],
    ids=repr,
)
def test_what_cannot_be_read_is_set_aside_alone(wrong: dict[bytes, bytes]) -> None:
    """A broken observation is told with its entries and a reason that quotes nothing; its neighbours are read."""
    (entry,) = written(1)
    broken = Entry({**entry.fields, **wrong}, entry.id)
    reading = assemble([*written(1, sequence=7), broken, *written(1, sequence=11)])
    assert [one.sequence for one in reading.whole] == [7, 11]
    assert [one.entries for one in reading.broken] == [(broken,)]
    assert reading.broken[0].reason in {"DecodeError", "TypeError", "KeyError", "ValueError", "ValidationError"}


@pytest.mark.parametrize(
    ("dataset", "data"),
    [
        (Dataset.MEMBERS, {}),
        (Dataset.MEMBERS, {"op": "c", "after": 3}),
        (Dataset.USAGE_MEMBER, {"op": "c", "after": None}),
        (Dataset.USAGE_MEMBER, {"op": "u", "dimension": "member", "bucket_start": "2026-04-01", "settled": True}),
    ],
    ids=repr,
)
def test_an_event_of_another_shape_breaks_its_observation(dataset: Dataset, data: dict[str, Any]) -> None:
    """Its part is known, so that it can be given up: nobody applies it, and its neighbours are whole."""
    (entry,) = written(1)
    ce = orjson.dumps([{"id": "x@9", "subject": "x", "data": data}])
    broken = Entry({**entry.fields, b"ce": ce, b"dataset": dataset.encode()}, entry.id)
    reading = assemble([*written(1, sequence=7), broken])
    assert [(one.sequence, one.broken) for one in reading.whole] == [(7, False), (9, True)]
    assert reading.whole[1].part_id == PART


def test_an_unknown_field_changes_nothing() -> None:
    """A newer version may say more."""
    (entry,) = written(1)
    report = orjson.dumps(orjson.loads(entry.fields[b"report"]) | {"mood": "good"})
    assert len(assemble([Entry({**entry.fields, b"report": report, b"more": b"x"}, "1-0")]).whole) == 1
