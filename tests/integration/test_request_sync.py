"""The backend's door through a real broker and a real worker: what is asked twice, wrongly, or in vain."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
import redis

from schemas.connectors import Dataset
from tests.fixtures.installation import Installation, Row, installed, until
from tests.fixtures.servers import cloned_database, revive
from tests.fixtures.simulator import Simulator
from worker.dev.stack import EmbeddedStack
from worker.store.connectors import PgConnectors
from worker.wiring import runtime

QUEUE: Final = "rollcall.sync"
CANARY: Final = "sk_canary_5d1f"
TENANT: Final = "acme"
QUIET_S: Final = 0.3
SMALL: Final = {"members": 3, "groups": 1, "service_accounts": 1, "keys_per_account": 1, "usage_rows_per_day": 2}


@pytest.fixture(scope="module")
def place(
    stack: EmbeddedStack, template_database: str, simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """A worker, a writer and a beat; no connector is due by itself: nothing happens but what is asked for."""
    revive(stack.valkey)
    url = stack.valkey.url.get_secret_value()
    with redis.Redis.from_url(url, socket_timeout=10) as client:
        client.flushall()
    folder = tmp_path_factory.mktemp("door")
    with (
        cloned_database(stack.postgres, template_database) as database_url,
        installed(database_url, url, simulator, folder, backfill_days=3) as made,
    ):
        made.start("worker", "writer", "beat")
        yield made


@pytest.fixture
def connector(place: Installation) -> UUID:
    """A connector that nobody has synced yet."""
    name = f"w{uuid4().hex[:8]}"
    return place.add([name], tenant=TENANT, history_days=5, **SMALL)[name]


def push(place: Installation, arguments: object, task: str = "rollcall.request_sync") -> None:
    """Send a message as a backend in any language does."""
    message_id = str(uuid4())
    message = {
        "body": json.dumps([[], arguments, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "any", "task": task, "id": message_id},
        "properties": {"delivery_tag": message_id, "delivery_info": {"exchange": "", "routing_key": "rollcall.sync"}},
    }
    place.redis.lpush(QUEUE, json.dumps(message))


def settle(place: Installation) -> None:
    """Wait until the worker is done with all messages; between a queue and its hands one is seen nowhere."""
    quiet_since = time.monotonic()

    def quiet() -> bool:
        nonlocal quiet_since
        if any(place.messages().values()):
            quiet_since = time.monotonic()
        return time.monotonic() - quiet_since > QUIET_S

    until(quiet, "every message is done with")


def ask(place: Installation, connector: UUID, *, run_id: UUID | None = None, **changed: object) -> UUID:
    """Ask for a run, and wait for its row."""
    run_id = run_id or uuid4()
    asked = {"v": 1, "tenant_id": TENANT, "connector_id": str(connector), "kind": "poll", "run_id": str(run_id)}
    push(place, {**asked, "actor": "billing", **changed})
    run(place, run_id)
    return run_id


def run(place: Installation, run_id: UUID) -> Row:
    return place.await_row("SELECT * FROM rollcall.sync_runs WHERE id = %s", run_id)


def over(place: Installation, run_id: UUID) -> Row:
    return place.await_row("SELECT * FROM rollcall.sync_runs WHERE id = %s AND finished_at IS NOT NULL", run_id)


def test_the_same_request_twice_is_one_run(place: Installation, connector: UUID) -> None:
    """The run_id is the idempotency key: asked again before, during or after the run, nothing more happens."""
    run_id = uuid4()
    for _ in range(3):
        ask(place, connector, run_id=run_id)
    done = over(place, run_id)
    assert (done["status"], done["kind"], done["requested_by"]) == ("succeeded", "poll", "billing")
    assert (done["parts_total"], done["parts_done"]) == (len(Dataset), len(Dataset))
    ask(place, connector, run_id=run_id)
    settle(place)
    assert run(place, run_id) == done
    assert len(place.rows("SELECT 1 FROM rollcall.sync_runs WHERE connector_id = %s", connector)) == 1
    announced = place.rows(
        "SELECT type FROM rollcall.announcements WHERE run_id = %s OR subject = %s ORDER BY seq",
        run_id,
        f"run/{run_id}",
    )
    assert [row["type"].split(".")[-2] for row in announced] == ["started", "completed"]


def test_a_kind_that_is_under_way_is_not_doubled(place: Installation, connector: UUID) -> None:
    """While a run of the kind is active another one is refused in a row; another kind is not, nor one later."""
    place.simulator.latency(300)
    try:
        first = ask(place, connector)
        second = ask(place, connector)
        other = ask(place, connector, kind="reconcile")
        assert run(place, first)["finished_at"] is None
    finally:
        place.simulator.latency(0)
    refused = run(place, second)
    assert (refused["status"], refused["error_reason"]) == ("refused", "already_running")
    assert refused["finished_at"] is not None
    assert [over(place, run_id)["status"] for run_id in (first, other)] == ["succeeded", "succeeded"]
    assert over(place, ask(place, connector))["status"] == "succeeded"


def test_what_cannot_be_synced_is_refused_in_a_row(place: Installation, connector: UUID) -> None:
    """An unknown, foreign, paused, disconnected or deleted connector: a row says so, and nobody is asked."""
    place.simulator.reset_stats()

    def refusal(asked: UUID, **changed: object) -> Row:
        row = run(place, ask(place, asked, **changed))
        assert (row["status"], row["connector_id"], row["parts_total"]) == ("refused", asked, 0)
        assert row["finished_at"] is not None
        return row

    async def change(what: str) -> None:
        async with runtime(place.settings, "test") as opened:
            registry = PgConnectors(opened.db)
            await {"pause": registry.pause, "delete": registry.delete}[what](connector)

    assert refusal(uuid4())["error_reason"] == "unknown_connector"
    foreign = refusal(connector, tenant_id="globex")
    assert (foreign["error_reason"], foreign["tenant_id"]) == ("unknown_connector", "globex")
    asyncio.run(change("pause"))
    assert refusal(connector)["error_reason"] == "paused"
    place.rows("UPDATE rollcall.connectors SET status = 'disconnected' WHERE id = %s", connector)
    assert refusal(connector)["error_reason"] == "disconnected"
    asyncio.run(change("delete"))
    assert refusal(connector)["error_reason"] == "deleted"
    assert place.simulator.stats()["total"] == 0


def test_a_run_id_is_not_lent(place: Installation, connector: UUID) -> None:
    """A run_id that belongs to another request changes nothing, and the worker lives on."""
    run_id = ask(place, connector)
    done = over(place, run_id)
    ask(place, connector, run_id=run_id, tenant_id="globex")
    ask(place, connector, run_id=run_id, kind="backfill")
    settle(place)
    assert run(place, run_id) == done
    assert place.processes[0].said().count('"run_id_taken"') == 2
    assert over(place, ask(place, connector))["status"] == "succeeded"


MALFORMED: Final[tuple[Any, ...]] = (
    {},
    {"api_key": CANARY},
    {"tenant_id": CANARY, "connector_id": CANARY, "run_id": CANARY},
    {"v": 2, "kind": CANARY, "actor": CANARY * 100},
    {"run_id": {"nested": CANARY}, "connector_id": [CANARY]},
)


def test_malformed_messages_are_logged_without_their_values(place: Installation, connector: UUID) -> None:
    """What cannot be read leaves one line with the names of the wrong fields, no row, and a worker that goes on."""
    worker = place.processes[0]
    before, pid = len(worker.said().splitlines()), worker.pid
    runs = place.rows("SELECT count(*) FROM rollcall.sync_runs")
    complete = {"v": 1, "tenant_id": TENANT, "connector_id": str(connector), "run_id": str(uuid4()), "actor": "b"}
    for wrong in MALFORMED:
        push(place, {**complete, **wrong} if wrong else {})
    settle(place)
    logged = [json.loads(line) for line in worker.said().splitlines()[before:]]
    malformed = [line for line in logged if line["event"] == "request_sync_malformed"]
    assert len(malformed) == len(MALFORMED)
    assert "run_id" in malformed[0]["fields"]
    assert CANARY not in worker.said()
    assert "Traceback" not in worker.said()
    assert place.rows("SELECT count(*) FROM rollcall.sync_runs") == runs
    assert worker.pid == pid is not None
    assert over(place, ask(place, connector))["status"] == "succeeded"


UNREADABLE: Final = (
    "no json",
    "[]",
    "7",
    "null",
    "{}",
    json.dumps({"body": 7, "headers": [], "properties": 7}),
    json.dumps({"body": "[]", "headers": None, "properties": {"delivery_tag": "1", "delivery_info": {}}}),
)


def test_what_is_no_message_kills_nobody(place: Installation, connector: UUID) -> None:
    """A text in the queue that is no message costs a connection to the broker: the worker goes on."""
    worker = place.processes[0]
    pid = worker.pid
    for text in UNREADABLE:
        place.redis.lpush(QUEUE, text)
        until(lambda: not place.redis.llen(QUEUE), "it has been taken")
        assert over(place, ask(place, connector))["status"] == "succeeded", worker.said()[-2000:]
        assert worker.pid == pid is not None


def test_what_is_no_task_of_ours_kills_nobody(place: Installation, connector: UUID) -> None:
    """Unknown tasks, bodies that are no arguments, wrong arguments of other tasks: no value of theirs is logged."""
    worker = place.processes[0]
    pid = worker.pid
    for task in ("rollcall.unheard_of", "rollcall.sync_connector", "rollcall.fetch_members"):
        push(place, {"run_id": CANARY, "part_ids": [CANARY], CANARY[:2]: CANARY}, task=task)
    for body in ([1, 2, 3], None, CANARY):
        push(place, body)
    settle(place)
    assert over(place, ask(place, connector))["status"] == "succeeded"
    assert worker.pid == pid is not None
    assert CANARY not in worker.said()
