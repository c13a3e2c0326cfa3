"""Event streams as their writer reads them, and as upkeep trims them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import orjson
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from schemas.events import event_type, timestamp
from worker import metrics
from worker.entries import Entry
from worker.errors import Refused
from worker.redis import answering
from worker.snapshots import stream_key

GROUP = "writer"
DEAD_LETTERS = "rollcall:deadletter"
DEAD_LETTERS_MOST = 10_000
START = "0"
_Id: TypeAlias = tuple[int, int]
"""An entry's id: milliseconds, then a number among those of the same one."""


class RedisJournal:
    """`worker.ports.Journal` of one partition, for one turn.

    The consumer's name is the partition's, whoever holds its lock: what a killed writer had read is pending
    under that name, and is read first.
    """

    def __init__(self, redis: Redis, partition: int) -> None:
        self._redis, self._key, self._consumer = redis, stream_key(partition), f"partition-{partition}"
        self._pending_after: str | None = START

    async def read(self, count: int) -> list[Entry]:
        """Read pending entries, then new ones; see `worker.ports.Journal`."""
        while self._pending_after is not None:
            entries = await self._read(self._pending_after, count)
            self._pending_after = entries[-1].id if entries else None
            # Somebody deleted these while they were pending: they would be read first for ever.
            await self.acknowledge([entry.id for entry in entries if not entry.fields])
            if left := [entry for entry in entries if entry.fields]:
                return left
        return await self._read(">", count)

    async def _read(self, after: str, count: int) -> list[Entry]:
        with answering():
            try:
                found = await self._ask(after, count)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await ensure_group(self._redis, self._key, GROUP)
                found = await self._ask(after, count)
        return [Entry(fields, entry_id.decode()) for _, items in found for entry_id, fields in items]

    async def _ask(self, after: str, count: int) -> list[Any]:
        found = await self._redis.xreadgroup(GROUP, self._consumer, {self._key: after}, count=count)
        return list(found.items()) if isinstance(found, dict) else found or []

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge; see `worker.ports.Journal`."""
        if ids:
            with answering():
                await self._redis.xack(self._key, GROUP, *ids)

    async def set_aside(self, entries: Sequence[Entry], reason: str) -> None:
        """Move to the dead letters and acknowledge, in one step; see `worker.ports.Journal`."""
        metrics.DEAD_LETTERS.labels(reason.partition(":")[0]).inc()
        with answering():
            async with self._redis.pipeline(transaction=True) as pipe:
                for entry in entries:
                    origin = f"{self._key} {entry.id}"
                    pipe.xadd(
                        DEAD_LETTERS,
                        _writable(entry, reason=reason, attempts="1", origin=origin),
                        maxlen=DEAD_LETTERS_MOST,
                        approximate=True,
                    )
                pipe.xack(self._key, GROUP, *(entry.id for entry in entries))
                await pipe.execute()

    async def announce(self, entries: Sequence[Entry]) -> None:
        """Append entries to the stream, in order."""
        with answering():
            async with self._redis.pipeline(transaction=False) as pipe:
                for entry in entries:
                    pipe.xadd(self._key, _writable(entry))
                await pipe.execute()


def _writable(entry: Entry, **more: str) -> dict[Any, Any]:
    return {**entry.fields, **more}


class RedisOutlet:
    """`worker.replay.Outlet`: streams of subscribers' own; one that nobody writes to goes after `keep_s`."""

    def __init__(self, redis: Redis, *, keep_s: int) -> None:
        self._redis, self._keep_s = redis, keep_s

    async def append(self, key: str, entries: Sequence[Entry]) -> None:
        """Append entries in one step; see `worker.replay.Outlet`."""
        with answering():
            if _text(await self._redis.type(key)) not in {"none", "stream"}:
                raise Refused("argument_invalid", f"The key {key!r} holds no stream: choose another")
            async with self._redis.pipeline(transaction=True) as pipe:
                for entry in entries:
                    pipe.xadd(key, _writable(entry))
                pipe.expire(key, self._keep_s)
                await pipe.execute()


