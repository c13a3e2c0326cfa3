"""The writer's process: takes turns on partitions, relays announcements, sends what may be sent next."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from uuid import UUID

import structlog
from redis.asyncio import Redis

from worker.errors import TryLater
from worker.settings import Settings
from worker.store.announcements import mark_published, unpublished
from worker.store.books import PgBooks
from worker.store.db import Connection, answering, connect
from worker.store.workers import writers
from worker.stream import RedisJournal, last_ids, lengths, wait_beyond
from worker.writer import Turn, fold

log = structlog.get_logger()

LOCK_CLASS = 0x77726974
"""First key of the writers' advisory locks ("writ"); the second is the partition."""
HANDS = 2
"""Each folds what partitions it gets hold of on a connection of its own: Postgres works for one, Python for another."""
BLOCK_MS = 200
"""How long an idle hand waits for news; announcements without events wait as long."""
MAX_PAUSE_S = 5.0
MAX_REST_S = 0.1
"""Between two small batches; the first of them never waits."""
LULL_S = 0.025
"""When nothing has come for so long, nothing more is waited for."""

Advance = Callable[[Sequence[UUID]], Awaitable[None]]


@dataclass(slots=True)
class Writer:
    """Folds every partition it can get hold of, until `stop` is set.

    `advance` sends what may be sent next of connectors whose parts were just applied.
    """

    settings: Settings
    redis: Redis
    advance: Advance
    partitions: int
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _progress: dict[int, float] = field(default_factory=lambda: dict.fromkeys(range(HANDS), time.monotonic()))
    _order: list[int] = field(init=False)
    """Writers begin at different partitions, the hands of one at different shares of the same order."""
    _ready: set[UUID] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._order = random.sample(range(self.partitions), self.partitions)

    @property
    def progress(self) -> float:
        """Give the monotonic time since when every hand has finished something: liveness is measured by it."""
        return min(self._progress.values())

    async def run(self) -> None:
        """Work until stopped; Postgres or Redis away means waiting with back-off, nothing is acknowledged."""
        advancing = asyncio.create_task(self._advance(), name="advance")
        advancing.add_done_callback(lambda _: self.stop.set())  # should it fail, the folding does not go on alone
        try:
            async with asyncio.TaskGroup() as hands:
                for hand in range(HANDS):
                    hands.create_task(self._fold(hand), name=f"fold {hand}")
        finally:
            advancing.cancel()
            with suppress(asyncio.CancelledError):
                await advancing

    async def _advance(self) -> None:
        """Send the next parts beside the folding: the broker takes longer than the transaction that freed them."""
        while True:
            await self._news.wait()
            self._news.clear()
            ready, self._ready = sorted(self._ready), set()
            if ready:
                await self.advance(ready)

    async def _fold(self, hand: int) -> None:
        pause_s = 0.1
        while not self.stop.is_set():
            try:
                connection = await connect(self.settings.require_database(), "writer")
                try:
                    with answering():
                        await self._turns(connection, hand)
                finally:
                    await connection.close()
                pause_s = 0.1
            except TryLater as error:
                log.warning("writer_waits", reason=error.reason, detail=error.message)
                await self._rest(random.uniform(0, pause_s))  # noqa: S311 - jitter, no secret
                pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def _turns(self, connection: Connection, hand: int) -> None:
        books = PgBooks(connection)
        while not self.stop.is_set():
            worked, ends = False, await last_ids(self.redis, self.partitions)
            share = ceil(self.partitions / (HANDS * max(1, await writers(connection))))
            shares = [self._order[at : at + share] for at in range(0, self.partitions, share)]
            for wanted in (*shares[hand:], *shares[:hand]):
                worked |= await self._turn(connection, books, wanted, hand)
            self._progress[hand] = time.monotonic()
            if not worked:
                await wait_beyond(self.redis, ends, block_ms=BLOCK_MS)

    async def _turn(self, connection: Connection, books: PgBooks, wanted: Sequence[int], hand: int) -> bool:
        """Hold what is free of these partitions while there is work, a second at most; tell whether there was any."""
        partitions = await _lock(connection, wanted)
        if not partitions:
            return False
        journals = {n: RedisJournal(self.redis, n) for n in partitions}
        turns, worked = [Turn(journal) for journal in journals.values()], False
        count = ceil(self.settings.writer_batch_entries / len(partitions))
        until = time.monotonic() + self.settings.writer_turn_s
        try:
            while not self.stop.is_set():
                began = time.monotonic()
                found = await fold(turns, books, count=count)
                announced = await relay(connection, journals)
                self._ready |= books.more
                books.more = set()
                self._news.set()
                worked |= bool(found) or announced
                now = self._progress[hand] = time.monotonic()
                if not found or (now >= until and not any(turn.large for turn in turns)):
                    return worked
                if not any(turn.ahead for turn in turns):
                    # No backlog. Small batches cost a transaction each: what comes meanwhile makes the next one larger,
                    # and where several entries came at once more are on their way.
                    most_s = min(found * (now - began), MAX_REST_S)
                    await rest_while_growing(partial(lengths, self.redis, partitions), self._rest, most_s)
        finally:
            await _unlock(connection, partitions)
        return worked

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return


async def rest_while_growing(
    measure: Callable[[], Awaitable[object]], rest: Callable[[float], Awaitable[None]], most_s: float
) -> None:
    """Rest for `most_s`, or until the measure stays the same for `LULL_S`."""
    before: object = None
    while most_s > LULL_S:
        now = await measure()
        if now == before:
            return
        before = now
        await rest(LULL_S)
        most_s -= LULL_S
    await rest(most_s)


async def relay(connection: Connection, journals: Mapping[int, RedisJournal]) -> bool:
    """Relay announcements of partitions in order; a crash before the mark repeats them under the same ids."""
    waiting = await unpublished(connection, list(journals))
    for partition, entries in waiting.items():
        await journals[partition].announce([entry for _, entry in entries])
        await mark_published(connection, [row_id for row_id, _ in entries])
    return bool(waiting)


async def _lock(connection: Connection, partitions: Sequence[int]) -> list[int]:
    rows = await connection.execute(
        "SELECT n, pg_try_advisory_lock(%s, n) AS held FROM unnest(%b::int[]) AS n", [LOCK_CLASS, list(partitions)]
    )
    return [row["n"] async for row in rows if row["held"]]


async def _unlock(connection: Connection, partitions: Sequence[int]) -> None:
    if not connection.closed:
        await connection.execute(
            "SELECT pg_advisory_unlock(%s, n) FROM unnest(%b::int[]) AS n", [LOCK_CLASS, list(partitions)]
        )
