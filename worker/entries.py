"""Observations and their stream entries: changes to CloudEvents batches, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

import msgspec
import orjson
from pydantic import BaseModel, ConfigDict

from schemas.connectors import Dataset
from schemas.events import MAX_BATCH, SUBJECT_TYPES, Op, padded, source_of, timestamp
from schemas.records import Record
from worker.changes import Change

Fields: TypeAlias = Mapping[bytes, bytes]

_TEXT = {op: op.value for op in Op}
"""An enum's member is written slower than its text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stream entry; `id` is empty until the stream gave it one."""

    fields: Fields
    id: str = ""


class Report(BaseModel):
    """What an observation tells beside its events; it travels on the last entry.

    `held` is the whole new hold (empty: none), `known` the number of records in the base.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: UUID
    records: int
    changes: int
    known: int = 0
    held: dict[str, tuple[int, str]] = {}
    incomplete: str | None = None


class RecordStep(msgspec.Struct, gc=False):
    """Of a record's event what the writer reads; the rest, most of it, is skipped undecoded."""

    op: str
    after: Record | None


class UsageRow(msgspec.Struct, gc=False):
    """A row of a usage day."""

    key: str
    unit: str
    label: str | None
    amount: str


class UsageDayStep(msgspec.Struct, gc=False):
    """Of a usage day's event what the writer reads."""

    dimension: str
    bucket_start: str
    settled: bool
    rows: list[UsageRow]


class RecordEvent(msgspec.Struct, gc=False):
    """What happened to a record."""

    subject: str
    data: RecordStep


class UsageDayEvent(msgspec.Struct, gc=False):
    """What a usage day has become."""

    subject: str
    data: UsageDayStep


@dataclass(frozen=True, slots=True)
class Observation:
    """The answer of one part, whole: `base` is the version it was compared with, `sequence` its number."""

    connector_id: UUID
    dataset: Dataset
    base: int
    sequence: int
    part_id: UUID
    report: Report
    records: Sequence[RecordEvent] = ()
    days: Sequence[UsageDayEvent] = ()
    entries: Sequence[Entry] = ()
    broken: bool = False
    """It is an observation, but some event is not of the known shape: nobody can apply it."""

    @property
    def changes(self) -> int:
        """How many different events it holds: of records, or of usage days."""
        return len(self.records) + len(self.days)


def batches(
    changes: Sequence[Change],
    *,
    tenant_id: str,
    connector_id: UUID,
    dataset: Dataset,
    base: int,
    sequence: int,
    part_id: UUID,
    began: datetime,
    report: Report,
) -> list[Entry]:
    """Write an observation as adjacent entries of at most 500 events; at least one, which completes the part."""
    cid, number = str(connector_id), padded(sequence)
    common = envelope(tenant_id, cid, sequence=sequence, at=began, run_id=report.run_id)
    head = {
        b"connector": cid.encode(),
        b"dataset": dataset.encode(),
        b"base": str(base).encode(),
        b"sequence": str(sequence).encode(),
    }
    pieces = [changes[i : i + MAX_BATCH] for i in range(0, len(changes), MAX_BATCH)] or [[]]
    last = {b"part": str(part_id).encode(), b"report": report.model_dump_json().encode()}
    return [
        Entry(
            {
                b"ce": orjson.dumps(_cloud_events(common, number, piece)),
                **head,
                **(last if n == len(pieces) - 1 else {}),
            }
        )
        for n, piece in enumerate(pieces)
    ]


def _cloud_events(common: Mapping[str, Any], number: str, changes: Iterable[Change]) -> list[dict[str, Any]]:
    """Write changes: of a usage day the whole day, of a record before and after.

    An event is a copy of one that has all the fields: half of what it takes to put them together.
    """
    blank = {
        kind: {**common, "id": "", "type": of_kind, "subject": "", "data": None}
        for kind, of_kind in SUBJECT_TYPES.items()
    }
    events = []
    for subject, op, before, after, changed in changes:
        kind = subject.partition("/")[0]
        event = blank[kind].copy()
        event["id"] = f"{subject}@{number}"
        event["subject"] = subject
        if kind == "usage":
            event["data"] = {"op": _TEXT[op], **(after or {})}
        else:
            event["data"] = {"op": _TEXT[op], "before": before, "after": after, "changed": changed}
        events.append(event)
    return events


