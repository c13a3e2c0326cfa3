"""Connectors in Postgres: each change of state or key in one transaction, with its announcement."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from psycopg import sql
from psycopg.errors import UniqueViolation

from schemas.connectors import LIVE, Access, Dataset, RunKind, Status, StatusReason, may_move
from worker.connectors import Connector, KeptKey, NewConnector, key_in_use, other_workspace
from worker.errors import Refused
from worker.plan import AccessRow, partition_of
from worker.store.announcements import announce
from worker.store.conclude import connector_announcement, health_of, lock_connectors
from worker.store.db import Connection, Database, Row
from worker.store.requests import request
from worker.store.runs import drop_parts
from worker.store.sending import access_of
from worker.store.tables import TABLES
from worker.verdict import Health, alive, derive

_PURGED: Final = (
    "connector_access",
    *(table.name for table in TABLES.values()),
    "credit_usage",
    "usage_coverage",
    "deletion_holds",
    "sync_parts",
    "sync_runs",
)
"""What goes with a connector, in the order in which locks are taken."""
_PURGE_TIMEOUT: Final = "600s"


class PgConnectors:
    """`worker.connectors.Registry` on Postgres, and what else an operator does to a connector."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def find(self, wanted: str, *, tenant_id: str | None = None, deleted: bool = False) -> Connector:
        """Find a connector by id, or among the living by name; `deleted`: by id a deleted one as well.

        Raises:
            Refused: there is none, or several tenants have one of this name.

        """
        by_id = _uuid(wanted)

        async def work(connection: Connection) -> list[Row]:
            rows = await connection.execute(
                """
                SELECT * FROM rollcall.connectors
                WHERE (id = %(id)s::uuid OR (name = %(wanted)s AND deleted_at IS NULL))
                  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s) AND (%(deleted)s OR deleted_at IS NULL)
                ORDER BY id = %(id)s::uuid DESC NULLS LAST, tenant_id
                """,
                {"id": by_id, "wanted": wanted, "tenant": tenant_id, "deleted": deleted},
            )
            return await rows.fetchall()

        found = await self._db.transaction(work)
        if not found:
            raise _unknown()
        if len(found) > 1 and found[0]["id"] != by_id:
            tenants = ", ".join(row["tenant_id"] for row in found)
            raise Refused("ambiguous_name", f"Several tenants have a connector of this name ({tenants}): add --tenant")
        return connector_of(found[0])

    async def key_holder(self, tenant_id: str, fingerprints: Sequence[str]) -> Connector | None:
        """Find the holder of a key; see `worker.connectors.Registry`."""

        async def work(connection: Connection) -> Connector | None:
            rows = await connection.execute(
                "SELECT * FROM rollcall.connectors"
                " WHERE tenant_id = %s AND key_fingerprint = ANY(%s) AND deleted_at IS NULL LIMIT 1",
                [tenant_id, list(fingerprints)],
            )
            row = await rows.fetchone()
            return connector_of(row) if row else None

        return await self._db.transaction(work)

    async def add(
        self,
        connector_id: UUID,
        new: NewConnector,
        key: KeptKey,
        *,
        base_url: str,
        workspace_id: str | None,
        poll_interval_s: int,
    ) -> Connector:
        """Write a connector with its access rows; see `worker.connectors.Registry`."""

        async def work(connection: Connection) -> Connector:
            meta = await (await connection.execute("SELECT partitions FROM rollcall.meta")).fetchone()
            partition = partition_of(connector_id, meta["partitions"] if meta else 1)
            async with _named_refusals(connection, new.tenant_id, new.name, key, workspace_id):
                rows = await connection.execute(
                    """
                    INSERT INTO rollcall.connectors
                        (id, tenant_id, name, external_ref, region, base_url, workspace_id, poll_interval_s,
                         sealed_key, key_fingerprint, hint, partition, next_sync_at)
                    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, now()) RETURNING *
                    """,
                    [
                        connector_id, new.tenant_id, new.name, new.external_ref, new.region, base_url, workspace_id,
                        poll_interval_s, key.sealed, key.fingerprint, key.hint, partition,
                    ],
                )  # fmt: skip
                row = await rows.fetchone()
            if row is None:
                raise RuntimeError("an inserted row comes back")
            await connection.execute(
                "INSERT INTO rollcall.connector_access (connector_id, dataset) SELECT %s, unnest(%s::text[])",
                [connector_id, [str(d) for d in Dataset]],
            )
            access = {d: AccessRow(d) for d in Dataset}
            created = connector_announcement(row, health_of(row), None, access)
            await announce(connection, [replace(created, what="connector.created")])
            return connector_of(row)

        return await self._db.transaction(work)

    async def set_key(self, connector_id: UUID, key: KeptKey, *, workspace_id: str | None) -> Connector:
        """Replace the key; see `worker.connectors.Registry`. Late answers to the old key say nothing more."""

        async def work(connection: Connection) -> Connector:
            row = await _locked(connection, connector_id)
            if workspace_id and row["workspace_id"] not in {None, workspace_id}:
                raise other_workspace()
            async with _named_refusals(connection, row["tenant_id"], row["name"], key, workspace_id):
                await connection.execute(
                    "UPDATE rollcall.connectors SET sealed_key = %s, key_fingerprint = %s, hint = %s,"
                    " workspace_id = coalesce(workspace_id, %s) WHERE id = %s",
                    [key.sealed, key.fingerprint, key.hint, workspace_id, connector_id],
                )
            old = health_of(row)
            if old.status is Status.DISCONNECTED:  # its probe would stand in the way of a whole sync
                await drop_parts(connection, row, reason="reconnected", status="cancelled")
            new = await _by_access(connection, row, old, final=old.status is not Status.PENDING)
            what = f"connector.{new.status}" if new.status in {Status.CONNECTED, Status.DEGRADED} else None
            return await _move(connection, row, new, what=what, due=new.status is not Status.PAUSED)

        return await self._db.transaction(work)

    async def pause(self, connector_id: UUID) -> Connector:
        """Stop syncing; open runs are cancelled. Again is harmless. Raises Refused: no such connector."""

        async def work(connection: Connection) -> Connector:
            row = await _locked(connection, connector_id)
            if row["status"] == Status.PAUSED:
                return connector_of(row)
            await drop_parts(connection, row, reason=StatusReason.PAUSED_BY_USER, status="cancelled")
            paused = Health(Status.PAUSED, StatusReason.PAUSED_BY_USER)
            return await _move(connection, row, paused, what="connector.paused", due=False)

        return await self._db.transaction(work)

    async def resume(self, connector_id: UUID) -> Connector:
        """Sync a paused connector again, at once. Again is harmless.

        Raises:
            Refused: no such connector, or it is disconnected.

        """

        async def work(connection: Connection) -> Connector:
            row = await _locked(connection, connector_id)
            if row["status"] == Status.DISCONNECTED:
                raise Refused("not_paused", "This connector is disconnected: reconnect it with a valid API key")
            if row["status"] in LIVE:
                return connector_of(row)
            resumed = await _by_access(connection, row, Health(Status.PENDING), final=False)
            return await _move(connection, row, resumed, what="connector.resumed", due=True)

        return await self._db.transaction(work)

    async def delete(self, connector_id: UUID) -> Connector:
        """Delete a connector; see `worker.connectors.Registry`. Its row stays, with its name and no key."""

        async def work(connection: Connection) -> Connector:
            row = await _locked(connection, connector_id, deleted=True)
            if row["status"] == Status.DELETED:
                return connector_of(row)
            await connection.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(_PURGE_TIMEOUT))
            await drop_parts(connection, row, reason="deleted", status="cancelled")
            for table in _PURGED:
                await connection.execute(
                    sql.SQL("DELETE FROM rollcall.{} WHERE connector_id = %s").format(sql.Identifier(table)),
                    [connector_id],
                )
            await connection.execute(
                "UPDATE rollcall.connectors SET deleted_at = now(), sealed_key = NULL, key_fingerprint = NULL,"
                " hint = NULL, workspace_id = NULL, plan = NULL, cost_since = NULL WHERE id = %s",
                [connector_id],
            )
            return await _move(connection, row, Health(Status.DELETED), what="connector.deleted", due=False)

        return await self._db.transaction(work)

    async def request_sync(
        self, *, tenant_id: str, connector_id: UUID, kind: RunKind, run_id: UUID, actor: str
    ) -> Mapping[str, Any]:
        """Write the run or its refusal; see `worker.connectors.request_sync`."""

        async def work(connection: Connection) -> Row:
            return await request(
                connection, tenant_id=tenant_id, connector_id=connector_id, kind=kind, run_id=run_id, actor=actor
            )

        return await self._db.transaction(work)


