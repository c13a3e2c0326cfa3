"""Floors: what the machine gives with as little as possible in between. Each runs in a process of its own.

`sync` is the whole job as one would write it in an afternoon: no queue, no events, no change detection, no
removals. The others are single steps: writing rows, moving batches through a stream, fetching. They share no
code with the product but its tables.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import cycle
from typing import Any
from uuid import UUID

import aiohttp
import orjson
from psycopg import AsyncConnection
from redis.asyncio import Redis

from tests.bench import samples
from tests.bench.apart import Figures, Go

Question = tuple[str, str, bytes | None]

AT_ONCE = 32
BATCH_ROWS = 5_000
MOST_DAYS = 30
"""Providers cap a window of daily figures at about a month, so 90 days are three questions."""

MEMBERS, ACCOUNTS = "/v1/workspace/members", "/v1/service-accounts"
USER, GROUPS = "/v1/user", "/v1/workspace/groups"
USAGE = "/v1/workspace/analytics/query/usage-by-product-over-time"
DIMENSIONS = {"product": "product_type", "member": "user_id", "api_key": "hashed_xi_api_key"}

_USAGE_SQL = """
    INSERT INTO rollcall.credit_usage
        (tenant_id, connector_id, dimension, bucket_start, bucket_key, unit, label, amount, version)
    SELECT t, c, d, b, k, 'credits', l, a::numeric, 1
    FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::date[], %b::text[], %b::text[], %b::text[])
         AS n (t, c, d, b, k, l, a)
    ON CONFLICT (connector_id, dimension, bucket_start, bucket_key, unit)
    DO UPDATE SET label = excluded.label, amount = excluded.amount, version = excluded.version
"""
_MEMBERS_SQL = """
    INSERT INTO rollcall.members
        (tenant_id, connector_id, user_id, email, first_name, seat_type, is_owner, is_locked, version)
    SELECT *, 1 FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bool[],
                            %b::bool[])
    ON CONFLICT (connector_id, user_id) DO UPDATE SET email = excluded.email, first_name = excluded.first_name,
        seat_type = excluded.seat_type, is_owner = excluded.is_owner, is_locked = excluded.is_locked,
        version = excluded.version, changed_at = now()
"""
_ACCOUNTS_SQL = """
    INSERT INTO rollcall.service_accounts
        (tenant_id, connector_id, service_account_id, name, created_at, sharing, version)
    SELECT t, c, k, n, to_timestamp(s), g::jsonb, 1
    FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[], %b::bigint[], %b::text[]) AS n (t, c, k, n, s, g)
    ON CONFLICT (connector_id, service_account_id) DO UPDATE SET name = excluded.name,
        created_at = excluded.created_at, sharing = excluded.sharing, version = excluded.version, changed_at = now()
"""
_GROUPS_SQL = """
    INSERT INTO rollcall.groups (tenant_id, connector_id, group_id, name, member_ids, permissions, usage_limit, version)
    SELECT t, c, k, n, m::text[], p::text[], l, 1
    FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[])
         AS n (t, c, k, n, m, p, l)
    ON CONFLICT (connector_id, group_id) DO UPDATE SET name = excluded.name, member_ids = excluded.member_ids,
        permissions = excluded.permissions, usage_limit = excluded.usage_limit, version = excluded.version,
        changed_at = now()
"""
_WORKSPACES_SQL = """
    UPDATE rollcall.connectors c SET workspace_id = n.w, plan = n.p, updated_at = now()
    FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[]) AS n (t, c, w, p) WHERE c.id = n.c
