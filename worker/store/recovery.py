"""Recovery: what was lost is found again from Postgres, and what is merely slow is left alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, LiteralString
from uuid import UUID

from schemas.connectors import RunKind
from worker.store.conclude import conclude, lock_connectors
from worker.store.db import Connection, Database
from worker.store.taking import SENT_LEASE

PLAN_AFTER = timedelta(seconds=30)
"""A run that nobody planned for so long has lost its message."""
SILENCE = timedelta(seconds=20)
"""How long a worker may miss its heartbeat before it counts as lost."""
UNCLAIMED = timedelta(seconds=10)
"""How long a part may be sent, its message not waiting at the broker, and be claimed by nobody before it counts as
lost: within it a message is on its way, or a worker that took it waits for Postgres."""
STRAY = timedelta(seconds=10)
"""How long ago a part must have been claimed to be looked for in its worker's hands: what was claimed since they were
looked at is no stray. (A number is drawn near the time in us.)"""
TIDY_EVERY = timedelta(minutes=5)
UNKNOWN = 2**63 - 1
"""What the ticks of a Redis are compared with while it is not known what it lost: all of them are lower."""

_CLAIMED = """
    WITH gone AS (
        UPDATE rollcall.sync_parts p SET status = 'waiting', lane = NULL, lease_until = NULL
        WHERE p.open AND p.status = 'running' AND p.published_at IS NULL AND """
_DUE_AGAIN = """
        RETURNING p.connector_id, p.dataset, p.claimed
    ), freed AS (
        UPDATE rollcall.connector_access a SET lease_until = NULL FROM gone
        WHERE a.connector_id = gone.connector_id AND a.dataset = gone.dataset AND a.claimed = gone.claimed
    )
    SELECT count(*) FROM gone
    """


class Recovery:
    """Finds stalled parts, unplanned runs and a Redis that went back."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def partitions(self) -> int:
        """Read how many streams there are."""
        return int(await self._one("SELECT partitions FROM rollcall.meta"))

    async def open_parts(self) -> dict[str, int]:
        """Count the unfinished parts by status."""

        async def work(connection: Connection) -> dict[str, int]:
            rows = await connection.execute(
                "SELECT status, count(*) AS n FROM rollcall.sync_parts WHERE open GROUP BY status"
            )
            return {"queued": 0, "running": 0, "waiting": 0} | {row["status"]: row["n"] async for row in rows}

        return await self._db.statement(work)

    async def slots(self) -> int:
        """Count the slots of living workers; at least one, so that a tick always moves something."""
        return int(
            await self._one(
                "SELECT greatest(1, coalesce(sum(slots), 0)) FROM rollcall.workers"
                " WHERE seen_at > now() - interval '60 seconds'"
            )
        )

    async def tidy_is_due(self) -> bool:
        """Claim the next tidying; one of several dispatchers gets it."""
        return bool(
            await self._one(
                "UPDATE rollcall.meta SET tidied_at = now()"
                " WHERE tidied_at IS NULL OR tidied_at < now() - %s RETURNING true",
                TIDY_EVERY,
            )
        )

    async def now(self) -> datetime:
        """Read the time that leases are measured by."""
        now: datetime = await self._one("SELECT clock_timestamp()")
        return now

    async def redis_went_back(self, count: Callable[[], Awaitable[int]]) -> bool:
        """Count a tick in Redis, and tell whether Redis had lost count: it was flushed or put back.

        Every tick is told so until somebody is done with what follows (`redis_is_known`), since who heard of it first
        may not come to it. The row's lock makes ticks count one after the other, so that two at once raise no alarm.
        """

        async def work(connection: Connection) -> bool:
            rows = await connection.execute("SELECT ticks FROM rollcall.meta FOR UPDATE")
            row = await rows.fetchone()
            ticks = await count()
            back = row is not None and ticks <= row["ticks"]
            await connection.execute("UPDATE rollcall.meta SET ticks = %s", [UNKNOWN if back else ticks])
            return back

        return await self._db.transaction(work)

    async def redis_is_known(self) -> None:
        """Note that what followed from a Redis that went back is done; the next tick counts on from there."""
        await self._one("UPDATE rollcall.meta SET ticks = 0 WHERE ticks = %s RETURNING true", UNKNOWN)

    async def bury(self) -> int:
        """Make due what silent or gone workers had claimed; if one was only slow, a fetch is spent, no fact."""
        silent = """
            NOT EXISTS (SELECT 1 FROM rollcall.workers w WHERE w.name = p.worker AND w.seen_at >= now() - %s)
            """
        return int(await self._one(_CLAIMED + silent + _DUE_AGAIN, SILENCE))

    async def return_strays(self, worker: str, in_hand: Callable[[], Collection[UUID]]) -> int:
        """Make due what a living worker claimed and has in hand no more: nobody else knows that it gave up.

        So it is when Postgres was away just then: the answer to a claim was lost, or the part could not be returned.
        `in_hand` is asked at the last moment, and must have had what it tells of since before it was claimed.
        """
        stray = "p.worker = %s AND p.claimed < extract(epoch FROM now() - %s) * 1e6 AND NOT p.id = ANY(%b)"

        async def work(connection: Connection) -> int:
            values = [worker, STRAY, list(in_hand())]
            row = await (await connection.execute(_CLAIMED + stray + _DUE_AGAIN, values)).fetchone()
            return int(row["count"]) if row else 0

        return await self._db.statement(work)

    async def void_unclaimed(self, kinds: Collection[RunKind], *, waiting: int) -> int:
        """Make due again parts of these kinds that were sent a while ago and whose message is lost.

        The `waiting` messages at the broker are those sent last, since a queue is worked off in order; parts of one
        message have leases that end together. Should a message turn up after all, it finds nothing left to claim.
        """
        return int(
            await self._one(
                """
                WITH sent AS (
                    SELECT id, lease_until, dense_rank() OVER (ORDER BY lease_until DESC) AS place
                    FROM rollcall.sync_parts WHERE open AND status = 'queued' AND kind = ANY(%s) AND lane IS NOT NULL
                ), lost AS (
                    UPDATE rollcall.sync_parts p SET lane = NULL, lease_until = NULL FROM sent
                    WHERE p.id = sent.id AND p.status = 'queued' AND p.lease_until = sent.lease_until
                      AND sent.place > %s AND sent.lease_until < now() + %s::interval - %s::interval
                    RETURNING 1
                )
                SELECT count(*) FROM lost
                """,
                [str(kind) for kind in kinds],
                waiting,
                SENT_LEASE,
                UNCLAIMED,
            )
        )

    async def void_messages(self) -> int:
        """After Redis lost data: parts that were sent or published, but not applied, are due again."""
        return int(
            await self._one(
                """
                WITH lost AS (
                    UPDATE rollcall.sync_parts SET lane = NULL, lease_until = NULL, published_at = NULL,
                           status = CASE WHEN status = 'running' THEN 'waiting' ELSE status END
                    WHERE open AND ((status = 'queued' AND lane IS NOT NULL)
                                    OR (status = 'running' AND published_at IS NOT NULL))
                    RETURNING connector_id, dataset, claimed
                ), freed AS (
                    UPDATE rollcall.connector_access a SET lease_until = NULL FROM lost
                    WHERE a.connector_id = lost.connector_id AND a.dataset = lost.dataset AND a.claimed = lost.claimed
                )
                SELECT count(*) FROM lost
                """
            )
        )

    async def look_after_published(self, unapplied: Mapping[int, datetime]) -> int:
        """Keep the leases of published parts whose entry may wait for the writer, make due again those whose is gone.

        `unapplied` tells, by partition, since when something may wait. A part is noted as published once its entry is
        there: one noted earlier is not among what waits, and no writer will ever close it. Slow is not lost: while the
        entry may wait, its part is not asked again. What somebody is working on right now is left alone.
        """
        return int(
            await self._one(
                """
                WITH n AS (SELECT * FROM unnest(%s::int[], %s::timestamptz[]) AS n (partition, since)),
                free AS (
                    SELECT p.id, p.published_at, a.connector_id, a.dataset,
                           CASE WHEN p.published_at >= n.since THEN now() + %s END AS lease_until
                    FROM rollcall.sync_parts p
                    JOIN rollcall.connectors c ON c.id = p.connector_id
                    JOIN n ON n.partition = c.partition
                    JOIN rollcall.connector_access a
                         ON a.connector_id = p.connector_id AND a.dataset = p.dataset AND a.claimed = p.claimed
                    WHERE p.open AND p.status = 'running' AND p.published_at IS NOT NULL
                    ORDER BY a.connector_id, a.dataset FOR NO KEY UPDATE OF a SKIP LOCKED
                ), parts AS (
                    UPDATE rollcall.sync_parts p
                    SET lease_until = free.lease_until, lane = NULL,
                        status = CASE WHEN free.lease_until IS NULL THEN 'waiting' ELSE p.status END,
                        published_at = CASE WHEN free.lease_until IS NULL THEN NULL ELSE p.published_at END
                    FROM free WHERE p.id = free.id AND p.status = 'running' AND p.published_at = free.published_at
                    RETURNING free.connector_id, free.dataset, free.lease_until
                ), leases AS (
                    UPDATE rollcall.connector_access a SET lease_until = parts.lease_until FROM parts
                    WHERE a.connector_id = parts.connector_id AND a.dataset = parts.dataset
                )
                SELECT count(*) FROM parts WHERE lease_until IS NULL
                """,
                list(unapplied),
                list(unapplied.values()),
                SENT_LEASE,
            )
        )

    async def unplanned(self) -> list[UUID]:
        """Find queued runs whose message was lost."""

        async def work(connection: Connection) -> list[UUID]:
            rows = await connection.execute(
                "SELECT id FROM rollcall.sync_runs WHERE status = 'queued' AND created_at < now() - %s LIMIT 100",
                [PLAN_AFTER],
            )
            return [row["id"] async for row in rows]

        return await self._db.statement(work)

    async def give_up(self, attempts: int) -> int:
        """Fail parts that were claimed so often without an end: whoever asks for them dies of it."""

        async def work(connection: Connection) -> int:
            rows = await connection.execute(
                """
                SELECT id, connector_id, run_id FROM rollcall.sync_parts
                WHERE open AND attempts >= %s AND not_before <= now()
                  AND (lease_until IS NULL OR lease_until < now()) LIMIT 100
                """,
                [attempts],
            )
            found = await rows.fetchall()
            if not found:
                return 0
            connectors = await lock_connectors(connection, {row["connector_id"] for row in found})
            await connection.execute(
                "UPDATE rollcall.sync_parts SET status = 'failed', lane = NULL, lease_until = NULL,"
                " error_class = coalesce(error_class, 'ContractBroken'), error_reason = 'attempts_exhausted'"
                " WHERE id = ANY(%b) AND open",
                [[row["id"] for row in found]],
            )
            await conclude(connection, connectors, [], runs={row["run_id"] for row in found})
            return len(found)

        return await self._db.transaction(work)

    async def stalled(self, most: int, kinds: Collection[RunKind] = tuple(RunKind)) -> set[UUID]:
        """Find connectors with a part that is due again (it waited long enough, or its lease is over).

        Those of the oldest runs of these kinds come first, each run once, however many parts it has left. (OFFSET 0 has
        the parts of each run looked up: by their status, all open ones would be read for each.)
        """

        async def work(connection: Connection) -> set[UUID]:
            rows = await connection.execute(
                """
                SELECT r.connector_id FROM rollcall.sync_runs r
                WHERE r.status IN ('queued', 'running') AND r.kind = ANY(%b) AND EXISTS (
                    SELECT 1 FROM (SELECT * FROM rollcall.sync_parts WHERE run_id = r.id OFFSET 0) p
                    WHERE p.open AND p.not_before <= now()
                      AND (p.lease_until IS NULL OR p.lease_until < now()))
                ORDER BY r.created_at LIMIT %s
                """,
                [[str(kind) for kind in kinds], most],
            )
            return {row["connector_id"] async for row in rows}

        return await self._db.statement(work)

    async def _one(self, query: LiteralString, *values: object) -> Any:
        async def work(connection: Connection) -> Any:
            row = await (await connection.execute(query, list(values))).fetchone()
            return next(iter(row.values())) if row else None

        return await self._db.statement(work)
