"""The story: six tenants connect, then things happen to them, and each must show in the events."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.events import event_type
from worker.cli.demo.control import Control
from worker.cli.demo.watching import Event, Watcher
from worker.errors import Refused, TryLater
from worker.store.db import Connection, Database, Row

EVENT_WITHIN_S = 30.0
BACKFILL_WITHIN_S = 90.0
PROVIDER_LATENCY_MS = 150
"""The simulator answers about as fast as the real provider, so that there is progress to see."""
ANALYTICS = "workspace_analytics_full_read"


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer of the product: its workspace at the provider and what is special about it."""

    name: str
    special: str
    shape: Mapping[str, Any] = field(default_factory=dict)


TENANTS = (
    Tenant("acme", "20 members", {"members": 20}),
    Tenant("globex", "billed in cost since 40 days", {"members": 30, "mode": "cost"}),
    Tenant(
        "initech",
        "its key lacks the analytics permission",
        {"members": 12, "scopes": ["user_read", "workspace_members_read", "workspace_read"]},
    ),
    Tenant("umbrella", "its key will die", {"members": 25}),
    Tenant(
        "hooli",
        "5,000 members, 20 service accounts, 100 keys",
        {"members": 5000, "service_accounts": 20, "keys_per_account": 5, "usage_rows_per_day": 60},
    ),
    Tenant("stark", "one of its keys will leak", {"members": 40, "service_accounts": 4}),
)


@dataclass(slots=True)
class Stage:
    """What the story plays on."""

    console: Console
    control: Control
    watcher: Watcher
    db: Database
    environment: Mapping[str, str]
    connectors: dict[str, UUID]
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)


