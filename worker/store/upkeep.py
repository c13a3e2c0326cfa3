"""Upkeep: nothing is kept longer than said."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from worker.store.db import Connection, Database

BATCH = 10_000
LATE = timedelta(days=1)
"""How long after a connector's end something of it may still be written to Redis: far longer than any task runs."""


async def age_out(db: Database, *, run_days: int, people_days: int) -> dict[str, int]:
    """Forget finished runs, relayed announcements, removed people's names and silent processes."""

    async def work(connection: Connection) -> dict[str, int]:
        runs = await connection.execute(
            "DELETE FROM rollcall.sync_runs WHERE id IN (SELECT id FROM rollcall.sync_runs"
            " WHERE finished_at < now() - %s LIMIT %s)",
            [timedelta(days=run_days), BATCH],
        )
        people = await connection.execute(
            "UPDATE rollcall.members SET email = NULL, first_name = NULL WHERE removed_at < now() - %s"
            " AND (email IS NOT NULL OR first_name IS NOT NULL)",
            [timedelta(days=people_days)],
        )
        announcements = await connection.execute(
            "DELETE FROM rollcall.announcements WHERE id IN (SELECT id FROM rollcall.announcements"
            " WHERE published_at < now() - %s LIMIT %s)",
            [timedelta(days=run_days), BATCH],
        )
        silent = await connection.execute("DELETE FROM rollcall.workers WHERE seen_at < now() - interval '1 day'")
        return {
            "runs": runs.rowcount,
            "people": people.rowcount,
            "announcements": announcements.rowcount,
            "workers": silent.rowcount,
        }

    return await db.transaction(work)


async def deleted_lately(db: Database) -> list[tuple[int, UUID]]:
    """Find connectors that were deleted within `LATE`, each with its partition."""

    async def work(connection: Connection) -> list[tuple[int, UUID]]:
        rows = await connection.execute(
            "SELECT partition, id FROM rollcall.connectors WHERE deleted_at > now() - %s", [LATE]
        )
        return [(row["partition"], row["id"]) async for row in rows]

    return await db.transaction(work)
