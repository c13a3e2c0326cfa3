"""Sending: due connectors become runs, and parts become messages, counted in the ledger before they leave.

Everything here only decides and writes; the caller sends after the commit. A crash in between is found again,
since a part whose lease is over is due again.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
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
from worker.store.taking import Born, bulk_room, take

AT_ONCE = 4 * plan.POLLS_PER_MESSAGE
"""How many connectors are claimed in one transaction."""


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

    async def due(self, most: int) -> AsyncIterator[list[Sending]]:
        """Claim connectors that are due: a run with its parts each, the next due time, and what to send first.

        Some at a time: the first are asked while the next are planned. Safe from two places at once: a connector is
        claimed by one of them.
        """
        while most > 0:
            wanted = min(most, AT_ONCE)
            claimed, sendings = await self._claim_due(wanted)
            yield sendings
            if claimed < wanted:
                return
            most -= claimed

    async def _claim_due(self, most: int) -> tuple[int, list[Sending]]:
        async def work(connection: Connection) -> tuple[int, list[Sending]]:
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
                return 0, []
            born, busy = await self._start_runs(connection, connectors)
            await self._reschedule(connection, connectors)
            now = next(iter(connectors.values()))["now"]
            return len(connectors), await take(connection, busy, now, born=born)

        return await self._db.transaction(work)

    async def _start_runs(
        self, connection: Connection, connectors: Mapping[UUID, Row]
    ) -> tuple[list[Born], list[UUID]]:
        """Start runs; give their parts, which are not written yet, and the connectors that had runs under way.

        A dataset with an observation under way has an open part, which `take` reads: so it is not sent twice.
        """
        rows = await connection.execute(
            "SELECT connector_id, kind FROM rollcall.sync_runs"
            " WHERE connector_id = ANY(%b) AND status IN ('queued', 'running')",
            [list(connectors)],
        )
        active = {(row["connector_id"], row["kind"]) async for row in rows}
        kinds = {cid: self._kind(row, active) for cid, row in connectors.items()}
        runs = {cid: uuid4() for cid, kind in kinds.items() if (cid, kind) not in active}
        access = await access_of(connection, list(runs), granted=False)
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
        await announce(connection, announced)
        born = [
            Born(
                cid,
                OpenPart(
                    id=uuid4(),
                    run_id=run_id,
                    kind=kinds[cid],
                    dataset=part.dataset,
                    start=part.start,
                    not_before=connectors[cid]["now"],
                    lane=None,
                    asking=False,
                    applying=False,
                ),
                part.end,
            )
            for cid, run_id in runs.items()
            for part in planned[cid]
        ]
        return born, sorted({cid for cid, _ in active})

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
                access = await access_of(connection, [row["id"]], granted=False)
                parts = plan.plan(
                    kind,
                    Status(row["status"]),
                    access[row["id"]],
                    as_of=row["as_of"],
                    calendar=self._schedule.calendar,
                )
                await insert_parts(connection, run_id, row["id"], kind, parts)
            return await take(connection, [row["id"]], row["now"])

        return await self._db.transaction(work)

    async def more(self, connector_ids: Collection[UUID]) -> list[Sending]:
        """Take what may be sent now of these connectors.

        Whoever holds one of them just now takes what is next of it afterwards, or the next tick does: nobody waits.
        """

        async def work(connection: Connection) -> list[Sending]:
            rows = await connection.execute(
                "SELECT id, now() AS now FROM rollcall.connectors WHERE id = ANY(%b)"
                " ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
                [sorted(connector_ids)],
            )
            free = [(row["id"], row["now"]) async for row in rows]
            return await take(connection, [cid for cid, _ in free], free[0][1]) if free else []

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

    async def bulk_room(self) -> int:
        """Count the connectors whose backfills and reconciles may be asked now; others may take the room meanwhile."""
        return await self._db.statement(bulk_room)


async def access_of(
    connection: Connection, ids: Sequence[UUID], *, granted: bool = True
) -> dict[UUID, dict[Dataset, AccessRow]]:
    """Read the access rows of connectors; with `granted` false only those that a plan may leave out."""
    rows = await connection.execute(
        "SELECT connector_id, dataset, state, reason, missing_permission, checked_at"
        " FROM rollcall.connector_access WHERE connector_id = ANY(%b) AND (%b OR state <> 'granted')",
        [list(ids), granted],
    )
    found: dict[UUID, dict[Dataset, AccessRow]] = {cid: {} for cid in ids}
    async for row in rows:
        found[row["connector_id"]][Dataset(row["dataset"])] = access_row(row)
    return found