def connector_of(row: Row) -> Connector:
    """Read a row of `connectors`."""
    return Connector(
        id=row["id"],
        tenant_id=row["tenant_id"],
        name=row["name"],
        status=Status(row["status"]),
        base_url=row["base_url"],
        partition=row["partition"],
        workspace_id=row["workspace_id"],
        cost_since=row["cost_since"],
        sealed_key=row["sealed_key"],
    )


async def _locked(connection: Connection, connector_id: UUID, *, deleted: bool = False) -> Row:
    row = (await lock_connectors(connection, [connector_id])).get(connector_id)
    if row is None or (row["status"] == Status.DELETED and not deleted):
        raise _unknown()
    return row


async def _by_access(connection: Connection, row: Row, old: Health, *, final: bool) -> Health:
    """Give the health of a connector whose key is taken to live, by what its access rows say."""
    access = (await access_of(connection, [row["id"]]))[row["id"]]
    holds = await connection.execute(
        "SELECT 1 FROM rollcall.deletion_holds WHERE connector_id = %s AND state IN ('open', 'released') LIMIT 1",
        [row["id"]],
    )
    known = any(r.state is not Access.UNKNOWN for r in access.values())
    held = await holds.fetchone() is not None
    return alive(old, derive(access, removals_held=held, final=final or known))


