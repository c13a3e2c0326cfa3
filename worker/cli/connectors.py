"""`rollcall connectors`: add, look at, mend and delete connectors."""

from __future__ import annotations

import asyncio
import getpass
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from schemas.connectors import Access, Action
from worker import connectors as recipe
from worker.cli.finding import command_settings
from worker.cli.opening import opened_database, opened_redis, opened_runtime
from worker.cli.printing import AsJson, Column, Yes, ago, confirm, note, print_fields, print_json, print_rows, say
from worker.connectors import Connector, NewConnector, Ports, Traces
from worker.deadletters import DeadLetters
from worker.errors import Refused
from worker.permissions import Checked
from worker.settings import Settings
from worker.snapshots import RedisSnapshots
from worker.store import reading
from worker.store.connectors import PgConnectors
from worker.wiring import Runtime

app = typer.Typer(help="Add, look at, mend and delete connectors.", no_args_is_help=True)

Wanted = Annotated[str, typer.Argument(metavar="CONNECTOR", help="Id, or name where only one tenant has it.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Tenant of the connector, if the name is not enough.")]
KeyFromStdin = Annotated[
    bool,
    typer.Option("--api-key-stdin", help="Read the API key from standard input; else a terminal asks, without echo."),
]
MOST_KEY_CHARS = 10_000


