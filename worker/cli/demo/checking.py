"""Checking: every fact table against the simulator's truth, told in the provider's own terms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from worker.cli.demo.control import Control
from worker.store.db import Connection, Database, Row

BACKFILL_DAYS = 90


async def differences(
    db: Database, control: Control, workspace: str, connector_id: UUID, *, with_usage: bool
) -> tuple[list[str], Row]:
    """Compare a connector's rows with the truth; return what differs (one line each) and the counts.

    `with_usage` False: its key may not read usage, so there must be none.
    """
    today = datetime.now(UTC).date()
    first = today - timedelta(days=BACKFILL_DAYS - 1)
    truth = await control.truth(workspace, first.isoformat(), today.isoformat())
    facts = await db.transaction(lambda connection: _facts(connection, connector_id))
    expected = _expected(truth)
    if not with_usage:
        expected["credit_usage"] = {}
    found = []
    for table, rows in expected.items():
        missing = rows.keys() - facts[table].keys()
        extra = facts[table].keys() - rows.keys()
        wrong = [key for key in rows.keys() & facts[table].keys() if rows[key] != facts[table][key]]
        for what, keys in (("missing", missing), ("too many", extra), ("different", wrong)):
            if keys:
                found.append(f"{workspace}: {table}: {len(keys)} {what}, such as {min(keys)}")
    return found, {table: len(rows) for table, rows in facts.items()}


def _expected(truth: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    accounts = truth["service_accounts"]
    return {
        "members": {
            m["user_id"]: (m["email"], m["first_name"], m["seat_type"], m["is_owner"], m["is_locked"])
            for m in truth["members"]
        },
        "groups": {g["id"]: (g["name"], sorted(g["members"])) for g in _values(truth["groups"])},
        "service_accounts": {a["service_account_user_id"]: a["name"] for a in accounts},
        "api_keys": {
            k["key_id"]: (k["service_account_user_id"], k["name"], k.get("is_disabled", False), k.get("disable_reason"))
            for a in accounts
            for k in a["api-keys"]
        },
        "credit_usage": {
            (dimension, day, key, unit): Decimal(amount)
            for dimension, days in truth["usage"].items()
            for day, keys in days.items()
            for key, units in keys.items()
            for unit, amount in units.items()
        },
    }


def _values(groups: Any) -> list[dict[str, Any]]:
    return list(groups.values()) if isinstance(groups, dict) else groups


async def _facts(connection: Connection, connector_id: UUID) -> dict[str, dict[Any, Any]]:
    async def rows(query: str) -> list[Row]:
        return await (await connection.execute(query, [connector_id])).fetchall()

    living = "WHERE connector_id = %s AND removed_at IS NULL"
    return {
        "members": {
            r["user_id"]: (r["email"], r["first_name"], r["seat_type"], r["is_owner"], r["is_locked"])
            for r in await rows(f"SELECT * FROM rollcall.members {living}")  # noqa: S608 - constant
        },
        "groups": {
            r["group_id"]: (r["name"], r["member_ids"])
            for r in await rows(f"SELECT * FROM rollcall.groups {living}")  # noqa: S608 - constant
        },
        "service_accounts": {
            r["service_account_id"]: r["name"]
            for r in await rows(f"SELECT * FROM rollcall.service_accounts {living}")  # noqa: S608 - constant
        },
        "api_keys": {
            r["key_id"]: (r["service_account_id"], r["name"], r["is_disabled"], r["disable_reason"])
            for r in await rows(f"SELECT * FROM rollcall.api_keys {living}")  # noqa: S608 - constant
        },
        "credit_usage": {
            (r["dimension"], r["bucket_start"].isoformat(), r["bucket_key"], r["unit"]): r["amount"]
            for r in await rows("SELECT * FROM rollcall.credit_usage WHERE connector_id = %s")
        },
    }
