"""Reading: what the command line shows. No query reads a key, sealed or not."""

from __future__ import annotations

from typing import Any, Final, LiteralString
from uuid import UUID

from worker.store.db import Connection, Database, Row

_CONNECTOR: Final = """
    id, tenant_id, name, external_ref, region, base_url, status, status_reason, status_since, action, hint,
    workspace_id, plan, version, poll_interval_s, next_sync_at, last_synced_at, suspect_since, created_at, updated_at,
    deleted_at
"""
_RUN: Final = """
    r.id, r.connector_id, r.tenant_id, c.name AS connector, r.kind, r.requested_by, r.status, r.parts_total,
    CASE WHEN r.finished_at IS NOT NULL THEN r.parts_done ELSE
        (SELECT count(*) FROM rollcall.sync_parts p WHERE p.run_id = r.id AND p.status IN ('succeeded', 'skipped'))
    END AS parts_now,
    r.parts_done, r.parts_failed, r.created_at, r.started_at, r.finished_at, r.error_reason, r.warnings
"""


async def _rows(db: Database, query: LiteralString, **values: object) -> list[Row]:
    async def work(connection: Connection) -> list[Row]:
        return await (await connection.execute(query, values)).fetchall()

    return await db.transaction(work)


async def connectors(db: Database, *, tenant_id: str | None = None, deleted: bool = False) -> list[Row]:
    """List connectors by tenant and name; deleted ones only if asked for."""
    return await _rows(
        db,
        f"SELECT {_CONNECTOR} FROM rollcall.connectors WHERE (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s)"  # noqa: S608 - constant columns
        " AND (%(deleted)s OR deleted_at IS NULL) ORDER BY tenant_id, name, created_at",
        tenant=tenant_id,
        deleted=deleted,
    )


async def connector(db: Database, connector_id: UUID) -> Row:
    """Read a connector with `access`, `counts` of its records and `usage_days` covered."""
    found = (await _rows(db, f"SELECT {_CONNECTOR} FROM rollcall.connectors WHERE id = %(id)s", id=connector_id))[0]  # noqa: S608 - constant columns
    access = await _rows(
        db,
        "SELECT dataset, state, reason, missing_permission, checked_at, version FROM rollcall.connector_access"
        " WHERE connector_id = %(id)s ORDER BY dataset",
        id=connector_id,
    )
    counts = await _rows(
        db,
        """
        SELECT (SELECT count(*) FROM rollcall.members WHERE connector_id = %(id)s AND removed_at IS NULL) AS members,
               (SELECT count(*) FROM rollcall.groups WHERE connector_id = %(id)s AND removed_at IS NULL) AS groups,
               (SELECT count(*) FROM rollcall.service_accounts WHERE connector_id = %(id)s AND removed_at IS NULL)
                   AS service_accounts,
               (SELECT count(*) FROM rollcall.api_keys WHERE connector_id = %(id)s AND removed_at IS NULL) AS api_keys,
               (SELECT count(DISTINCT day) FROM rollcall.usage_coverage WHERE connector_id = %(id)s) AS usage_days
        """,
        id=connector_id,
    )
    return {**found, "access": access, "counts": counts[0]}


async def runs(db: Database, *, connector_id: UUID | None = None, most: int = 20) -> list[Row]:
    """List the latest runs, of one connector or of all."""
    return await _rows(
        db,
        f"SELECT {_RUN} FROM rollcall.sync_runs r LEFT JOIN rollcall.connectors c"  # noqa: S608 - constant columns
        " ON c.id = r.connector_id AND c.tenant_id = r.tenant_id"
        " WHERE %(id)s::uuid IS NULL OR r.connector_id = %(id)s ORDER BY r.created_at DESC LIMIT %(most)s",
        id=connector_id,
        most=most,
    )


async def run(db: Database, run_id: UUID) -> Row:
    """Read a run; `owner_must_act` tells whether its failures are for the connector's owner to mend."""
    rows = await _rows(
        db,
        f"SELECT {_RUN}, EXISTS (SELECT 1 FROM rollcall.sync_parts p WHERE p.run_id = r.id"  # noqa: S608 - constant columns
        " AND p.status IN ('failed', 'skipped') AND p.error_class = 'OwnerMustAct') AS owner_must_act"
        " FROM rollcall.sync_runs r LEFT JOIN rollcall.connectors c ON c.id = r.connector_id WHERE r.id = %(id)s",
        id=run_id,
    )
    return rows[0]


