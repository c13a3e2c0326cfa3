"""Conclude: what answered parts mean for access, runs and the connector's status, in one transaction.

Callers hold the connector rows' locks already (`lock_connectors`) and have written their parts. The judgement
itself is `worker.verdict`; this module reads rows, asks it, and writes what differs, set by set.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from schemas.connectors import USAGE, Access, Action, Dataset, Status, StatusReason, may_move
from worker import metrics, plan
from worker.elevenlabs.protocol import Verdict
from worker.plan import AccessRow
from worker.store.announcements import Announcement, announce
from worker.store.db import Connection, Row
from worker.store.runs import drop_parts, finish_runs
from worker.verdict import (
    CEILING_WINDOW,
    DOUBTS,
    Deaths,
    Health,
    access_after,
    alive,
    derive,
    doubted,
    proves_alive,
)

REPROBE_INTERVAL_S = 3600


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answered part: its number decides whether it may speak about the credential."""

    connector_id: UUID
    dataset: Dataset
    run_id: UUID
    number: int
    verdict: Verdict
    workspace: Mapping[str, Any] | None = None


async def lock_connectors(connection: Connection, ids: Iterable[UUID]) -> dict[UUID, Row]:
    """Lock connector rows, in order of their ids, and read them (with the database's `now`)."""
    rows = await connection.execute(
        "SELECT *, now() AS now FROM rollcall.connectors WHERE id = ANY(%b) ORDER BY id FOR NO KEY UPDATE",
        [sorted(set(ids))],
    )
    return {row["id"]: row async for row in rows}


async def conclude(
    connection: Connection,
    connectors: Mapping[UUID, Row],
    outcomes: Sequence[Outcome],
    *,
    runs: Collection[UUID] = (),
) -> set[UUID]:
    """Settle outcomes, their runs and `runs`; return connectors of which more may be sent."""
    ids = list(connectors)
    access = await _access(connection, ids)
    held = await _held(connection, ids)
    before = {cid: dict(rows) for cid, rows in access.items()}
    for outcome in outcomes:
        row = connectors.get(outcome.connector_id)
        if row is not None and outcome.number > row["version"]:
            rows = access[outcome.connector_id]
            rows[outcome.dataset] = access_after(
                rows.get(outcome.dataset, AccessRow(outcome.dataset)), outcome.verdict, now=row["now"]
            )
    await _write_access(connection, access, before)
    finished = await finish_runs(connection, {*runs, *(o.run_id for o in outcomes)}, connectors)
    ended = {r["connector_id"] for r in finished.ended}
    for connector_id, row in connectors.items():
        mine = [o for o in outcomes if o.connector_id == connector_id and o.number > row["version"]]
        health = await _judge(connection, row, mine, access[connector_id], connector_id in ended, held)
        gained = any(
            access[connector_id][d].state is Access.GRANTED
            and before[connector_id].get(d, AccessRow(d)).state is not Access.GRANTED
            for d in USAGE
            if d in access[connector_id]
        )
        await write_health(
            connection,
            row,
            health,
            access=access[connector_id],
            access_changed=_differs(before[connector_id], access[connector_id]),
            usage_gained=gained and row["backfilled_at"] is not None,
        )
    return finished.unsent


async def _judge(
    connection: Connection,
    row: Row,
    outcomes: Sequence[Outcome],
    access: Mapping[Dataset, AccessRow],
    final: bool,
    held: set[UUID],
) -> Health:
    health = health_of(row)
    for outcome in outcomes:
        if proves_alive(outcome.verdict):
            known = final or health.status is not Status.PENDING
            health = alive(health, derive(access, removals_held=row["id"] in held, final=known))
        elif outcome.verdict.finding in DOUBTS:
            deaths = await _deaths(connection, row["id"])
            health = doubted(health, outcome.verdict, run_id=str(outcome.run_id), deaths=deaths, now=row["now"])
    if final and health.status is Status.PENDING and any(r.state is not Access.UNKNOWN for r in access.values()):
        health = alive(health, derive(access, removals_held=row["id"] in held, final=True))
    return health


def health_of(row: Row) -> Health:
    """Read a connector row as the credential's health."""
    return Health(
        status=Status(row["status"]),
        reason=StatusReason(row["status_reason"]) if row["status_reason"] else None,
        action=Action(row["action"]),
        strikes=row["strikes"],
        strike_run=str(row["strike_run"]) if row["strike_run"] else None,
        suspect_since=row["suspect_since"],
    )


