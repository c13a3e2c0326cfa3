"""Operating: what an operator decides over holds, and the re-sealing of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from worker.errors import Refused
from worker.store.announcements import announce
from worker.store.conclude import lock_connectors
from worker.store.db import Connection, Database, Row
from worker.store.holds import removals


async def release(db: Database, hold_id: UUID, *, digest: str, actor: str, valid: timedelta) -> None:
    """Let the held records go: exactly those that `digest` stands for, in syncs until `valid` is over.

    The connector is due at once; what its next listing lacks still is removed and announced then.

    Raises:
        Refused: there is no such open hold, or it holds other records by now.

    """

    async def work(connection: Connection) -> None:
        hold, _ = await _locked(connection, hold_id)
        if hold["missing_digest"] != digest:
            raise Refused(
                "hold_changed", "Other records are held by now: look again (`rollcall holds show`), then release"
            )
        await connection.execute(
            "UPDATE rollcall.deletion_holds SET state = 'released', released = %s, released_by = %s,"
            " expires_at = now() + %s WHERE id = %s",
            [sorted(hold["records"]), actor, valid, hold_id],
        )
        await connection.execute(
            "UPDATE rollcall.connectors SET next_sync_at = now() WHERE id = %s AND next_sync_at > now()",
            [hold["connector_id"]],
        )

    await db.transaction(work)


async def reject(db: Database, hold_id: UUID, *, actor: str) -> None:
    """Close a hold without removing anything: if the records stay missing, counting begins anew.

    Raises:
        Refused: there is no such open hold.

    """

    async def work(connection: Connection) -> None:
        hold, connector = await _locked(connection, hold_id)
        await connection.execute(
            "UPDATE rollcall.deletion_holds SET state = 'rejected', released_by = %s WHERE id = %s", [actor, hold_id]
        )
        rejected = removals(
            connector, hold_id, hold["dataset"], "rejected", hold["known"], hold["missing"], reason="operator"
        )
        await announce(connection, [rejected])

    await db.transaction(work)


async def _locked(connection: Connection, hold_id: UUID) -> tuple[Row, Row]:
    """Lock the connector, then the hold, in the order that the writer takes them."""
    rows = await connection.execute("SELECT connector_id FROM rollcall.deletion_holds WHERE id = %s", [hold_id])
    found = await rows.fetchone()
    connectors = await lock_connectors(connection, [found["connector_id"]] if found else [])
    rows = await connection.execute(
        "SELECT * FROM rollcall.deletion_holds WHERE id = %s AND state IN ('open', 'released') FOR UPDATE", [hold_id]
    )
    hold = await rows.fetchone()
    if hold is None:
        raise Refused("unknown_hold", "There is no such open hold: `rollcall holds list` shows them")
    return hold, connectors[hold["connector_id"]]


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A connector's key as stored."""

    connector_id: UUID
    tenant_id: str
    name: str
    sealed: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Resealed:
    """A key sealed anew, with its fingerprint under the same master key."""

    key: SealedKey
    sealed: str = field(repr=False)
    fingerprint: str


async def sealed_keys(db: Database) -> list[SealedKey]:
    """Read every sealed key."""

    async def work(connection: Connection) -> list[SealedKey]:
        rows = await connection.execute(
            "SELECT id, tenant_id, name, sealed_key FROM rollcall.connectors WHERE sealed_key IS NOT NULL ORDER BY id"
        )
        return [SealedKey(row["id"], row["tenant_id"], row["name"], row["sealed_key"]) async for row in rows]

    return await db.transaction(work)


async def reseal(db: Database, keys: Sequence[Resealed]) -> int:
    """Write keys sealed anew, each unless it was replaced meanwhile; return how many were written."""

    async def work(connection: Connection) -> int:
        await lock_connectors(connection, [k.key.connector_id for k in keys])
        written = await connection.execute(
            """
            UPDATE rollcall.connectors c SET sealed_key = n.new, key_fingerprint = n.fingerprint
            FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[]) AS n (id, old, new, fingerprint)
            WHERE c.id = n.id AND c.sealed_key = n.old
            """,
            [
                [k.key.connector_id for k in keys],
                [k.key.sealed for k in keys],
                [k.sealed for k in keys],
                [k.fingerprint for k in keys],
            ],
        )
        return written.rowcount

    return await db.transaction(work) if keys else 0