@app.command()
def add(
    tenant: Annotated[str, typer.Option(help="The customer it belongs to: an opaque id of yours.")],
    name: Annotated[str, typer.Option(help="Its name, unique within the tenant.")],
    region: Annotated[str | None, typer.Option(help="Where the workspace lives: global, us, eu, in or sg.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Instead of a region: https://host of the provider.")] = None,
    api_key_stdin: KeyFromStdin = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Ask the provider whether the key works.")] = True,
    external_ref: Annotated[str | None, typer.Option(help="Your own reference, kept beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add a connector; its first sync (90 days of usage) starts within seconds.

    The API key is asked for without echo, or read from standard input; it is never an argument.

        rollcall connectors add --tenant acme --name main

        rollcall connectors add --tenant acme --name eu --region eu --api-key-stdin < key.txt
    """
    settings = command_settings()
    new = NewConnector(tenant, name, _read_key(from_stdin=api_key_stdin), region, base_url, external_ref)

    async def work() -> Connector:
        async with opened_runtime(settings) as runtime:
            return await recipe.add(
                new,
                _ports(runtime),
                api_hosts=settings.api_hosts,
                poll_interval_s=settings.poll_interval_s,
                check=check,
            )

    added = asyncio.run(work())
    if as_json:
        print_json(_summary(added))
        return
    say(f"Added connector {added.name} of tenant {added.tenant_id}: {added.id}")
    say(f"Its first sync starts within seconds. Watch it: rollcall connectors show {added.id}")


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted ones too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List connectors, with their status and when they were last synced."""
    settings = command_settings()

    async def work() -> list[dict[str, Any]]:
        async with opened_database(settings) as db:
            return await reading.connectors(db, tenant_id=tenant, deleted=deleted)

    print_rows(
        asyncio.run(work()),
        [
            Column("NAME", lambda r: r["name"], flexible=True),
            Column("TENANT", lambda r: r["tenant_id"], flexible=True),
            Column("STATUS", lambda r: r["status"]),
            Column("WHY", lambda r: r["status_reason"]),
            Column("SYNCED", lambda r: ago(r["last_synced_at"])),
            Column("ID", lambda r: r["id"]),
        ],
        as_json=as_json,
        empty="No connectors yet. Add one: rollcall connectors add --tenant acme --name main",
    )


@app.command()
def show(connector: Wanted, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Show a connector: its state, what its key may read, and what was found so far."""
    settings = command_settings()

    async def work() -> dict[str, Any]:
        async with opened_database(settings) as db:
            found = await PgConnectors(db).find(connector, tenant_id=tenant, deleted=True)
            return await reading.connector(db, found.id)

    row = asyncio.run(work())
    if as_json:
        print_json(row)
        return
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in row["counts"].items())
    print_fields(
        {
            "id": row["id"],
            "name": row["name"],
            "tenant": row["tenant_id"],
            "external ref": row["external_ref"],
            "status": row["status"],
            "why": row["status_reason"],
            "what to do": None if row["action"] == Action.NONE else row["action"],
            "since": ago(row["status_since"]),
            "base URL": row["base_url"],
            "key ends in": row["hint"],
            "workspace": row["workspace_id"],
            "plan": row["plan"],
            "last synced": ago(row["last_synced_at"]),
            "next sync": ago(row["next_sync_at"]),
            "found": counts,
        }
    )
    say("")
    print_rows(
        row["access"],
        [
            Column("DATASET", lambda r: r["dataset"]),
            Column("ACCESS", lambda r: r["state"]),
            Column("WHY", lambda r: r["reason"], flexible=True),
            Column("MISSING", lambda r: r["missing_permission"], flexible=True),
            Column("CHECKED", lambda r: ago(r["checked_at"])),
        ],
        as_json=False,
        empty="Nothing is left of it but its name.",
    )


@app.command()
def check(connector: Wanted, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Ask the provider what the key may read, and say which permissions to add.

    Nothing is written. Exit code 77 when a permission, plan or key is for the owner to mend.
    """
    settings = command_settings()

    async def work() -> list[Checked]:
        async with opened_runtime(settings) as runtime:
            found = await PgConnectors(runtime.db).find(connector, tenant_id=tenant)
            return await recipe.check(found, runtime.provider, now=datetime.now(UTC))

    matrix = [{**asdict(row), "missing": _named(row)} for row in asyncio.run(work())]
    print_rows(
        matrix,
        [
            Column("DATASET", lambda r: r["dataset"]),
            Column("ACCESS", lambda r: r["state"]),
            Column("WHY", lambda r: r["reason"]),
            Column("WHAT TO DO", lambda r: r["advice"], flexible=True),
        ],
        as_json=as_json,
        empty="",
    )
    if any(row["action"] != Action.NONE for row in matrix):
        raise typer.Exit(77)
    if any(row["state"] == Access.UNKNOWN for row in matrix):
        raise typer.Exit(75)


@app.command()
def reconnect(
    connector: Wanted, tenant: Tenant = None, api_key_stdin: KeyFromStdin = False, as_json: AsJson = False
) -> None:
    """Give a connector another API key, once the provider has accepted it.

    It must be a key of the same workspace. For another workspace add another connector.

    rollcall connectors reconnect main --api-key-stdin < new-key.txt
    """
    settings = command_settings()
    key = _read_key(from_stdin=api_key_stdin)

    async def work() -> Connector:
        async with opened_runtime(settings) as runtime:
            ports = _ports(runtime)
            return await recipe.reconnect(await PgConnectors(runtime.db).find(connector, tenant_id=tenant), key, ports)

    _print_state(asyncio.run(work()), as_json=as_json)


@app.command()
def pause(connector: Wanted, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Stop syncing a connector; what is under way is cancelled, its data stays."""
    _print_state(asyncio.run(_change(command_settings(), "pause", connector, tenant)), as_json=as_json)


@app.command()
def resume(connector: Wanted, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Sync a paused connector again, at once."""
    _print_state(asyncio.run(_change(command_settings(), "resume", connector, tenant)), as_json=as_json)


@app.command()
def delete(
    connector: Wanted,
    tenant: Tenant = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete a connector: its key, members, usage, runs, everything but its name. There is no way back."""
    settings = command_settings()

    async def find() -> Connector:
        async with opened_database(settings) as db:
            return await PgConnectors(db).find(connector, tenant_id=tenant, deleted=True)

    found = asyncio.run(find())
    confirm(f"Delete connector {found.name} of tenant {found.tenant_id} and all its data?", yes=yes)

    async def work() -> Connector:
        async with opened_database(settings) as db, opened_redis(settings) as redis:
            traces: list[Traces] = [
                RedisSnapshots(redis, ceiling_entries=settings.stream_ceiling_entries),
                DeadLetters(redis),
            ]
            return await recipe.delete(found, PgConnectors(db), traces)

    _print_state(asyncio.run(work()), as_json=as_json)
    note("Now revoke the API key in the provider's dashboard: deleting it here does not disable it there.")


async def _change(settings: Settings, what: str, connector: str, tenant: str | None) -> Connector:
    async with opened_database(settings) as db:
        registry = PgConnectors(db)
        found = await registry.find(connector, tenant_id=tenant)
        return await (registry.pause if what == "pause" else registry.resume)(found.id)


def _ports(runtime: Runtime) -> Ports:
    return Ports(PgConnectors(runtime.db), runtime.provider, runtime.vault)


def _read_key(*, from_stdin: bool) -> SecretStr:
    if from_stdin:
        return SecretStr(sys.stdin.read(MOST_KEY_CHARS).strip())
    if not sys.stdin.isatty():
        raise Refused("argument_invalid", "No terminal to ask for the API key: pass it by --api-key-stdin < key.txt")
    return SecretStr(getpass.getpass("API key (not shown): ").strip())


def _named(row: Checked) -> list[dict[str, str]]:
    return [{"permission": name, "label": label} for name, label in row.missing]


def _summary(connector: Connector) -> dict[str, Any]:
    return {
        "id": connector.id,
        "tenant_id": connector.tenant_id,
        "name": connector.name,
        "status": connector.status,
        "base_url": connector.base_url,
        "workspace_id": connector.workspace_id,
    }


def _print_state(connector: Connector, *, as_json: bool) -> None:
    if as_json:
        print_json(_summary(connector))
    else:
        say(f"Connector {connector.name} of tenant {connector.tenant_id} is {connector.status}.")