def envelope(tenant_id: str, connector_id: str, *, sequence: int, at: datetime, run_id: UUID) -> dict[str, Any]:
    """Give what all events of an observation have in common."""
    return {
        "specversion": "1.0",
        "source": source_of(tenant_id, connector_id),
        "time": timestamp(at),
        "datacontenttype": "application/json",
        "tenantid": tenant_id,
        "connectorid": connector_id,
        "partitionkey": connector_id,
        "sequence": padded(sequence),
        "correlationid": str(run_id),
    }


@dataclass(frozen=True, slots=True)
class Broken:
    """Entries that cannot be read as an observation, and why."""

    entries: Sequence[Entry]
    reason: str


@dataclass(slots=True)
class Reading:
    """What a run of entries holds.

    `whole` observations; `broken` ones; `passed`: ids of entries that need nothing (announcements, and pieces
    whose rest is lost: their parts will be fetched again); `tail`: pieces still waiting for their end.
    """

    whole: list[Observation] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    tail: list[Entry] = field(default_factory=list)
    entries: int = 0
    """How many entries were read anew."""
    more: bool = False
    """As many as were asked for: there may be more."""


def assemble(entries: Iterable[Entry]) -> Reading:
    """Put entries together. The entries of an observation are adjacent; the last one names the part.

    A reader that has lost its lock, or a stream rolled back between two reads, may take or repeat pieces: an
    observation counts as whole only when it has as many different events as its report says.
    """
    reading = Reading()
    for entry in entries:
        if b"dataset" not in entry.fields:
            reading.passed.append(entry.id)
            continue
        if reading.tail and _key(reading.tail[0]) != _key(entry):
            reading.passed += [piece.id for piece in reading.tail]
            reading.tail = []
        reading.tail.append(entry)
        if b"part" in entry.fields:
            try:
                observation = _observation(reading.tail)
            except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
                reading.broken.append(Broken(tuple(reading.tail), type(error).__name__))
            else:
                if observation.broken or observation.changes == observation.report.changes:
                    reading.whole.append(observation)
                else:
                    reading.passed += [piece.id for piece in reading.tail]
            reading.tail = []
    return reading


def _key(entry: Entry) -> tuple[bytes, ...]:
    return tuple(entry.fields.get(name, b"") for name in (b"connector", b"dataset", b"sequence"))


def _observation(pieces: Sequence[Entry]) -> Observation:
    fields = pieces[-1].fields
    dataset = Dataset(fields[b"dataset"].decode())
    records: Sequence[RecordEvent] = ()
    days: Sequence[UsageDayEvent] = ()
    broken = False
    try:
        if dataset.dimension:
            days = _events(_DAYS, pieces)
        else:
            records = _events(_RECORDS, pieces)
    except msgspec.ValidationError:
        for piece in pieces:
            _ANY.decode(piece.fields[b"ce"])  # or these are no events at all
        broken = True
    return Observation(
        connector_id=UUID(fields[b"connector"].decode()),
        dataset=dataset,
        base=int(fields[b"base"]),
        sequence=int(fields[b"sequence"]),
        part_id=UUID(fields[b"part"].decode()),
        report=Report.model_validate_json(fields[b"report"]),
        records=records,
        days=days,
        broken=broken,
        entries=tuple(pieces),
    )


class _AnyEvent(msgspec.Struct):
    id: str


_Event = TypeVar("_Event", RecordEvent, UsageDayEvent)
_RECORDS = msgspec.json.Decoder(list[RecordEvent])
_DAYS = msgspec.json.Decoder(list[UsageDayEvent])
_ANY = msgspec.json.Decoder(list[_AnyEvent])


def _events(decoder: msgspec.json.Decoder[list[_Event]], pieces: Sequence[Entry]) -> Sequence[_Event]:
    events = [event for piece in pieces for event in decoder.decode(piece.fields[b"ce"])]
    if len(pieces) > 1:  # one of them may be repeated
        return list({event.subject: event for event in events}.values())
    return events
