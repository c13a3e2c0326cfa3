"""Heartbeats of processes: what there is to fill, and whether each makes progress."""

from __future__ import annotations

import orjson

from worker.store.db import Connection, Database


async def beat_heart(db: Database, name: str, role: str, slots: int, *, quiet_s: float) -> None:
    """Note that a process lives; `quiet_s` is how long it has finished nothing."""

    async def work(connection: Connection) -> None:
        await connection.execute(
            """
            INSERT INTO rollcall.workers (name, role, slots, details) VALUES (%s, %s, %s, %s::jsonb)
            ON CONFLICT (name) DO UPDATE SET role = excluded.role, slots = excluded.slots, seen_at = now(),
                                             details = excluded.details
            """,
            [name, role, slots, orjson.dumps({"quiet_s": round(quiet_s, 1)}).decode()],
        )

    await db.statement(work)


async def leave(db: Database, name: str) -> None:
    """Forget a process that ends in order."""

    async def work(connection: Connection) -> None:
        await connection.execute("DELETE FROM rollcall.workers WHERE name = %s", [name])

    await db.statement(work)


async def writers(connection: Connection) -> int:
    """Count the writers whose hearts beat: they share the partitions."""
    rows = await connection.execute(
        "SELECT count(*) AS n FROM rollcall.workers WHERE role = 'writer' AND seen_at > now() - interval '60 seconds'"
    )
    row = await rows.fetchone()
    return int(row["n"]) if row else 0
