"""What the command line reads from Redis: events of all partitions in order, and dead letters."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import orjson
from redis.asyncio import Redis

from worker.errors import Refused
from worker.redis import answering
from worker.stream import DEAD_LETTERS, last_ids

READ: Final = 200
BLOCK_MS: Final = 1000
_TEXTS: Final = ("connector", "dataset", "base", "sequence", "reason", "attempts", "origin", "part")

_Entries = list[tuple[bytes, dict[bytes, bytes]]]


async def tail(
    redis: Redis, partitions: int, *, start: str, follow: bool
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """Read events of every partition, by their time in Redis, each with its entry's id.

    Args:
        redis: the client.
        partitions: how many streams there are.
        start: `start`, `now`, or an entry's id to read beyond.
        follow: wait for more; else end with what is there now.

    Raises:
        TryLater: Redis cannot be reached.

    """
    ends = await last_ids(redis, partitions)
    cursors = dict(ends) if start == "now" else dict.fromkeys(ends, b"0" if start == "start" else start.encode())
    while True:
        with answering():
            found = await redis.xread(dict(cursors), count=READ, block=BLOCK_MS if follow else None)
        pieces = {key.decode(): entries for key, entries in _pairs(found)}
        # A stream that filled its share may hold earlier entries than another's last one: up to there only.
        full = [order(entries[-1][0]) for entries in pieces.values() if len(entries) == READ]
        until = min(full, default=None)
        merged = sorted((order(eid), key, eid, fields) for key, entries in pieces.items() for eid, fields in entries)
        moved = False
        for at, key, eid, fields in merged:
            if (until is not None and at > until) or (not follow and at > order(ends[key])):
                continue
            cursors[key], moved = eid, True
            for event in orjson.loads(fields.get(b"ce", b"[]")):
                yield eid.decode(), event
        if not follow and not moved:
            return


def order(entry_id: bytes) -> tuple[int, int]:
    """Read an entry's id as numbers that compare in time."""
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number or 0)


def _pairs(found: Any) -> Sequence[tuple[bytes, _Entries]]:
    return list(found.items()) if isinstance(found, Mapping) else found or []


class DeadLetters:
    """Entries that could not be applied."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def all(self) -> AsyncIterator[dict[str, Any]]:
        """List dead letters, oldest first, without their events."""
        after = "-"
        while True:
            with answering():
                found: Any = await self._redis.xrange(DEAD_LETTERS, min=after, count=READ)
            for eid, fields in found:
                yield _letter(eid, fields)
            if len(found) < READ:
                return
            after = f"({found[-1][0].decode()}"

    async def read(self, entry_id: str) -> dict[str, Any]:
        """Read one with its events. Raises Refused when there is none."""
        with answering():
            found: Any = await self._redis.xrange(DEAD_LETTERS, min=_checked_id(entry_id), max=entry_id)
        if not found:
            raise _unknown()
        eid, fields = found[0]
        return _letter(eid, fields) | {"events": _events(fields.get(b"ce", b""))}

    async def drop(self, entry_ids: Sequence[str]) -> int:
        """Delete these; return how many there were."""
        if not entry_ids:
            return 0
        with answering():
            return int(await self._redis.xdel(DEAD_LETTERS, *map(_checked_id, entry_ids)))

    async def forget(self, _partition: int, connector_id: UUID) -> None:
        """Delete those of a connector; see `worker.connectors.Traces`."""
        await self.drop([letter["id"] async for letter in self.all() if letter.get("connector") == str(connector_id)])


def _letter(eid: bytes, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    texts = {name: fields[name.encode()].decode(errors="replace") for name in _TEXTS if name.encode() in fields}
    return {"id": eid.decode(), "at_ms": order(eid)[0]} | texts


def _events(batch: bytes) -> Any:
    """Read a batch; what is no JSON, the reason it may lie here, is shown as it is."""
    try:
        return orjson.loads(batch)
    except orjson.JSONDecodeError:
        return batch.decode(errors="replace")


def _checked_id(entry_id: str) -> str:
    milliseconds, dash, number = entry_id.partition("-")
    if not milliseconds.isdecimal() or (dash and not number.isdecimal()):
        raise _unknown()
    return entry_id


def _unknown() -> Refused:
    return Refused("unknown_dead_letter", "There is no such dead letter: `rollcall deadletter list` shows them")
