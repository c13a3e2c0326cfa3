"""What the command line reads from Redis: events of all partitions in order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

import orjson
from redis.asyncio import Redis

from worker.redis import answering
from worker.stream import last_ids

READ: Final = 200
BLOCK_MS: Final = 1000

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
