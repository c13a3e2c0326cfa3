"""Requests: runs that somebody asks for, written once whatever is asked again; a refusal is a row too."""

from __future__ import annotations

from uuid import UUID

from schemas.connectors import LIVE, RunKind, RunStatus, Status
from worker.errors import Refused
from worker.store.announcements import announce
from worker.store.db import Connection, Row
from worker.store.runs import SCHEDULER, run_announcement, speaks


async def request(
    connection: Connection, *, tenant_id: str, connector_id: UUID, kind: RunKind, run_id: UUID, actor: str
) -> Row:
    """Write the run or its refusal inside the caller's transaction; see `worker.connectors.request_sync`."""
    if actor == SCHEDULER:
        raise Refused(
            "actor_invalid", f"The actor {SCHEDULER!r} is our own: its runs are not announced. Choose another"
        )
    # Another tenant's connector is not even locked: it answers like one that does not exist.
    rows = await connection.execute(
        "SELECT * FROM rollcall.connectors WHERE id = %s AND tenant_id = %s FOR NO KEY UPDATE",
        [connector_id, tenant_id],
    )
    connector = await rows.fetchone()
    reason = await _refusal(connection, connector, kind, run_id)
    inserted = await connection.execute(
        """
        INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, error_reason,
                                        finished_at)
        VALUES (%s, %s, %s, %s, %s, %s, %s, CASE WHEN %s THEN now() END) ON CONFLICT (id) DO NOTHING RETURNING *
        """,
        [
            run_id,
            connector_id,
            tenant_id,
            kind,
            actor,
            RunStatus.REFUSED if reason else RunStatus.QUEUED,
            reason,
            reason is not None,
        ],
    )
    run = await inserted.fetchone()
    if run is None:
        return await _asked_before(connection, run_id, (tenant_id, connector_id, kind))
    if connector is not None and reason is None and speaks(run):
        await announce(connection, [run_announcement(run, connector)])
    return run


async def _refusal(connection: Connection, connector: Row | None, kind: RunKind, run_id: UUID) -> str | None:
    if connector is None:
        return "unknown_connector"
    status = Status(connector["status"])
    if status not in LIVE:
        return status
    active = await connection.execute(
        "SELECT 1 FROM rollcall.sync_runs"
        " WHERE connector_id = %s AND kind = %s AND status IN ('queued', 'running') AND id <> %s",
        [connector["id"], kind, run_id],
    )
    return "already_running" if await active.fetchone() else None


async def _asked_before(connection: Connection, run_id: UUID, asked: tuple[str, UUID, RunKind]) -> Row:
    rows = await connection.execute("SELECT * FROM rollcall.sync_runs WHERE id = %s", [run_id])
    run = await rows.fetchone()
    if run is None or (run["tenant_id"], run["connector_id"], run["kind"]) != asked:
        raise Refused("run_id_taken", "This run_id belongs to another request: choose a new UUID for each")
    return run
