"""Checking: what stands in the tables against what the simulator knows to be true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tests.bench.stage import Database, WrongResultError
from tests.bench.tenants import Tenant, first_day
from tests.fixtures.simulator import Simulator
from tests.fixtures.states import PLACES, of_rows, of_truth

LEAST = ("member", "service_account", "api_key")
"""What even the least of syncs writes, and what is counted."""
KINDS = (*LEAST, "workspace", "group")
SAMPLED = 5


@dataclass(frozen=True, slots=True)
class Counts:
    """How many records there are, usage rows of all three dimensions together."""

    members: int = 0
    service_accounts: int = 0
    api_keys: int = 0
    credit_usage: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.members + self.service_accounts + self.api_keys + self.credit_usage


def expected(simulator: Simulator, tenants: Sequence[Tenant], days: int) -> Counts:
    """Count what is true of these tenants, of usage the last `days` days."""
    counts = [_count(simulator.truth(t.workspace, first_day(days).isoformat())) for t in tenants]
    return Counts(*(sum(values) for values in zip(*counts, strict=True)))


def _count(told: Mapping[str, Any]) -> tuple[int, int, int, int]:
    usage = sum(
        len(units) for of_days in told["usage"].values() for keys in of_days.values() for units in keys.values()
    )
    accounts = told["service_accounts"]
    return len(told["members"]), len(accounts), sum(len(a["api-keys"]) for a in accounts), usage


def check(
    database: Database,
    simulator: Simulator,
    tenants: Sequence[Tenant],
    days: int,
    *,
    kinds: Sequence[str] = KINDS,
) -> Counts:
    """Compare all counts, and every value of a few tenants.

    Raises:
        WrongResultError: naming the first difference.

    """
    wanted = expected(simulator, tenants, days)
    found = Counts(*(_rows(database, table) for table in Counts.__dataclass_fields__))
    if found != wanted:
        raise WrongResultError(f"expected {wanted}, found {found}")
    step = max(1, len(tenants) // SAMPLED)
    for tenant in tenants[::step]:
        _check_values(database, simulator, tenant, days, kinds)
    return found


def _rows(database: Database, table: str) -> int:
    living = "" if table == "credit_usage" else "WHERE removed_at IS NULL"
    (row,) = database.execute(f"SELECT count(*) AS n FROM rollcall.{table} {living}").fetchall()  # noqa: S608 - names of this module
    return int(row["n"])


def _check_values(database: Database, simulator: Simulator, tenant: Tenant, days: int, kinds: Sequence[str]) -> None:
    first = first_day(days)
    covered = [
        {"dimension": dimension, "day": first + timedelta(days=n), "state": ""}
        for dimension in ("product", "member", "api_key")
        for n in range(days)
    ]
    tables = {kind: _facts(database, PLACES[kind][0], tenant) for kind in kinds if kind in PLACES}
    (workspace,) = database.execute(
        "SELECT workspace_id, plan FROM rollcall.connectors WHERE id = %s", [tenant.connector_id]
    ).fetchall()
    found = of_rows(tables, workspace, _facts(database, "credit_usage", tenant), covered)
    truth = of_truth(simulator.truth(tenant.workspace, first.isoformat()), found.usage)
    here, there = ({s: r for s, r in state.records.items() if s.partition("/")[0] in kinds} for state in (found, truth))
    _compare(tenant, here, there)
    _compare(tenant, found.usage, truth.usage)


def _facts(database: Database, table: str, tenant: Tenant) -> list[dict[str, Any]]:
    living = "" if table == "credit_usage" else "AND removed_at IS NULL"
    query = f"SELECT * FROM rollcall.{table} WHERE connector_id = %s {living}"  # noqa: S608 - names of this module
    return database.execute(query, [tenant.connector_id]).fetchall()


def _compare(tenant: Tenant, found: Mapping[str, Any], true: Mapping[str, Any]) -> None:
    for subject in sorted(found.keys() | true.keys()):
        if found.get(subject) != true.get(subject):
            raise WrongResultError(
                f"{tenant.workspace} {subject}: expected {true.get(subject)}, found {found.get(subject)}"
            )