"""
_KEYS_SQL = """
    INSERT INTO rollcall.api_keys
        (tenant_id, connector_id, key_id, service_account_id, name, hint, key_hash, permissions, created_at, expires_at,
         is_disabled, disable_reason, character_limit, allowed_ips, third_party_disable_allowed, platform_limits,
         version)
    SELECT t, c, k, sa, n, h, kh, p::text[], to_timestamp(s), to_timestamp(e), x, r, l, i::text[], y, pl::jsonb, 1
    FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[],
                %b::bigint[], %b::bigint[], %b::bool[], %b::text[], %b::bigint[], %b::text[], %b::bool[], %b::text[])
         AS n (t, c, k, sa, n, h, kh, p, s, e, x, r, l, i, y, pl)
    ON CONFLICT (connector_id, key_id) DO UPDATE SET service_account_id = excluded.service_account_id,
        name = excluded.name, hint = excluded.hint, key_hash = excluded.key_hash, permissions = excluded.permissions,
        created_at = excluded.created_at, expires_at = excluded.expires_at, is_disabled = excluded.is_disabled,
        disable_reason = excluded.disable_reason, character_limit = excluded.character_limit,
        allowed_ips = excluded.allowed_ips, third_party_disable_allowed = excluded.third_party_disable_allowed,
        platform_limits = excluded.platform_limits, version = excluded.version, changed_at = now()
