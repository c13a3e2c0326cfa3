"""Facts: reading a dataset back as the base of a comparison, and writing observations set by set."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from psycopg import sql

from schemas.connectors import Dataset
from schemas.records import Listing, Record
from worker.compare import day_of, fingerprints
from worker.entries import Observation
from worker.errors import ContractBroken
from worker.ports import Base
from worker.store.db import Connection, Database
from worker.store.staging import Stage
from worker.store.tables import OF_DATASET, TABLES, Table, record_of
from worker.usage import usage_day

_DAY = timedelta(days=1)


class PgFacts:
    """`worker.ports.Facts` on Postgres."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def base(self, connector_id: UUID, dataset: Dataset, *, since: date | None) -> Base:
        """Read a dataset with its version; of usage the fingerprints of the days from `since` on."""

        async def work(connection: Connection) -> Base:
            version, found = await _whole(connection, connector_id, dataset, since=since)
            return Base(version, days=fingerprints(found)) if dataset.dimension else Base(version, records=found)

        return await self._db.transaction(work, isolation="REPEATABLE READ")

    async def whole(self, connector_id: UUID, dataset: Dataset) -> tuple[int, Listing]:
        """Read a dataset whole with its version; see `worker.replay.Source`."""

        async def work(connection: Connection) -> tuple[int, Listing]:
            return await _whole(connection, connector_id, dataset, since=None)

        return await self._db.transaction(work, isolation="REPEATABLE READ")

    async def usage_days(self, connector_id: UUID, dataset: Dataset, days: Sequence[date]) -> tuple[int, Listing]:
        """Read whole usage days with the dataset's version."""

        async def work(connection: Connection) -> tuple[int, Listing]:
            version, found = await _whole(connection, connector_id, dataset, since=min(days))
            return version, {s: r for s, r in found.items() if day_of(s) in set(days)}

        return await self._db.transaction(work, isolation="REPEATABLE READ")


async def _whole(
    connection: Connection, connector_id: UUID, dataset: Dataset, *, since: date | None
) -> tuple[int, Listing]:
    version = await _version(connection, connector_id, dataset)
    if not version:
        return 0, {}  # what a registration wrote beforehand (a pinned workspace) was not observed
    if dataset.dimension:
        return version, await usage_records(connection, connector_id, dataset, since=since)
    return version, await records(connection, connector_id, dataset)


async def _version(connection: Connection, connector_id: UUID, dataset: Dataset) -> int:
    rows = await connection.execute(
        "SELECT version FROM rollcall.connector_access WHERE connector_id = %s AND dataset = %s",
        [connector_id, dataset],
    )
    row = await rows.fetchone()
    return int(row["version"]) if row else 0


async def records(connection: Connection, connector_id: UUID, dataset: Dataset) -> Listing:
    """Read a directory dataset as normalizing would give it."""
    if dataset is Dataset.WORKSPACE:
        rows = await connection.execute(
            "SELECT workspace_id, plan FROM rollcall.connectors WHERE id = %s"
            " AND (workspace_id IS NOT NULL OR plan IS NOT NULL)",
            [connector_id],
        )
        row = await rows.fetchone()
        return {"workspace": dict(row)} if row else {}
    found: Listing = {}
    for kind in OF_DATASET[dataset]:
        table = TABLES[kind]
        async for row in await connection.execute(table.select, [connector_id]):
            found[f"{kind}/{row[table.key]}"] = record_of(table, row)
    return found


