"""Announcements: what the world must hear of control facts, written in the same transaction as the fact.

A row stays until the partition's writer has relayed it to the stream, in order of `seq`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from schemas.events import event_type, padded, source_of, timestamp
from worker.entries import Entry
from worker.store.db import Connection, Row


@dataclass(frozen=True, slots=True)
class Announcement:
    """`what` is the type without prefix (`connector.connected`), `data` as in `schemas.events`."""

    tenant_id: str
    connector_id: UUID
    partition: int
    what: str
    subject: str
    data: Mapping[str, Any]
    run_id: UUID | None = None


async def announce(connection: Connection, announcements: Sequence[Announcement]) -> None:
    """Write announcements inside the caller's transaction."""
    if not announcements:
        return
    await connection.execute(
        """
        INSERT INTO rollcall.announcements (tenant_id, connector_id, partition, type, subject, data, run_id)
        SELECT tenant_id, connector_id, partition, type, subject, data::jsonb, run_id
        FROM unnest(%b::text[], %b::uuid[], %b::int[], %b::text[], %b::text[], %b::text[], %b::uuid[])
             AS n (tenant_id, connector_id, partition, type, subject, data, run_id)
        """,
        [
            [a.tenant_id for a in announcements],
            [a.connector_id for a in announcements],
            [a.partition for a in announcements],
            [event_type(a.what) for a in announcements],
            [a.subject for a in announcements],
            [orjson.dumps(a.data, default=str).decode() for a in announcements],
            [a.run_id for a in announcements],
        ],
    )


async def unpublished(
    connection: Connection, partitions: Sequence[int], *, most: int = 500
) -> dict[int, list[tuple[UUID, Entry]]]:
    """Read the oldest announcements of partitions that were not relayed yet, as stream entries, by partition."""
    rows = await connection.execute(
        """
        SELECT id, seq, partition, tenant_id, connector_id, type, subject, run_id, data, created_at
        FROM rollcall.announcements WHERE partition = ANY(%b) AND published_at IS NULL ORDER BY seq LIMIT %s
        """,
        [list(partitions), most],
    )
    found: dict[int, list[tuple[UUID, Entry]]] = {}
    async for row in rows:
        found.setdefault(row["partition"], []).append((row["id"], _entry(row)))
    return found


def _entry(row: Row) -> Entry:
    connector = str(row["connector_id"])
    event = {
        "specversion": "1.0",
        "id": str(row["id"]),
        "source": source_of(row["tenant_id"], connector),
        "type": row["type"],
        "subject": row["subject"],
        "time": timestamp(row["created_at"]),
        "datacontenttype": "application/json",
        "tenantid": row["tenant_id"],
        "connectorid": connector,
        "partitionkey": connector,
        "sequence": padded(row["seq"]),
        "data": row["data"],
    }
    if row["run_id"]:
        event["correlationid"] = str(row["run_id"])
    return Entry({b"ce": orjson.dumps([event]), b"connector": connector.encode()})


async def mark_published(connection: Connection, ids: Sequence[UUID]) -> None:
    """Note that these were relayed."""
    await connection.execute("UPDATE rollcall.announcements SET published_at = now() WHERE id = ANY(%b)", [list(ids)])