async def active_run(db: Database, connector_id: UUID, kind: str) -> UUID | None:
    """Find the run of this kind that is under way."""
    rows = await _rows(
        db,
        "SELECT id FROM rollcall.sync_runs WHERE connector_id = %(id)s AND kind = %(kind)s"
        " AND status IN ('queued', 'running')",
        id=connector_id,
        kind=kind,
    )
    return rows[0]["id"] if rows else None


async def partitions(db: Database) -> int:
    """Read how many streams there are."""
    return int((await _rows(db, "SELECT partitions FROM rollcall.meta"))[0]["partitions"])


async def status(db: Database) -> dict[str, Any]:
    """Read the state of the whole: connectors, processes, parts, announcements and verdicts that wait."""
    counted = await _rows(db, "SELECT status, count(*) AS n FROM rollcall.connectors GROUP BY 1 ORDER BY 1")
    workers = await _rows(
        db,
        "SELECT name, role, slots, seen_at, details, seen_at > now() - interval '30 seconds' AS alive"
        " FROM rollcall.workers WHERE seen_at > now() - interval '1 hour' ORDER BY role, name",
    )
    parts = await _rows(
        db,
        "SELECT kind, status, count(*) AS n, min(not_before) AS oldest FROM rollcall.sync_parts"
        " WHERE open GROUP BY 1, 2 ORDER BY 1, 2",
    )
    others = await _rows(
        db,
        """
        SELECT (SELECT count(*) FROM rollcall.announcements WHERE published_at IS NULL) AS unpublished,
               (SELECT min(created_at) FROM rollcall.announcements WHERE published_at IS NULL) AS oldest_unpublished,
               (SELECT count(*) FROM rollcall.connectors WHERE next_sync_at < now() - interval '60 seconds'
                       AND status NOT IN ('paused', 'deleted')) AS overdue,
               (SELECT count(*) FROM rollcall.deletion_holds WHERE state IN ('open', 'released')) AS holds
        """,
    )
    suspects = await _rows(
        db,
        "SELECT id, tenant_id, name, suspect_since FROM rollcall.connectors WHERE suspect_since IS NOT NULL"
        " ORDER BY suspect_since LIMIT 100",
    )
    return {
        "connectors": {row["status"]: row["n"] for row in counted},
        "processes": workers,
        "parts": parts,
        **others[0],
        "suspects": suspects,
    }


async def holds(db: Database, *, tenant_id: str | None = None, every: bool = False) -> list[Row]:
    """List holds, by default those under way."""
    return await _rows(
        db,
        """
        SELECT h.id, h.tenant_id, h.connector_id, c.name AS connector, h.dataset, h.known, h.missing, h.missing_digest,
               h.runs, h.state, h.first_seen_at, h.expires_at, h.released_by
        FROM rollcall.deletion_holds h JOIN rollcall.connectors c ON c.id = h.connector_id
        WHERE (%(tenant)s::text IS NULL OR h.tenant_id = %(tenant)s)
          AND (%(every)s OR h.state IN ('open', 'released'))
        ORDER BY h.first_seen_at DESC
        """,
        tenant=tenant_id,
        every=every,
    )


async def hold(db: Database, hold_id: UUID) -> Row | None:
    """Read a hold with its `records`: by subject, in how many runs in a row it was missing."""
    rows = await _rows(
        db,
        """
        SELECT h.id, h.tenant_id, h.connector_id, c.name AS connector, h.dataset, h.known, h.missing, h.missing_digest,
               h.runs, h.state, h.first_seen_at, h.expires_at, h.released_by, h.released, h.records
        FROM rollcall.deletion_holds h JOIN rollcall.connectors c ON c.id = h.connector_id WHERE h.id = %(id)s
        """,
        id=hold_id,
    )
    if not rows:
        return None
    return rows[0] | {"records": {subject: count for subject, (count, _) in rows[0]["records"].items()}}