async def usage_records(connection: Connection, connector_id: UUID, dataset: Dataset, *, since: date | None) -> Listing:
    """Read usage days as normalizing would give them; a covered day without rows is an empty day."""
    dimension, first = dataset.dimension, since or date.min
    covered = await connection.execute(
        "SELECT day::text, state FROM rollcall.usage_coverage WHERE connector_id = %s AND dimension = %s"
        " AND day >= %s AND state <> 'unavailable'",
        [connector_id, dimension, first],
    )
    settled = {row["day"]: row["state"] == "complete" async for row in covered}
    rows = await connection.execute(
        """
        SELECT bucket_start::text AS day, bucket_key, unit, label, amount FROM rollcall.credit_usage
        WHERE connector_id = %s AND dimension = %s AND bucket_start >= %s
        ORDER BY bucket_start, bucket_key COLLATE "C", unit COLLATE "C"
        """,
        [connector_id, dimension, first],
    )
    by_day: dict[str, list[Record]] = {day: [] for day in settled}
    async for row in rows:
        by_day[row["day"]].append(
            {
                "key": row["bucket_key"],
                "label": row["label"],
                "unit": row["unit"],
                "amount": format(row["amount"], "f"),
            }
        )
    return {f"usage/{dimension}/{day}": usage_day(dimension, day, by_day[day], settled=settled[day]) for day in settled}


async def write(connection: Connection, observations: Sequence[Observation], tenants: dict[UUID, str]) -> None:
    """Write the facts of observations (each dataset at most once) inside the caller's transaction.

    Raises:
        ContractBroken: an event lacks what its table needs.

    """
    groups: dict[tuple[str, bool], list[_Group]] = defaultdict(list)
    usage: dict[bool, list[Observation]] = defaultdict(list)
    for observation in observations:
        # Of a dataset of which nothing was applied yet, no row can be there. (It does not follow from an event that
        # tells of a new record: removed ones keep their rows.)
        new = observation.base == 0
        if observation.broken:
            raise ContractBroken("event_broken", "an event is not of the known shape")
        if observation.days:
            usage[new].append(observation)
        for kind, found in _by_kind(observation).items():
            groups[kind, new].append((observation, found))
    try:
        for (kind, new), some in groups.items():
            if kind == "workspace":
                await _write_workspaces(connection, some)
            elif kind in TABLES:
                await _write_records(connection, TABLES[kind], some, tenants, new=new)
        for new, some_days in usage.items():
            await _write_usage(connection, some_days, tenants, new=new)
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError, struct.error) as error:
        raise ContractBroken("event_broken", f"{type(error).__name__} while reading an event") from error


def _by_kind(observation: Observation) -> dict[str, list[tuple[str, Record | None]]]:
    found: dict[str, list[tuple[str, Record | None]]] = defaultdict(list)
    for event in observation.records:
        kind, _, key = event.subject.partition("/")
        found[kind].append((key, event.data.after))
    return found


_Group = tuple[Observation, Sequence[tuple[str, Record | None]]]
"""An observation and those of its changes that are of one kind: each key, and the record after."""


async def _write_records(
    connection: Connection, table: Table, groups: Sequence[_Group], tenants: dict[UUID, str], *, new: bool
) -> None:
    rows: list[tuple[Any, ...]] = []
    gone: list[tuple[UUID, int, str]] = []
    cells = table.cells
    for observation, found in groups:
        connector_id, version = observation.connector_id, observation.sequence
        head = (tenants[connector_id], str(connector_id), version)
        for key, after in found:
            if after is None:
                gone.append((connector_id, version, key))
            else:
                rows.append((*head, key, *cells(after)))
    await table.upsert.run(connection, rows, new=new)
    if gone:
        await connection.execute(table.remove, [list(column) for column in zip(*gone, strict=True)])


async def _write_workspaces(connection: Connection, groups: Sequence[_Group]) -> None:
    after = [(o.connector_id, record or {}) for o, found in groups for _, record in found]
    await connection.execute(
        """
        UPDATE rollcall.connectors c SET workspace_id = coalesce(n.workspace_id, c.workspace_id), plan = n.plan,
               updated_at = now()
        FROM unnest(%b::uuid[], %b::text[], %b::text[]) AS n (id, workspace_id, plan) WHERE c.id = n.id
        """,
        [[c for c, _ in after], [r.get("workspace_id") for _, r in after], [r.get("plan") for _, r in after]],
    )