"""


def questions(days: int, *, least: bool = False) -> list[Question]:
    """List what a sync asks of one tenant: its directory and usage of `days` three ways, in as few requests as may be.

    With `least` the workspace and its groups are left out: they are few records.
    """
    directory = (MEMBERS, ACCOUNTS) if least else (USER, MEMBERS, GROUPS, ACCOUNTS)
    asked: list[Question] = [("GET", path, None) for path in directory]
    end = datetime.combine(datetime.now(UTC).date() + timedelta(days=1), datetime.min.time(), UTC)
    while days > 0:
        start = end - timedelta(days=min(days, MOST_DAYS))
        for column in DIMENSIONS.values():
            window = {"start_time": int(start.timestamp() * 1000), "end_time": int(end.timestamp() * 1000) - 1}
            body = {**window, "interval_seconds": 86_400, "group_by": [column], "time_zone": "UTC"}
            asked.append(("POST", USAGE, orjson.dumps(body)))
        end, days = start, days - MOST_DAYS
    return asked


class Sink:
    """Collects rows and writes them in batches, one statement at a time."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection
        self._rows: dict[str, list[tuple[Any, ...]]] = {}
        self._lock = asyncio.Lock()
        self.written = 0

    async def add(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Take rows of one table."""
        self._rows.setdefault(statement, []).extend(rows)
        while len(held := self._rows[statement]) >= BATCH_ROWS:
            self._rows[statement] = held[BATCH_ROWS:]
            await self._write(statement, held[:BATCH_ROWS])

    async def flush(self) -> None:
        """Write what is left."""
        for statement, rows in self._rows.items():
            if rows:
                await self._write(statement, rows)

    async def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        async with self._lock:
            await self._connection.execute(statement, list(map(list, zip(*rows, strict=True))))
            self.written += len(rows)


async def sync(asked: dict[str, Any], go: Go) -> Figures:
    """Fetch and upsert every tenant.

    Asked for: `tenants` [(tenant id, connector id, key)], `url`, `database_url`, `days`, `least`.
    """
    todo = [(t, UUID(c), key) for t, c, key in asked["tenants"]]
    wanted = questions(asked["days"], least=asked["least"])
    async with (
        await AsyncConnection.connect(asked["database_url"], autocommit=True) as connection,
        aiohttp.ClientSession() as session,
    ):
        sink, waiting = Sink(connection), iter(todo)

        async def some() -> None:
            for tenant, connector, key in waiting:
                for method, path, body in wanted:
                    headers = {"xi-api-key": key}
                    async with session.request(method, asked["url"] + path, data=body, headers=headers) as response:
                        response.raise_for_status()
                        found = orjson.loads(await response.read())
                    for statement, rows in _rows(tenant, connector, path, found):
                        await sink.add(statement, rows)

        await go()
        began = time.perf_counter()
        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        await sink.flush()
        return {"seconds": time.perf_counter() - began, "rows": sink.written}


def _rows(tenant: str, connector: UUID, path: str, found: Any) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    if path == MEMBERS:
        fields = ("user_id", "email", "first_name", "seat_type", "is_owner", "is_locked")
        yield _MEMBERS_SQL, [(tenant, connector, *(m[f] for f in fields)) for m in found]
    elif path == USER:
        yield _WORKSPACES_SQL, [(tenant, connector, found["workspace_id"], found["subscription"]["tier"])]
    elif path == GROUPS:
        yield _GROUPS_SQL, [(tenant, connector, *_group(g)) for g in found.values()]
    elif path == ACCOUNTS:
        accounts = found["service-accounts"]
        yield _ACCOUNTS_SQL, [(tenant, connector, *_account(a)) for a in accounts]
        yield _KEYS_SQL, [(tenant, connector, *_key(k)) for a in accounts for k in a["api-keys"]]
    else:
        yield _USAGE_SQL, _usage(tenant, connector, found)


def _group(group: dict[str, Any]) -> tuple[Any, ...]:
    limit = group["group_usage_limit"]
    return (
        group["id"], group["name"], _array(group["members"]), _array(group["permissions"]),
        None if limit is None else str(limit),
    )  # fmt: skip


def _account(account: dict[str, Any]) -> tuple[Any, ...]:
    shared = [
        {"group_id": one["group"]["id"], "permission_level": one["permission_level"]}
        for one in account["default_sharing_groups"]
    ]
    name = account["service_account_user_id"]
    return name, account["name"], account["created_at_unix"], orjson.dumps(shared).decode()


def _key(key: dict[str, Any]) -> tuple[Any, ...]:
    limits = key["platform_limits"]
    return (
        key["key_id"], key["service_account_user_id"], key["name"], key["hint"], key["hashed_xi_api_key"],
        _array(key["permissions"]), key["created_at_unix"], key["expires_at_unix"], key["is_disabled"],
        key["disable_reason"], key["character_limit"], _array(key["allowed_ips"]), key["third_party_disable_allowed"],
        None if limits is None else orjson.dumps(limits).decode(),
    )  # fmt: skip


def _array(names: list[str] | None) -> str | None:
    return None if names is None else "{" + ",".join(f'"{name}"' for name in sorted(names)) + "}"


def _usage(tenant: str, connector: UUID, table: dict[str, Any]) -> list[tuple[Any, ...]]:
    columns = table["columns"]
    dimension, column = next((d, c) for d, c in DIMENSIONS.items() if c in columns)
    key, day, amount = (columns.index(name) for name in (column, "timestamp", "credits_used"))
    label = next((at for at, name in enumerate(columns) if name in {"user_label", "api_key_name"}), None)
    days: dict[str, date] = {}
    rows = []
    for row in table["rows"]:
        at = row[day]
        if at not in days:
            days[at] = date.fromisoformat(at[:10])
        named = None if label is None else row[label]
        rows.append((tenant, connector, dimension, days[at], row[key] or "", named, str(row[amount])))
    return rows


async def gets(asked: dict[str, Any], go: Go) -> Figures:
    """Fetch for `seconds`, `at_once` in flight: `url`, `keys`, `days`; give requests per second."""
    wanted = questions(asked["days"])
    each = cycle([(key, question) for key in asked["keys"] for question in wanted])
    done = 0
    limit = aiohttp.TCPConnector(limit=asked["at_once"])
    async with aiohttp.ClientSession(connector=limit) as session:
        await go()
        began = time.perf_counter()
        until = began + asked["seconds"]

        async def some() -> None:
            nonlocal done
            while time.perf_counter() < until:
                key, (method, path, body) = next(each)
                headers = {"xi-api-key": key}
                async with session.request(method, asked["url"] + path, data=body, headers=headers) as response:
                    response.raise_for_status()
                    await response.read()
                done += 1

        await asyncio.gather(*(some() for _ in range(asked["at_once"])))
        return {"seconds": time.perf_counter() - began, "requests": done, "requests_per_poll": len(wanted)}


_STAGED = {
    "usage": (
        ("text", "uuid", "text", "date", "text", "text", "text", "numeric", "int8"),
        "tenant_id, connector_id, dimension, bucket_start, bucket_key, unit, label, amount, version",
        "connector_id, dimension, bucket_start, bucket_key, unit",
        "label = excluded.label, amount = excluded.amount, version = excluded.version",
    ),
    "members": (
        ("text", "uuid", "text", "text", "text", "text", "bool", "bool", "int8"),
        "tenant_id, connector_id, user_id, email, first_name, seat_type, is_owner, is_locked, version",
        "connector_id, user_id",
        (
            "email = excluded.email, first_name = excluded.first_name, seat_type = excluded.seat_type,"
            " is_owner = excluded.is_owner, is_locked = excluded.is_locked, version = excluded.version,"
            " changed_at = now()"
        ),
    ),
}
_TABLES = {"usage": "credit_usage", "members": "members"}


async def upserts(asked: dict[str, Any], go: Go) -> Figures:
    """Write rows through COPY to a temporary table, batch by batch: `database_url`, `what`, `size`, `phase`.

    The phases follow each other on one database: `fresh` rows, `update` of every row, `repeat` of the same rows.
    """
    size = samples.Size(**asked["size"])
    version = 1 if asked["phase"] == "fresh" else 2
    rows = list((samples.usage_rows if asked["what"] == "usage" else samples.member_rows)(size, version))
    types, columns, key, updates = _STAGED[asked["what"]]
    table = f"rollcall.{_TABLES[asked['what']]}"
    async with await AsyncConnection.connect(asked["database_url"], autocommit=True) as connection:
        await connection.execute(
            f"CREATE TEMP TABLE staged ON COMMIT DELETE ROWS AS SELECT {columns} FROM {table} LIMIT 0"  # noqa: S608 - constants of this module
        )
        await go()
        began = time.perf_counter()
        for at in range(0, len(rows), BATCH_ROWS):
            async with connection.transaction():
                cursor = connection.cursor()
                async with cursor.copy("COPY staged FROM STDIN (FORMAT binary)") as copy:
                    copy.set_types(types)
                    for row in rows[at : at + BATCH_ROWS]:
                        await copy.write_row(row)
                await cursor.execute(
                    f"INSERT INTO {table} ({columns}) SELECT * FROM staged ON CONFLICT ({key}) DO UPDATE SET {updates}"  # noqa: S608 - constants of this module
                )
        return {"seconds": time.perf_counter() - began, "rows": len(rows)}


def streams(found: Any) -> dict[bytes, list[tuple[bytes, dict[bytes, bytes]]]]:
    """Read the answer of XREAD or XREADGROUP, whichever form the driver gives it."""
    return dict(found or ())


async def stream(asked: dict[str, Any], go: Go) -> Figures:
    """Move batches of 500 events through a stream: `redis_url`, `entries`; give seconds of writing and reading."""
    key, group = "bench:stream", "bench"
    batch = orjson.dumps([samples.event(number) for number in range(samples.EVENTS_PER_ENTRY)])
    async with Redis.from_url(asked["redis_url"], socket_timeout=60) as redis:
        await redis.xgroup_create(key, group, id="0", mkstream=True)
        await go()
        began = time.perf_counter()
        for _ in range(asked["entries"]):
            await redis.xadd(key, {b"ce": batch})
        written = time.perf_counter()
        read = 0
        while found := await redis.xreadgroup(group, "one", {key: ">"}, count=100):
            ids = [entry_id for entry_id, _ in streams(found)[key.encode()]]
            await redis.xack(key, group, *ids)
            read += len(ids)
        ended = time.perf_counter()
    return {
        "write_s": written - began,
        "read_s": ended - written,
        "events": read * samples.EVENTS_PER_ENTRY,
        "bytes_per_event": len(batch) / samples.EVENTS_PER_ENTRY,
    }
