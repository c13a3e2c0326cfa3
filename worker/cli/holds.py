"""`rollcall holds`: removals that wait because too many records went missing at once."""

from __future__ import annotations

import asyncio
import getpass
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from worker.cli.finding import command_settings
from worker.cli.opening import opened_database
from worker.cli.printing import AsJson, Column, Yes, ago, confirm, print_fields, print_json, print_rows, say
from worker.errors import Refused
from worker.settings import Settings
from worker.store import operating, reading

app = typer.Typer(
    help="Decide over removals that are held because too many records went missing at once.", no_args_is_help=True
)
HoldId = Annotated[UUID, typer.Argument(metavar="HOLD", help="Its id, as `rollcall holds list` shows it.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who decides; default your user name.")]


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those that are over too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List holds: how many of the known records are missing, in how many runs in a row."""
    settings = command_settings()

    async def work() -> list[dict[str, Any]]:
        async with opened_database(settings) as db:
            return await reading.holds(db, tenant_id=tenant, every=every)

    print_rows(
        asyncio.run(work()),
        [
            Column("CONNECTOR", lambda r: f"{r['tenant_id']}/{r['connector']}", flexible=True),
            Column("DATASET", lambda r: r["dataset"]),
            Column("MISSING", lambda r: f"{r['missing']} of {r['known']}", justify="right"),
            Column("RUNS", lambda r: r["runs"], justify="right"),
            Column("STATE", lambda r: r["state"]),
            Column("ID", lambda r: r["id"]),
        ],
        as_json=as_json,
        empty="Nothing is held.",
    )


@app.command()
def show(hold: HoldId, as_json: AsJson = False) -> None:
    """Show a hold with the records that are missing."""
    row = asyncio.run(_read(command_settings(), hold))
    if as_json:
        print_json(row)
        return
    print_fields(
        {
            "id": row["id"],
            "connector": f"{row['tenant_id']}/{row['connector']}",
            "dataset": row["dataset"],
            "missing": f"{row['missing']} of {row['known']}",
            "state": row["state"],
            "since": ago(row["first_seen_at"]),
            "released until": row["expires_at"],
            "decided by": row["released_by"],
        }
    )
    say("")
    print_rows(
        [{"subject": subject, "runs": runs} for subject, runs in row["records"].items()],
        [
            Column("RECORD", lambda r: r["subject"], flexible=True),
            Column("MISSING IN RUNS", lambda r: r["runs"], justify="right"),
        ],
        as_json=False,
        empty="No records.",
    )


@app.command()
def release(
    hold: HoldId,
    hours: Annotated[float, typer.Option(help="How long the release is valid.", min=0.1, max=168)] = 24,
    actor: Actor = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let the held records be removed, by the next listing that still lacks them.

    The release is for exactly the records that are held now; others that go missing are held again.
    """
    settings = command_settings()
    row = asyncio.run(_read(settings, hold))
    confirm(
        f"Remove {row['missing']} of {row['known']} {row['dataset']} of {row['tenant_id']}/{row['connector']}?", yes=yes
    )

    async def work() -> None:
        async with opened_database(settings) as db:
            await operating.release(
                db, hold, digest=row["missing_digest"], actor=actor or getpass.getuser(), valid=timedelta(hours=hours)
            )

    asyncio.run(work())
    _done(settings, hold, "Released; the connector is synced at once.", as_json=as_json)


@app.command()
def reject(hold: HoldId, actor: Actor = None, as_json: AsJson = False) -> None:
    """Keep the held records; if they stay missing, counting begins anew."""
    settings = command_settings()

    async def work() -> None:
        async with opened_database(settings) as db:
            await operating.reject(db, hold, actor=actor or getpass.getuser())

    asyncio.run(work())
    _done(settings, hold, "Rejected; nothing was removed.", as_json=as_json)


async def _read(settings: Settings, hold: UUID) -> dict[str, Any]:
    async with opened_database(settings) as db:
        row = await reading.hold(db, hold)
    if row is None:
        raise Refused("unknown_hold", "There is no such hold: `rollcall holds list --all` shows them")
    return row


def _done(settings: Settings, hold: UUID, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(asyncio.run(_read(settings, hold)))
    else:
        say(text)
