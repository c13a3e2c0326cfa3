"""Bounded memory: streams are trimmed behind their readers, never before the writer, and fetchers wait for room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio import Redis

from schemas.connectors import Dataset
from tests.fixtures.harness import Harness, opened
from tests.fixtures.simulator import Simulator
from worker.redis import client
from worker.snapshots import stream_key
from worker.stream import GROUP, trim

KEY: Final = stream_key(0)
WEEK_S: Final = 604_800
HOUR_S: Final = 3600
CEILING: Final = 20
GROUPS: Final = (GROUP, "alerts", "billing")


@dataclass
class Stream:
    """Partition 0's stream with the groups that read it; entries are numbered, some are hours old."""

    redis: Redis
    now_ms: int
    added: int = 0

    async def add(self, n: int = 1, *, hours_ago: float = 0) -> None:
        for _ in range(n):
            self.added += 1
            at = f"{self.now_ms - int(hours_ago * HOUR_S * 1000)}-{self.added}" if hours_ago else "*"
            await self.redis.xadd(KEY, {"n": self.added}, id=at)

    async def read(self, group: str, n: int, *, acknowledge: bool = True) -> None:
        """Let a group read on."""
        found = await self.redis.xreadgroup(group, "one", {KEY: ">"}, count=n)
        pieces = found.values() if isinstance(found, dict) else [entries for _, entries in found]
        for at in [at for entries in pieces for at, _ in entries]:
            if acknowledge:
                await self.redis.xack(KEY, group, at)

    async def trim(self, retention_s: float = WEEK_S, ceiling_entries: int = CEILING) -> list[str]:
        return sorted(await trim(self.redis, 0, retention_s=retention_s, ceiling_entries=ceiling_entries))

    async def left(self) -> list[int]:
        """The numbers of the entries that are still there; announcements have none."""
        return [int(fields[b"n"]) for _, fields in await self.redis.xrange(KEY) if b"n" in fields]

    async def unread(self, group: str) -> dict[bytes, list[str]]:
        """The entries that a group has not read, each with the groups it names if it is a `stream.reset`."""
        (last,) = [g["last-delivered-id"] for g in await self.redis.xinfo_groups(KEY) if g["name"] == group.encode()]
        found = await self.redis.xrange(KEY, min=b"(" + last)
        return {at: orjson.loads(f[b"ce"])[0]["data"]["groups"] if b"ce" in f else [] for at, f in found}

    async def told(self) -> list[list[str]]:
        """The groups that each `stream.reset` names."""
        found = [orjson.loads(fields[b"ce"])[0] for _, fields in await self.redis.xrange(KEY) if b"ce" in fields]
        assert {event["type"] for event in found} <= {"io.rollcall.elevenlabs.stream.reset.v1"}
        return [event["data"]["groups"] for event in found]


@asynccontextmanager
async def streaming(redis_url: str, groups: Sequence[str]) -> AsyncIterator[Stream]:
    redis = client(SecretStr(redis_url))
    try:
        await redis.flushall()
        for group in groups:
            await redis.xgroup_create(KEY, group, id="0", mkstream=True)
        seconds, _ = await redis.time()
        yield Stream(redis, seconds * 1000)
    finally:
        await redis.aclose()


@pytest.fixture
async def stream(redis_url: str) -> AsyncIterator[Stream]:
    """An empty stream with the writer's group and two subscribers'."""
    async with streaming(redis_url, GROUPS) as made:
        yield made


async def test_what_is_older_than_the_retention_goes(stream: Stream) -> None:
    """Applied entries go after the retention, read by everybody or not; whoever loses some is told."""
    await stream.add(4, hours_ago=3)
    await stream.add(2)
    await stream.read(GROUP, 6)
    await stream.read("alerts", 4)
    assert await stream.trim(retention_s=2 * HOUR_S) == ["billing"]
    assert await stream.left() == [5, 6]
    assert await stream.told() == [["billing"]]


async def test_short_of_half_the_ceiling_nothing_else_goes(stream: Stream) -> None:
    """Entries that everybody has read stay for their retention while there is room: somebody new may want them."""
    await stream.add(10)
    for group in GROUPS:
        await stream.read(group, 10)
    assert await stream.trim() == []
    assert len(await stream.left()) == 10


