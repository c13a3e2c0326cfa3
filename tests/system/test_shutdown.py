"""SIGTERM: work in hand is finished within the grace period, else given back; a second one is immediate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from tests.fixtures.installation import Installation, Row, installed, until
from tests.fixtures.processes import Process
from tests.fixtures.simulator import Simulator
from worker.stream import GROUP

pytestmark = pytest.mark.slow

GRACE_S: Final = 15
PROMPT_S: Final = 6.0
"""Besides the grace period an end may take so long, on a machine that has other things to do."""
HELD_S: Final = 120
"""Longer than any test waits."""
SMALL: Final = {"members": 5, "groups": 1, "service_accounts": 1, "keys_per_account": 1, "usage_rows_per_day": 2}


@pytest.fixture
def place(database_url: str, redis_url: str, simulator: Simulator, tmp_path: Path) -> Iterator[Installation]:
    simulator.faults(None)
    with installed(
        database_url, redis_url, simulator, tmp_path, dispatch_interval_s=1, backfill_days=30, shutdown_grace_s=GRACE_S
    ) as made:
        yield made
        simulator.faults(None)


def in_hand(place: Installation, **settings: object) -> tuple[UUID, Process]:
    """Start a worker and a beat, without a writer; wait until the worker is asking the provider."""
    (acme,) = place.add(["acme"], history_days=31, **SMALL).values()
    worker, _ = place.start("worker", "beat", **settings)
    place.simulator.reset_stats()
    place.rows("UPDATE rollcall.connectors SET next_sync_at = now()")
    until(lambda: place.simulator.stats()["total"] >= 2, "two requests are in flight")
    return acme, worker


def parts(place: Installation) -> list[Row]:
    return place.rows("SELECT * FROM rollcall.sync_parts ORDER BY dataset")


def finished(place: Installation, connector_id: UUID) -> Row:
    """Wait until the connector's run is over, whoever ends it."""
    return place.await_row(
        "SELECT * FROM rollcall.sync_runs WHERE connector_id = %s AND finished_at IS NOT NULL", connector_id
    )


def exits(process: Process, *, within_s: float) -> int:
    """Wait for the end of a process; give its exit status."""
    until(lambda: process.pid is None, f"the {process.role} has ended: {process.said()[-2000:]}", within_s=within_s)
    assert process._process is not None
    return int(process._process.returncode)


def test_a_worker_finishes_what_it_has_in_hand(place: Installation) -> None:
    """Slow fetches that end within the grace period are ended: published, not given back, their message done with."""
    place.simulator.faults(None, {"kind": "slow", "seconds": 0.7})
    acme, worker = in_hand(place)
    worker.terminate()
    began = time.monotonic()
    assert exits(worker, within_s=GRACE_S) == 0
    assert time.monotonic() - began > 0.5
    assert {(part["status"], part["published_at"] is None, part["attempts"]) for part in parts(place)} == {
        ("running", False, 1)
    }
    assert place.messages()["rollcall.backfill"] == 0
    assert not place.rows("SELECT 1 FROM rollcall.workers WHERE role = 'worker'"), "it has signed off"
    place.start("writer")
    assert finished(place, acme)["status"] == "succeeded"


def test_what_takes_longer_than_the_grace_period_is_given_back(place: Installation) -> None:
    """Work that will not end in time is interrupted: its parts wait, no attempt is lost, their datasets are free."""
    place.simulator.faults(None, {"kind": "slow", "seconds": HELD_S})
    acme, worker = in_hand(place, shutdown_grace_s=1)
    worker.terminate()
    assert exits(worker, within_s=1 + PROMPT_S) == 0
    assert {
        (part["status"], part["error_reason"], part["attempts"], part["lane"], part["lease_until"])
        for part in parts(place)
    } == {("waiting", "interrupted", 0, None, None)}
    assert not place.rows("SELECT 1 FROM rollcall.connector_access WHERE lease_until IS NOT NULL")
    place.simulator.faults(None)
    place.start("worker", "writer")
    run = finished(place, acme)
    assert (run["status"], run["parts_failed"]) == ("succeeded", 0)


def test_a_second_signal_is_immediate(place: Installation) -> None:
    """Who asks twice does not wait; what was in hand is found by the silence, and another worker does it."""
    place.simulator.faults(None, {"kind": "slow", "seconds": HELD_S})
    acme, worker = in_hand(place)
    worker.terminate()
    time.sleep(1)
    assert worker.pid is not None
    worker.terminate()
    assert exits(worker, within_s=PROMPT_S) == 1
    assert {part["status"] for part in parts(place)} == {"running"}
    place.simulator.faults(None)
    place.rows("UPDATE rollcall.workers SET seen_at = seen_at - interval '1 min' WHERE role = 'worker'")
    place.start("worker", "writer")
    assert finished(place, acme)["status"] == "succeeded"


def test_a_writer_finishes_its_batch(place: Installation) -> None:
    """Stopped amid a backlog a writer ends what it is at: what it applied is acknowledged, the rest is another's."""
    names = [f"tenant {n}" for n in range(60)]
    ids = list(place.add(names, history_days=31, **SMALL).values())
    place.start("worker", "beat")
    place.rows("UPDATE rollcall.connectors SET next_sync_at = now()")
    until(lambda: len([p for p in parts(place) if p["published_at"]]) == 7 * len(ids), "all is published")
    (writer,) = place.start("writer", writer_batch_entries=1)
    place.await_row("SELECT 1 FROM rollcall.sync_parts WHERE status = 'succeeded'")
    writer.terminate()
    assert exits(writer, within_s=PROMPT_S) == 0
    applied = {part["id"] for part in parts(place) if part["status"] == "succeeded"}
    assert 0 < len(applied) < 7 * len(ids)
    pending = set()
    for key in place.redis.scan_iter("rollcall:events:*"):
        if place.redis.xinfo_groups(key):
            for entry in place.redis.xpending_range(key, GROUP, "-", "+", 1000):
                ((_, fields),) = place.redis.xrange(key, entry["message_id"], entry["message_id"])
                pending.add(UUID(fields[b"part"].decode()))
    assert not applied & pending, "what was committed is acknowledged"
    place.start("writer")
    for connector_id in ids:
        assert finished(place, connector_id)["status"] == "succeeded"


def test_a_beat_ends_at_once(place: Installation) -> None:
    """However long it is until the next tick, a beat does not wait for it."""
    (beat,) = place.start("beat", dispatch_interval_s=2 * PROMPT_S)
    until(lambda: place.messages()["rollcall.dispatch"], "it has sent its first tick")
    beat.terminate()
    assert exits(beat, within_s=PROMPT_S) == 0
