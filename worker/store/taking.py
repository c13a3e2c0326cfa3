"""Taking: which open parts leave now, counted in the ledger before they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from uuid import UUID

from schemas.connectors import Dataset, RunKind
from worker import plan
from worker.plan import OpenPart, Sending
from worker.store.db import Connection

SENT_LEASE = timedelta(seconds=120)
"""How long a message may stay unclaimed at most before its parts are sent again; a tick mostly knows sooner."""


@dataclass(frozen=True, slots=True)
class Born:
    """A part of a run that starts now; `end`: of its window."""

    connector_id: UUID
    part: OpenPart
    end: date | None


_Held = Mapping[UUID, tuple[int, timedelta]]
"""What is sent, by part: its lane, and how long it may hold it unclaimed."""


async def take(
    connection: Connection, connector_ids: Sequence[UUID], now: datetime, *, born: Sequence[Born] = ()
) -> list[Sending]:
    """Choose what may be sent now, count it as sent, and write the parts that are new.

    Args:
        connection: in a transaction that has locked the connectors.
        connector_ids: connectors that may have parts in the ledger.
        now: the transaction's time.
        born: parts of runs that start now; whole runs of connectors.

    """
    parts = await _open_parts(connection, connector_ids)
    for new in born:
        parts.setdefault(new.connector_id, []).append(new.part)
    sendings, held = await _choose(connection, parts, now)
    await _insert(connection, born, held)
    known = {new.part.id for new in born}
    await _hold(connection, {part_id: sent for part_id, sent in held.items() if part_id not in known})
    return sendings


async def _open_parts(connection: Connection, connector_ids: Sequence[UUID]) -> dict[UUID, list[OpenPart]]:
    """Read of a long backlog only what may be next: of each dataset what is asked, and the newest that is due."""
    found: dict[UUID, list[OpenPart]] = {}
    if not connector_ids:
        return found
    rows = await connection.execute(
        """
        SELECT DISTINCT ON (p.connector_id, p.kind, p.dataset, asking)
               p.id, p.run_id, p.connector_id, p.kind, p.dataset, p.window_start, p.not_before, p.lane,
               p.lane IS NOT NULL AND coalesce(p.lease_until > now(), false) AS asking,
               coalesce(a.lease_until > now(), false) AS applying
        FROM rollcall.sync_parts p
        JOIN rollcall.connector_access a ON a.connector_id = p.connector_id AND a.dataset = p.dataset
        WHERE p.connector_id = ANY(%b) AND p.open
        ORDER BY p.connector_id, p.kind, p.dataset, asking, p.not_before <= now() DESC, p.window_start DESC
        """,
        [list(connector_ids)],
    )
    async for row in rows:
        part = OpenPart(
            id=row["id"],
            run_id=row["run_id"],
            kind=RunKind(row["kind"]),
            dataset=Dataset(row["dataset"]),
            start=row["window_start"],
            not_before=row["not_before"],
            lane=row["lane"],
            asking=row["asking"],
            applying=row["applying"],
        )
        found.setdefault(row["connector_id"], []).append(part)
    return found


async def _choose(
    connection: Connection, parts: Mapping[UUID, Sequence[OpenPart]], now: datetime
) -> tuple[list[Sending], _Held]:
    """Choose what is sent now of connectors' open parts."""
    room = 0
    if any(part.kind is not RunKind.POLL for some in parts.values() for part in some):
        # Takers of bulk parts count one after the other.
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('rollcall bulk'))")
        room = await bulk_room(connection)
    sendings = []
    for cid, some in parts.items():
        sending = plan.pick(cid, some, now=now, allow_bulk=room > 0)
        if sending is not None:
            room -= sending.kind is not RunKind.POLL
            sendings.append(sending)
    # Leases of one message end together, those of two do not: so messages can be counted.
    held = {
        part_id: (lane, SENT_LEASE + n * timedelta.resolution)
        for n, message in enumerate(plan.messages(sendings))
        for sending in message
        for part_id, lane in sending.lanes.items()
    }
    return sendings, held


async def _insert(connection: Connection, born: Sequence[Born], held: _Held) -> None:
    """Write new parts, those that are sent as sent."""
    if not born:
        return
    lanes = [held.get(new.part.id, (None, None)) for new in born]
    await connection.execute(
        """
        INSERT INTO rollcall.sync_parts
            (id, run_id, connector_id, kind, dataset, window_start, window_end, lane, lease_until)
        SELECT id, run, c, kind, dataset, first, last, lane, now() + lease
        FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::text[], %b::text[], %b::date[], %b::date[],
                    %b::smallint[], %b::interval[]) AS n (id, run, c, kind, dataset, first, last, lane, lease)
        """,
        [
            [new.part.id for new in born],
            [new.part.run_id for new in born],
            [new.connector_id for new in born],
            [str(new.part.kind) for new in born],
            [str(new.part.dataset) for new in born],
            [new.part.start for new in born],
            [new.end for new in born],
            [lane for lane, _ in lanes],
            [lease for _, lease in lanes],
        ],
    )


async def _hold(connection: Connection, held: _Held) -> None:
    """Count parts as sent."""
    if not held:
        return
    await connection.execute(
        """
        UPDATE rollcall.sync_parts p SET status = 'queued', lane = n.lane, lease_until = now() + n.lease
        FROM unnest(%b::uuid[], %b::smallint[], %b::interval[]) AS n (id, lane, lease) WHERE p.id = n.id
        """,
        [list(held), [lane for lane, _ in held.values()], [lease for _, lease in held.values()]],
    )


async def bulk_room(connection: Connection) -> int:
    """Count the connectors whose backfills and reconciles may still leave: full messages for half of all slots.

    Parts of one message are claimed in one transaction: as when they were sent, their leases end at the same moment,
    and those of two messages do not.
    """
    rows = await connection.execute(
        """
        SELECT greatest(1, (SELECT coalesce(sum(slots), 0) FROM rollcall.workers
                            WHERE seen_at > now() - interval '60 seconds') / 2)
               - (SELECT count(DISTINCT lease_until) FROM rollcall.sync_parts
                  WHERE open AND kind <> 'poll' AND lane IS NOT NULL AND lease_until > now()
                    AND status <> 'waiting') AS room
        """
    )
    row = await rows.fetchone()
    return max(0, int(row["room"])) * plan.BULK_PER_MESSAGE if row else 0
