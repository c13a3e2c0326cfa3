"""Poison in the stream: found by halving, put away with its story, and healed when somebody redrives it."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid4

import orjson
import pytest

from schemas.connectors import Dataset
from tasks.upkeep import forget_deleted
from tests.fixtures.harness import Harness, Row, Watched
from tests.fixtures.terminal import rollcall
from worker.store import staging
from worker.stream import DEAD_LETTERS, GROUP, ensure_group

SYNC_QUEUE: Final = "rollcall.sync"


async def published(harness: Harness, *watched: Watched) -> None:
    """Poll, and work the messages off: everything is in the stream, nothing is written."""
    await harness.make_due(*watched)
    await harness.tick()
    while harness.messages:
        await harness.deliver(harness.messages.popleft())


def null_owner(event: Row) -> None:
    event["data"]["after"]["is_owner"] = None


def unstorable_mail(event: Row) -> None:
    event["data"]["after"]["email"] = "a\0b"


def no_text(event: Row) -> None:
    event["data"]["after"]["email"] = {}


def twice(event: Row) -> None:
    event["data"]["rows"] *= 2


def no_number(event: Row) -> None:
    event["data"]["rows"][0]["amount"] = "a lot"


async def poison(harness: Harness, watched: Watched, dataset: Dataset, spoil: Callable[[Row], None]) -> None:
    """Spoil the first unread event of a connector's dataset; every entry keeps its fields and its place."""
    redis = harness.runtime.redis
    (last,) = [g["last-delivered-id"] for g in await redis.xinfo_groups(watched.stream) if g["name"] == GROUP.encode()]
    for at, fields in await redis.xrange(watched.stream, min=b"(" + last):
        await redis.xdel(watched.stream, at)
        if (fields.get(b"dataset"), fields[b"connector"]) == (dataset.encode(), str(watched.id).encode()):
            events = orjson.loads(fields[b"ce"])
            spoil(events[0])
            fields[b"ce"] = orjson.dumps(events)
        await redis.xadd(watched.stream, fields)


async def poisoned(harness: Harness, *watched: Watched) -> list[Row]:
    """Let each connector's members be dead-lettered; return all letters."""
    for one in watched:
        harness.simulator.mutate(one.workspace, {"op": "member_join"})
        await published(harness, one)
        await poison(harness, one, Dataset.MEMBERS, null_owner)
        await harness.settle()
    return await letters(harness)


async def letters(harness: Harness) -> list[Row]:
    found = await harness.runtime.redis.xrange(DEAD_LETTERS)
    return [{"id": at.decode()} | {n.decode(): v.decode() for n, v in fields.items()} for at, fields in found]


async def work_off(harness: Harness) -> list[UUID]:
    """Do what the commands' messages say; return the runs they name."""
    sent = [orjson.loads(message) for message in await harness.runtime.redis.lrange(SYNC_QUEUE, 0, -1)]
    await harness.runtime.redis.delete(SYNC_QUEUE)
    assert {message["headers"]["task"] for message in sent} <= {"rollcall.sync_connector"}
    named = [UUID(orjson.loads(b64decode(message["body"]))[1]["run_id"]) for message in sent]
    for run_id in named:
        harness.messages.extend(await harness.runtime.dispatch.plan_run(run_id))
    await harness.settle()
    return named


