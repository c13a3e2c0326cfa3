"""Snapshots in a real Redis: small ones come along with their heads, large ones are read when they are needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from random import Random
from uuid import UUID

import pytest
from pydantic import SecretStr

from schemas.connectors import Dataset, RunKind
from worker.entries import Entry
from worker.packing import pack, unpack
from worker.ports import Base, Claim, Head, Packed, Publication, Quiet, Target
from worker.redis import client
from worker.snapshots import SMALL_BYTES, RedisSnapshots, snapshot_key
from worker.stream import lengths

NOW = datetime(2026, 4, 17, 12, tzinfo=UTC)
ID = UUID(int=1)
TARGET = Target(ID, "acme", "http://127.0.0.1", "", 0)
CLAIM = Claim(ID, ID, RunKind.POLL, Dataset.MEMBERS, TARGET, 3, 2, NOW, NOW)


@pytest.fixture
async def snapshots(redis_url: str) -> AsyncIterator[RedisSnapshots]:
    redis = client(SecretStr(redis_url))
    made = RedisSnapshots(redis, ceiling_entries=100)
    yield made
    await made.close()
    await redis.aclose()


def base(version: int, members: int) -> Base:
    """Give a listing that compression cannot make much smaller."""
    rng = Random(version)  # noqa: S311 - no secret
    return Base(version, {f"member/{n}": {"user_id": rng.randbytes(32).hex()} for n in range(members)})


async def publish(snapshots: RedisSnapshots, expected: int | None, packed: Packed) -> None:
    entries = [Entry({b"ce": b"[]"})]
    done = await snapshots.publish(TARGET, Dataset.MEMBERS, expected, packed, f"digest {packed.version}", entries)
    assert done is Publication.DONE


async def head(snapshots: RedisSnapshots) -> Head:
    return (await snapshots.heads([CLAIM]))[ID]


async def test_a_publication_makes_its_stream_grow(snapshots: RedisSnapshots, redis_url: str) -> None:
    """By that a writer sees that more is coming."""
    async with client(SecretStr(redis_url)) as redis:
        before = await lengths(redis, [TARGET.partition, TARGET.partition + 1])
        await publish(snapshots, None, pack(base(1, 10)))
        assert await lengths(redis, [TARGET.partition, TARGET.partition + 1]) == [before[0] + 1, before[1]]


async def test_only_small_records_come_with_the_head(snapshots: RedisSnapshots) -> None:
    """A head brings small records along, of large ones it tells the version; either way they are found as published."""
    small, large = base(1, 10), base(2, 2_000)
    assert len(pack(small).blob) < SMALL_BYTES < len(pack(large).blob)
    await publish(snapshots, None, pack(small))
    assert await head(snapshots) == Head(1, "digest 1", pack(small))
    await publish(snapshots, 1, pack(large))
    assert await head(snapshots) == Head(2, "digest 2", None)
    loaded = await snapshots.load(TARGET, Dataset.MEMBERS, 2)
    assert loaded is not None
    assert dict(loaded.records) == large.records


async def test_records_that_change_their_size_leave_no_old_ones_behind(snapshots: RedisSnapshots) -> None:
    """What a listing held when it was large, or small, is never read as what it holds now."""
    for version, members in ((1, 2_000), (2, 10), (3, 2_000), (4, 10)):
        await publish(snapshots, version - 1 or None, pack(base(version, members)))
        now, loaded = await head(snapshots), await snapshots.load(TARGET, Dataset.MEMBERS, version)
        found = [unpack(now.packed) if now.packed else None, loaded]
        assert [dict(one.records) for one in found if one] == [base(version, members).records]


async def test_small_records_that_an_earlier_worker_left_behind_are_not_believed(
    snapshots: RedisSnapshots, redis_url: str
) -> None:
    """A worker of an earlier state knows of large records only: what it publishes leaves the small ones behind."""
    await publish(snapshots, None, pack(base(1, 10)))
    key = snapshot_key(TARGET.partition, ID, Dataset.MEMBERS)
    async with client(SecretStr(redis_url)) as earlier:
        await earlier.hset(key, mapping={"v": "2", "d": "digest 2", "b": pack(base(2, 10)).blob})
    assert await head(snapshots) == Head(2, "digest 2", None)
    loaded = await snapshots.load(TARGET, Dataset.MEMBERS, 2)
    assert loaded is not None
    assert dict(loaded.records) == base(2, 10).records


@pytest.mark.parametrize("restarted", [False, True], ids=["", "after a restart of the server"])
async def test_digests_are_renewed_of_what_was_compared_with(
    snapshots: RedisSnapshots, redis_url: str, restarted: bool
) -> None:
    """What moved on since then keeps its own digest; a server that has lost its scripts gets them again."""
    await publish(snapshots, None, pack(base(1, 10)))
    await snapshots.note_digests([Quiet(CLAIM, 1, 10, digest="renewed")])
    assert (await head(snapshots)).digest == "renewed"
    if restarted:
        async with client(SecretStr(redis_url)) as redis:
            await redis.script_flush()
    await snapshots.note_digests([Quiet(CLAIM, 0, 10, digest="too late"), Quiet(CLAIM, 1, 10, digest="again")])
    assert (await head(snapshots)).digest == "again"
    await snapshots.note_digests([Quiet(CLAIM, 0, 10, digest="too late")])
    assert (await head(snapshots)).digest == "again"