async def ensure_group(redis: Redis, key: str, group: str) -> None:
    """Create a consumer group that reads from the very start, with its stream, unless it is there."""
    try:
        await redis.xgroup_create(key, group, id=START, mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


async def last_ids(redis: Redis, partitions: int) -> dict[Any, Any]:
    """Read where each stream ends now."""
    keys = [stream_key(n) for n in range(partitions)]
    with answering():
        async with redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.xrevrange(key, count=1)
            found = await pipe.execute()
    return {key: entries[0][0] if entries else b"0-0" for key, entries in zip(keys, found, strict=True)}


async def lengths(redis: Redis, partitions: Sequence[int]) -> list[int]:
    """Count the entries of these partitions' streams."""
    with answering():
        async with redis.pipeline(transaction=False) as pipe:
            for n in partitions:
                pipe.xlen(stream_key(n))
            return await pipe.execute()


async def wait_beyond(redis: Redis, ends: dict[Any, Any], *, block_ms: int) -> None:
    """Wait until some stream has grown beyond these ids, `block_ms` at most."""
    with answering():
        await redis.xread(ends, count=1, block=block_ms)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What the writer has not applied yet of a partition: since when, None when nothing.

    `age` is how long that one waits by the clock that dated it, so that it can be compared with any other clock.
    """

    oldest: datetime | None
    entries: int
    age: timedelta = timedelta()


async def backlog(redis: Redis, partition: int) -> Backlog:
    """Measure what is pending or unread for the writer (never by `lag`, which is wrong after deletes)."""
    key = stream_key(partition)
    pending = None
    with answering():
        seconds, microseconds = await redis.time()
        length = await redis.xlen(key)
        groups = await redis.xinfo_groups(key) if length else []
        mine = next((g for g in groups if _text(g["name"]) == GROUP), None)
        if mine is None:
            unread = await redis.xrange(key, count=1) if length else []
        else:
            last = _text(mine["last-delivered-id"])
            pending = await redis.xpending(key, GROUP) if mine["pending"] else None
            unread = await redis.xrange(key, min=f"({last}", count=1)
    ids = [i for i in ((pending or {}).get("min"), unread[0][0] if unread else None) if i]
    if not ids:
        return Backlog(None, length)
    oldest = min(map(_time, ids))
    return Backlog(oldest, length, datetime.fromtimestamp(seconds + microseconds / 1e6, UTC) - oldest)


def _time(entry_id: Any) -> datetime:
    return datetime.fromtimestamp(int(_text(entry_id).partition("-")[0]) / 1000, UTC)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


TICKS = "rollcall:ticks"


async def tick(redis: Redis) -> int:
    """Count a tick in Redis; a count below an earlier one tells that Redis lost data."""
    with answering():
        return int(await redis.incr(TICKS))


async def trim(redis: Redis, partition: int, *, retention_s: float, ceiling_entries: int) -> list[str]:
    """Trim a stream; return the groups that lose unread entries by it, after telling them with `stream.reset`.

    What is older than the retention goes. Past half the ceiling goes what every group has read, and while the stream
    is still past it, what the slowest groups have not read, one group after the other, at last all that the writer
    has applied. What the writer has not applied is never cut.
    """
    key = stream_key(partition)
    with answering():
        length = await redis.xlen(key)
        groups = await redis.xinfo_groups(key) if length else []
        reached = {_text(g["name"]): await _reached(redis, key, g) for g in groups}
        if GROUP not in reached:
            return []
        seconds, _ = await redis.time()
        retained = (int((seconds - retention_s) * 1000), 0)
        told: list[str] = []
        for cut in (retained, *sorted(max(retained, at) for at in reached.values())):
            until = min(cut, reached[GROUP])
            if losing := await _losing(redis, partition, reached, until):
                notice = await redis.xadd(key, {"ce": _reset_event(partition, losing, int(seconds))})
                await redis.hset(_notices(partition), mapping=dict.fromkeys(losing, notice))
                told += losing
            length -= await redis.xtrim(key, minid=_entry_id(until), approximate=False)
            if length <= ceiling_entries // 2:
                break
    metrics.STREAM_ENTRIES.labels(str(partition)).set(length)
    return told


async def _losing(redis: Redis, partition: int, reached: Mapping[str, _Id], until: _Id) -> list[str]:
    """Name the groups that a cut before `until` takes something unread from, and that have no notice ahead of them."""
    key = stream_key(partition)
    noticed = {_text(name): _id(at) for name, at in (await redis.hgetall(_notices(partition))).items()}
    return [
        name
        for name, at in reached.items()
        if at < until
        and noticed.get(name, (0, 0)) < max(at, until)
        and await redis.xrange(key, min=_entry_id(at), max=f"({_entry_id(until)}", count=1)
    ]


def _notices(partition: int) -> str:
    """Name the hash that holds, by group, the id of the entry that told it of its last loss."""
    return f"rollcall:resets:{{{partition}}}"


def _reset_event(partition: int, groups: Sequence[str], seconds: int) -> bytes:
    """Write the announcement that groups were left behind: they must replay."""
    return orjson.dumps(
        [
            {
                "specversion": "1.0",
                "id": str(uuid4()),
                "source": f"/streams/{partition}",
                "type": event_type("stream.reset"),
                "subject": f"stream/{partition}",
                "time": timestamp(datetime.fromtimestamp(seconds, UTC)),
                "datacontenttype": "application/json",
                "data": {"partition": partition, "groups": list(groups)},
            }
        ]
    )


async def _reached(redis: Redis, key: str, group: dict[str, Any]) -> _Id:
    """Give the id before which a group needs nothing any more."""
    if group["pending"]:
        pending = await redis.xpending(key, _text(group["name"]))
        if pending["min"]:  # else all of it was acknowledged meanwhile
            return _id(pending["min"])
    milliseconds, sequence = _id(group["last-delivered-id"])
    return milliseconds, sequence + 1


def _id(entry_id: Any) -> _Id:
    milliseconds, _, sequence = _text(entry_id).partition("-")
    return int(milliseconds), int(sequence or 0)


def _entry_id(at: _Id) -> str:
    return f"{at[0]}-{at[1]}"