async def command(stage: Stage, *arguments: str, key: str | None = None) -> dict[str, Any]:
    """Run a `rollcall` command as anybody would, a key on its standard input; return its JSON.

    Raises:
        Refused: it failed.

    """
    stage.console.print(f"  [dim]$ rollcall {' '.join(arguments)}[/]", highlight=False, soft_wrap=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.cli",
        *arguments,
        "--json",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(stage.environment),
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(key.encode() if key else b"")
    if process.returncode:
        raise Refused("demo_command", f"rollcall {arguments[0]} failed: {err.decode().strip()}")
    found: dict[str, Any] = orjson.loads(out)
    return found


async def connect(stage: Stage) -> None:
    """Create the workspaces at the simulator and register a connector for each."""
    await stage.control.latency(PROVIDER_LATENCY_MS)
    await asyncio.gather(*(_connect(stage, tenant) for tenant in TENANTS))


async def _connect(stage: Stage, tenant: Tenant) -> None:
    since = (datetime.now(UTC).date() - timedelta(days=40)).isoformat()
    shape = {**tenant.shape, **({"cost_since": since} if tenant.shape.get("mode") == "cost" else {})}
    stage.keys[tenant.name] = await stage.control.create(tenant.name, **shape)
    made = await command(
        stage,
        "connectors", "add", "--tenant", tenant.name, "--name", "elevenlabs",
        "--base-url", stage.control.url, "--api-key-stdin",
        key=stage.keys[tenant.name]["api_key"],
    )  # fmt: skip
    stage.connectors[tenant.name] = UUID(made["id"])


async def backfills(stage: Stage) -> None:
    """Show the first syncs until all are over.

    Raises:
        TryLater: they took too long.

    """
    bars = Progress(
        TextColumn("  {task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[special]}[/]"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=stage.console,
    )
    with bars:
        tasks = {t.name: bars.add_task(t.name, total=None, special=t.special, status="") for t in TENANTS}
        async with asyncio.timeout(BACKFILL_WITHIN_S):
            while True:
                runs = await rows_of(
                    stage.db,
                    "SELECT connector_id, status, parts_total, parts_done + parts_failed AS parts"
                    " FROM rollcall.sync_runs WHERE kind = 'backfill'",
                )
                names = {cid: name for name, cid in stage.connectors.items()}
                for run in (r for r in runs if r["connector_id"] in names):
                    bar = tasks[names[run["connector_id"]]]
                    bars.update(bar, total=run["parts_total"] or None, completed=run["parts"], status=run["status"])
                    if run["status"] not in {"queued", "running"}:
                        bars.stop_task(bar)
                ended = {r["connector_id"] for r in runs if r["status"] not in {"queued", "running"}}
                if len(names) == len(TENANTS) and names.keys() <= ended:
                    return
                await asyncio.sleep(0.1)


async def live(stage: Stage) -> None:
    """Let things happen, one after the other; each must come out of the stream."""
    today = datetime.now(UTC).date()
    acme, stark = stage.control, "stark"
    truth = await acme.truth("acme", today.isoformat(), today.isoformat())
    people = [m for m in truth["members"] if not m["is_owner"]]
    await _happens(
        stage, "acme", "a member joins", [{"op": "member_join", "email": "new@acme.example", "first_name": "Nova"}],
        lambda e: e["type"] == event_type("member.changed") and e["data"]["op"] == "c",
    )  # fmt: skip
    await _happens(
        stage, "acme", "a seat changes",
        [{"op": "member_update", "user_id": people[0]["user_id"], "seat_type": _other_seat(people[0])}],
        lambda e: e["subject"] == f"member/{people[0]['user_id']}" and "seat_type" in e["data"]["changed"],
    )  # fmt: skip
    await _happens(
        stage, "acme", "somebody leaves", [{"op": "member_leave", "user_id": people[1]["user_id"]}],
        lambda e: e["subject"] == f"member/{people[1]['user_id']}" and e["data"]["op"] == "d",
    )  # fmt: skip
    late = (today - timedelta(days=2)).isoformat()
    await _happens(
        stage, "acme", f"usage of {late} arrives late",
        [{"op": "usage_add", "day": late, "product": "text_to_speech", "user_id": people[2]["user_id"],
          "key_hash": None, "amount": "125.50"}],
        lambda e: e["subject"] == f"usage/member/{late}",
    )  # fmt: skip
    leaked = (await acme.truth(stark, today.isoformat(), today.isoformat()))["service_accounts"][0]["api-keys"][0]
    await _happens(
        stage, stark, "a service account's key leaks and is disabled",
        [{"op": "key_update", "key_id": leaked["key_id"], "is_disabled": True, "disable_reason": "exposed_publicly"}],
        lambda e: e["subject"] == f"api_key/{leaked['key_id']}"
        and e["data"]["after"]["disable_reason"] == "exposed_publicly",
    )  # fmt: skip


async def degraded(stage: Stage) -> None:
    """See that the tenant without the scope is degraded, with the permission to add."""
    event = await stage.watcher.wait_for(
        lambda e: e["type"] == event_type("connector.degraded") and _is(stage, e, "initech"),
        since=0,
        within_s=EVENT_WITHIN_S,
        what="initech is degraded",
    )
    missing = {a["missing_permission"] for a in event["data"]["access"] if a["missing_permission"]}
    if missing != {ANALYTICS} or event["data"]["action"] != "add_permission":
        raise Refused("demo_wrong", f"initech should be told to add {ANALYTICS}, but was told {event['data']}")
    stage.console.print(f"  [cyan]initech[/] keeps syncing all but usage; its screen says: add {ANALYTICS}")


async def death_and_return(stage: Stage) -> None:
    """Let a key die: disconnected with its reason, no further polls; then reconnect with a new key."""
    since = len(stage.watcher.events)
    stage.console.print("\n[bold]umbrella[/]: its key is deleted at the provider")
    await stage.control.kill("umbrella", stage.keys["umbrella"]["key_id"])
    await stage.watcher.wait_for(
        lambda e: (
            e["type"] == event_type("connector.disconnected")
            and _is(stage, e, "umbrella")
            and e["data"]["reason"] == "key_invalid"
        ),
        since=since,
        within_s=EVENT_WITHIN_S,
        what="umbrella is disconnected",
    )
    before = await stage.control.requests("umbrella")
    await asyncio.sleep(5)
    asked = await stage.control.requests("umbrella") - before
    if asked:
        raise Refused("demo_wrong", f"umbrella was asked {asked} times after it was disconnected")
    stage.console.print("  no request in the 5 s since (its polls come every 3 s)")
    since = len(stage.watcher.events)
    await command(
        stage, "connectors", "reconnect", str(stage.connectors["umbrella"]), "--api-key-stdin",
        key=await stage.control.mint("umbrella"),
    )  # fmt: skip
    await stage.watcher.wait_for(
        lambda e: e["type"] == event_type("connector.connected") and _is(stage, e, "umbrella"),
        since=since,
        within_s=EVENT_WITHIN_S,
        what="umbrella is connected again",
    )


async def settle(stage: Stage) -> None:
    """Wait until every connector was synced after everything that happened."""
    at = datetime.now(UTC)
    async with asyncio.timeout(EVENT_WITHIN_S):
        while True:
            rows = await rows_of(
                stage.db,
                "SELECT 1 FROM rollcall.connectors WHERE last_synced_at > %s AND NOT EXISTS (SELECT 1 FROM"
                " rollcall.sync_runs r WHERE r.connector_id = connectors.id AND r.status IN ('queued', 'running')"
                " AND r.created_at < %s)",
                at,
                at,
            )
            if len(rows) == len(stage.connectors):
                return
            await asyncio.sleep(0.2)


async def _happens(stage: Stage, workspace: str, what: str, operations: list[dict[str, Any]], wanted: Any) -> None:
    since = len(stage.watcher.events)
    stage.console.print(f"\n[bold]{workspace}[/]: {what}")
    await stage.control.mutate(workspace, *operations)
    await stage.watcher.wait_for(
        lambda e: _is(stage, e, workspace) and wanted(e), since=since, within_s=EVENT_WITHIN_S, what=what
    )


def _other_seat(member: Mapping[str, Any]) -> str:
    lite = "workspace_lite_member"
    return "workspace_member" if member["seat_type"] == lite else lite


def _is(stage: Stage, event: Event, workspace: str) -> bool:
    return event.get("connectorid") == str(stage.connectors[workspace])


async def rows_of(db: Database, query: str, *values: object) -> list[Row]:
    """Ask Postgres; nothing while it is away."""

    async def work(connection: Connection) -> list[Row]:
        return await (await connection.execute(query, values)).fetchall()

    try:
        return await db.transaction(work)
    except TryLater:
        return []
