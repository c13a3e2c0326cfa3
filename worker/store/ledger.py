"""The ledger's side of fetching: claims, quiet closes, failures, returns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from uuid import UUID

from schemas.connectors import LIVE, Dataset, RunKind, Status
from worker.chain import draw
from worker.elevenlabs.asking import Window
from worker.elevenlabs.protocol import OK_VERDICT, Verdict, backoff_s
from worker.ports import Claim, Failure, Quiet, Target
from worker.store.conclude import Outcome, conclude, lock_connectors
from worker.store.db import Connection, Database, Row
from worker.verdict import part_after

BUSY_WAIT_S = 2.0
POLL_ATTEMPTS = 3
_RNG = random.Random()  # noqa: S311 - jitter, no secret

_CLAIM = """
    SELECT p.id, p.run_id, p.kind, p.dataset, p.window_start, p.window_end, p.attempts, p.lane, p.status AS part_status,
           r.created_at AS as_of, c.id AS connector_id, c.tenant_id, c.base_url, c.sealed_key, c.status, c.partition,
           c.cost_since, a.version, a.claimed, a.lease_until > now() AS leased, now() AS now,
           h.records AS held, CASE WHEN h.state = 'released' AND h.expires_at > now() THEN h.released END AS released
    FROM rollcall.sync_parts p
    JOIN rollcall.sync_runs r ON r.id = p.run_id
    JOIN rollcall.connectors c ON c.id = p.connector_id
    JOIN rollcall.connector_access a ON a.connector_id = p.connector_id AND a.dataset = p.dataset
    LEFT JOIN rollcall.deletion_holds h ON h.connector_id = p.connector_id AND h.dataset = p.dataset
              AND h.state IN ('open', 'released')
    WHERE p.id = ANY(%b) AND p.status IN ('queued', 'running')
    ORDER BY a.connector_id, a.dataset FOR NO KEY UPDATE OF a