async def write_health(
    connection: Connection,
    row: Row,
    health: Health,
    *,
    access: Mapping[Dataset, AccessRow],
    access_changed: bool = False,
    usage_gained: bool = False,
) -> None:
    """Write a connector's health where it differs, announce a move, and drop the work of a dead key."""
    old = health_of(row)
    if usage_gained:
        await connection.execute("UPDATE rollcall.connectors SET backfilled_at = NULL WHERE id = %s", [row["id"]])
    moved = (old.status, old.reason, old.action) != (health.status, health.reason, health.action)
    if old == health and not (access_changed and health.status is Status.DEGRADED):
        return
    if not may_move(old.status, health.status):
        raise RuntimeError(f"illegal move of a connector: {old.status} to {health.status}")
    dead, now = health.status is Status.DISCONNECTED, row["now"]
    recovered = old.status is Status.DISCONNECTED and not dead
    next_sync = row["next_sync_at"]
    if dead and old.status is not Status.DISCONNECTED:
        next_sync = plan.next_probe(0, now=now, interval_s=REPROBE_INTERVAL_S, jitter=random.random())  # noqa: S311 - spread, no secret
    elif recovered:
        next_sync = now
    await connection.execute(
        """
        UPDATE rollcall.connectors SET
            status = %s, status_reason = %s, action = %s, strikes = %s, strike_run = %s, suspect_since = %s,
            status_since = CASE WHEN status = %s THEN status_since ELSE now() END,
            version = CASE WHEN %s THEN greatest(version + 1, (extract(epoch FROM clock_timestamp()) * 1e6)::bigint)
                      ELSE version END,
            next_sync_at = %s, probes = CASE WHEN %s THEN 0 ELSE probes END, updated_at = now()
        WHERE id = %s
        """,
        [
            health.status, health.reason, health.action, health.strikes, health.strike_run, health.suspect_since,
            health.status, dead or recovered, next_sync, dead != (old.status is Status.DISCONNECTED), row["id"],
        ],
    )  # fmt: skip
    if dead and old.status is not Status.DISCONNECTED:
        await drop_parts(connection, row, reason=str(health.reason))
    if moved or (access_changed and health.status is Status.DEGRADED):
        metrics.TRANSITIONS.labels(health.status, health.reason or "none").inc()
        await announce(connection, [connector_announcement(row, health, old.status, access)])


def connector_announcement(
    row: Row, health: Health, previous: Status | None, access: Mapping[Dataset, AccessRow]
) -> Announcement:
    """Write what a connector has become."""
    return Announcement(
        tenant_id=row["tenant_id"],
        connector_id=row["id"],
        partition=row["partition"],
        what=f"connector.{health.status}",
        subject="connector",
        data={
            "status": health.status,
            "previous_status": previous,
            "reason": health.reason,
            "action": health.action,
            "access": [
                {
                    "dataset": r.dataset,
                    "state": r.state,
                    "reason": r.reason,
                    "missing_permission": r.missing_permission,
                }
                for r in access.values()
            ],
        },
    )


async def _access(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, dict[Dataset, AccessRow]]:
    rows = await connection.execute(
        """
        SELECT connector_id, dataset, state, reason, missing_permission, checked_at
        FROM rollcall.connector_access WHERE connector_id = ANY(%b)
        ORDER BY connector_id, dataset FOR NO KEY UPDATE
        """,
        [sorted(ids)],
    )
    found: dict[UUID, dict[Dataset, AccessRow]] = {cid: {} for cid in ids}
    async for row in rows:
        found[row["connector_id"]][Dataset(row["dataset"])] = access_row(row)
    return found


def access_row(row: Row) -> AccessRow:
    """Read an access row."""
    return AccessRow(
        Dataset(row["dataset"]),
        Access(row["state"]),
        row["reason"],
        row["missing_permission"],
        row["checked_at"],
    )


def _differs(before: Mapping[Dataset, AccessRow], after: Mapping[Dataset, AccessRow]) -> bool:
    return {d: _state(r) for d, r in before.items()} != {d: _state(r) for d, r in after.items()}


def _state(row: AccessRow) -> tuple[Access, str | None, str | None]:
    return row.state, row.reason, row.missing_permission


async def _write_access(
    connection: Connection,
    access: Mapping[UUID, Mapping[Dataset, AccessRow]],
    before: Mapping[UUID, Mapping[Dataset, AccessRow]],
) -> None:
    new = [(cid, r) for cid, rows in access.items() for r in rows.values() if before[cid].get(r.dataset) != r]
    if not new:
        return
    await connection.execute(
        """
        UPDATE rollcall.connector_access a
        SET state = n.state, reason = n.reason, missing_permission = n.missing, checked_at = n.checked_at
        FROM unnest(%b::uuid[], %b::text[], %b::text[], %b::text[], %b::text[], %b::timestamptz[])
             AS n (connector_id, dataset, state, reason, missing, checked_at)
        WHERE a.connector_id = n.connector_id AND a.dataset = n.dataset
        """,
        [
            [cid for cid, _ in new],
            [str(r.dataset) for _, r in new],
            [str(r.state) for _, r in new],
            [r.reason for _, r in new],
            [r.missing_permission for _, r in new],
            [r.checked_at for _, r in new],
        ],
    )


async def _held(connection: Connection, ids: Sequence[UUID]) -> set[UUID]:
    rows = await connection.execute(
        "SELECT DISTINCT connector_id FROM rollcall.deletion_holds"
        " WHERE connector_id = ANY(%b) AND state IN ('open', 'released')",
        [sorted(ids)],
    )
    return {row["connector_id"] async for row in rows}


async def _deaths(connection: Connection, connector_id: UUID) -> Deaths:
    rows = await connection.execute(
        """
        SELECT count(*) FILTER (WHERE suspect_since IS NOT NULL OR (status = 'disconnected'
                                AND status_since > now() - %(window)s)) AS dead, count(*) AS polled
        FROM rollcall.connectors
        WHERE id <> %(id)s AND (last_polled_at > now() - %(window)s OR suspect_since IS NOT NULL
                                OR (status = 'disconnected' AND status_since > now() - %(window)s))
        """,
        {"window": CEILING_WINDOW, "id": connector_id},
    )
    row = await rows.fetchone()
    return Deaths(row["dead"], row["polled"] + 1) if row else Deaths()
