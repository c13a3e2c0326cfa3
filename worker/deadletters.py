"""Dead letters: stream entries that could not be applied, each with its reason and where it came from."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import orjson
from redis.asyncio import Redis

from worker.errors import Refused
from worker.redis import answering
from worker.stream import DEAD_LETTERS

READ: Final = 200
_ID: Final = re.compile(r"[0-9]{1,16}(-[0-9]{1,16})?")
_TEXTS: Final = ("connector", "dataset", "base", "sequence", "reason", "attempts", "origin", "part")


class DeadLetters:
    """The dead letters of all partitions; a letter's id is its place among them."""

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
        await self.drop_of({connector_id})

    async def drop_of(self, connectors: Collection[UUID]) -> int:
        """Delete those of these connectors; return how many there were."""
        ids = set(map(str, connectors))
        return await self.drop([letter["id"] async for letter in self.all() if letter.get("connector") in ids])


def _letter(eid: bytes, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    texts = {name: fields[name.encode()].decode(errors="replace") for name in _TEXTS if name.encode() in fields}
    return {"id": eid.decode(), "at_ms": int(eid.partition(b"-")[0])} | texts


def _events(batch: bytes) -> Any:
    """Read a batch; what is no JSON, the reason it may lie here, is shown as it is."""
    try:
        return orjson.loads(batch)
    except orjson.JSONDecodeError:
        return batch.decode(errors="replace")


def _checked_id(entry_id: str) -> str:
    if not _ID.fullmatch(entry_id):
        raise _unknown()
    return entry_id


def _unknown() -> Refused:
    return Refused("unknown_dead_letter", "There is no such dead letter: `rollcall deadletter list` shows them")
