"""Snapshots: what was last published of each dataset, written together with the stream entries.

A hash per (connector, dataset): `v` version, `d` digest of request and raw answer, and the compressed records: small
ones in `s`, which is read with the two, large ones in `b`, which is read when it is needed. Before the small ones
stands their version: a worker of an earlier state, which knows `b` only, leaves them behind when it publishes. Hashes
may vanish at any time: Postgres is the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from schemas.connectors import Dataset
from worker.autopipeline import AutoPipeline
from worker.entries import Entry
from worker.packing import unpack
from worker.ports import Base, Claim, Head, Packed, Publication, Quiet, Target
from worker.redis import Line, answering

_AT_ONCE = 2
"""Pipelines under way: the server works on one while the next is written."""
SMALL_BYTES = 16_384
"""Records that small take less to read than to ask for once more; those of a full message are in memory together."""
_SMALL, _LARGE = "s", "b"
_PUBLISH = """
local have = redis.call('HGET', KEYS[1], 'v') or ''
if have == ARGV[2] then return 'done' end
if have ~= ARGV[1] then return 'refused' end
if redis.call('XLEN', KEYS[2]) >= tonumber(ARGV[5]) then return 'full' end
redis.call('HSET', KEYS[1], 'v', ARGV[2], 'd', ARGV[3], ARGV[7], ARGV[4])
redis.call('HDEL', KEYS[1], ARGV[8])
local at = 9
for _ = 1, tonumber(ARGV[6]) do
    local size = tonumber(ARGV[at])
    local fields = {}
    for i = 1, size do fields[i] = ARGV[at + i] end
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    at = at + size + 1
end
return 'done'
"""
_NOTE = """
if redis.call('HGET', KEYS[1], 'v') == ARGV[1] then redis.call('HSET', KEYS[1], 'd', ARGV[2]) end
"""


def stream_key(partition: int) -> str:
    """Name a partition's stream; the braces keep it with its snapshots in a Redis Cluster."""
    return f"rollcall:events:{{{partition}}}"


def snapshot_key(partition: int, connector_id: UUID, dataset: Dataset) -> str:
    """Name a snapshot."""
    return f"rollcall:snapshot:{{{partition}}}:{connector_id}:{dataset}"


class RedisSnapshots:
    """`worker.ports.Snapshots` on Redis.

    Args:
        redis: the process's client.
        ceiling_entries: a stream this long takes no more: its writer is too far behind.

    """

    def __init__(self, redis: Redis, *, ceiling_entries: int) -> None:
        self._redis, self._ceiling = redis, ceiling_entries
        self._pipeline = AutoPipeline(Line(redis) for _ in range(_AT_ONCE))
        self._publish = redis.register_script(_PUBLISH)
        self._note = redis.register_script(_NOTE)
        self._loaded = False

    async def close(self) -> None:
        """Fail what is under way, and close the lines; the client is its owner's."""
        await self._pipeline.close()

    async def heads(self, claims: Sequence[Claim]) -> dict[UUID, Head]:
        """Read heads; see `worker.ports.Snapshots`."""
        found = await self._pipeline.send(
            *(("HMGET", _key(claim.target, claim.dataset), "v", "d", _SMALL) for claim in claims)
        )
        return {claim.part_id: _head(*fields) for claim, fields in zip(claims, found, strict=True)}

    async def load(self, target: Target, dataset: Dataset, version: int) -> Base | None:
        """Read a snapshot's records; see `worker.ports.Snapshots`."""
        ((v, blob),) = await self._pipeline.send(("HMGET", _key(target, dataset), "v", _LARGE))
        if v is None or not isinstance(blob, bytes) or int(v) != version:
            return None
        return unpack(Packed(version, blob))

    async def note_digests(self, quiet: Sequence[Quiet]) -> None:
        """Renew digests; see `worker.ports.Snapshots`."""
        await self._run(
            self._note, *(([_key(q.claim.target, q.claim.dataset)], [str(q.base), q.digest]) for q in quiet)
        )

    async def room(self) -> None:
        """Wait for room, with the script loaded; see `worker.ports.Snapshots`."""
        if not self._loaded:
            # Else the first publication is sent twice, and stays in memory with the error between.
            self._loaded = bool(await self._pipeline.send(("SCRIPT LOAD", _PUBLISH)))
        await self._pipeline.room()

    async def publish(
        self,
        target: Target,
        dataset: Dataset,
        expected: int | None,
        new: Packed,
        digest: str,
        entries: Sequence[Entry],
    ) -> Publication:
        """Write snapshot and entries in one step; see `worker.ports.Snapshots`."""
        small = len(new.blob) <= SMALL_BYTES
        arguments: list[Any] = [
            "" if expected is None else str(expected),
            str(new.version),
            digest,
            b"%d %b" % (new.version, new.blob) if small else new.blob,
            self._ceiling,
            len(entries),
            *((_SMALL, _LARGE) if small else (_LARGE, _SMALL)),
        ]
        for entry in entries:
            arguments.append(2 * len(entry.fields))
            for name, value in entry.fields.items():
                arguments += (name, value)
        keys = [_key(target, dataset), stream_key(target.partition)]
        (answer,) = await self._run(self._publish, (keys, arguments))
        return Publication(answer.decode())

    async def _run(self, script: AsyncScript, *calls: tuple[Sequence[str], Sequence[Any]]) -> list[Any]:
        """Run a script with these keys and arguments; a server that was started anew does not know it."""
        commands = [("EVALSHA", script.sha, len(keys), *keys, *arguments) for keys, arguments in calls]
        try:
            return await self._pipeline.send(*commands)
        except NoScriptError:
            await self._pipeline.send(("SCRIPT LOAD", script.script))
            return await self._pipeline.send(*commands)

    async def forget(self, partition: int, connector_id: UUID) -> None:
        """Delete every snapshot of a connector."""
        with answering():
            await self._redis.delete(*(snapshot_key(partition, connector_id, d) for d in Dataset))

    async def forget_all(self) -> None:
        """Delete every snapshot: what was published last is not certain any more."""
        with answering():
            async for key in self._redis.scan_iter(match="rollcall:snapshot:*", count=1000):
                await self._redis.unlink(key)


def _head(version: bytes | None, digest: bytes | None, small: bytes | None) -> Head:
    if version is None:
        return Head()
    of, _, blob = (small or b"").partition(b" ")
    return Head(int(version), (digest or b"").decode(), Packed(int(version), blob) if of == version else None)


def _key(target: Target, dataset: Dataset) -> str:
    return snapshot_key(target.partition, target.connector_id, dataset)