@pytest.mark.parametrize(
    ("dataset", "spoil"),
    [(Dataset.MEMBERS, null_owner), (Dataset.USAGE_PRODUCT, no_number), (Dataset.USAGE_PRODUCT, twice)],
    ids=["not null", "numeric", "twice"],
)
@pytest.mark.parametrize("staged", [False, True], ids=["arrays", "staged"])
async def test_poison_is_put_away_alone_and_healed_by_redriving(
    harness: Harness,
    monkeypatch: pytest.MonkeyPatch,
    dataset: Dataset,
    spoil: Callable[[Row], None],
    staged: bool,
) -> None:
    """An unwritable value costs its own observation only; the letter tells its story, and redriving mends the data."""
    if staged:
        monkeypatch.setattr(staging, "STAGE_FROM_ROWS", 1)
    acme = await harness.synced()
    neighbour = await harness.synced("neighbour", tenant="t2")
    before = (await harness.access(acme))[dataset]["version"]
    place = dataset.encode(), str(before).encode()
    for name in ("acme", "neighbour"):
        added = {"op": "usage_add", "day": datetime.now(UTC).date().isoformat(), "product": "music", "amount": "3"}
        harness.simulator.mutate(name, {"op": "member_join"}, {"op": "group_add", "name": "New"}, added)
    await published(harness, acme, neighbour)
    await poison(harness, acme, dataset, spoil)
    (spoilt,) = [at for at, f in await harness.entries(acme) if (f.get(b"dataset"), f.get(b"base")) == place]
    await harness.settle()

    await harness.agree(neighbour)
    state, truth = await harness.facts(acme), await harness.truth(acme)
    wrong = {s for s in truth.records if state.records.get(s) != truth.records[s]}
    wrong |= {s for s in truth.usage if state.usage.get(s) != truth.usage[s]}
    assert {s.split("/")[0] for s in wrong} == {"member" if dataset is Dataset.MEMBERS else "usage"}
    assert (await harness.access(acme))[dataset]["version"] == before
    (letter,) = await letters(harness)
    assert letter["origin"] == f"{acme.stream} {spoilt.decode()}"
    assert (letter["reason"], letter["attempts"]) == ("unwritable", "1")
    assert (letter["connector"], letter["dataset"], letter["base"]) == (str(acme.id), str(dataset), str(before))
    run = (await harness.runs(acme))[-1]
    assert (run["status"], run["parts_failed"]) == ("partial", 1)
    assert f"{dataset}: dead_letter_unwritable" in run["error_reason"]
    assert (await harness.health(acme))[0] == "connected"
    assert (await harness.runtime.redis.xpending(acme.stream, GROUP))["pending"] == 0

    ((row,), _) = await rollcall(harness.runtime.settings, "deadletter", "redrive", letter["id"])
    assert (row["connector"], row["letters"], row["outcome"]) == (str(acme.id), [letter["id"]], "redriven")
    assert await letters(harness) == []
    assert await work_off(harness) == [UUID(row["run_id"])]
    run = (await harness.runs(acme))[-1]
    assert (run["kind"], run["requested_by"], run["status"]) == ("reconcile", "deadletter", "succeeded")
    await harness.true(acme)


@pytest.mark.parametrize(
    ("dataset", "spoil"),
    [
        (Dataset.MEMBERS, null_owner),
        (Dataset.MEMBERS, unstorable_mail),
        (Dataset.MEMBERS, no_text),
        (Dataset.USAGE_PRODUCT, no_number),
        (Dataset.USAGE_PRODUCT, twice),
    ],
    ids=["not null", "zero byte", "type", "numeric", "twice"],
)
async def test_poison_in_a_first_sync_is_put_away_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, dataset: Dataset, spoil: Callable[[Row], None]
) -> None:
    """An unwritable value among rows that go straight into their table costs its own observation only."""
    monkeypatch.setattr(staging, "COPY_FROM_ROWS", 1)
    acme = await harness.add_connector()
    await ensure_group(harness.runtime.redis, acme.stream, GROUP)
    await published(harness, acme)
    await poison(harness, acme, dataset, spoil)
    await harness.settle()

    (letter,) = await letters(harness)
    assert (letter["dataset"], letter["base"]) == (str(dataset), "0")
    unwritten = {
        Dataset(row["dataset"])
        for row in await harness.rows("SELECT dataset FROM rollcall.connector_access WHERE version = 0")
    }
    assert unwritten == {dataset}
    await rollcall(harness.runtime.settings, "deadletter", "redrive", letter["id"])
    await work_off(harness)
    await harness.true(acme)


async def test_one_reconcile_answers_for_all_letters_of_its_connector(harness: Harness) -> None:
    """--all asks for one reconcile a connector; a letter by its id takes the connector's others with it."""
    acme, globex = await harness.synced(), await harness.synced("globex", tenant="t2")
    lying = await poisoned(harness, acme, globex, acme)
    assert [letter["connector"] for letter in lying] == [str(one.id) for one in (acme, globex, acme)]
    ((row,), _) = await rollcall(harness.runtime.settings, "deadletter", "redrive", lying[2]["id"])
    assert row["letters"] == [lying[0]["id"], lying[2]["id"]]
    ((row,), _) = await rollcall(harness.runtime.settings, "deadletter", "redrive", "--all")
    assert row["letters"] == [lying[1]["id"]]
    assert len(await work_off(harness)) == 2
    for one in (acme, globex):
        await harness.true(one)
    assert await rollcall(harness.runtime.settings, "deadletter", "redrive", "--all") == ([], "")


