"""Fair sharing: what a tenant with a huge backlog costs the others, measured with real processes.

The bound: messages of backfills and reconciles hold half of the slots at most. So beside any backlog a poll waits for
the next tick and for the polls before it, for nothing else, and takes a small multiple of what it takes alone.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import pytest

from schemas.connectors import RunKind
from tests.fixtures.harness import Harness
from tests.fixtures.installation import Installation, Row, installed, until
from tests.fixtures.simulator import Simulator, start_simulator
from worker.connectors import request_sync
from worker.plan import BULK_PER_MESSAGE, Calendar, messages
from worker.store.sending import Dispatch, Schedule
from worker.wiring import runtime

SLOTS: Final = 16
TENANTS: Final = 200
WORKSPACES: Final = 30
"""Of the huge tenant: one with a thousand parts, the others with a few dozen each."""
OVER_S: Final = 18.0
LATENCY_MS: Final = 75
MULTIPLE: Final = 3.0
SLACK_S: Final = 3.0
"""Beside the backlog a poll may take so many times what it takes alone, and so much longer."""
TRIES: Final = 2
"""The machine may be busy with something else in one half of a comparison: then both halves are measured anew."""
SMALL: Final = {"members": 5, "groups": 1, "service_accounts": 1, "keys_per_account": 1, "usage_rows_per_day": 2}


@dataclass(frozen=True)
class Delays:
    """Seconds from due to done, of many polls."""

    p50: float
    p95: float
    most: float

    def bounds(self, other: Delays) -> bool:
        """Tell whether the other delays are about as short as these."""
        return all(
            theirs <= MULTIPLE * ours + SLACK_S
            for ours, theirs in ((self.p50, other.p50), (self.p95, other.p95), (self.most, other.most))
        )

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} s, p95 {self.p95:.2f} s, max {self.most:.2f} s"


def polls(place: Installation, ids: Sequence[UUID], *, over_s: float) -> Delays:
    """Let one poll of each connector be due, evenly over some seconds; wait until all are done."""
    place.rows(
        """
        UPDATE rollcall.connectors c SET backfilled_at = now(), reconciled_at = now(), external_ref = n.due::text,
               next_sync_at = n.due
        FROM (SELECT id, now() + (0.5 + %s * i) * interval '1 s' AS due
              FROM unnest(%s::uuid[]) WITH ORDINALITY AS n (id, i)) n WHERE c.id = n.id
        """,
        over_s / len(ids),
        list(ids),
    )
    found: list[Row] = []

    def done() -> bool:
        found[:] = place.rows(
            """
            SELECT extract(epoch FROM min(r.finished_at) - c.external_ref::timestamptz)::float AS delay_s
            FROM rollcall.connectors c JOIN rollcall.sync_runs r ON r.connector_id = c.id
            WHERE c.id = ANY(%s) AND r.created_at >= c.external_ref::timestamptz AND r.finished_at IS NOT NULL
            GROUP BY c.id
            """,
            list(ids),
        )
        return len(found) == len(ids)

    until(done, "all polls are done", within_s=over_s + 60)
    delays = [row["delay_s"] for row in found]
    twentieths = statistics.quantiles(delays, n=20)
    return Delays(twentieths[9], twentieths[18], max(delays))


async def plan_backfills(place: Installation, ids: Sequence[UUID]) -> None:
    """Plan 330 days of these connectors, of the first one day by day; the tick finds the parts."""
    async with runtime(place.settings, "test") as opened:
        for number, connector_id in enumerate(ids):
            dispatch = Dispatch(opened.db, Schedule(Calendar(backfill_days=330, part_days=30 if number else 1)))
            run_id = uuid4()
            await request_sync(
                opened.registry,
                tenant_id="huge",
                connector_id=connector_id,
                kind=RunKind.BACKFILL,
                run_id=run_id,
                actor="test",
            )
            for sending in await dispatch.plan_run(run_id):
                await dispatch.unsend(list(sending.lanes))


def backlog(place: Installation, *, due: bool) -> int:
    """Let the backlog be due, or not; give its parts."""
    place.rows(
        "UPDATE rollcall.sync_parts SET not_before = now() + CASE WHEN %s THEN interval '0' ELSE interval '1 h' END"
        " WHERE kind = 'backfill' AND status = 'queued' AND lane IS NULL",
        due,
    )
    return open_parts(place)


def open_parts(place: Installation) -> int:
    (row,) = place.rows("SELECT count(*) AS n FROM rollcall.sync_parts WHERE kind = 'backfill' AND open")
    return int(row["n"])


@contextmanager
def watching(place: Installation) -> Iterator[list[Counter[str]]]:
    """Count the messages at the broker all the time, by queue: those that wait and those in workers' hands.

    `in lanes` are the bulk messages that hold places of their connectors, as the ledger has them: parts of one message
    have leases that end together.
    """
    seen: list[Counter[str]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            (row,) = place.rows(
                "SELECT count(DISTINCT lease_until) AS n FROM rollcall.sync_parts WHERE kind <> 'poll'"
                " AND lane IS NOT NULL AND lease_until > now() AND status IN ('queued', 'running')"
            )
            seen.append(Counter({**place.messages(), "in lanes": row["n"]}))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Simulator]:
    """A provider that takes its time."""
    with start_simulator(tmp_path / "simulator", latency_ms=LATENCY_MS) as started:
        yield started


@pytest.mark.slow
@pytest.mark.alone
def test_a_huge_backlog_delays_no_poll(database_url: str, redis_url: str, provider: Simulator, tmp_path: Path) -> None:
    """Beside a tenant with thousands of backfill parts, the polls of 200 others take about as long as without."""
    with installed(database_url, redis_url, provider, tmp_path, worker_slots=SLOTS, dispatch_interval_s=1) as place:
        small = list(place.add([f"small {n}" for n in range(TENANTS)], history_days=5, **SMALL).values())
        names = [f"huge {n}" for n in range(WORKSPACES)]
        huge = list(place.add(names, tenant="huge", history_days=331, **SMALL).values())
        place.start("worker", "writer", "beat")
        polls(place, small, over_s=1)

        asyncio.run(plan_backfills(place, huge))
        provider.reset_stats()
        for _ in range(TRIES):
            backlog(place, due=False)
            until(lambda: not place.messages()["rollcall.backfill"], "bulk has ended")
            alone = polls(place, small, over_s=OVER_S)
            before = backlog(place, due=True)
            with watching(place) as seen:
                beside = polls(place, small, over_s=OVER_S)
            after = open_parts(place)
            bulk = Counter(found["rollcall.backfill"] for found in seen)
            longest = max(found["rollcall.fetch"] for found in seen)
            sys.stdout.write(
                f"\npolls alone: {alone}\npolls beside a backlog of {before} to {after} parts: {beside}\n"
                f"at most {longest} poll messages; looks by number of bulk messages: {dict(sorted(bulk.items()))}\n"
            )
            if alone.bounds(beside):
                break
        assert alone.bounds(beside)
        assert before > after > 500, "the backlog moves, and lasts"
        assert max(provider.stats()["max_concurrent"].values()) <= 2, "requests in flight per connector"
        assert longest <= 5 * SLOTS, "the backlog is in Postgres, not in the queues"
        assert max(found["in lanes"] for found in seen) == SLOTS // 2, "bulk fills half of the slots, and no more"
        # A message that has freed its lanes counts here until it is acknowledged, so for a moment there may be more.
        over = [number for number in bulk.elements() if number > SLOTS // 2]
        assert len(over) < 0.1 * len(seen)
        assert bulk[SLOTS // 2], "bulk fills its half of the slots"


async def test_no_backlog_hides_a_poll(harness: Harness) -> None:
    """Polls that are due, or due again, leave at the next tick, however many parts and connectors wait for longer."""
    again, due = [await harness.add_connector(name, tenant=name) for name in ("again", "due")]
    await harness.rows(
        "UPDATE rollcall.connectors SET backfilled_at = now(), reconciled_at = now(),"
        " next_sync_at = CASE WHEN id = %s THEN now() END",
        [again.id],
    )
    for sending in await harness.due(10):
        await harness.runtime.dispatch.unsend(list(sending.lanes))
    await harness.rows(
        """
        WITH c AS (INSERT INTO rollcall.connectors (tenant_id, name, base_url, sealed_key, partition, status)
                   SELECT 'huge', 'c' || n, 'http://127.0.0.1', 'sealed', 0, 'connected' FROM generate_series(1, 400) n
                   RETURNING id),
        a AS (INSERT INTO rollcall.connector_access (connector_id, dataset) SELECT id, 'usage.member' FROM c),
        r AS (INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, created_at)
              SELECT gen_random_uuid(), id, 'huge', 'backfill', 'test', 'running', now() - interval '1 h' FROM c
              RETURNING id, connector_id, created_at)
        INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, window_start, not_before)
        SELECT gen_random_uuid(), id, connector_id, 'backfill', 'usage.member', date '2026-01-01' + n, created_at
        FROM r, generate_series(1, 5) n
        """
    )
    await harness.make_due(due)
    await harness.tick()
    sent = [(message.kind, message.connector_id) for message in harness.messages]
    assert {connector for kind, connector in sent if kind is RunKind.POLL} == {again.id, due.id}
    bulk = [message for message in messages(harness.messages) if message[0].kind is RunKind.BACKFILL]
    assert [len(message) for message in bulk] == [BULK_PER_MESSAGE] * 32, "for half of the harness's slots"
