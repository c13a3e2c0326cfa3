"""`rollcall demo`: the main job where one can watch, on real parts, in a data folder of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from worker import logs
from worker.cli.demo import story
from worker.cli.demo.checking import differences
from worker.cli.demo.control import Control
from worker.cli.demo.watching import Watcher
from worker.cli.printing import AsJson, console, note, print_json
from worker.cli.running import RunningStack, environment
from worker.errors import TryLater
from worker.settings import load
from worker.store.db import Database
from worker.wiring import runtime

POLL_INTERVAL_S: Final = 3
SIMULATOR_WITHIN_S: Final = 20.0
TABLES: Final = ("members", "groups", "service_accounts", "api_keys", "credit_usage")


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Stay up at the end, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the main job: six tenants against a simulated provider, checked against its truth at the end.

    Needs nothing but this machine: embedded Postgres and Valkey in a folder of their own (or DATABASE_URL and
    REDIS_URL, if set), the simulator, beat, a worker and a writer as separate processes. Ends with 0 only if
    every table agrees with the simulator.
    """
    folder = Path(tempfile.mkdtemp(prefix="rollcall-demo-"))
    settings = load().model_copy(
        update={
            "data_dir": folder,
            "poll_interval_s": POLL_INTERVAL_S,
            "dispatch_interval_s": 1.0,
            "log_level": os.environ.get("ROLLCALL_LOG_LEVEL", "ERROR"),
        }
    )
    logs.configure(settings.log_format, "ERROR", process="demo")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with RunningStack(settings, simulator=True, ephemeral=True, say=note) as stack:
            found = asyncio.run(_play(stack))
            if as_json:
                print_json({"agrees": not found, "differences": found, "seconds": round(time.monotonic() - began, 1)})
            elif not found:
                console().print(f"\n[green]Everything agrees with the simulator.[/] {time.monotonic() - began:.0f} s.")
            if keep:
                _stay(folder)
    except KeyboardInterrupt:
        note("Stopped.")
        raise typer.Exit(1) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        for line in found:
            note(f"Differs: {line}")
        raise typer.Exit(1)


async def _play(stack: RunningStack) -> list[str]:
    show = console(error=False)
    if stack.simulator_url is None:
        raise RuntimeError("the stack was started without its simulator")
    async with Control(stack.simulator_url) as control, runtime(stack.settings, "demo") as opened:
        await _simulator_answers(control)
        watcher = Watcher(opened.redis, await opened.recovery.partitions(), show, {})
        stage = story.Stage(show, control, watcher, opened.db, environment(stack.settings, os.environ), connectors={})
        watching = asyncio.create_task(watcher.run(), name="watcher")
        try:
            show.rule("Six tenants connect; their first syncs bring 90 days of usage")
            await asyncio.gather(story.connect(stage), story.backfills(stage))
            watcher.names.update({str(cid): name for name, cid in stage.connectors.items()})
            await story.degraded(stage)
            show.rule("Live: events as they leave the stream")
            watcher.show = True
            await story.live(stage)
            await story.death_and_return(stage)
            await story.settle(stage)
            watcher.show = False
            show.rule("Postgres against the simulator's truth")
            return await _compare(stage)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching


async def _simulator_answers(control: Control) -> None:
    until = time.monotonic() + SIMULATOR_WITHIN_S
    while True:
        try:
            await control.requests("")
        except TryLater:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def _compare(stage: story.Stage) -> list[str]:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("tenant", "status", "what to do"):
        table.add_column(title, no_wrap=True)
    for title in (*TABLES, "agrees"):
        table.add_column(title.replace("_", " "), justify="right")
    wrong: list[str] = []
    for tenant in story.TENANTS:
        connector_id = stage.connectors[tenant.name]
        found, counts = await differences(
            stage.db, stage.control, tenant.name, connector_id, with_usage=tenant.name != "initech"
        )
        status = await _status(stage.db, connector_id)
        numbers = [f"{counts[t]:,}" for t in TABLES]
        table.add_row(tenant.name, status[0], status[2], *numbers, "[red]no[/]" if found else "[green]yes[/]")
        wrong += found
        expected = (
            ("degraded", "scope_missing", "add_permission") if tenant.name == "initech" else ("connected", "-", "-")
        )
        if status != expected:
            wrong.append(f"{tenant.name}: should be {expected[0]}, is {status[0]} ({status[1]})")
    stage.console.print(table)
    return wrong


async def _status(db: Database, connector_id: object) -> tuple[str, str, str]:
    rows: Sequence[dict[str, object]] = await story.rows_of(
        db, "SELECT status, status_reason, action FROM rollcall.connectors WHERE id = %s", connector_id
    )
    row = rows[0]
    action = row["action"] if row["action"] != "none" else None
    return str(row["status"]), str(row["status_reason"] or "-"), str(action or "-")


def _stay(folder: Path) -> None:
    console().print(
        f"\nIt stays up. In another terminal: [bold]export ROLLCALL_DATA_DIR={folder}[/], then"
        " [bold]rollcall connectors list[/] or [bold]rollcall events tail[/]. Stop with Ctrl-C."
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
