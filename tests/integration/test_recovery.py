"""What is lost, late, doubled or rolled back costs a fetch, never a fact."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from schemas.connectors import Dataset, RunKind
from tasks import bridge
from tests.fixtures.harness import Harness, Row, Watched, opened
from tests.fixtures.simulator import Simulator
from worker.dev.stack import EmbeddedStack
from worker.errors import TryLater
from worker.folding import LOCK_CLASS
from worker.observe import observe
from worker.ports import Claim
from worker.snapshots import RedisSnapshots
from worker.store import recovery
from worker.store.books import PgBooks
from worker.store.db import connect
from worker.store.ledger import PgLedger
from worker.store.workers import leave
from worker.stream import DEAD_LETTERS, GROUP, RedisJournal, backlog
from worker.wiring import Runtime, process_name
from worker.writer import Turn, fold

SOON_S = 20.0
CHAIN = ("connector_access", "members", "groups", "service_accounts", "api_keys", "credit_usage", "usage_coverage")
"""The tables that versions order."""
JSON = {"sharing", "platform_limits"}


async def change(harness: Harness, seed: int) -> None:
    kinds = ["member_join", "member_update", "group_update", "key_update", "usage_add", "key_add"]
    harness.simulator.mutate("acme", {"op": "random", "n": 6, "seed": seed, "kinds": kinds})


async def fetched(harness: Harness, watched: Watched) -> None:
    """Start a poll and let its messages be worked off: everything is published, nothing written."""
    await harness.make_due(watched)
    await harness.tick()
    while harness.messages:
        await harness.deliver(harness.messages.popleft())


async def put_back(harness: Harness, table: str, rows: list[Row]) -> None:
    """Put a table back to these rows."""
    name = sql.Identifier(table)
    await harness.rows(sql.SQL("DELETE FROM rollcall.{}").format(name))
    for row in rows:
        values = [
            Jsonb(value) if isinstance(value, list | dict) and column in JSON else value
            for column, value in row.items()
        ]
        await harness.rows(
            sql.SQL("INSERT INTO rollcall.{} VALUES ({})").format(name, sql.SQL(", ").join([sql.SQL("%s")] * len(row))),
            values,
        )


async def until(found: Callable[[], Awaitable[object]]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SOON_S):
        while not await found():  # noqa: ASYNC110 - a server tells nobody when it is so
            await asyncio.sleep(0.02)


@asynccontextmanager
async def writing(harness: Harness) -> AsyncIterator[asyncio.Task[None]]:
    """Run a writer's process beside the test; it must end in order."""
    writer = harness.writer()
    task = asyncio.create_task(writer.run())
    try:
        yield task
    finally:
        writer.stop.set()
        async with asyncio.timeout(SOON_S):
            await task


async def applied(harness: Harness, watched: Watched, writer: asyncio.Task[None]) -> None:
    """Wait until a writer, which must not end meanwhile, has acknowledged all that is published."""

    async def acknowledged() -> bool:
        assert not writer.done()
        groups = await harness.redis.xinfo_groups(watched.stream)
        group = next(g for g in groups if g["name"] in {GROUP, GROUP.encode()})
        (newest,) = await harness.redis.xrevrange(watched.stream, count=1)
        return group["pending"] == 0 and group["last-delivered-id"] in {newest[0], newest[0].decode()}

    await until(acknowledged)


# Redis loses data.


async def test_a_flushed_redis_is_refilled(harness: Harness) -> None:
    """After Redis lost everything the next poll ends in the right state, and a subscriber sees the break."""
    acme = await harness.synced()
    subscriber = await harness.subscribe(acme)
    await change(harness, 1)
    await harness.redis.flushall()
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    facts = await harness.true(acme)
    await subscriber.read()
    assert subscriber.breaks == 0, "versions go on where they were: nothing was missed"
    assert subscriber.state == facts
    assert await harness.redis.exists(acme.snapshot(Dataset.MEMBERS))


async def test_what_was_published_and_lost_is_fetched_again(harness: Harness) -> None:
    """Entries that Redis lost before the writer read them: their parts are due again at the next tick."""
    acme = await harness.synced()
    subscriber = await harness.subscribe(acme)
    await change(harness, 1)
    await fetched(harness, acme)
    await subscriber.read()
    await harness.redis.flushall()
    await harness.tick()
    await harness.settle()
    assert harness.lapses == 0, "no lease had to run out"
    await subscriber.read()
    assert subscriber.breaks > 0
    assert subscriber.state == await harness.true(acme)