async def test_letters_stay_where_no_reconcile_can_start(harness: Harness) -> None:
    """A refusal is told with what to do and keeps the letter; of a deleted connector there is nothing to heal."""
    acme, globex = await harness.synced(), await harness.synced("globex", tenant="t2")
    mine, others = await poisoned(harness, acme, globex)

    async def redrive(reason: str, code: int, outcome: str = "kept") -> None:
        ((row,), error) = await rollcall(harness.runtime.settings, "deadletter", "redrive", mine["id"], code=code)
        assert (row["outcome"], row["reason"], error) == (outcome, reason, reason if code else "")

    await harness.runtime.registry.pause(acme.id)
    await redrive("paused", 1)
    await harness.runtime.registry.resume(acme.id)
    await harness.rows("UPDATE rollcall.connectors SET status = 'disconnected' WHERE id = %s", [acme.id])
    await redrive("disconnected", 77)
    await harness.rows("UPDATE rollcall.connectors SET status = 'connected' WHERE id = %s", [acme.id])
    await harness.rows(
        "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status)"
        " VALUES (%s, %s, 't1', 'reconcile', 'schedule', 'queued')",
        [uuid4(), acme.id],
    )
    await redrive("already_running", 1)
    assert await letters(harness) == [mine, others]
    await harness.runtime.registry.delete(acme.id)
    await redrive("deleted", 0, outcome="dropped")
    stranger = await harness.runtime.redis.xadd(DEAD_LETTERS, {"connector": "?", "reason": "unreadable:ValueError"})
    (rows, error) = await rollcall(harness.runtime.settings, "deadletter", "redrive", "--all", code=1)
    assert [row["outcome"] for row in rows] == ["redriven", "kept"]
    assert error == "unknown_connector"
    assert [letter["id"] for letter in await letters(harness)] == [stranger.decode()]


@pytest.mark.parametrize("arguments", [(), ("--all", "1-1"), ("1-1",), ("not-an-id",)], ids=str)
async def test_redriving_names_what_there_is(harness: Harness, arguments: tuple[str, ...]) -> None:
    """Ids or --all, and ids that exist: else nothing is asked for."""
    code = 1 if len(arguments) == 1 else 2
    (rows, error) = await rollcall(harness.runtime.settings, "deadletter", "redrive", *arguments, code=code)
    assert rows == []
    assert error == ("unknown_dead_letter" if code == 1 else "argument_invalid")


async def test_late_traces_of_a_deleted_connector_are_forgotten(harness: Harness) -> None:
    """What a task under way wrote to Redis after a connector's purge goes at the next tidying; the others' stays."""
    acme, globex = await harness.synced(), await harness.synced("globex", tenant="t2")
    _, others = await poisoned(harness, acme, globex)
    await harness.make_due(acme)
    await harness.tick()
    harness.simulator.mutate("acme", {"op": "member_join"})
    delete = harness.runtime.registry.delete
    converse = harness.runtime.provider.client.converse

    async def deleted_meanwhile(*arguments: Any, **options: Any) -> Any:
        await delete(acme.id)
        return await converse(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.runtime.provider.client, "converse", deleted_meanwhile)
        await harness.deliver(harness.messages.popleft())
    await harness.settle()
    redis = harness.runtime.redis
    assert await redis.exists(acme.snapshot(Dataset.MEMBERS))
    assert len(await letters(harness)) == 2

    await forget_deleted(harness.runtime)
    assert not [key async for key in redis.scan_iter(f"rollcall:snapshot:*{acme.id}*")]
    assert await letters(harness) == [others]
    assert await redis.exists(*(globex.snapshot(dataset) for dataset in Dataset)) == len(Dataset)
    await harness.rows("UPDATE rollcall.connectors SET deleted_at = deleted_at - interval '2 days'")
    await redis.hset(acme.snapshot(Dataset.MEMBERS), "v", "1")
    await forget_deleted(harness.runtime)
    assert await redis.exists(acme.snapshot(Dataset.MEMBERS)), "after a day nothing can come late any more"