"""


class PgLedger:
    """`worker.ports.Ledger` on Postgres.

    Args:
        db: the process's pool.
        lease_s: how long a claim holds a dataset beyond the time its requests may take.
        request_s: how long one part's conversation takes at most, but for rare ones: should a lease end before them,
            they are asked again, which costs a fetch, while a lease that nobody returns is waited for.
        attempts: most attempts of a part within its run; of a poll three, since the next one comes soon.
        worker: the name under which this process's heart beats.

    """

    def __init__(self, db: Database, *, lease_s: float, request_s: float, attempts: int, worker: str) -> None:
        self._db, self._lease_s, self._request_s, self._attempts = db, lease_s, request_s, attempts
        self._worker = worker

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim the parts that may be asked now; see `worker.ports.Ledger`."""

        async def work(connection: Connection) -> list[Claim]:
            rows = await (await connection.execute(_CLAIM, [list(part_ids)])).fetchall()
            fit = [r for r in rows if r["part_status"] == "queued" and _may_ask(r) and not r["leased"]]
            busy = [r["id"] for r in rows if r["part_status"] == "queued" and _may_ask(r) and r["leased"]]
            idle = [r["id"] for r in rows if r["part_status"] == "queued" and not _may_ask(r)]
            if busy:
                await _wait(connection, busy, "dataset_busy", BUSY_WAIT_S)
            if idle:
                await connection.execute(
                    "UPDATE rollcall.sync_parts SET status = 'skipped', lane = NULL, lease_until = NULL,"
                    " error_reason = 'connector_not_live' WHERE id = ANY(%b) AND status = 'queued'",
                    [idle],
                )
            targets = {r["connector_id"]: _target(r) for r in fit}
            claims = {r["id"]: _claim(r, targets[r["connector_id"]]) for r in fit}
            if not claims:
                return []
            most = max(Counter(c.target.connector_id for c in claims.values()).values())
            lease = timedelta(seconds=self._lease_s + self._request_s * most)
            won = await connection.execute(
                """
                WITH n AS (SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::text[], %b::bigint[])
                           AS n (id, connector_id, dataset, number)),
                part AS (
                    UPDATE rollcall.sync_parts p SET status = 'running', attempts = attempts + 1, claimed = n.number,
                           lease_until = now() + %b, published_at = NULL, worker = %b
                    FROM n WHERE p.id = n.id AND p.status = 'queued' RETURNING p.id
                )
                UPDATE rollcall.connector_access a SET claimed = n.number, lease_until = now() + %b
                FROM n JOIN part USING (id) WHERE a.connector_id = n.connector_id AND a.dataset = n.dataset
                RETURNING n.id
                """,
                [
                    list(claims),
                    [c.target.connector_id for c in claims.values()],
                    [str(c.dataset) for c in claims.values()],
                    [c.number for c in claims.values()],
                    lease,
                    self._worker,
                    lease,
                ],
            )
            return [claims[row["id"]] async for row in won]

        claims = await self._db.transaction(work)
        order = {part_id: n for n, part_id in enumerate(part_ids)}
        return sorted(claims, key=lambda c: order[c.part_id])

    async def close_quiet(self, quiet: Sequence[Quiet]) -> None:
        """Close unchanged parts; see `worker.ports.Ledger`."""
        claims = [q.claim for q in quiet]

        async def work(connection: Connection) -> None:
            connectors = await lock_connectors(connection, {c.target.connector_id for c in claims})
            rows = await connection.execute(
                """
                WITH n AS (SELECT * FROM unnest(%b::uuid[], %b::uuid[], %b::text[], %b::bigint[], %b::bigint[],
                                                %b::int[], %b::text[])
                           AS n (id, connector_id, dataset, number, base, records, incomplete)),
                still AS (
                    UPDATE rollcall.connector_access a SET lease_until = NULL, checked_at = now()
                    FROM n WHERE a.connector_id = n.connector_id AND a.dataset = n.dataset
                           AND a.version = n.base AND a.claimed = n.number
                    RETURNING n.id, n.records, n.incomplete
                )
                UPDATE rollcall.sync_parts p SET status = 'succeeded', lane = NULL, lease_until = NULL,
                       error_class = NULL, error_reason = still.incomplete, records = coalesce(still.records, p.records)
                FROM still WHERE p.id = still.id AND p.status = 'running' RETURNING p.id
                """,
                [
                    [c.part_id for c in claims],
                    [c.target.connector_id for c in claims],
                    [str(c.dataset) for c in claims],
                    [c.number for c in claims],
                    [q.base for q in quiet],
                    [q.records for q in quiet],
                    [f"incomplete_{q.incomplete}" if q.incomplete else None for q in quiet],
                ],
            )
            closed = {row["id"] async for row in rows}
            for claim in claims:
                if claim.part_id not in closed:
                    await give_back(connection, claim, "chain_moved", 0.0)
            await conclude(connection, connectors, [_outcome(c, OK_VERDICT) for c in claims if c.part_id in closed])

        await self._db.transaction(work)

    async def failed(self, failure: Failure) -> None:
        """Settle a failure; see `worker.ports.Ledger`."""
        claim, verdict = failure.claim, failure.verdict
        most = min(self._attempts, POLL_ATTEMPTS) if claim.kind is RunKind.POLL else self._attempts
        outcome = part_after(verdict, attempts=claim.attempts, most=most, backoff_s=backoff_s(claim.attempts, _RNG))

        async def work(connection: Connection) -> None:
            connectors = await lock_connectors(connection, [claim.target.connector_id])
            await _release(connection, claim)
            await connection.execute(
                """
                UPDATE rollcall.sync_parts SET status = %s, lane = NULL, lease_until = NULL, error_class = %s,
                       error_reason = %s, not_before = now() + %s
                WHERE id = %s AND status = 'running' AND claimed = %s
                """,
                [
                    outcome.status,
                    outcome.error_class,
                    outcome.error_reason,
                    timedelta(seconds=outcome.wait_s),
                    claim.part_id,
                    claim.number,
                ],
            )
            await conclude(connection, connectors, [_outcome(claim, verdict)])

        await self._db.transaction(work)

    async def give_back(self, claim: Claim, reason: str, wait_s: float) -> None:
        """Return a part; see `worker.ports.Ledger`."""
        await self._db.transaction(lambda connection: give_back(connection, claim, reason, wait_s))

    async def published(self, claims: Sequence[Claim]) -> None:
        """Free the lanes of published parts, but for what the writer is closing already; see `worker.ports.Ledger`."""

        async def work(connection: Connection) -> None:
            await connection.execute(
                """
                WITH n AS (
                    SELECT p.id FROM rollcall.sync_parts p
                    WHERE p.id = ANY(%(ids)b) AND p.status = 'running'
                          AND p.claimed = (%(numbers)b::bigint[])[array_position(%(ids)b::uuid[], p.id)]
                    FOR NO KEY UPDATE OF p SKIP LOCKED
                )
                UPDATE rollcall.sync_parts p SET lane = NULL, published_at = now() FROM n WHERE p.id = n.id
                """,
                {"ids": [c.part_id for c in claims], "numbers": [c.number for c in claims]},
            )

        await self._db.statement(work)

    async def narrow(self, claim: Claim, window: Window, because: Verdict | None) -> Claim | None:
        """Split a part; see `worker.ports.Ledger`."""
        wait_s = part_after(because, attempts=1, most=2, backoff_s=backoff_s(1, _RNG)).wait_s if because else 0.0

        async def work(connection: Connection) -> bool:
            # Whoever drops the connector's parts does so before or after: the new one is not overlooked.
            await lock_connectors(connection, [claim.target.connector_id])
            rows = await connection.execute(
                """
                WITH part AS (
                    UPDATE rollcall.sync_parts SET window_start = %(start)s
                    WHERE id = %(id)s AND claimed = %(number)s AND status = 'running' AND window_start < %(start)s
                    RETURNING run_id, connector_id, kind, dataset
                ),
                rest AS (
                    INSERT INTO rollcall.sync_parts
                        (id, run_id, connector_id, kind, dataset, window_start, window_end, not_before)
                    SELECT gen_random_uuid(), run_id, connector_id, kind, dataset, %(first)s, %(start)s,
                           now() + %(wait)s
                    FROM part
                )
                UPDATE rollcall.sync_runs r SET parts_total = parts_total + 1 FROM part WHERE r.id = part.run_id
                RETURNING r.id
                """,
                {
                    "start": window.start,
                    "first": claim.window and claim.window.start,
                    "id": claim.part_id,
                    "number": claim.number,
                    "wait": timedelta(seconds=wait_s),
                },
            )
            return await rows.fetchone() is not None

        return replace(claim, window=window) if await self._db.transaction(work) else None

    async def remember_cost_since(self, claim: Claim, day: date) -> None:
        """Note when the workspace became cost-billed; see `worker.ports.Ledger`."""

        async def work(connection: Connection) -> None:
            await connection.execute(
                "UPDATE rollcall.connectors SET cost_since = least(cost_since, %s) WHERE id = %s",
                [day, claim.target.connector_id],
            )

        await self._db.statement(work)