async def test_sent_messages_that_the_broker_lost_are_sent_again(harness: Harness) -> None:
    """When Redis, as the broker, lost its messages, the tick that notices sends their parts anew."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    harness.messages.clear()
    await harness.redis.flushall()
    await harness.tick()
    assert harness.messages
    await harness.settle()
    assert harness.lapses == 0
    await harness.true(acme)


@pytest.mark.parametrize("written", [True, False], ids=["written", "unwritten"])
async def test_an_older_redis_is_not_believed(harness: Harness, written: bool) -> None:
    """Redis put back to an older copy, with old snapshots and old entries pending: the next poll is right."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    if written:
        await harness.settle()
    copy = await harness.copy_redis()
    await harness.settle()
    subscriber = await harness.subscribe(acme)
    for seed in (2, 3):
        await change(harness, seed)
        await harness.poll(acme)
        await subscriber.read()
    assert subscriber.state == await harness.true(acme)
    await harness.put_back(copy)
    await change(harness, 4)
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    await subscriber.read()
    assert subscriber.state == await harness.true(acme)
    assert not await harness.redis.xlen(DEAD_LETTERS)


async def test_a_lost_publication_that_was_seen_is_taken_back(harness: Harness) -> None:
    """A subscriber saw what Redis then lost and what the provider took back: the next sync makes it replay."""
    acme = await harness.synced()
    copy = await harness.copy_redis()
    subscriber = await harness.subscribe(acme)
    (joined,) = harness.simulator.mutate("acme", {"op": "member_join"})
    await fetched(harness, acme)
    await subscriber.read()
    await harness.put_back(copy)
    harness.simulator.mutate("acme", {"op": "member_leave", "user_id": joined["user_id"]})
    await harness.tick()
    await harness.settle()
    facts = await harness.true(acme)
    await subscriber.read()
    assert subscriber.breaks > 0
    assert subscriber.state == facts


async def test_only_a_lower_tick_means_that_redis_went_back(harness: Harness) -> None:
    """Ticks that grow are no alarm; the same or a lower one is, until what follows is done."""
    recovery = harness.runtime.recovery

    def counted(ticks: int) -> Callable[[], Awaitable[int]]:
        async def count() -> int:
            return ticks

        return count

    assert [await recovery.redis_went_back(counted(n)) for n in (1, 2, 5, 5, 6)] == [False, False, False, True, True]
    await recovery.redis_is_known()
    assert [await recovery.redis_went_back(counted(n)) for n in (7, 8, 3)] == [False, False, True]
    await recovery.redis_is_known()
    await recovery.redis_is_known()
    assert [await recovery.redis_went_back(counted(n)) for n in (4, 5)] == [False, False]


