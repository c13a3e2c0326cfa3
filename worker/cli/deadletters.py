"""`rollcall deadletter`: stream entries that could not be applied."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import typer

from schemas.connectors import RunKind, RunStatus, Status
from worker.cli.finding import command_settings
from worker.cli.opening import opened_database, opened_redis
from worker.cli.printing import AsJson, Column, Yes, ago, confirm, print_json, print_rows, say
from worker.cli.syncs import refused, send
from worker.connectors import request_sync
from worker.deadletters import DeadLetters
from worker.errors import OwnerMustAct, Refused, RollcallError
from worker.settings import Settings
from worker.store.connectors import PgConnectors

app = typer.Typer(help="Look at stream entries that could not be applied, and fetch again.", no_args_is_help=True)
Letters = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones.")]
Every = Annotated[bool, typer.Option("--all", help="All of them.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List dead letters, oldest first: why they lie here and where they came from.

    What one held is fetched again by redriving it:

        rollcall deadletter redrive ID
    """
    settings = command_settings()

    async def work() -> list[dict[str, Any]]:
        async with opened_redis(settings) as redis:
            return [letter async for letter in DeadLetters(redis).all()]

    print_rows(
        asyncio.run(work()),
        [
            Column("ID", lambda r: r["id"]),
            Column("AGE", lambda r: ago(datetime.fromtimestamp(r["at_ms"] / 1000, UTC))),
            Column("REASON", lambda r: r.get("reason"), flexible=True),
            Column("DATASET", lambda r: r.get("dataset")),
            Column("CONNECTOR", lambda r: r.get("connector")),
        ],
        as_json=as_json,
        empty="No dead letters.",
    )


@app.command()
def show(letter: Annotated[str, typer.Argument(help="Its id.")], as_json: AsJson = False) -> None:  # noqa: ARG001 - it is JSON in any case
    """Show one with its events, as JSON. It may hold names and addresses."""
    settings = command_settings()

    async def work() -> dict[str, Any]:
        async with opened_redis(settings) as redis:
            return await DeadLetters(redis).read(letter)

    print_json(asyncio.run(work()))


@app.command()
def drop(
    letters: Letters = None,
    every: Every = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters for good, without fetching again what they held."""
    _require_choice(letters, every=every)
    settings = command_settings()
    confirm("Drop them for good?", yes=yes)

    async def work() -> int:
        async with opened_redis(settings) as redis:
            dead = DeadLetters(redis)
            return await dead.drop(letters or [letter["id"] async for letter in dead.all()])

    dropped = asyncio.run(work())
    if as_json:
        print_json({"dropped": dropped})
    else:
        say(f"Dropped {dropped}.")


@app.command()
def redrive(letters: Letters = None, every: Every = False, as_json: AsJson = False) -> None:
    """Fetch again what dead letters held, and drop them.

    Each connector they name is reconciled: asked anew and compared with Postgres, dataset by dataset. That answers
    for all dead letters of the connector, so they go together. Those of a deleted connector just go. Letters stay
    where no reconcile can start: the connector is paused or disconnected, or a reconcile is under way that may have
    passed their dataset already. The exit code is 0 when none stayed.

        rollcall deadletter redrive --all

        rollcall runs CONNECTOR
    """
    _require_choice(letters, every=every)
    settings = command_settings()
    rows, errors = asyncio.run(_redrive(settings, letters or []))
    print_rows(
        rows,
        [
            Column("CONNECTOR", lambda r: r["connector"]),
            Column("LETTERS", lambda r: len(r["letters"]), justify="right"),
            Column("OUTCOME", lambda r: r["outcome"]),
            Column("WHY", lambda r: r["reason"], flexible=True),
            Column("RUN", lambda r: r["run_id"]),
        ],
        as_json=as_json,
        empty="No dead letters.",
    )
    if errors:
        raise errors[0]


async def _redrive(settings: Settings, ids: list[str]) -> tuple[list[dict[str, Any]], list[RollcallError]]:
    """Redrive connector by connector; give a row of each, and why letters stayed."""
    rows: list[dict[str, Any]] = []
    errors: list[RollcallError] = []
    async with opened_database(settings) as db, opened_redis(settings) as redis:
        dead, registry = DeadLetters(redis), PgConnectors(db)
        named = {(await dead.read(one)).get("connector", "") for one in ids}
        by_connector: dict[str, list[str]] = {}
        async for letter in dead.all():
            by_connector.setdefault(letter.get("connector", ""), []).append(letter["id"])
        for connector, lying in by_connector.items():
            if ids and connector not in named:
                continue
            outcome, reason, run_id = "redriven", None, None
            try:
                run_id = await _reconcile(settings, registry, connector)
                if run_id is None:
                    outcome, reason = "dropped", "deleted"
                await dead.drop(lying)
            except (Refused, OwnerMustAct) as error:
                outcome, reason = "kept", error.reason
                errors.append(error)
            rows.append(
                {"connector": connector, "letters": lying, "outcome": outcome, "reason": reason, "run_id": run_id}
            )
    return rows, errors


async def _reconcile(settings: Settings, registry: PgConnectors, connector: str) -> UUID | None:
    """Ask for a reconcile of the connector that dead letters name; None: it is deleted, there is nothing to heal.

    Raises:
        Refused: no connector of ours is named, or it cannot be reconciled now.
        OwnerMustAct: it is disconnected.
        TryLater: Postgres is away.

    """
    try:
        found = await registry.find(str(UUID(connector)), deleted=True)
    except (ValueError, Refused):
        raise Refused(
            "unknown_connector", "Some name no connector of ours: look (`rollcall deadletter show ID`), then drop them"
        ) from None
    if found.status is Status.DELETED:
        return None
    run_id = uuid4()
    run = await request_sync(
        registry,
        tenant_id=found.tenant_id,
        connector_id=found.id,
        kind=RunKind.RECONCILE,
        run_id=run_id,
        actor="deadletter",
    )
    if run["status"] != RunStatus.QUEUED:
        raise refused(found, RunKind.RECONCILE, str(run["error_reason"]))
    await asyncio.to_thread(send, settings, run_id)
    return run_id


def _require_choice(letters: list[str] | None, *, every: bool) -> None:
    if bool(letters) == every:
        raise Refused("argument_invalid", "Name dead letters by their ids, or say --all")