async def test_past_half_the_ceiling_what_everybody_has_read_goes(stream: Stream) -> None:
    """The stream is cut behind the slowest group, and nobody loses anything."""
    await stream.add(12)
    await stream.read(GROUP, 12)
    await stream.read("alerts", 9)
    await stream.read("billing", 5)
    assert await stream.trim() == []
    assert await stream.left() == list(range(6, 13))
    assert await stream.told() == []


async def test_the_slowest_are_given_up_first(stream: Stream) -> None:
    """Where one group stands still, it alone loses entries: the others keep what they have not read."""
    await stream.add(30)
    await stream.read(GROUP, 30)
    await stream.read("alerts", 27)
    assert await stream.trim() == ["billing"]
    assert await stream.left() == [28, 29, 30]
    assert await stream.told() == [["billing"]]


async def test_past_everybody_the_writer_is_the_limit(stream: Stream) -> None:
    """If every subscriber is far behind, all that the writer has applied goes, and not one entry more."""
    await stream.add(40)
    await stream.read(GROUP, 25)
    await stream.read(GROUP, 5, acknowledge=False)
    assert await stream.trim() == ["alerts", "billing"]
    assert await stream.left() == list(range(26, 41)), "read but not acknowledged is not applied"
    assert await stream.told() == [["alerts", "billing"]]
    assert await stream.trim(retention_s=-HOUR_S, ceiling_entries=1) == []
    assert await stream.left() == list(range(26, 41))


async def test_a_stream_without_a_writer_is_not_cut(stream: Stream) -> None:
    """Before the writer has ever read, everything waits for it."""
    await stream.redis.xgroup_destroy(KEY, GROUP)
    await stream.add(40, hours_ago=3)
    assert await stream.trim(retention_s=HOUR_S) == []
    assert len(await stream.left()) == 40


async def test_a_loss_is_told_once(stream: Stream) -> None:
    """While the notice lies ahead of a group, further losses need no other; having read on, it hears of the next."""
    for hours_ago in (5, 3, 1):
        await stream.add(2, hours_ago=hours_ago)
    await stream.read(GROUP, 6)
    await stream.read("alerts", 6)
    assert await stream.trim(retention_s=4 * HOUR_S) == ["billing"]
    assert await stream.trim(retention_s=2 * HOUR_S) == []
    assert await stream.left() == [5, 6]
    await stream.read("billing", 3)
    await stream.add(12)
    await stream.read(GROUP, 13)
    await stream.read("alerts", 13)
    assert await stream.trim() == ["billing"]
    assert await stream.told() == [["billing"]]


async def test_a_notice_that_is_cut_is_repeated(stream: Stream) -> None:
    """However long a group stands still: what tells it of its loss is there when it wakes up."""
    for _ in range(3):
        await stream.add(15)
        await stream.read(GROUP, 100)
        await stream.read("alerts", 100)
        assert await stream.trim() == ["billing"]
        assert await stream.told() == [["billing"]]
    await stream.read("billing", 1)
    assert await stream.trim(retention_s=-HOUR_S) == []


async def test_a_group_that_has_read_everything_is_left_in_peace(stream: Stream) -> None:
    """Old entries that a group has read are no loss to it, however far the writer is ahead since."""
    await stream.add(3, hours_ago=3)
    for group in GROUPS:
        await stream.read(group, 3)
    await stream.add(2)
    await stream.read(GROUP, 2)
    assert await stream.trim(retention_s=HOUR_S) == []
    assert await stream.left() == [4, 5]
    assert await stream.told() == []


async def test_what_a_group_has_in_hand_is_unread(stream: Stream) -> None:
    """An entry that was delivered and not acknowledged counts as unread: it is kept, or its loss is told."""
    await stream.add(12)
    await stream.read(GROUP, 12)
    await stream.read("alerts", 12)
    await stream.read("billing", 4)
    await stream.read("billing", 8, acknowledge=False)
    assert await stream.trim() == []
    assert (await stream.left())[0] == 5
    await stream.add(20)
    await stream.read(GROUP, 20)
    await stream.read("alerts", 20)
    assert await stream.trim() == ["billing"]