async def _move(connection: Connection, row: Row, health: Health, *, what: str | None, due: bool) -> Connector:
    """Write a state that somebody asked for, under a new version: what is under way says nothing about it."""
    old = Status(row["status"])
    if not may_move(old, health.status):
        raise RuntimeError(f"illegal move of a connector: {old} to {health.status}")
    written = await connection.execute(
        """
        UPDATE rollcall.connectors SET
            status = %s, status_reason = %s, action = %s, strikes = 0, strike_run = NULL, suspect_since = NULL,
            status_since = CASE WHEN status = %s THEN status_since ELSE now() END, probes = 0,
            version = greatest(version + 1, (extract(epoch FROM clock_timestamp()) * 1e6)::bigint),
            next_sync_at = CASE WHEN %s THEN now() END, updated_at = now()
        WHERE id = %s RETURNING *
        """,
        [health.status, health.reason, health.action, health.status, due, row["id"]],
    )
    new = await written.fetchone()
    if new is None:
        raise RuntimeError("a locked row cannot vanish")
    if what is not None:
        access = (await access_of(connection, [row["id"]]))[row["id"]]
        await announce(connection, [replace(connector_announcement(row, health, old, access), what=what)])
    return connector_of(new)


@asynccontextmanager
async def _named_refusals(
    connection: Connection, tenant_id: str, name: str, key: KeptKey, workspace_id: str | None
) -> AsyncIterator[None]:
    """Turn a broken rule of uniqueness into a refusal that names the other connector."""
    try:
        async with connection.transaction():  # a savepoint, since the other's name is read after the failure
            yield
    except UniqueViolation as error:
        rows = await connection.execute(
            "SELECT name, key_fingerprint = %s AS same_key FROM rollcall.connectors WHERE tenant_id = %s"
            " AND deleted_at IS NULL AND (key_fingerprint = %s OR workspace_id = %s) ORDER BY same_key DESC NULLS LAST",
            [key.fingerprint, tenant_id, key.fingerprint, workspace_id],
        )
        other = await rows.fetchone() or {"name": name}
        if error.diag.constraint_name == "connectors_key":
            raise key_in_use(other["name"]) from None
        if error.diag.constraint_name == "connectors_workspace":
            raise Refused(
                "workspace_taken",
                f"Connector {other['name']!r} is of the same workspace: reconnect that one with this key instead",
            ) from None
        raise Refused("name_taken", f"The tenant has a connector named {name!r}: choose another name") from None


def _unknown() -> Refused:
    return Refused("unknown_connector", "There is no such connector: `rollcall connectors list` shows them")


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
