"""Fact tables as data: which record stands where, and the statements that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from operator import itemgetter
from typing import Any, Final, LiteralString

import orjson
from psycopg import sql

from schemas.connectors import Dataset
from schemas.records import Record
from worker.store.staging import Stage


@dataclass(frozen=True, slots=True)
class Column:
    """A column and its Postgres type; it is named like the record's field."""

    name: LiteralString
    type: LiteralString


@dataclass(frozen=True)
class Table:
    """Where the records of one subject kind (`member`, `api_key`, ...) stand; its statements are made once."""

    name: LiteralString
    kind: str
    key: LiteralString
    columns: tuple[Column, ...]

    @cached_property
    def cells(self) -> Callable[[Record], tuple[Any, ...]]:
        """Give what writes a record as the cells of its columns, in order. It raises KeyError for a missing one."""
        plain = itemgetter(*(c.name for c in self.columns))
        json = [c.type in JSON_TYPES for c in self.columns]
        if not any(json):
            return plain
        return lambda record: tuple(
            _to_json(value) if as_json else value for value, as_json in zip(plain(record), json, strict=True)
        )

    @cached_property
    def upsert(self) -> Stage:
        """Write many records: rows of tenant, connector as text, version, key and every column."""
        names = [c.name for c in self.columns]
        statement = """
            INSERT INTO rollcall.{table} (tenant_id, connector_id, version, {key}, {columns})
            SELECT tenant_id, connector_id::uuid, version, {key}, {values} FROM {source}
            ON CONFLICT (connector_id, {key}) DO UPDATE SET
                version = excluded.version, changed_at = now(), removed_at = NULL, {updates}
            """
        return Stage(
            f"staged_{self.name}",
            (
                ("tenant_id", "text"),
                ("connector_id", "text"),
                ("version", "bigint"),
                (self.key, "text"),
                *((c.name, wire_type(c.type)) for c in self.columns),
            ),
            sql.SQL(statement),
            {
                "table": sql.Identifier(self.name),
                "key": sql.Identifier(self.key),
                "columns": sql.SQL(", ").join(map(sql.Identifier, names)),
                "values": sql.SQL(", ").join(_from_wire(c) for c in self.columns),
                "updates": sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(n)) for n in names),
            },
            None if any(c.type == "text[]" for c in self.columns) else self.name,
        )

    @cached_property
    def remove(self) -> bytes:
        """Mark many rows as removed: arrays of connector, version and key."""
        return (
            sql.SQL(
                """
            UPDATE rollcall.{table} r SET removed_at = now(), changed_at = now(), version = n.v
            FROM unnest(%b::uuid[], %b::bigint[], %b::text[]) AS n (c, v, k)
            WHERE r.connector_id = n.c AND r.{key} = n.k AND r.removed_at IS NULL
            """
            )
            .format(table=sql.Identifier(self.name), key=sql.Identifier(self.key))
            .as_bytes()
        )

    @cached_property
    def select(self) -> bytes:
        """Read the living records of one connector."""
        return (
            sql.SQL("SELECT {key}, {columns} FROM rollcall.{table} WHERE connector_id = %s AND removed_at IS NULL")
            .format(
                table=sql.Identifier(self.name),
                key=sql.Identifier(self.key),
                columns=sql.SQL(", ").join(sql.Identifier(c.name) for c in self.columns),
            )
            .as_bytes()
        )


JSON_TYPES: Final = frozenset({"text[]", "jsonb"})


def wire_type(kind: LiteralString) -> LiteralString:
    """Give the type a column travels as: arrays and objects go as JSON text, times as text."""
    return "text" if kind in JSON_TYPES or kind == "timestamptz" else kind


def _from_wire(column: Column) -> sql.Composed:
    name = sql.Identifier(column.name)
    if column.type == "text[]":
        return sql.SQL("CASE WHEN {0} IS NOT NULL THEN ARRAY(SELECT jsonb_array_elements_text({0}::jsonb)) END").format(
            name
        )
    return sql.SQL("{}::{}").format(name, sql.SQL(column.type))


TABLES: Final[dict[str, Table]] = {
    t.kind: t
    for t in (
        Table(
            "members",
            "member",
            "user_id",
            (
                Column("email", "text"),
                Column("first_name", "text"),
                Column("seat_type", "text"),
                Column("is_owner", "boolean"),
                Column("is_locked", "boolean"),
            ),
        ),
        Table(
            "groups",
            "group",
            "group_id",
            (
                Column("name", "text"),
                Column("member_ids", "text[]"),
                Column("permissions", "text[]"),
                Column("usage_limit", "text"),
            ),
        ),
        Table(
            "service_accounts",
            "service_account",
            "service_account_id",
            (Column("name", "text"), Column("created_at", "timestamptz"), Column("sharing", "jsonb")),
        ),
        Table(
            "api_keys",
            "api_key",
            "key_id",
            (
                Column("service_account_id", "text"),
                Column("name", "text"),
                Column("hint", "text"),
                Column("key_hash", "text"),
                Column("permissions", "text[]"),
                Column("created_at", "timestamptz"),
                Column("expires_at", "timestamptz"),
                Column("is_disabled", "boolean"),
                Column("disable_reason", "text"),
                Column("character_limit", "bigint"),
                Column("allowed_ips", "text[]"),
                Column("third_party_disable_allowed", "boolean"),
                Column("platform_limits", "jsonb"),
            ),
        ),
    )
}
"""By the first piece of a record's subject. Workspaces stand in `connectors`, usage in `credit_usage`."""

OF_DATASET: Final[dict[Dataset, tuple[str, ...]]] = {
    Dataset.MEMBERS: ("member",),
    Dataset.GROUPS: ("group",),
    Dataset.SERVICE_ACCOUNTS: ("service_account", "api_key"),
}


def _to_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def record_of(table: Table, row: dict[str, Any]) -> Record:
    """Read a row as the record that normalizing would give."""
    record = {table.key: row[table.key]}
    for column in table.columns:
        value = row[column.name]
        record[column.name] = _z(value) if isinstance(value, datetime) else value
    return record


def _z(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