STEPS: Final = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 8)),
        st.tuples(st.sampled_from(GROUPS), st.integers(1, 12)),
        st.tuples(st.just("trim"), st.integers(2, CEILING)),
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_unapplied_is_cut_and_no_loss_is_silent(redis_url: str, steps: list[tuple[str, int]]) -> None:
    """Whatever is read and cut in whatever order, the writer misses nothing, and who loses something is told."""

    async def play() -> None:
        async with streaming(redis_url, GROUPS) as stream:
            for what, n in steps:
                if what == "add":
                    await stream.add(n)
                elif what != "trim":
                    await stream.read(what, n)
                else:
                    unread = {group: await stream.unread(group) for group in GROUPS}
                    told = await stream.trim(ceiling_entries=n)
                    for group, before in unread.items():
                        now = await stream.unread(group)
                        lost = before.keys() - now.keys()
                        assert not lost or group != GROUP
                        assert not lost or any(group in names for names in now.values())
                        assert lost or group not in told

    asyncio.run(play())


@pytest.fixture
async def small(database_url: str, redis_url: str, simulator: Simulator) -> AsyncIterator[Harness]:
    """The flow with streams of ten entries at most."""
    async with opened(database_url, redis_url, simulator, stream_ceiling_entries=10) as made:
        yield made


async def test_at_the_ceiling_parts_wait_for_the_writer(small: Harness) -> None:
    """A full stream takes no more: parts wait without using up attempts, and go on once there is room again."""
    some = [await small.add_connector(name, tenant=name) for name in ("acme", "globex", "initech")]
    await small.rows("UPDATE rollcall.connectors SET partition = %s", [some[0].partition])
    for _ in range(4):
        await small.tick()
        while small.messages:
            await small.deliver(small.messages.popleft())
        await small.rows("UPDATE rollcall.sync_parts SET not_before = now() WHERE status = 'waiting'")
    assert await small.runtime.redis.xlen(some[0].stream) == 10
    full = await small.rows("SELECT * FROM rollcall.sync_parts WHERE error_reason = 'stream_full'")
    assert len(full) >= 3 * len(Dataset) - 10
    assert {(part["status"], part["attempts"], part["lane"]) for part in full} == {("waiting", 0, None)}
    assert not await small.rows(
        "SELECT 1 FROM rollcall.connector_access a JOIN rollcall.sync_parts p USING (connector_id, dataset)"
        " WHERE p.error_reason = 'stream_full' AND a.lease_until > now()"
    )
    await small.settle()
    for watched in some:
        (run,) = await small.runs(watched)
        assert (run["status"], run["parts_failed"]) == ("succeeded", 0)
        await small.true(watched)
    await small.tick()
    assert await small.runtime.redis.xlen(some[0].stream) <= 5


async def test_a_subscriber_that_stands_still_stops_nobody(small: Harness) -> None:
    """Its entries are cut when room is needed, it is told, and everything else goes on."""
    acme = await small.add_connector()
    await small.runtime.redis.xgroup_create(acme.stream, "asleep", id="0", mkstream=True)
    await small.poll(acme)
    for seed in range(4):
        kinds = ["member_join", "group_update", "key_update", "key_add"]
        small.simulator.mutate("acme", {"op": "random", "n": 12, "seed": seed, "kinds": kinds})
        (run,) = await small.poll(acme)
        assert run["status"] == "succeeded"
        assert await small.runtime.redis.xlen(acme.stream) <= 10
    await small.true(acme)
    left = [
        event for _, fields in await small.runtime.redis.xrange(acme.stream) for event in orjson.loads(fields[b"ce"])
    ]
    assert [event["data"]["groups"] for event in left if event["subject"].startswith("stream/")] == [["asleep"]]
    assert {"groups": ["asleep"], "partition": acme.partition}.items() <= next(
        log for log in small.logs if log["event"] == "stream_reset"
    ).items()
