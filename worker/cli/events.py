"""`rollcall events`: watch the change events, and have datasets replayed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

import typer

from schemas.connectors import Dataset
from schemas.events import PREFIX
from worker.cli.connectors import Tenant, Wanted
from worker.cli.finding import command_settings
from worker.cli.opening import opened_database, opened_redis
from worker.cli.printing import AsJson, Column, print_json, print_rows, say
from worker.cli.redis_reading import tail as read_events
from worker.errors import Refused
from worker.replay import Replayed
from worker.replay import replay as recipe
from worker.settings import Settings
from worker.store import reading
from worker.store.connectors import PgConnectors
from worker.store.facts import PgFacts
from worker.stream import RedisOutlet

app = typer.Typer(help="Watch the change events, and have datasets replayed.", no_args_is_help=True)
_ID: Final = re.compile(r"[0-9]{1,16}(-[0-9]{1,16})?")


@app.command()
def tail(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    type_: Annotated[
        str, typer.Option("--type", help="Glob over the type, as 'member.*', 'connector.*' or the full name.")
    ] = "*",
    from_: Annotated[
        str, typer.Option("--from", help="start: the oldest kept; now: new ones only; or an entry's id.")
    ] = "start",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for more.")] = True,
    count: Annotated[int | None, typer.Option(help="Stop after so many events.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Print events of all partitions as they come, without taking them from any subscriber.

    With --json one CloudEvent per line.

        rollcall events tail --type 'connector.*'
        rollcall events tail --from start --no-follow --json | jq .subject
    """
    if from_ not in {"start", "now"} and not _ID.fullmatch(from_):
        raise Refused("argument_invalid", "--from takes start, now, or an entry's id like 1716200000000-0")
    asyncio.run(_tail(command_settings(), tenant, type_, from_, follow=follow, count=count, as_json=as_json))


async def _tail(
    settings: Settings, tenant: str | None, glob: str, start: str, *, follow: bool, count: int | None, as_json: bool
) -> None:
    async with opened_database(settings) as db:
        partitions = await reading.partitions(db)
    left = count
    async with (
        opened_redis(settings) as redis,
        aclosing(read_events(redis, partitions, start=start, follow=follow)) as events,
    ):
        async for _, event in events:
            if not wanted(event, tenant, glob):
                continue
            if as_json:
                print_json(event)
            else:
                say(line(event))
            if left is not None:
                left -= 1
                if left == 0:
                    return


@app.command()
def replay(
    connector: Wanted,
    to: Annotated[str, typer.Option("--to", metavar="STREAM_KEY", help="A Redis key of your own for the stream.")],
    dataset: Annotated[
        list[Dataset] | None,
        typer.Option("--dataset", metavar="DATASET", help=f"Only this one ({', '.join(Dataset)}); may be repeated."),
    ] = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Write whole datasets, as Postgres holds them, to a stream of your own: for who missed events.

    You missed something when an entry's `sequence` is above the version you hold of its dataset, and its `base` is
    not that version. Then:

    1. Remember where you stand in the live stream, and have the dataset replayed.

    2. Empty your copy of the dataset, with version 0, and fold the replay as you fold the live stream. Its events are
    of op `r`, its `base` is 0, and its `sequence` is the version Postgres holds. `replay.completed` ends it.

    3. Go on with the live stream where you stood. What the replay has already is skipped by its `sequence`. Should
    the next entry still not fit, Postgres was not there yet: replay once more.

    The stream is yours to delete; Redis deletes it after the events' retention.

        rollcall events replay main --dataset members --dataset groups --to billing:replay
    """
    settings = command_settings()

    async def work() -> list[Replayed]:
        async with opened_database(settings) as db, opened_redis(settings) as redis:
            found = await PgConnectors(db).find(connector, tenant_id=tenant)
            outlet = RedisOutlet(redis, keep_s=settings.event_retention_s)
            return await recipe(
                found, list(dict.fromkeys(dataset or Dataset)), to, PgFacts(db), outlet, now=datetime.now(UTC)
            )

    print_rows(
        map(asdict, asyncio.run(work())),
        [
            Column("DATASET", lambda r: r["dataset"]),
            Column("VERSION", lambda r: r["version"], justify="right"),
            Column("RECORDS", lambda r: r["records"], justify="right"),
        ],
        as_json=as_json,
        empty="",
    )


def wanted(event: Mapping[str, Any], tenant: str | None, glob: str) -> bool:
    """Tell whether an event is of the tenant, if one is given, and of a type like the glob."""
    if tenant is not None and event.get("tenantid") != tenant:
        return False
    return fnmatchcase(short(event), glob) or fnmatchcase(str(event.get("type")), glob)


def short(event: Mapping[str, Any]) -> str:
    """Give the type without prefix and version."""
    return str(event.get("type", "")).removeprefix(PREFIX).removesuffix(".v1")


def line(event: Mapping[str, Any]) -> str:
    """Write an event for people, on one line; no names or addresses, which its data may hold."""
    data = event.get("data") or {}
    what = {"c": "created", "u": "updated", "d": "deleted", "r": "replayed"}.get(data.get("op", ""), "")
    details = [what, ", ".join(data.get("changed") or ())]
    details += [str(data[name]) for name in ("status", "reason") if data.get(name)]
    if totals := data.get("totals"):
        details += [f"{amount} {unit}" for unit, amount in totals.items()]
    head = f"{str(event.get('time', ''))[:19]}  {short(event):<23} {event.get('tenantid', '')}"
    return f"{head}  {event.get('subject', '')}  {' '.join(filter(None, details))}".rstrip()
