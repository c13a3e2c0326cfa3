"""`rollcall sync` and `rollcall runs`: ask for a sync, watch it, look back."""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import UTC, datetime
from importlib import import_module
from typing import Annotated, Any, Final
from uuid import UUID, uuid4

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.connectors import Action, RunKind, RunStatus
from worker.cli.connectors import Tenant, Wanted
from worker.cli.finding import command_settings
from worker.cli.opening import opened_database
from worker.cli.printing import AsJson, Column, ago, console, duration, note, print_json, print_rows, say
from worker.connectors import Connector, request_sync
from worker.errors import OwnerMustAct, Refused, RollcallError, TryLater
from worker.settings import Settings
from worker.store import reading
from worker.store.connectors import PgConnectors
from worker.store.db import Database

LOOK_S: Final = 0.5
OPEN: Final = frozenset({RunStatus.QUEUED, RunStatus.RUNNING})


def sync(
    connector: Wanted,
    kind: Annotated[
        RunKind, typer.Option(help="poll: the latest; backfill: 90 days of usage; reconcile: compared with Postgres.")
    ] = RunKind.POLL,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is over, with a progress bar.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest wait, seconds.", min=1)] = 3600,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Ask for a sync now, beside the schedule.

    With --wait the exit code is 0 when it succeeded (wholly or in part), 77 when it failed and the connector's
    owner must act, else 1. A run of this kind that is under way already is waited for.

        rollcall sync main --kind reconcile --wait
    """
    settings = command_settings()
    run = asyncio.run(_sync(settings, connector, tenant, kind, timeout_s if wait else None, as_json=as_json))
    if as_json:
        print_json(run)
    elif not wait:
        say(f"Asked for: {kind} {run['id']}. Watch it: rollcall runs {run['connector_id']}")
    else:
        say(f"{run['kind'].capitalize()} {run['status']}: {run['parts_done']} of {run['parts_total']} parts.")
    if wait:
        _judge(run)


async def _sync(
    settings: Settings, wanted: str, tenant: str | None, kind: RunKind, timeout_s: float | None, *, as_json: bool
) -> dict[str, Any]:
    async with opened_database(settings) as db:
        registry = PgConnectors(db)
        found = await registry.find(wanted, tenant_id=tenant)
        run = await request_sync(
            registry, tenant_id=found.tenant_id, connector_id=found.id, kind=kind, run_id=uuid4(), actor="cli"
        )
        run_id: UUID = run["id"]
        if run["status"] == RunStatus.QUEUED:
            await asyncio.to_thread(send, settings, run_id)
        else:
            active = await reading.active_run(db, found.id, kind) if timeout_s else None
            if run["error_reason"] != "already_running" or active is None:
                raise refused(found, kind, str(run["error_reason"]))
            run_id = active
        if timeout_s is None:
            return await reading.run(db, run_id)
        return await _wait(db, run_id, timeout_s, quiet=as_json or not sys.stderr.isatty())


def send(settings: Settings, run_id: UUID) -> None:
    """Send a queued run off; blocking. When the broker is away it starts later, and a note says so."""
    tasks = import_module("tasks.app")  # Celery takes half a second to import, and no other command needs it
    tasks.configure(settings)
    try:
        tasks.send_sync(run_id)
    except TryLater as error:
        note(f"{error.message} The run is written down and starts when the broker is back.")


def refused(found: Connector, kind: RunKind, reason: str) -> RollcallError:
    """Make the error of a run that was refused, with what to do about it."""
    if reason == "disconnected":
        return OwnerMustAct(
            reason,
            f"Connector {found.name!r} is disconnected: rollcall connectors reconnect {found.id}",
            action=Action.RECONNECT,
        )
    todo = {
        "paused": f"it is paused: rollcall connectors resume {found.id}",
        "already_running": f"a {kind} is under way: rollcall runs {found.id}, or wait for it with --wait",
    }.get(reason, reason)
    return Refused(reason, f"Connector {found.name!r} is not synced: {todo}")


async def _wait(db: Database, run_id: UUID, timeout_s: float, *, quiet: bool) -> dict[str, Any]:
    give_up = time.monotonic() + timeout_s
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(error=True), disable=quiet, transient=True) as progress:
        bar = progress.add_task("waiting for a worker", total=None)
        while True:
            run = await reading.run(db, run_id)
            progress.update(
                bar,
                description=f"{run['kind']} {run['status']}",
                completed=run["parts_now"],
                total=run["parts_total"] or None,
            )
            if run["status"] not in OPEN:
                return run
            if time.monotonic() > give_up:
                raise TryLater("still_running", f"The run goes on after {timeout_s:.0f} s: rollcall runs shows it")
            await asyncio.sleep(LOOK_S)


def _judge(run: dict[str, Any]) -> None:
    if run["status"] == RunStatus.PARTIAL:
        note(f"Only a part succeeded: {run['error_reason']}. Look: rollcall connectors show {run['connector_id']}")
    elif run["status"] != RunStatus.SUCCEEDED:
        message = f"The run {run['status']}: {run['error_reason']}"
        if run["status"] == RunStatus.FAILED and run["owner_must_act"]:
            raise OwnerMustAct("run_failed", f"{message}. Look: rollcall connectors check {run['connector_id']}")
        raise RollcallError("run_failed", message)


def runs(
    connector: Annotated[str | None, typer.Argument(metavar="[CONNECTOR]", help="Of this one only.")] = None,
    most: Annotated[int, typer.Option("--most", "-n", help="How many, the latest first.", min=1)] = 20,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """List the latest runs: how far they are, how they ended and why."""
    settings = command_settings()

    async def work() -> list[dict[str, Any]]:
        async with opened_database(settings) as db:
            found = await PgConnectors(db).find(connector, tenant_id=tenant, deleted=True) if connector else None
            return await reading.runs(db, connector_id=found.id if found else None, most=most)

    print_rows(
        asyncio.run(work()),
        [
            Column("ASKED", lambda r: ago(r["created_at"])),
            Column("CONNECTOR", lambda r: r["connector"], flexible=True),
            Column("KIND", lambda r: r["kind"]),
            Column("STATUS", lambda r: r["status"]),
            Column("PARTS", lambda r: f"{r['parts_now']}/{r['parts_total']}", justify="right"),
            Column("TOOK", _took, justify="right"),
            Column("WHY", lambda r: r["error_reason"], flexible=True),
        ],
        as_json=as_json,
        empty="No runs yet.",
    )


def _took(run: Any) -> str:
    if run["started_at"] is None:
        return "-"
    return duration(((run["finished_at"] or datetime.now(UTC)) - run["started_at"]).total_seconds())
