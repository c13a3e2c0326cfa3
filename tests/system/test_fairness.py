"""Fair sharing: what a tenant with a huge backlog costs the others, measured with real processes."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import asyncio
import pytest

from schemas.connectors import RunKind
from tests.fixtures.installation import Installation, Row, installed, until
from tests.fixtures.simulator import start_simulator
from worker.connectors import request_sync
from worker.plan import Calendar
from worker.store.sending import Dispatch, Schedule
from worker.wiring import runtime

pytestmark = pytest.mark.slow

SLOTS: Final = 8
TENANTS: Final = 200
OVER_S: Final = 10.0
LATENCY_MS: Final = 75
SMALL: Final = {"members": 5, "groups": 1, "service_accounts": 1, "keys_per_account": 1, "usage_rows_per_day": 2}


def polls(place: Installation, ids: list[UUID], over_s: float) -> list[float]:
    """Let polls be due one after the other over some seconds; give each one's seconds from due to done, sorted."""
    (start,) = place.rows("SELECT now() + interval '0.5 s' AS at")
    place.rows(
        "UPDATE rollcall.connectors c SET next_sync_at = %s::timestamptz + (n.i - 1) * %s * interval '1 s', backfilled_at = now(),"
        " reconciled_at = now() FROM unnest(%s::uuid[]) WITH ORDINALITY AS n (id, i) WHERE c.id = n.id",
        start["at"], over_s / len(ids), ids,
    )
    query = """
        SELECT extract(epoch FROM r.finished_at - (%s::timestamptz + (n.i - 1) * %s * interval '1 s'))::float AS delay
        FROM unnest(%s::uuid[]) WITH ORDINALITY AS n (id, i)
        JOIN rollcall.sync_runs r ON r.connector_id = n.id AND r.created_at >= %s AND r.finished_at IS NOT NULL
    """
    found: list[Row] = []

    def done() -> bool:
        found[:] = place.rows(query, start["at"], over_s / len(ids), ids, start["at"])
        return len(found) == len(ids)

    until(done, "all polls done", within_s=over_s + 60)
    return sorted(row["delay"] for row in found)


def told(what: str, delays: list[float]) -> str:
    p50, p95 = statistics.quantiles(delays, n=20)[9], statistics.quantiles(delays, n=20)[18]
    return f"{what}: p50 {p50:.2f} s, p95 {p95:.2f} s, max {delays[-1]:.2f} s"


async def backfill(place: Installation, ids: list[UUID], days: int) -> None:
    async with runtime(place.settings, "test") as opened:
        dispatch = Dispatch(opened.db, Schedule(Calendar(3, 330, days)))
        for cid in ids:
            run_id = uuid4()
            await request_sync(opened.registry, tenant_id="huge", connector_id=cid, kind=RunKind.BACKFILL, run_id=run_id, actor="test")
            for sending in await dispatch.plan_run(run_id):
                await dispatch.unsend(list(sending.lanes))


@dataclass
class Seen:
    most: Counter = field(default_factory=Counter)
    bulk: Counter = field(default_factory=Counter)
    samples: int = 0


@contextmanager
def watching(place: Installation) -> Iterator[Seen]:
    seen, stop = Seen(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found = place.messages()
            seen.samples += 1
            for k, v in found.items():
                seen.most[k] = max(seen.most[k], v)
            seen.bulk[found["rollcall.backfill"]] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    stop.set()
    thread.join()


def test_x(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """x."""
    with start_simulator(tmp_path / "sim") as simulator, installed(database_url, redis_url, simulator, tmp_path, worker_slots=SLOTS, dispatch_interval_s=1) as place:
        t=time.monotonic()
        small = list(place.add([f"small-{n}" for n in range(TENANTS)], history_days=5, **SMALL).values())
        huge = list(place.add([f"huge-{n}" for n in range(40)], tenant="huge", history_days=331, **SMALL).values())
        print("added", time.monotonic()-t)
        place.start("worker", "writer", "beat")
        print("up", time.monotonic()-t)
        simulator.latency(LATENCY_MS)
        print(told("warm", polls(place, small, 1)))
        print("warm", time.monotonic()-t)
        with watching(place) as alone:
            print(told("alone", polls(place, small, OVER_S)))
        print(alone)
        t1=time.monotonic()
        asyncio.run(backfill(place, huge[:1], 1))
        asyncio.run(backfill(place, huge[1:], 30))
        print("planned", time.monotonic()-t1)
        simulator.reset_stats()
        with watching(place) as beside:
            time.sleep(3)
            print(place.rows("select kind,status,count(*) from rollcall.sync_parts group by 1,2"))
            print(told("beside", polls(place, small, OVER_S)))
            print(place.rows("select kind,status,count(*) from rollcall.sync_parts group by 1,2"))
        print(beside)
        print(max(simulator.stats()["max_concurrent"].values()))
        print("end", time.monotonic()-t)
        for p in place.processes:
            lines = p.said().splitlines()
            print(p.role, len(lines), lines[-3:])
