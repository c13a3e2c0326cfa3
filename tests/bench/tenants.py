"""Tenants: simulated workspaces, their connectors in a database, and the changes made to them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aiohttp
from pydantic import SecretStr

from schemas.connectors import Dataset
from tests.bench.floors import questions
from tests.bench.stage import Database
from tests.fixtures.installation import NEVER_S
from tests.fixtures.simulator import Simulator
from worker.plan import partition_of
from worker.vault import Vault

POLL_DAYS = 4
"""A poll asks for today and the look-back."""
RECONCILE_DAYS = 30
BACKFILL_DAYS = 90
AT_ONCE = 32
"""Requests in flight while warming up."""
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Shape:
    """How many tenants of what size; `usage_rows_per_day` counts what uses credits, each in three dimensions."""

    tenants: int = 200
    members: int = 200
    groups: int = 3
    service_accounts: int = 4
    keys_per_account: int = 5
    products: int = 1
    usage_rows_per_day: int = 3

    def workspace(self) -> dict[str, Any]:
        """Give the simulator's words for one workspace."""
        fields = {name: value for name, value in asdict(self).items() if name != "tenants"}
        return {**fields, "history_days": BACKFILL_DAYS + 2}


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with one connector to one simulated workspace."""

    id: str
    connector_id: UUID
    workspace: str
    api_key: str


def populate(simulator: Simulator, shape: Shape, prefix: str = "w") -> list[Tenant]:
    """Make the workspaces, and a tenant for each."""
    specs = [{"name": f"{prefix}{number}", **shape.workspace()} for number in range(shape.tenants)]
    made = [one for at in range(0, len(specs), CHUNK) for one in simulator.workspaces(specs[at : at + CHUNK])]
    return [Tenant(f"tenant-{one['name']}", uuid4(), one["name"], one["api_key"]) for one in made]


def register(
    database: Database, ring: SecretStr, base_url: str, tenants: Sequence[Tenant], *, poll_interval_s: int = NEVER_S
) -> None:
    """Write connectors that are not due yet, as adding them one by one would leave them."""
    vault = Vault(ring)
    (meta,) = database.execute("SELECT partitions FROM rollcall.meta").fetchall()
    with (
        database.cursor() as cursor,
        cursor.copy(
            "COPY rollcall.connectors (id, tenant_id, name, base_url, sealed_key, partition, poll_interval_s)"
            " FROM STDIN"
        ) as copy,
    ):
        for tenant in tenants:
            sealed = vault.seal(SecretStr(tenant.api_key), tenant_id=tenant.id, connector_id=tenant.connector_id)
            partition = partition_of(tenant.connector_id, meta["partitions"])
            copy.write_row(
                (tenant.connector_id, tenant.id, tenant.workspace, base_url, sealed, partition, poll_interval_s)
            )
    database.execute(
        "INSERT INTO rollcall.connector_access (connector_id, dataset)"
        " SELECT c.id, d FROM rollcall.connectors c, unnest(%s::text[]) AS d ON CONFLICT DO NOTHING",
        [[str(dataset) for dataset in Dataset]],
    )
    database.execute("ANALYZE rollcall.connectors, rollcall.connector_access")


def warm(simulator: Simulator, tenants: Sequence[Tenant], *days: int) -> None:
    """Ask everything once, so that the simulator has its answers ready: building them is no part of a sync."""
    asked = [question for many in days for question in questions(many)]

    async def ask() -> None:
        waiting = iter([(tenant, question) for tenant in tenants for question in dict.fromkeys(asked)])
        async with aiohttp.ClientSession() as session:

            async def some() -> None:
                for tenant, (method, path, body) in waiting:
                    async with session.request(
                        method, simulator.url + path, data=body, headers={"xi-api-key": tenant.api_key}
                    ) as response:
                        await response.read()
                        response.raise_for_status()

            await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    asyncio.run(ask())


def change(simulator: Simulator, shape: Shape, tenants: Sequence[Tenant], *, share: float, seed: int) -> None:
    """Change about `share` of the records of every tenant: members, keys, and usage of the last days."""
    keys = shape.service_accounts * shape.keys_per_account * share
    for number, tenant in enumerate(tenants):
        counts = {
            "member_update": math.ceil(shape.members * share),
            "key_update": math.floor(keys * (number + 1)) - math.floor(keys * number),
            "usage_add": math.ceil(shape.usage_rows_per_day * POLL_DAYS * share),
        }
        simulator.mutate(
            tenant.workspace,
            *(
                {"op": "random", "n": n, "seed": seed, "kinds": [kind], "usage_days": POLL_DAYS - 1}
                for kind, n in counts.items()
                if n
            ),
        )


def first_day(days: int) -> date:
    """Give the first of the last `days` UTC days."""
    return datetime.now(UTC).date() - timedelta(days=days - 1)
