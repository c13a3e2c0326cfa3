"""Holds: removals that wait for three runs in a row, or for an operator."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from uuid import UUID

import orjson

from schemas.events import Op
from worker.changes import row_name
from worker.entries import Observation
from worker.store.announcements import Announcement, announce
from worker.store.db import Connection, Row


def digest_of(subjects: Iterable[str]) -> str:
    """Digest a set of subjects: what an operator's release is bound to."""
    return hashlib.blake2b("\n".join(sorted(subjects)).encode(), digest_size=16).hexdigest()


async def write_holds(
    connection: Connection, connectors: Mapping[UUID, Row], observations: Sequence[Observation]
) -> None:
    """Open, carry on or close the holds these observations speak of, and announce openings and closings."""
    if not observations:
        return
    rows = await connection.execute(
        """
        SELECT h.id, h.connector_id, h.dataset, h.records FROM rollcall.deletion_holds h
        JOIN (SELECT DISTINCT * FROM unnest(%b::uuid[], %b::text[]) AS n (c, d)) n
             ON h.connector_id = n.c AND h.dataset = n.d
        WHERE h.state IN ('open', 'released') FOR UPDATE OF h
        """,
        [[o.connector_id for o in observations], [str(o.dataset) for o in observations]],
    )
    open_holds = {(row["connector_id"], row["dataset"]): row async for row in rows}
    announced = []
    for observation in observations:
        hold = open_holds.get((observation.connector_id, str(observation.dataset)))
        held = observation.report.held
        connector = connectors[observation.connector_id]
        if held and hold is None:
            announced.append(await _open(connection, connector, observation))
        elif held and hold is not None:
            await _carry(connection, hold, observation)
        elif hold is not None:
            announced.append(await _close(connection, connector, hold, observation))
    await announce(connection, announced)


async def _open(connection: Connection, connector: Row, observation: Observation) -> Announcement:
    held = observation.report.held
    rows = await connection.execute(
        """
        INSERT INTO rollcall.deletion_holds
            (tenant_id, connector_id, dataset, known, missing, missing_digest, runs, state, records)
        VALUES (%s, %s, %s, %s, %s, %s, %s, 'open', %s::jsonb) RETURNING id
        """,
        [
            connector["tenant_id"],
            connector["id"],
            observation.dataset,
            observation.report.known,
            len(held),
            digest_of(held),
            max(count for count, _ in held.values()),
            orjson.dumps(held).decode(),
        ],
    )
    row = await rows.fetchone()
    hold_id = row["id"] if row else None
    return removals(connector, hold_id, observation.dataset, "held", observation.report.known, len(held))


async def _carry(connection: Connection, hold: Row, observation: Observation) -> None:
    held = observation.report.held
    await connection.execute(
        """
        UPDATE rollcall.deletion_holds SET known = %s, missing = %s, missing_digest = %s, runs = %s,
               records = %s::jsonb WHERE id = %s
        """,
        [
            observation.report.known,
            len(held),
            digest_of(held),
            max(count for count, _ in held.values()),
            orjson.dumps(held).decode(),
            hold["id"],
        ],
    )


async def _close(connection: Connection, connector: Row, hold: Row, observation: Observation) -> Announcement:
    gone = _removed(observation, set(hold["records"]))
    await connection.execute("UPDATE rollcall.deletion_holds SET state = 'closed' WHERE id = %s", [hold["id"]])
    return removals(
        connector,
        hold["id"],
        observation.dataset,
        "released" if gone else "rejected",
        observation.report.known,
        len(hold["records"]),
        reason="removed" if gone else "seen_again",
    )


def _removed(observation: Observation, held: Collection[str]) -> set[str]:
    """Find the held subjects that an observation removes: by name, of a usage day the rows it no longer has."""
    gone = {event.subject for event in observation.records if event.data.op == Op.DELETED}
    days = {event.subject: event.data for event in observation.days}
    for subject in held:
        name, _, row = subject.partition("#")
        if (day := days.get(name)) and row not in {row_name(one.key, one.unit) for one in day.rows}:
            gone.add(subject)
    return gone.intersection(held)


def removals(
    connector: Row,
    hold_id: object,
    dataset: str,
    what: str,
    known: int,
    missing: int,
    *,
    reason: str | None = None,
) -> Announcement:
    """Write the opening or the end of a hold."""
    return Announcement(
        tenant_id=connector["tenant_id"],
        connector_id=connector["id"],
        partition=connector["partition"],
        what=f"removals.{what}",
        subject=f"removals/{hold_id}",
        data={
            "hold_id": str(hold_id),
            "dataset": str(dataset),
            "known": known,
            "missing": missing,
            "reason": reason,
        },
    )