def _may_ask(row: Row) -> bool:
    status = Status(row["status"])
    return status in LIVE or (status is Status.DISCONNECTED and row["dataset"] == Dataset.WORKSPACE)


def _target(row: Row) -> Target:
    return Target(
        row["connector_id"],
        row["tenant_id"],
        row["base_url"],
        row["sealed_key"],
        row["partition"],
        row["cost_since"],
    )


def _claim(row: Row, target: Target) -> Claim:
    start, end = row["window_start"], row["window_end"]
    return Claim(
        part_id=row["id"],
        run_id=row["run_id"],
        kind=RunKind(row["kind"]),
        dataset=Dataset(row["dataset"]),
        target=target,
        number=draw(row["claimed"], row["now"]),
        version=row["version"],
        as_of=row["as_of"],
        began=row["now"],
        window=Window(start, end) if start else None,
        attempts=row["attempts"] + 1,
        lane=row["lane"] or 1,
        held={subject: (count, last) for subject, (count, last) in (row["held"] or {}).items()},
        released=frozenset(row["released"] or ()),
    )


def _outcome(claim: Claim, verdict: Verdict) -> Outcome:
    return Outcome(claim.target.connector_id, claim.dataset, claim.run_id, claim.number, verdict)


async def _release(connection: Connection, claim: Claim) -> None:
    await connection.execute(
        "UPDATE rollcall.connector_access SET lease_until = NULL"
        " WHERE connector_id = %s AND dataset = %s AND claimed = %s",
        [claim.target.connector_id, claim.dataset, claim.number],
    )


async def give_back(connection: Connection, claim: Claim, reason: str, wait_s: float) -> None:
    """Return a claimed part inside the caller's transaction; the dataset is free, the attempt does not count."""
    await _release(connection, claim)
    await connection.execute(
        """
        UPDATE rollcall.sync_parts SET status = 'waiting', lane = NULL, lease_until = NULL, error_class = 'TryLater',
               error_reason = %s, not_before = now() + %s, attempts = attempts - 1
        WHERE id = %s AND claimed = %s AND status = 'running'
        """,
        [reason, timedelta(seconds=wait_s), claim.part_id, claim.number],
    )


async def _wait(connection: Connection, ids: Sequence[UUID], reason: str, wait_s: float) -> None:
    await connection.execute(
        "UPDATE rollcall.sync_parts SET status = 'waiting', lane = NULL, lease_until = NULL, error_class = 'TryLater',"
        " error_reason = %s, not_before = now() + %s WHERE id = ANY(%b) AND status = 'queued'",
        [reason, timedelta(seconds=wait_s), list(ids)],
    )