async def _write_usage(
    connection: Connection, observations: Sequence[Observation], tenants: dict[UUID, str], *, new: bool
) -> None:
    rows: list[tuple[Any, ...]] = []
    days: list[tuple[Observation, str, date, str]] = []
    for observation in observations:
        connector_id, version = observation.connector_id, observation.sequence
        tenant, whose = tenants[connector_id], str(connector_id)
        for event in observation.days:
            found = event.data
            dimension, day = found.dimension, found.bucket_start
            state = "complete" if found.settled else "provisional"
            days.append((observation, dimension, date.fromisoformat(day), state))
            rows += [
                (tenant, whose, dimension, day, row.key, row.unit, row.label, row.amount, version) for row in found.rows
            ]
    await _ROWS.run(connection, rows, new=new)
    spans = _spans(days)
    await connection.execute(
        _NEW_DAYS if new else _DAYS,
        [
            [tenants[o.connector_id] for o, *_ in spans],
            [o.connector_id for o, *_ in spans],
            [o.sequence for o, *_ in spans],
            [dimension for _, dimension, *_ in spans],
            [state for *_, state, _, _ in spans],
            [first for *_, first, _ in spans],
            [last for *_, last in spans],
        ],
    )


_Span = tuple[Observation, str, str, date, date]


def _spans(days: Iterable[tuple[Observation, str, date, str]]) -> list[_Span]:
    """Put days in a row together: observation, dimension, state, first and last day."""
    spans: list[_Span] = []
    for o, dimension, day, state in days:
        if spans:
            before, *known, first, last = spans[-1]
            if before is o and known == [dimension, state] and day - last == _DAY:
                spans[-1] = (o, dimension, state, first, day)
                continue
        spans.append((o, dimension, state, day, day))
    return spans


_ROWS = Stage(
    "staged_usage",
    (
        ("tenant_id", "text"),
        ("connector_id", "text"),
        ("dimension", "text"),
        ("bucket_start", "text"),
        ("bucket_key", "text"),
        ("unit", "text"),
        ("label", "text"),
        ("amount", "text"),
        ("version", "bigint"),
    ),
    sql.SQL(
        """
        INSERT INTO rollcall.credit_usage
            (tenant_id, connector_id, dimension, bucket_start, bucket_key, unit, label, amount, version)
        SELECT tenant_id, connector_id::uuid, dimension, bucket_start::date, bucket_key, unit, label, amount::numeric,
               version
        FROM {source}
        ON CONFLICT (connector_id, dimension, bucket_start, bucket_key, unit) DO UPDATE SET
            label = excluded.label, amount = excluded.amount, version = excluded.version
        """
    ),
    target="credit_usage",
)
"""Every row of whole days. Ids and days travel as text: they are written once for many rows."""

_NEW_DAYS = b"""
    INSERT INTO rollcall.usage_coverage (tenant_id, connector_id, dimension, day, state, observed_at, version)
    SELECT t, c, d, first + i, s, now(), v
    FROM unnest(%b::text[], %b::uuid[], %b::bigint[], %b::text[], %b::text[], %b::date[], %b::date[])
         AS n (t, c, v, d, s, first, last), generate_series(0, last - first) AS i
"""
"""The coverage of spans of days of which none is there yet."""

_DAYS = (
    b"WITH day AS ("
    + _NEW_DAYS
    + b"""
        ON CONFLICT (connector_id, dimension, day) DO UPDATE SET
            state = excluded.state, observed_at = excluded.observed_at, version = excluded.version
        RETURNING connector_id, dimension, day, version, xmax <> 0 AS known
    )
    DELETE FROM rollcall.credit_usage r USING day
    WHERE day.known AND r.connector_id = day.connector_id AND r.dimension = day.dimension
          AND r.bucket_start = day.day AND r.version < day.version
"""
)
"""The coverage of any spans of days, and away with what days that were covered before have no more: a row that was
inserted has no xmax, one that was updated has."""
