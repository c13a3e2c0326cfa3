"""`rollcall status`: is everything running, and is anything piling up?"""

from __future__ import annotations

import asyncio
from typing import Any

from worker.cli.finding import command_settings
from worker.cli.opening import opened_database, opened_redis
from worker.cli.printing import AsJson, Column, ago, duration, note, print_fields, print_json, print_rows, say
from worker.errors import TryLater
from worker.settings import Settings
from worker.store import reading
from worker.stream import backlog


def status(as_json: AsJson = False) -> None:
    """Show connectors by status, the processes, and what waits: parts, streams, announcements, verdicts."""
    found, trouble = asyncio.run(_status(command_settings()))
    if as_json:
        print_json(found)
    else:
        _print(found)
    if trouble is not None:
        raise trouble


async def _status(settings: Settings) -> tuple[dict[str, Any], TryLater | None]:
    async with opened_database(settings) as db, opened_redis(settings) as redis:
        found = await reading.status(db)
        try:
            streams = [(n, await backlog(redis, n)) for n in range(await reading.partitions(db))]
        except TryLater as error:
            return found | {"streams": None}, error
    return found | {
        "streams": [{"partition": n, "entries": b.entries, "oldest_unapplied": b.oldest} for n, b in streams]
    }, None


def _print(found: dict[str, Any]) -> None:
    connectors = ", ".join(f"{count} {name}" for name, count in found["connectors"].items())
    print_fields(
        {
            "connectors": connectors or "none yet",
            "overdue": found["overdue"] or "none",
            "announcements": f"{found['unpublished']} to relay, oldest {ago(found['oldest_unpublished'])}"
            if found["unpublished"]
            else "all relayed",
            "removals held": f"{found['holds']} (rollcall holds list)" if found["holds"] else "none",
        }
    )
    say("")
    print_rows(
        found["processes"],
        [
            Column("PROCESS", lambda r: r["role"]),
            Column("NAME", lambda r: r["name"], flexible=True),
            Column("SLOTS", lambda r: r["slots"], justify="right"),
            Column("SEEN", lambda r: ago(r["seen_at"])),
            Column("LAST DID", lambda r: f"{duration(r['details'].get('quiet_s', 0))} ago"),
            Column("STATE", lambda r: "alive" if r["alive"] else "silent"),
        ],
        as_json=False,
        empty="No process was seen in the last hour: run `rollcall up`, or beat, worker and writer.",
    )
    say("")
    print_rows(
        found["streams"] or [],
        [
            Column("STREAM", lambda r: r["partition"]),
            Column("ENTRIES", lambda r: r["entries"], justify="right"),
            Column("WRITER BEHIND SINCE", lambda r: ago(r["oldest_unapplied"])),
        ],
        as_json=False,
        empty="The streams are not readable.",
    )
    say("")
    print_rows(
        found["parts"],
        [
            Column("PARTS OF", lambda r: r["kind"]),
            Column("STATUS", lambda r: r["status"]),
            Column("COUNT", lambda r: r["n"], justify="right"),
            Column("SENT OR DUE", lambda r: ago(r["oldest"])),
        ],
        as_json=False,
        empty="No parts wait or run.",
    )
    if suspects := found["suspects"]:
        names = ", ".join(f"{row['tenant_id']}/{row['name']}" for row in suspects[:5])
        note(f"{len(suspects)} keys seem dead at once, so the verdicts wait: {names}. Is it the provider?")
