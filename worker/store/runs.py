"""Runs: their birth, their count, their end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from uuid import UUID, uuid4

import orjson

from schemas.connectors import RunKind
from worker import metrics
from worker.plan import PlannedPart
from worker.store.announcements import Announcement, announce
from worker.store.db import Connection, Row
from worker.usage import reconcile_totals
from worker.verdict import DENIALS

SCHEDULER = "schedule"
"""`requested_by` of runs nobody asked for: their quiet polls announce nothing."""


@dataclass(slots=True)
class Finished:
    """Runs that ended now, and the connectors, of those looked at, with parts that nobody has in hand."""

    ended: list[Row] = field(default_factory=list)
    unsent: set[UUID] = field(default_factory=set)


async def insert_parts(
    connection: Connection, run_id: UUID, connector_id: UUID, kind: RunKind, parts: Sequence[PlannedPart]
) -> None:
    """Write the parts of a planned run and start it."""
    await connection.execute(
        """
        INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, window_start, window_end)
        SELECT id, %s, %s, %s, dataset, s, e FROM unnest(%b::uuid[], %b::text[], %b::date[], %b::date[])
               AS n (id, dataset, s, e)
        """,
        [
            run_id,
            connector_id,
            kind,
            [uuid4() for _ in parts],
            [str(p.dataset) for p in parts],
            [p.start for p in parts],
            [p.end for p in parts],
        ],
    )
    await connection.execute(
        "UPDATE rollcall.sync_runs SET status = 'running', started_at = now(), parts_total = %s"
        " WHERE id = %s AND status = 'queued'",
        [len(parts), run_id],
    )


async def finish_runs(connection: Connection, ids: Collection[UUID], connectors: Mapping[UUID, Row]) -> Finished:
    """Count the parts of these runs, whose connectors are locked by the caller; end those with none open.

    A part is unlucky when asking again may help. One that its owner must see to is so too if the dataset is granted by
    now: what follows from being granted again has passed already.
    """
    finished = Finished()
    if not ids:
        return finished
    wanted = sorted(ids)
    # Materialized: by statistics of a quiet moment no run is open, and for each that is all would be counted again.
    rows = await connection.execute(
        """
        WITH n AS MATERIALIZED (
            SELECT p.run_id,
                   count(*) FILTER (WHERE p.open) AS open,
                   count(*) FILTER (WHERE status = 'succeeded') AS good,
                   count(*) FILTER (WHERE status = 'skipped') AS skipped,
                   count(*) FILTER (WHERE status = 'failed') AS failed,
                   count(*) FILTER (WHERE status = 'failed' AND (error_class <> 'OwnerMustAct'
                                    OR (error_reason = ANY(%b) AND a.state = 'granted'))) AS unlucky,
                   count(*) FILTER (WHERE status = 'succeeded' AND error_reason IS NOT NULL) AS incomplete,
                   string_agg(DISTINCT p.dataset || ': ' || error_reason, '; ')
                       FILTER (WHERE error_reason IS NOT NULL AND status <> 'waiting') AS why,
                   coalesce(sum(changes), 0) AS changes,
                   min(window_start) AS first_day, max(window_end) AS last_day
            FROM rollcall.sync_parts p LEFT JOIN rollcall.connector_access a USING (connector_id, dataset)
            WHERE p.run_id = ANY(%b) GROUP BY p.run_id
        )
        UPDATE rollcall.sync_runs r SET
            parts_done = n.good + n.skipped, parts_failed = n.failed,
            status = CASE WHEN n.open > 0 THEN 'running' WHEN n.good = 0 THEN 'failed'
                          WHEN n.failed + n.incomplete > 0 THEN 'partial' ELSE 'succeeded' END,
            error_reason = CASE WHEN n.open = 0 THEN n.why END,
            finished_at = CASE WHEN n.open = 0 THEN now() END
        FROM n WHERE r.id = n.run_id AND r.id = ANY(%b) AND r.status IN ('queued', 'running')
        RETURNING r.*, n.open AS open_parts, n.unlucky, n.changes, n.first_day, n.last_day,
                  EXISTS (SELECT 1 FROM rollcall.sync_parts p WHERE p.connector_id = r.connector_id
                          AND p.open AND p.status <> 'running' AND p.lane IS NULL) AS unsent
        """,
        [[str(reason) for reason in DENIALS], wanted, wanted],
    )
    async for row in rows:
        if row["unsent"]:
            finished.unsent.add(row["connector_id"])
        if not row["open_parts"]:
            finished.ended.append(row)
    await _after(connection, finished.ended, connectors)
    return finished


async def _after(connection: Connection, ended: Sequence[Row], connectors: Mapping[UUID, Row]) -> None:
    if not ended:
        return
    for run in ended:
        metrics.RUNS_FINISHED.labels(run["kind"], run["status"]).inc()
    await _check_totals(connection, [run for run in ended if run["changes"] and run["first_day"]])
    await connection.execute(
        """
        WITH unchanged AS (
            DELETE FROM rollcall.sync_parts WHERE run_id = ANY(%b) AND kind = 'poll' AND status = 'succeeded'
                   AND changes = 0 AND error_reason IS NULL
        )
        UPDATE rollcall.connectors c SET
            last_polled_at = now(),
            last_synced_at = CASE WHEN n.synced THEN now() ELSE last_synced_at END,
            backfilled_at = CASE WHEN n.backfilled THEN now() ELSE backfilled_at END,
            reconciled_at = CASE WHEN n.reconciled THEN now() ELSE reconciled_at END
        FROM (
            SELECT id, bool_or(good) AS synced, bool_or(good AND NOT unlucky AND kind = 'backfill') AS backfilled,
                   bool_or(good AND NOT unlucky AND kind <> 'poll') AS reconciled
            FROM unnest(%b::uuid[], %b::text[], %b::bool[], %b::bool[]) AS n (id, kind, good, unlucky) GROUP BY id
        ) n
        WHERE c.id = n.id
        """,
        [
            [r["id"] for r in ended if r["requested_by"] == SCHEDULER],
            [r["connector_id"] for r in ended],
            [r["kind"] for r in ended],
            [r["status"] in {"succeeded", "partial"} for r in ended],
            [r["unlucky"] > 0 for r in ended],
        ],
    )
    await announce(connection, [run_announcement(r, connectors[r["connector_id"]]) for r in ended if speaks(r)])


def speaks(run: Row) -> bool:
    """Tell whether a run is announced: backfills and asked-for runs are."""
    return bool(run["kind"] == RunKind.BACKFILL or run["requested_by"] != SCHEDULER)


def run_announcement(run: Row, connector: Row) -> Announcement:
    """Write the start or the end of a run."""
    status = run["status"]
    what = {"running": "started", "queued": "started", "failed": "failed", "cancelled": "failed"}
    return Announcement(
        tenant_id=run["tenant_id"],
        connector_id=run["connector_id"],
        partition=connector["partition"],
        what=f"sync.{what.get(status, 'completed')}",
        subject=f"run/{run['id']}",
        run_id=run["id"],
        data={
            "run_id": str(run["id"]),
            "kind": run["kind"],
            "status": status,
            "parts_total": run["parts_total"],
            "parts_done": run["parts_done"],
            "parts_failed": run["parts_failed"],
            "reason": run["error_reason"],
        },
    )


async def _check_totals(connection: Connection, runs: Sequence[Row]) -> None:
    """Record where the dimensions of a day do not add up to the same total; most do exactly, and stay in Postgres."""
    if not runs:
        return
    rows = await connection.execute(
        """
        SELECT n.id, day::text, unit, product, member, api_key
        FROM unnest(%b::uuid[], %b::uuid[], %b::date[], %b::date[]) AS n (id, c, first, last), LATERAL (
            SELECT bucket_start AS day, unit, sum(amount) FILTER (WHERE dimension = 'product') AS product,
                   sum(amount) FILTER (WHERE dimension = 'member') AS member,
                   sum(amount) FILTER (WHERE dimension = 'api_key') AS api_key
            FROM rollcall.credit_usage
            WHERE connector_id = n.c AND dimension IN ('product', 'member', 'api_key')
                  AND bucket_start >= n.first AND bucket_start < n.last
            GROUP BY bucket_start, unit
        ) t
        WHERE (product IS DISTINCT FROM member OR member IS DISTINCT FROM api_key) AND 3 = (
            SELECT count(*) FROM rollcall.usage_coverage v
            WHERE v.connector_id = n.c AND v.day = t.day AND v.dimension IN ('product', 'member', 'api_key')
                  AND v.state <> 'unavailable')
        """,
        [
            [run["id"] for run in runs],
            [run["connector_id"] for run in runs],
            [run["first_day"] for run in runs],
            [run["last_day"] for run in runs],
        ],
    )
    totals: dict[UUID, dict[str, dict[tuple[str, str], Decimal]]] = {}
    async for row in rows:
        of_run = totals.setdefault(row["id"], {"product": {}, "member": {}, "api_key": {}})
        for dimension, of_dimension in of_run.items():
            if row[dimension] is not None:
                of_dimension[row["day"], row["unit"]] = row[dimension]
    for run_id, by_dimension in totals.items():
        if found := reconcile_totals(by_dimension):
            warnings = [
                {
                    "kind": "totals_differ",
                    "day": m.day,
                    "unit": m.unit,
                    "totals": {d: str(v) for d, v in m.totals.items()},
                }
                for m in found
            ]
            await connection.execute(
                "UPDATE rollcall.sync_runs SET warnings = %t::jsonb WHERE id = %s",
                [orjson.dumps(warnings).decode(), run_id],
            )


async def drop_parts(connection: Connection, connector: Row, *, reason: str, status: str = "failed") -> None:
    """End the open runs of a connector that may not be asked any more; their open parts are skipped."""
    await connection.execute(
        """
        UPDATE rollcall.sync_parts SET status = 'skipped', lane = NULL, lease_until = NULL,
               error_class = 'OwnerMustAct', error_reason = %s
        WHERE connector_id = %s AND open
        """,
        [reason, connector["id"]],
    )
    await connection.execute(
        "UPDATE rollcall.connector_access SET lease_until = NULL WHERE connector_id = %s AND lease_until IS NOT NULL",
        [connector["id"]],
    )
    rows = await connection.execute(
        """
        UPDATE rollcall.sync_runs r SET status = %s, error_reason = %s, finished_at = now(),
               parts_done = n.done, parts_failed = n.failed
        FROM (SELECT r.id, count(*) FILTER (WHERE p.status IN ('succeeded', 'skipped')) AS done,
                     count(*) FILTER (WHERE p.status = 'failed') AS failed
              FROM rollcall.sync_runs r LEFT JOIN rollcall.sync_parts p ON p.run_id = r.id
              WHERE r.connector_id = %s AND r.status IN ('queued', 'running') GROUP BY r.id) n
        WHERE r.id = n.id RETURNING r.*
        """,
        [status, reason, connector["id"]],
    )
    ended = [row async for row in rows]
    await announce(connection, [run_announcement(r, connector) for r in ended if speaks(r)])