async def test_a_tick_that_fails_leaves_a_lost_redis_to_the_next(harness: Harness) -> None:
    """Redis goes away again while a tick sees to what it lost: the next one forgets the snapshots all the same."""
    acme = await harness.synced()
    copy = await harness.copy_redis()
    await change(harness, 1)
    await harness.poll(acme)
    await harness.put_back(copy)

    async def away(_: object) -> None:
        raise TryLater("redis_unreachable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RedisSnapshots, "forget_all", away)
        with pytest.raises(TryLater):
            await harness.tick()
    assert await harness.redis.exists(acme.snapshot(Dataset.MEMBERS))
    await harness.tick()
    assert not await harness.redis.exists(acme.snapshot(Dataset.MEMBERS))


async def test_a_postgres_put_back_is_caught_up(harness: Harness) -> None:
    """Postgres restored from a backup: the newer snapshots in Redis are not believed, and subscribers replay."""
    acme = await harness.synced()
    backup = {table: await harness.rows(sql.SQL("TABLE rollcall.{}").format(sql.Identifier(table))) for table in CHAIN}
    await change(harness, 1)
    await harness.poll(acme)
    subscriber = await harness.subscribe(acme)
    for table, rows in backup.items():
        await put_back(harness, table, rows)
    await change(harness, 2)
    await harness.poll(acme)
    facts = await harness.true(acme)
    await subscriber.read()
    assert subscriber.breaks > 0
    assert subscriber.state == facts


# Slow is not lost.


async def test_a_slow_writer_causes_no_more_fetching(harness: Harness) -> None:
    """While published entries wait for the writer, their parts keep their leases and are not asked again."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    harness.simulator.reset_stats()
    for _ in range(3):
        await harness.rows(
            "UPDATE rollcall.sync_parts SET lease_until = now() + interval '1 ms' WHERE status = 'running'"
        )
        await harness.tick()
        await asyncio.sleep(0.005)
        await harness.tick()
        assert not harness.messages
    assert harness.simulator.stats()["total"] == 0
    await harness.settle()
    await harness.agree(acme)


async def test_a_part_whose_entry_is_gone_is_fetched_again(harness: Harness) -> None:
    """A published part without anything unapplied in its partition is lost: the next tick sends it."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    await harness.redis.xtrim(acme.stream, maxlen=0)
    await harness.tick()
    assert harness.messages
    await harness.settle()
    assert harness.lapses == 0
    await harness.true(acme)


async def test_a_publication_noted_after_redis_was_put_back_is_missed_soon(harness: Harness) -> None:
    """Postgres hears of a publication when Redis has lost it already, and the writer is behind with what came later."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    late: list[Claim] = []

    async def delayed(_: object, claims: Sequence[Claim]) -> None:
        late.extend(claims)

    copy = await harness.copy_redis()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PgLedger, "published", delayed)
        await harness.deliver(harness.messages.popleft())
    await harness.put_back(copy)
    await harness.tick()
    await harness.runtime.ports.ledger.published(late)
    await asyncio.sleep(0.05)
    await harness.redis.xadd(acme.stream, {"ce": "[]"})
    await harness.tick()
    assert {p for sending in harness.messages for p in sending.lanes} == {claim.part_id for claim in late}
    await harness.settle()
    assert harness.lapses == 0
    await harness.true(acme)


async def test_a_wrong_clock_of_redis_makes_nothing_lost(harness: Harness) -> None:
    """Whether an entry still waits is told without comparing the clocks of Redis and Postgres."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    found = await backlog(harness.redis, acme.partition)
    assert found.oldest is not None
    assert timedelta() < found.age < timedelta(minutes=1)
    now = await harness.runtime.recovery.now()
    recovery = harness.runtime.recovery
    assert await recovery.look_after_published({acme.partition: now - found.age}) == 0
    assert await recovery.look_after_published({acme.partition: now}) > 0


async def test_a_killed_fetcher_is_followed_by_another(harness: Harness) -> None:
    """Parts that were claimed by a process that died are found stalled and asked again; the repeat is harmless."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    message = harness.messages.popleft()
    await harness.runtime.ports.ledger.claim(list(message.lanes))
    assert await harness.runtime.recovery.stalled(10) == set()
    await harness.break_leases()
    assert await harness.runtime.recovery.stalled(10) == {acme.id}
    await harness.tick()
    await harness.settle()
    await harness.agree(acme)


@pytest.mark.parametrize("gone", [False, True])
async def test_parts_of_a_silent_worker_are_due_at_once(harness: Harness, gone: bool) -> None:
    """What a worker had claimed that fell silent, or left, is asked by others, long before its lease is over."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    claims = await harness.runtime.ports.ledger.claim(list(harness.messages.popleft().lanes))
    assert len(claims) == len(Dataset)
    await harness.rows(
        "INSERT INTO rollcall.workers (name, role, seen_at) VALUES ('somebody else', 'worker', now() - interval '1 h')"
    )
    await harness.tick()
    assert not harness.messages
    if gone:
        await leave(harness.runtime.db, process_name())
    else:
        await harness.rows("UPDATE rollcall.workers SET seen_at = now() - interval '5 minutes'")
    await harness.tick()
    assert harness.messages
    await harness.settle()
    assert harness.lapses == 0
    await harness.agree(acme)


async def test_a_claim_that_could_not_be_returned_is_missed_by_its_worker(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that ends while Postgres is away leaves its parts claimed: its worker's heart makes them due again.

    What the worker still has in hand is left alone.
    """
    monkeypatch.setattr(bridge, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(recovery, "STRAY", timedelta())
    acme = await harness.synced()
    await harness.make_due(acme)
    await harness.tick()
    parts = list(harness.messages.popleft().lanes)
    ending = threading.Event()

    async def work(opened: Runtime) -> None:
        await opened.ports.ledger.claim(parts)
        await asyncio.to_thread(ending.wait)
        raise TryLater("database_unreachable")

    here = bridge.Bridge(harness.runtime.settings, role="worker", slots=1)
    await asyncio.to_thread(here.open)
    try:
        running = asyncio.create_task(asyncio.to_thread(here.run, work, deadline_s=SOON_S, parts=parts))
        await until(lambda: harness.rows("SELECT 1 FROM rollcall.sync_parts WHERE status = 'running'"))
        await asyncio.sleep(0.3)
        assert not await harness.rows("SELECT 1 FROM rollcall.sync_parts WHERE status = 'waiting'")
        ending.set()
        with pytest.raises(TryLater):
            await running
        await until(lambda: harness.rows("SELECT 1 FROM rollcall.sync_parts WHERE status = 'waiting'"))
        assert not await harness.rows("SELECT 1 FROM rollcall.sync_parts WHERE status = 'running'")
    finally:
        await asyncio.to_thread(here.close)
    await harness.tick()
    assert harness.messages
    await harness.settle()
    assert harness.lapses == 0
    await harness.agree(acme)


async def test_what_was_claimed_since_hands_were_looked_at_is_no_stray(harness: Harness) -> None:
    """A claim of the last seconds may be younger than what is known of its worker's hands."""
    acme = await harness.synced()
    await harness.make_due(acme)
    await harness.tick()
    await harness.runtime.ports.ledger.claim(list(harness.messages.popleft().lanes))
    assert await harness.runtime.recovery.return_strays(process_name(), list) == 0
    await harness.settle()
    await harness.agree(acme)


async def test_a_message_that_the_broker_lost_is_sent_again(harness: Harness) -> None:
    """Parts that were sent a while ago, with nothing left at the broker, are sent anew; a waiting message is not."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    await harness.rows("UPDATE rollcall.sync_parts SET lease_until = now() + interval '1 s' WHERE status = 'queued'")
    await harness.tick()
    assert len(harness.messages) == 1, "it waits in its queue"
    harness.messages.clear()
    await harness.tick()
    assert len(harness.messages) == 1
    await harness.settle()
    await harness.agree(acme)


async def test_a_lost_message_is_missed_although_others_wait(harness: Harness) -> None:
    """A queue is worked off in order: what was sent before all that waits there, and nobody claimed, is lost."""
    first, second = await harness.synced("first"), await harness.synced("second")
    for watched in (first, second):
        await harness.make_due(watched)
        await harness.tick()
    assert len(harness.messages) == 2
    harness.messages.popleft()
    for seconds, watched in enumerate((first, second), start=1):
        await harness.rows(
            "UPDATE rollcall.sync_parts SET lease_until = now() + make_interval(secs => %s)"
            " WHERE status = 'queued' AND connector_id = %s",
            [seconds, watched.id],
        )
    await harness.tick()
    assert [sending.connector_id for sending in harness.messages] == [second.id, first.id]
    await harness.settle()
    assert harness.lapses == 0
    await harness.agree(first)
    await harness.agree(second)


async def test_what_kills_whoever_asks_for_it_is_given_up(harness: Harness) -> None:
    """A part that was claimed as often as allowed without an end fails, and its run ends partial."""
    acme = await harness.synced()
    await harness.make_due(acme)
    await harness.tick()
    for _ in range(harness.runtime.settings.part_attempts):
        while harness.messages:
            message = harness.messages.popleft()
            doomed = [p for p, d in zip(message.lanes, message.datasets, strict=True) if d is Dataset.MEMBERS]
            await harness.runtime.ports.ledger.claim(doomed)
            await observe([p for p in message.lanes if p not in doomed], harness.runtime.ports)
        await harness.break_leases()
        await harness.tick()
    await harness.settle()
    run = (await harness.runs(acme))[-1]
    part = (await harness.parts(run))["members"]
    assert (run["status"], part["status"], part["error_reason"]) == ("partial", "failed", "attempts_exhausted")
    await harness.agree(acme)


async def test_a_run_whose_message_was_lost_is_planned(harness: Harness) -> None:
    """A queued run that nobody planned for half a minute is found again."""
    acme = await harness.synced()
    run_id = uuid4()
    await harness.rows(
        "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, created_at)"
        " VALUES (%s, %s, 't1', 'poll', 'backend', 'queued', now() - interval '31 s')",
        [run_id, acme.id],
    )
    assert await harness.runtime.recovery.unplanned() == [run_id]
    harness.messages.extend(await harness.runtime.dispatch.plan_run(run_id))
    await harness.settle()
    run = await harness.one("SELECT * FROM rollcall.sync_runs WHERE id = %s", [run_id])
    assert run["status"] == "succeeded"
    (completed,) = [a for a in await harness.announced(acme) if a.get("run_id") == str(run_id)]
    assert (completed["what"], completed["parts_done"]) == ("sync.completed", 7)


async def test_doubled_messages_change_nothing(harness: Harness) -> None:
    """The same message delivered twice, side by side and later again, gives every part one effect."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    (message,) = harness.messages
    harness.simulator.reset_stats()
    await asyncio.gather(*(observe(list(message.lanes), harness.runtime.ports) for _ in range(3)))
    assert harness.simulator.stats()["total"] == len(Dataset), "one of them asks"
    await harness.settle()
    await observe(list(message.lanes), harness.runtime.ports)
    await harness.settle()
    assert harness.simulator.stats()["total"] == len(Dataset)
    await harness.agree(acme)


async def test_a_superseded_observation_is_returned(harness: Harness) -> None:
    """A part that was claimed anew while its first observation waits: the old one has no effect, the new one has."""
    acme = await harness.synced()
    (first,) = harness.simulator.mutate("acme", {"op": "member_join"})
    await fetched(harness, acme)
    subscriber = await harness.subscribe(acme)
    harness.simulator.mutate("acme", {"op": "member_leave", "user_id": first["user_id"]}, {"op": "member_join"})
    await harness.break_leases()
    (again,) = await harness.runtime.dispatch.more([acme.id])
    assert again.datasets == (Dataset.MEMBERS,)
    claimed = await harness.runtime.ports.ledger.claim(list(again.lanes))
    await harness.write()
    assert len(claimed) == 1
    assert f"member/{first['user_id']}" not in (await harness.facts(acme)).records, "returned"
    await harness.break_leases()
    await harness.tick()
    await harness.settle()
    facts = await harness.true(acme)
    await subscriber.read()
    assert subscriber.breaks == 1
    assert subscriber.state == facts


# The writer.


async def test_one_writer_per_partition(harness: Harness) -> None:
    """While one connection holds a partition's lock another one leaves its entries alone."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    other = await connect(harness.runtime.settings.require_database(), "other writer")
    try:
        await other.execute("SELECT pg_advisory_lock(%s, %s)", [LOCK_CLASS, acme.partition])
        before = await harness.facts(acme)
        await harness.write()
        assert await harness.facts(acme) == before
        pending = await harness.redis.xpending(acme.stream, GROUP)
        assert pending["pending"] == 0, "not even read"
    finally:
        await other.close()
    await harness.settle()
    await harness.agree(acme)


async def test_a_bug_in_sending_ends_the_writer(database_url: str, redis_url: str, simulator: Simulator) -> None:
    """What fails unexpectedly beside the folding fails the process loudly, instead of never sending again."""

    async def broken(_: Sequence[UUID]) -> None:
        raise RuntimeError("a bug")

    async with opened(database_url, redis_url, simulator, part_days=30) as harness:
        await harness.add_connector()
        await harness.tick()
        await harness.deliver(harness.messages.popleft())
        writer = harness.writer()
        writer.advance = broken
        async with asyncio.timeout(SOON_S):
            with pytest.raises(RuntimeError, match="a bug"):
                await writer.run()


async def test_two_writers_share_the_work(harness: Harness) -> None:
    """Two writers' processes at once fold everything exactly once."""
    added = [await harness.add_connector(f"w{n}", tenant=f"t{n}") for n in range(6)]
    async with writing(harness), writing(harness):
        await harness.tick()
        while await harness.rows("SELECT 1 FROM rollcall.sync_runs WHERE status = 'running'"):
            while harness.messages:
                await harness.deliver(harness.messages.popleft())
            await asyncio.sleep(0.02)
    await harness.write()
    for watched in added:
        await harness.agree(watched)
    assert not await harness.redis.xlen(DEAD_LETTERS)


class Dying(RedisJournal):
    """A journal whose process dies just before it acknowledges."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        if ids:
            raise asyncio.CancelledError


async def test_a_writer_killed_before_it_acknowledges_repeats_nothing(harness: Harness) -> None:
    """Applied but not acknowledged: the next holder of the lock finds the entries pending and skips them."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    books = PgBooks(harness.books_connection)
    with pytest.raises(asyncio.CancelledError):
        await fold([Turn(Dying(harness.redis, acme.partition))], books, count=200)
    pending = (await harness.redis.xpending(acme.stream, GROUP))["pending"]
    assert pending > 0
    before = await harness.rows("SELECT xmin::text, user_id FROM rollcall.members ORDER BY 2")
    runs = await harness.runs(acme)
    await harness.write()
    assert (await harness.redis.xpending(acme.stream, GROUP))["pending"] == 0
    assert await harness.rows("SELECT xmin::text, user_id FROM rollcall.members ORDER BY 2") == before
    assert await harness.runs(acme) == runs
    await harness.agree(acme)


async def test_observations_longer_than_a_batch_are_folded_whole(
    database_url: str, redis_url: str, simulator: Simulator
) -> None:
    """With a backlog read in small batches, and writers killed again and again, nothing is lost or half applied."""
    async with opened(database_url, redis_url, simulator, writer_batch_entries=2) as harness:
        acme = await harness.add_connector(members=1_600)
        await harness.tick()
        while harness.messages:
            await harness.deliver(harness.messages.popleft())
        assert await harness.redis.xlen(acme.stream) > 8
        for count in (1, 2, 3, 2):
            turn = Turn(Dying(harness.redis, acme.partition))
            with suppress(asyncio.CancelledError):
                while await fold([turn], PgBooks(harness.books_connection), count=count):
                    pass
            members = await harness.one("SELECT count(*) AS n FROM rollcall.members")
            assert members["n"] in {0, 1_600}, "whole or not at all"
        await harness.settle()
        await harness.agree(acme)
        assert (await harness.redis.xpending(acme.stream, GROUP))["pending"] == 0


async def test_a_turn_lasts_until_a_large_observation_is_read(
    database_url: str, redis_url: str, simulator: Simulator
) -> None:
    """However short turns and reads are, an observation of many entries comes to its end."""
    async with opened(database_url, redis_url, simulator, writer_batch_entries=1, writer_turn_s=0.001) as harness:
        acme = await harness.add_connector(members=1_600)
        await harness.tick()
        while harness.messages:
            await harness.deliver(harness.messages.popleft())
        async with asyncio.timeout(SOON_S):
            await harness.write()
        await harness.settle()
        await harness.agree(acme)


async def test_a_writer_killed_in_its_transaction_loses_nothing(harness: Harness) -> None:
    """The connection dies under the batch: nothing of it is there, and the next turn applies all of it."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    await change(harness, 1)
    await fetched(harness, acme)
    doomed = await connect(harness.runtime.settings.require_database(), "doomed")
    await harness.rows("BEGIN")
    await harness.rows("LOCK TABLE rollcall.members IN ACCESS EXCLUSIVE MODE")
    folding = asyncio.create_task(fold([Turn(RedisJournal(harness.redis, acme.partition))], PgBooks(doomed), count=200))
    waits = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    await until(lambda: harness.rows(waits, [doomed.info.backend_pid]))
    await harness.rows("SELECT pg_terminate_backend(%s)", [doomed.info.backend_pid])
    await harness.rows("ROLLBACK")
    with pytest.raises(TryLater):
        await folding
    await doomed.close()
    assert await harness.facts(acme) == before
    await harness.settle()
    await harness.agree(acme)


async def test_deleted_pending_entries_block_nobody(harness: Harness) -> None:
    """Entries that somebody deleted while they were pending are passed over; what follows is folded."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    redis = harness.redis
    read = await redis.xreadgroup(GROUP, f"partition-{acme.partition}", {acme.stream: ">"}, count=1)
    streams = list(read.items()) if isinstance(read, dict) else read
    await redis.xdel(acme.stream, streams[0][1][0][0])
    await harness.write()
    assert (await redis.xpending(acme.stream, GROUP))["pending"] == 0
    await harness.break_leases()
    await harness.tick()
    await harness.settle()
    await harness.true(acme)


# Poison.


async def poison(harness: Harness, watched: Watched, wrong: Callable[[dict[str, Any]], None]) -> None:
    """Damage the members' observation in the stream, every other entry as it is and in its place."""
    redis = harness.redis
    entries = await redis.xrange(watched.stream)
    groups = {g["name"]: g["last-delivered-id"] for g in await redis.xinfo_groups(watched.stream)}
    last = groups[GROUP.encode() if GROUP.encode() in groups else GROUP]
    after = tuple(int(n) for n in (last.decode() if isinstance(last, bytes) else last).split("-"))
    for at, fields in entries:
        if tuple(int(n) for n in at.decode().split("-")) <= after:
            continue
        await redis.xdel(watched.stream, at)
        if fields.get(b"dataset") == b"members":
            events = orjson.loads(fields[b"ce"])
            wrong(events[0])
            fields[b"ce"] = orjson.dumps(events)
        await redis.xadd(watched.stream, fields)


def too_long(event: dict[str, Any]) -> None:
    event["data"]["after"]["is_owner"] = "neither"


def without_a_field(event: dict[str, Any]) -> None:
    del event["data"]["after"]["is_locked"]


def without_subject(event: dict[str, Any]) -> None:
    del event["subject"]


def without_data(event: dict[str, Any]) -> None:
    del event["data"]


def unstorable(event: dict[str, Any]) -> None:
    event["data"]["after"]["email"] = "\u0000"


@pytest.mark.parametrize("wrong", [too_long, without_a_field, without_subject, without_data, unstorable])
async def test_poison_is_set_aside_alone(harness: Harness, wrong: Callable[[dict[str, Any]], None]) -> None:
    """What cannot be written is found by halving, put away with reason and origin; its neighbours are committed."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.mutate(
        "acme",
        {"op": "member_join"},
        {"op": "group_add", "name": "New"},
        {"op": "plan", "tier": "growth"},
        {"op": "usage_add", "day": datetime.now(UTC).date().isoformat(), "product": "music", "amount": "3"},
    )
    await fetched(harness, acme)
    await poison(harness, acme, wrong)
    await harness.settle()

    facts, truth = await harness.facts(acme), await harness.truth(acme)
    others = {s: r for s, r in truth.records.items() if not s.startswith("member/")}
    assert {s: r for s, r in facts.records.items() if not s.startswith("member/")} == others
    assert facts.usage == truth.usage
    members = {s: r for s, r in before.records.items() if s.startswith("member/")}
    assert {s: r for s, r in facts.records.items() if s.startswith("member/")} == members

    ((_, letter),) = await harness.redis.xrange(DEAD_LETTERS)
    assert letter[b"origin"].decode().split()[0] == acme.stream
    assert letter[b"reason"] in {b"unwritable", b"event_broken"}
    assert (letter[b"attempts"], letter[b"dataset"]) == (b"1", b"members")
    run = (await harness.runs(acme))[-1]
    assert (run["status"], run["parts_failed"]) == ("partial", 1)
    part = (await harness.parts(run))["members"]
    assert part["error_class"] == "ContractBroken"
    assert part["error_reason"] == f"dead_letter_{letter[b'reason'].decode()}"
    assert (await harness.health(acme))[0] == "connected"
    assert (await harness.redis.xpending(acme.stream, GROUP))["pending"] == 0

    (run,) = await harness.poll(acme, kind=RunKind.RECONCILE)
    assert run["status"] == "succeeded", "re-driving is a reconcile"
    await harness.true(acme)


async def test_unreadable_entries_are_set_aside(harness: Harness) -> None:
    """An entry that is no observation at all is put away; its part is fetched again."""
    acme = await harness.synced()
    redis = harness.redis
    cid = str(acme.id)
    for fields in (
        {"ce": "[]", "connector": cid, "dataset": "members", "base": "x", "sequence": "1", "part": cid, "report": "{}"},
        {"ce": "no json", "connector": cid, "dataset": "unheard_of", "base": "1", "sequence": "2", "part": "p"},
        {"ce": "[]", "connector": "?", "dataset": "members", "base": "1", "sequence": "2", "part": cid},
    ):
        await redis.xadd(acme.stream, fields)
    await change(harness, 1)
    await harness.poll(acme)
    await harness.true(acme)
    assert await redis.xlen(DEAD_LETTERS) == 3
    assert (await redis.xpending(acme.stream, GROUP))["pending"] == 0


async def test_a_tail_without_end_holds_up_nothing(harness: Harness) -> None:
    """The first piece of an observation whose rest was lost is passed over by what follows."""
    acme = await harness.synced()
    piece = {"ce": "[]", "connector": str(acme.id), "dataset": "members", "base": "1", "sequence": "2"}
    await harness.redis.xadd(acme.stream, piece)
    await harness.write()
    await change(harness, 1)
    await harness.poll(acme)
    await harness.true(acme)
    assert (await harness.redis.xpending(acme.stream, GROUP))["pending"] == 0
    assert not await harness.redis.xlen(DEAD_LETTERS)


async def test_events_of_a_connector_nobody_knows_are_dropped(harness: Harness) -> None:
    """What comes late of a deleted connector, or of none, leaves no row and no dead letter."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    await harness.rows("UPDATE rollcall.connectors SET status = 'deleted', deleted_at = now()")
    await harness.rows("DELETE FROM rollcall.members")
    await harness.write()
    assert not await harness.rows("SELECT 1 FROM rollcall.members")
    assert not await harness.redis.xlen(DEAD_LETTERS)


# Servers go away.


async def test_a_stopped_postgres_never_dead_letters(harness: Harness, stack: EmbeddedStack) -> None:
    """The writer waits while Postgres is away, acknowledges nothing, and goes on by itself when it is back."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    async with writing(harness) as task:
        await asyncio.to_thread(stack.postgres.stop)
        try:
            await asyncio.sleep(0.5)
            assert not task.done()
        finally:
            await asyncio.to_thread(stack.postgres.start)
        await applied(harness, acme, task)
    assert not await harness.redis.xlen(DEAD_LETTERS)
    await harness.renew_connections()
    await harness.settle()
    await harness.agree(acme)


async def test_a_standby_never_dead_letters(harness: Harness, database_url: str) -> None:
    """The writer waits while Postgres only reads, and goes on by itself once there is a primary."""
    acme = await harness.synced()
    await change(harness, 1)
    await fetched(harness, acme)
    with psycopg.connect(database_url, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        async with writing(harness) as task:

            async def refused() -> bool:
                assert not task.done()
                return any(said["event"] == "writer_waits" and "standby" in said["detail"] for said in harness.logs)

            await until(refused)
            admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
            await applied(harness, acme, task)
    assert not await harness.redis.xlen(DEAD_LETTERS)
    await harness.settle()
    await harness.agree(acme)


async def test_a_stopped_redis_makes_everybody_wait(harness: Harness, stack: EmbeddedStack) -> None:
    """While Redis is away, fetching and writing say TryLater and lose nothing."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    message = harness.messages.popleft()
    await asyncio.to_thread(stack.valkey.stop)
    try:
        with pytest.raises(TryLater):
            await observe(list(message.lanes), harness.runtime.ports)
        with pytest.raises(TryLater):
            await harness.write()
    finally:
        await asyncio.to_thread(stack.valkey.start)
    assert {p["status"] for p in (await harness.parts((await harness.runs())[-1])).values()} == {"waiting"}, (
        "given back"
    )
    await harness.settle()
    assert harness.lapses == 0
    await harness.true(acme)


async def test_a_cancellation_is_not_lost_in_redis(harness: Harness) -> None:
    """A call to Redis that is cancelled ends, at whatever moment: deadlines and shutdowns rely on it."""

    async def calling() -> None:
        while True:
            await harness.redis.ping()

    for moment in range(60):
        task = asyncio.create_task(calling())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        assert (moment, task.cancelled()) == (moment, True)
    assert await harness.redis.ping()


async def test_redis_away_in_the_middle_of_an_observation_is_no_bug(harness: Harness) -> None:
    """A part whose publication fails is told as TryLater, not as a failure of ours, and is found again."""
    acme = await harness.synced()
    await change(harness, 1)
    await harness.make_due(acme)
    await harness.tick()
    message = harness.messages.popleft()
    snapshots = harness.runtime.snapshots

    async def away(*_args: object, **_kwargs: object) -> object:
        raise TryLater("redis_unreachable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(snapshots), "publish", away)
        with pytest.raises(TryLater):
            await observe(list(message.lanes), harness.runtime.ports)
    await harness.settle()
    await harness.agree(acme)
