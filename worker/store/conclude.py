"""Conclude: what answered parts mean for access, runs and the connector's status, in one transaction.

Callers hold the connector rows' locks already (`lock_connectors`) and have written their parts. The judgement
itself is `worker.verdict`; this module reads rows, asks it, and writes what differs, set by set.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
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
    in_time: dict[UUID, list[Outcome]] = {cid: [] for cid in ids}
    for outcome in outcomes:
        row = connectors.get(outcome.connector_id)
        if row is not None and outcome.number > row["version"]:
            in_time[outcome.connector_id].append(outcome)
            rows = access[outcome.connector_id]
            rows[outcome.dataset] = access_after(
                rows.get(outcome.dataset, AccessRow(outcome.dataset)), outcome.verdict, now=row["now"]
            )
    await _write_access(connection, access, before)
    finished = await finish_runs(connection, {*runs, *(o.run_id for o in outcomes)}, connectors)
    ended = {r["connector_id"] for r in finished.ended}
    moves: list[_Move] = []
    for connector_id, row in connectors.items():
        rows, old = access[connector_id], before[connector_id]
        health = await _judge(connection, row, in_time[connector_id], rows, connector_id in ended, held)
        changed = _differs(old, rows)
        if health_of(row) != health or (changed and health.status is Status.DEGRADED):
            moves.append(_Move(row, health, rows, changed))
        if row["backfilled_at"] is not None and _gained_usage(old, rows):
            await connection.execute("UPDATE rollcall.connectors SET backfilled_at = NULL WHERE id = %s", [row["id"]])
    await _write_moves(connection, moves)
    return finished.unsent


def _gained_usage(before: Mapping[Dataset, AccessRow], after: Mapping[Dataset, AccessRow]) -> bool:
    return any(
        after[d].state is Access.GRANTED and before.get(d, AccessRow(d)).state is not Access.GRANTED
        for d in USAGE
        if d in after
    )


async def _judge(
    connection: Connection,
    row: Row,
    outcomes: Sequence[Outcome],
    access: Mapping[Dataset, AccessRow],
    final: bool,
    held: set[UUID],
) -> Health:
    health, proven = health_of(row), False
    for outcome in outcomes:
        if proves_alive(outcome.verdict):
            if proven:
                continue  # what is proven once more changes nothing
            known = final or health.status is not Status.PENDING
            health = alive(health, derive(access, removals_held=row["id"] in held, final=known))
            proven = True
        elif outcome.verdict.finding in DOUBTS:
            deaths = await _deaths(connection, row["id"])
            health = doubted(health, outcome.verdict, run_id=str(outcome.run_id), deaths=deaths, now=row["now"])
            proven = False
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


@dataclass(frozen=True, slots=True)
class _Move:
    """What a connector becomes, and whether its access does not stay as it was."""

    row: Row
    health: Health
    access: Mapping[Dataset, AccessRow]
    access_changed: bool

    @property
    def old(self) -> Health:
        return health_of(self.row)

    @property
    def dies(self) -> bool:
        return self.health.status is Status.DISCONNECTED and self.old.status is not Status.DISCONNECTED

    @property
    def recovers(self) -> bool:
        return self.old.status is Status.DISCONNECTED and self.health.status is not Status.DISCONNECTED

    @property
    def shows(self) -> bool:
        """Tell whether the world hears of it."""
        before, after = self.old, self.health
        moved = (before.status, before.reason, before.action) != (after.status, after.reason, after.action)
        return moved or (self.access_changed and after.status is Status.DEGRADED)

    @property
    def next_sync_at(self) -> datetime:
        now: datetime = self.row["now"]
        if self.dies:
            return plan.next_probe(0, now=now, interval_s=REPROBE_INTERVAL_S, jitter=random.random())  # noqa: S311 - spread, no secret
        next_sync: datetime = now if self.recovers else self.row["next_sync_at"]
        return next_sync


async def _write_moves(connection: Connection, moves: Sequence[_Move]) -> None:
    """Write what connectors become, drop the work of dead keys, and announce what shows."""
    if not moves:
        return
    for move in moves:
        if not may_move(move.old.status, move.health.status):
            raise RuntimeError(f"illegal move of a connector: {move.old.status} to {move.health.status}")
    await connection.execute(
        """
        UPDATE rollcall.connectors c SET
            status = n.status, status_reason = n.reason, action = n.action, strikes = n.strikes,
            strike_run = n.strike_run, suspect_since = n.suspect_since,
            status_since = CASE WHEN c.status = n.status THEN status_since ELSE now() END,
            version = CASE WHEN n.dies OR n.recovers
                      THEN greatest(version + 1, (extract(epoch FROM clock_timestamp()) * 1e6)::bigint)
                      ELSE version END,
            next_sync_at = n.next_sync_at, probes = CASE WHEN n.dies OR n.recovers THEN 0 ELSE probes END,
            updated_at = now()
        FROM unnest(%b::uuid[], %b::text[], %b::text[], %b::text[], %b::int[], %b::uuid[], %b::timestamptz[],
                    %b::timestamptz[], %b::bool[], %b::bool[])
             AS n (id, status, reason, action, strikes, strike_run, suspect_since, next_sync_at, dies, recovers)
        WHERE c.id = n.id
        """,
        [
            [m.row["id"] for m in moves],
            [str(m.health.status) for m in moves],
            [m.health.reason and str(m.health.reason) for m in moves],
            [str(m.health.action) for m in moves],
            [m.health.strikes for m in moves],
            [m.health.strike_run and UUID(m.health.strike_run) for m in moves],
            [m.health.suspect_since for m in moves],
            [m.next_sync_at for m in moves],
            [m.dies for m in moves],
            [m.recovers for m in moves],
        ],
    )
    for move in moves:
        if move.dies:
            await drop_parts(connection, move.row, reason=str(move.health.reason))
    shown = [move for move in moves if move.shows]
    for move in shown:
        metrics.TRANSITIONS.labels(move.health.status, move.health.reason or "none").inc()
    await announce(connection, [connector_announcement(m.row, m.health, m.old.status, m.access) for m in shown])


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
    """Read access rows; what they say changes only while their connector is locked."""
    rows = await connection.execute(
        """
        SELECT connector_id, dataset, state, reason, missing_permission, checked_at
        FROM rollcall.connector_access WHERE connector_id = ANY(%b) ORDER BY connector_id, dataset
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
