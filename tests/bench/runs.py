"""Runs: making connectors due, and waiting until all that follows from it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

from tests.bench.crew import Crew
from tests.bench.stage import Database, WrongResultError

LIMIT_S = 1200.0
LOOK_S = 0.2
OPEN = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Done:
    """How long runs took by Postgres's clock, from being due: until the first began, until the last ended."""

    first_s: float
    last_s: float
    runs: int
    changes: int


def make_due(database: Database, kind: str) -> datetime:
    """Make every connector due for a `backfill`, `poll` or `reconcile`; return since when."""
    (row,) = database.execute(
        """
        WITH due AS (
            UPDATE rollcall.connectors SET next_sync_at = clock_timestamp(),
                   backfilled_at = CASE WHEN %(kind)s <> 'backfill' THEN backfilled_at END,
                   reconciled_at = CASE WHEN %(kind)s <> 'reconcile' THEN now() END
            RETURNING next_sync_at
        ) SELECT min(next_sync_at) AS since FROM due
        """,
        {"kind": kind},
    ).fetchall()
    since: datetime = row["since"]
    return since


def await_runs(database: Database, team: Crew, since: datetime, *, kind: str, connectors: int) -> Done:
    """Wait until each connector's run that began since then has ended.

    Raises:
        WrongResultError: one did not succeed, there were others, or it took too long.

    """
    deadline = time.monotonic() + LIMIT_S
    while True:
        (row,) = database.execute(
            """
            SELECT count(*) AS runs, count(*) FILTER (WHERE status = ANY(%(open)s)) AS open,
                   count(*) FILTER (WHERE status = 'succeeded' AND kind = %(kind)s) AS good,
                   extract(epoch FROM min(created_at) - %(since)s) AS first_s,
                   extract(epoch FROM max(finished_at) - %(since)s) AS last_s,
                   string_agg(DISTINCT kind || ' ' || status || ': ' || error_reason, '; ') AS why
            FROM rollcall.sync_runs WHERE created_at >= %(since)s
            """,
            {"since": since, "kind": kind, "open": list(OPEN)},
        ).fetchall()
        if row["runs"] >= connectors and not row["open"]:
            break
        team.check()
        if time.monotonic() > deadline:
            raise WrongResultError(f"{row['open']} of {connectors} runs are still open after {LIMIT_S:.0f} s")
        time.sleep(LOOK_S)
    if row["good"] != connectors or row["runs"] != connectors:
        raise WrongResultError(f"{row['good']} of {row['runs']} runs succeeded, {connectors} should have: {row['why']}")
    (parts,) = database.execute(
        "SELECT coalesce(sum(p.changes), 0) AS changes FROM rollcall.sync_parts p"
        " JOIN rollcall.sync_runs r ON r.id = p.run_id WHERE r.created_at >= %s",
        [since],
    ).fetchall()
    return Done(float(row["first_s"]), float(row["last_s"]), int(row["runs"]), int(parts["changes"]))
