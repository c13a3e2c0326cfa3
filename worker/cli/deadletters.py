"""`rollcall deadletter`: stream entries that could not be applied."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from worker.cli.finding import command_settings
from worker.cli.opening import opened_redis
from worker.cli.printing import AsJson, Column, Yes, ago, confirm, print_json, print_rows, say
from worker.cli.redis_reading import DeadLetters
from worker.errors import Refused

app = typer.Typer(help="Look at stream entries that could not be applied.", no_args_is_help=True)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List dead letters, oldest first: why they lie here and where they came from.

    What one held is fetched again by a reconcile:

        rollcall sync CONNECTOR --kind reconcile
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
    letters: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters for good."""
    if bool(letters) == every:
        raise Refused("argument_invalid", "Name the dead letters to drop, or say --all")
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
