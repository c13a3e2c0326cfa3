"""Sending: due connectors become runs, and parts become messages, counted in the ledger before they leave.

Everything here only decides and writes; the caller sends after the commit. A crash in between is found again,
since a part whose lease is over is due again.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID, uuid4

from schemas.connectors import Dataset, RunKind, Status
from worker import plan
from worker.plan import AccessRow, Calendar, OpenPart, Sending
from worker.store.announcements import announce
from worker.store.conclude import access_row
from worker.store.db import Connection, Database, Row
from worker.store.runs import SCHEDULER, insert_parts, run_announcement, speaks

SENT_LEASE = timedelta(seconds=120)
"""How long a message may stay unclaimed at most before its parts are sent again; a tick mostly knows sooner."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What planning needs of the settings."""

    calendar: Calendar
    reconcile_interval_s: int = 86_400
    reprobe_interval_s: int = 3600
    attempts: int = 8


class Dispatch:
    """Claims due connectors, plans runs, and takes parts to send."""

    def __init__(self, db: Database, schedule: Schedule) -> None:
        self._db, self._schedule = db, schedule

    async def due(self, most: int) -> list[Sending]:
        """Claim connectors that are due: a run with its parts each, the next due time, and what to send first.

        Safe from two places at once: a connector is claimed by one of them.
        """

        async def work(connection: Connection) -> list[Sending]:
            rows = await connection.execute(
                """
                SELECT *, now() AS now FROM rollcall.connectors
                WHERE next_sync_at <= now() AND status NOT IN ('paused', 'deleted')
                ORDER BY next_sync_at LIMIT %s FOR NO KEY UPDATE SKIP LOCKED
                """,
                [most],
            )
            connectors = {row["id"]: row async for row in rows}
            if not connectors:
                return []
            await self._start_runs(connection, connectors)
            await self._reschedule(connection, connectors)
            return await self._take(connection, list(connectors))

        return await self._db.transaction(work)

    async def _start_runs(self, connection: Connection, connectors: Mapping[UUID, Row]) -> None:
        busy = await connection.execute(
            "SELECT connector_id, kind FROM rollcall.sync_runs"
            " WHERE connector_id = ANY(%b) AND status IN ('queued', 'running')",
            [list(connectors)],
        )
        active = {(row["connector_id"], row["kind"]) async for row in busy}
        kinds = {cid: self._kind(row, active) for cid, row in connectors.items()}
        runs = {cid: uuid4() for cid, kind in kinds.items() if (cid, kind) not in active}
        access = await access_of(connection, list(runs))
        planned = {
            cid: plan.plan(
                kinds[cid],
                Status(connectors[cid]["status"]),
                access[cid],
                as_of=connectors[cid]["now"],
                calendar=self._schedule.calendar,
            )
            for cid in runs
        }
        started = await connection.execute(
            """
            INSERT INTO rollcall.sync_runs
                (id, connector_id, tenant_id, kind, requested_by, status, started_at, parts_total)
            SELECT id, connector_id, tenant_id, kind, %s, 'running', now(), parts
            FROM unnest(%b::uuid[], %b::uuid[], %b::text[], %b::text[], %b::int[])
                 AS n (id, connector_id, tenant_id, kind, parts)
            RETURNING *
            """,
            [
                SCHEDULER,
                list(runs.values()),
                list(runs),
                [connectors[c]["tenant_id"] for c in runs],
                [str(kinds[c]) for c in runs],
                [len(planned[c]) for c in runs],
            ],
        )
        announced = [run_announcement(r, connectors[r["connector_id"]]) async for r in started if speaks(r)]
        parts = [(cid, run_id, part) for cid, run_id in runs.items() for part in planned[cid]]
        await connection.execute(
            """
            INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, window_start, window_end)
            SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::text[], %b::text[], %b::date[],
                                 %b::date[])
            """,
            [
                [uuid4() for _ in parts],
                [run_id for _, run_id, _ in parts],
                [cid for cid, _, _ in parts],
                [str(kinds[cid]) for cid, _, _ in parts],
                [str(p.dataset) for _, _, p in parts],
                [p.start for _, _, p in parts],
                [p.end for _, _, p in parts],
            ],
        )
        await announce(connection, announced)

    def _kind(self, row: Row, active: Collection[tuple[UUID, str]]) -> RunKind:
        if row["status"] == Status.DISCONNECTED:
            return RunKind.POLL
        if row["backfilled_at"] is None:
            return RunKind.POLL if (row["id"], RunKind.BACKFILL) in active else RunKind.BACKFILL
        stale = timedelta(seconds=self._schedule.reconcile_interval_s)
        if row["reconciled_at"] is None or row["now"] - row["reconciled_at"] >= stale:
            return RunKind.POLL if (row["id"], RunKind.RECONCILE) in active else RunKind.RECONCILE
        return RunKind.POLL

    async def _reschedule(self, connection: Connection, connectors: Mapping[UUID, Row]) -> None:
        dead = {cid for cid, row in connectors.items() if row["status"] == Status.DISCONNECTED}
        times = [
            plan.next_probe(
                row["probes"] + 1,
                now=row["now"],
                interval_s=self._schedule.reprobe_interval_s,
                jitter=random.random(),  # noqa: S311 - spread, no secret
            )
            if cid in dead
            else plan.next_due(cid, row["poll_interval_s"], now=row["now"])
            for cid, row in connectors.items()
        ]
        await connection.execute(
            """
            UPDATE rollcall.connectors c SET next_sync_at = n.at, probes = probes + n.probed::int
            FROM unnest(%b::uuid[], %b::timestamptz[], %b::bool[]) AS n (id, at, probed) WHERE c.id = n.id
            """,
            [list(connectors), times, [cid in dead for cid in connectors]],
        )

    async def plan_run(self, run_id: UUID) -> list[Sending]:
        """Plan a queued run (asked for, or found without parts) and take its first parts; again is harmless."""

        async def work(connection: Connection) -> list[Sending]:
            rows = await connection.execute(
                """
                SELECT c.*, r.kind, r.created_at AS as_of, r.status AS run_status, now() AS now
                FROM rollcall.connectors c JOIN rollcall.sync_runs r ON c.id = r.connector_id
                WHERE r.id = %s AND r.status IN ('queued', 'running') FOR NO KEY UPDATE
                """,
                [run_id],
            )
            row = await rows.fetchone()
            if row is None:
                return []
            if row["run_status"] == "queued":
                kind = RunKind(row["kind"])
                access = await access_of(connection, [row["id"]])
                parts = plan.plan(
                    kind,
                    Status(row["status"]),
                    access[row["id"]],
                    as_of=row["as_of"],
                    calendar=self._schedule.calendar,
                )
                await insert_parts(connection, run_id, row["id"], kind, parts)
            return await self._take(connection, [row["id"]])

        return await self._db.transaction(work)

    async def more(self, connector_ids: Collection[UUID]) -> list[Sending]:
        """Take what may be sent now of these connectors.

        Whoever holds one of them just now takes what is next of it afterwards, or the next tick does: nobody waits.
        """

        async def work(connection: Connection) -> list[Sending]:
            rows = await connection.execute(
                "SELECT id FROM rollcall.connectors WHERE id = ANY(%b) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
                [sorted(connector_ids)],
            )
            return await self._take(connection, [row["id"] async for row in rows])

        return await self._db.transaction(work) if connector_ids else []

    async def unsend(self, part_ids: Sequence[UUID]) -> None:
        """Take back what could not be sent: these parts are due again at once."""

        async def work(connection: Connection) -> None:
            await connection.execute(
                "UPDATE rollcall.sync_parts SET lane = NULL, lease_until = NULL"
                " WHERE id = ANY(%b) AND status = 'queued'",
                [list(part_ids)],
            )

        await self._db.transaction(work)

    async def _take(self, connection: Connection, connector_ids: Sequence[UUID]) -> list[Sending]:
        # Of a long backlog only what may be next is read: of each dataset what is asked, and the newest that is due.
        rows = await connection.execute(
            """
            SELECT DISTINCT ON (p.connector_id, p.kind, p.dataset, asking)
                   p.id, p.run_id, p.connector_id, p.kind, p.dataset, p.window_start, p.not_before, p.lane,
                   p.lane IS NOT NULL AND coalesce(p.lease_until > now(), false) AS asking,
                   coalesce(a.lease_until > now(), false) AS applying, now() AS now
            FROM rollcall.sync_parts p
            JOIN rollcall.connector_access a ON a.connector_id = p.connector_id AND a.dataset = p.dataset
            WHERE p.connector_id = ANY(%b) AND p.open
            ORDER BY p.connector_id, p.kind, p.dataset, asking, p.not_before <= now() DESC, p.window_start DESC
            """,
            [list(connector_ids)],
        )
        by_connector: dict[UUID, list[Row]] = {}
        async for row in rows:
            by_connector.setdefault(row["connector_id"], []).append(row)
        room = 0
        if _any_bulk(by_connector):
            # Takers of bulk parts count one after the other.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('rollcall bulk'))")
            room = await _bulk_room(connection)
        sendings = []
        for cid, found in by_connector.items():
            sending = plan.pick(cid, [_open_part(r) for r in found], now=found[0]["now"], allow_bulk=room > 0)
            if sending is not None:
                room -= sending.kind is not RunKind.POLL
                sendings.append(sending)
        # Leases of one message end together, those of two do not: so messages can be counted.
        sent = [
            (part_id, lane, SENT_LEASE + n * timedelta.resolution)
            for n, message in enumerate(plan.messages(sendings))
            for sending in message
            for part_id, lane in sending.lanes.items()
        ]
        if sent:
            await connection.execute(
                """
                UPDATE rollcall.sync_parts p SET status = 'queued', lane = n.lane, lease_until = now() + n.lease
                FROM unnest(%b::uuid[], %b::smallint[], %b::interval[]) AS n (id, lane, lease) WHERE p.id = n.id
                """,
                [[part_id for part_id, _, _ in sent], [lane for _, lane, _ in sent], [lease for _, _, lease in sent]],
            )
        return sendings

    async def bulk_room(self) -> int:
        """Count the connectors whose backfills and reconciles may be asked now; others may take the room meanwhile."""
        return await self._db.statement(_bulk_room)


async def _bulk_room(connection: Connection) -> int:
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


def _any_bulk(by_connector: Mapping[UUID, Sequence[Row]]) -> bool:
    return any(row["kind"] != RunKind.POLL for rows in by_connector.values() for row in rows)


def _open_part(row: Row) -> OpenPart:
    return OpenPart(
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


async def access_of(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, dict[Dataset, AccessRow]]:
    """Read the access rows of connectors."""
    rows = await connection.execute(
        "SELECT connector_id, dataset, state, reason, missing_permission, checked_at"
        " FROM rollcall.connector_access WHERE connector_id = ANY(%b)",
        [list(ids)],
    )
    found: dict[UUID, dict[Dataset, AccessRow]] = {cid: {} for cid in ids}
    async for row in rows:
        found[row["connector_id"]][Dataset(row["dataset"])] = access_row(row)
    return found
