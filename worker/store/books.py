"""The writer's books: observations applied whole, with the ledger and the verdicts, on the locked connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from uuid import UUID

from schemas.connectors import Dataset, Status
from worker import metrics
from worker.chain import Fate, fate
from worker.elevenlabs.protocol import OK_VERDICT
from worker.entries import Observation
from worker.store.conclude import Outcome, conclude, lock_connectors
from worker.store.db import Connection, Row, repeated
from worker.store.facts import write
from worker.store.holds import write_holds

RETURN_WAIT = timedelta(seconds=1)


class PgBooks:
    """`worker.ports.Books` on one connection.

    `more` collects connectors of which more may be sent now; the caller takes it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.more: set[UUID] = set()

    async def apply(self, observations: Sequence[Observation]) -> None:
        """Apply what is in its place, skip what is seen, return the rest; see `worker.ports.Books`."""

        async def once() -> set[UUID]:
            async with self._connection.transaction():
                return await apply(self._connection, observations)

        with metrics.APPLY_SECONDS.time():
            self.more |= await repeated(once)

    async def set_aside(self, observation: Observation, reason: str) -> None:
        """Fail the part of an observation that was dead-lettered; its run ends partial."""

        async def once() -> None:
            async with self._connection.transaction():
                connectors = await lock_connectors(self._connection, [observation.connector_id])
                await self._connection.execute(
                    "UPDATE rollcall.connector_access SET lease_until = NULL"
                    " WHERE connector_id = %s AND dataset = %s AND claimed = %s",
                    [observation.connector_id, observation.dataset, observation.sequence],
                )
                await self._connection.execute(
                    "UPDATE rollcall.sync_parts SET status = 'failed', lane = NULL, lease_until = NULL,"
                    " error_class = 'ContractBroken', error_reason = %s WHERE id = %s AND status = 'running'",
                    [f"dead_letter_{reason}", observation.part_id],
                )
                await conclude(self._connection, connectors, [], runs={observation.report.run_id})

        await repeated(once)


async def apply(connection: Connection, observations: Sequence[Observation]) -> set[UUID]:
    """Apply observations inside the caller's transaction; return connectors of which more may be sent."""
    connectors = await lock_connectors(connection, {o.connector_id for o in observations})
    chains = await _chains(connection, observations)
    good: list[Observation] = []
    returned: list[Observation] = []
    for observation in observations:
        connector = connectors.get(observation.connector_id)
        chain = chains.get((observation.connector_id, observation.dataset))
        if connector is None or chain is None or connector["status"] == Status.DELETED:
            metrics.OBSERVATIONS_SETTLED.labels(metrics.Effect.SKIPPED).inc()
            continue
        what = fate(
            version=chain["version"],
            claimed=chain["claimed"],
            base=observation.base,
            sequence=observation.sequence,
        )
        if what is Fate.APPLY:
            chain["version"] = observation.sequence
            good.append(observation)
        elif what is Fate.RETURN:
            returned.append(observation)
        metrics.OBSERVATIONS_SETTLED.labels(_EFFECTS[what]).inc()
    tenants = {cid: row["tenant_id"] for cid, row in connectors.items()}
    await write(connection, good, tenants)
    await _advance(connection, good)
    await _return(connection, returned)
    await write_holds(connection, connectors, good)
    return await conclude(connection, connectors, [_outcome(o) for o in good])


_EFFECTS = {
    Fate.APPLY: metrics.Effect.APPLIED,
    Fate.SEEN: metrics.Effect.SKIPPED,
    Fate.RETURN: metrics.Effect.RETURNED,
}


def _outcome(observation: Observation) -> Outcome:
    return Outcome(
        observation.connector_id,
        observation.dataset,
        observation.report.run_id,
        observation.sequence,
        OK_VERDICT,
    )


async def _chains(connection: Connection, observations: Sequence[Observation]) -> Mapping[tuple[UUID, Dataset], Row]:
    rows = await connection.execute(
        """
        SELECT a.connector_id, a.dataset, a.version, a.claimed FROM rollcall.connector_access a
        JOIN (SELECT DISTINCT * FROM unnest(%b::uuid[], %b::text[]) AS n (c, d)) n
             ON a.connector_id = n.c AND a.dataset = n.d
        ORDER BY a.connector_id, a.dataset FOR NO KEY UPDATE OF a
        """,
        [[o.connector_id for o in observations], [str(o.dataset) for o in observations]],
    )
    return {(row["connector_id"], Dataset(row["dataset"])): row async for row in rows}


async def _advance(connection: Connection, good: Sequence[Observation]) -> None:
    """Advance the chains and close the parts."""
    if not good:
        return
    # By status: asked whether it is `open`, Postgres may read all that are, by statistics of when none was.
    await connection.execute(
        """
        WITH n AS (SELECT * FROM unnest(%b::uuid[], %b::text[], %b::bigint[], %b::uuid[], %b::int[], %b::int[],
                                        %b::text[]) AS n (c, d, v, part, records, changes, incomplete)),
        chain AS (
            UPDATE rollcall.connector_access a SET version = n.v, lease_until = NULL, checked_at = now()
            FROM n WHERE a.connector_id = n.c AND a.dataset = n.d
        )
        UPDATE rollcall.sync_parts p SET status = 'succeeded', lane = NULL, lease_until = NULL, error_class = NULL,
               error_reason = n.incomplete, records = n.records, changes = n.changes
        FROM n WHERE p.id = n.part AND p.status IN ('queued', 'running', 'waiting')
        """,
        [
            [o.connector_id for o in good],
            [str(o.dataset) for o in good],
            [o.sequence for o in good],
            [o.part_id for o in good],
            [o.report.records for o in good],
            [o.report.changes for o in good],
            [f"incomplete_{o.report.incomplete}" if o.report.incomplete else None for o in good],
        ],
    )


async def _return(connection: Connection, returned: Sequence[Observation]) -> None:
    """Give parts back whose observation is not in its place, unless they were claimed again meanwhile."""
    if not returned:
        return
    await connection.execute(
        """
        WITH n AS (SELECT * FROM unnest(%b::uuid[], %b::text[], %b::bigint[], %b::uuid[]) AS n (c, d, v, part)),
        chain AS (
            UPDATE rollcall.connector_access a SET lease_until = NULL
            FROM n WHERE a.connector_id = n.c AND a.dataset = n.d AND a.claimed = n.v
        )
        UPDATE rollcall.sync_parts p SET status = 'waiting', lane = NULL, lease_until = NULL, not_before = now() + %b,
               error_class = 'TryLater', error_reason = 'chain_moved', attempts = attempts - 1
        FROM n WHERE p.id = n.part AND p.claimed = n.v AND p.status = 'running'
        """,
        [
            [o.connector_id for o in returned],
            [str(o.dataset) for o in returned],
            [o.sequence for o in returned],
            [o.part_id for o in returned],
            RETURN_WAIT,
        ],
    )
