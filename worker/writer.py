"""Writer: fold the streams into Postgres, each partition by one writer at a time, each observation exactly once.

A turn holds a partition's lock: read what is pending, then what is new; apply the observations of all partitions in
hand in one transaction; acknowledge after the commit. What cannot be applied is found by halving the batch and set
aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from worker.entries import Entry, Observation, Reading, assemble
from worker.errors import ContractBroken
from worker.ports import Books, Journal

log = structlog.get_logger()

READ_BYTES = 4_000_000
"""How much one read of a partition should bring: an entry holds up to 500 events, or one. How large entries are is
known of the last ones only, so reads grow step by step."""
FIRST_READ_ENTRIES = 16


@dataclass(slots=True)
class Turn:
    """A turn on one partition, and what it did.

    `tail` is an observation whose end was not read yet, `ahead` the next batch if it was read already; both stay
    pending, and a next turn begins with them. `most` is how many entries may be read at once, by the size of the last
    ones.
    """

    journal: Journal
    applied: int = 0
    dead: int = 0
    tail: Sequence[Entry] = ()
    ahead: Reading | None = None
    most: int = FIRST_READ_ENTRIES

    @property
    def large(self) -> bool:
        """Tell whether an observation is in hand that a turn as long as this one could not read to its end."""
        return bool(self.tail) and not self.applied and not self.dead


_Batch = Sequence[tuple[Turn, Observation]]


async def fold(turns: Sequence[Turn], books: Books, *, count: int) -> int:
    """Read and apply one batch, at most `count` entries of each partition; give how many entries were read.

    Of large entries it reads fewer (`READ_BYTES`); an observation is in hand whole, however large.

    Raises:
        TryLater: Postgres or Redis is not there; nothing was acknowledged that is not committed.

    """
    readings = await _all(_next, turns, count)
    for turn, reading in zip(turns, readings, strict=True):
        turn.ahead, turn.tail = None, reading.tail
        if not reading.entries:
            # Publishing is one step: what is not there now never comes, and the part will be fetched again.
            await turn.journal.acknowledge([piece.id for piece in reading.tail])
            turn.tail = ()
    # Where there is a backlog, the next batch is read and decoded while Postgres works on this one.
    more = [turn for turn, reading in zip(turns, readings, strict=True) if reading.more]
    ahead = asyncio.create_task(_all(_read, more, count), name="read ahead") if more else None
    try:
        await _settle(turns, readings, books)
        if ahead:
            for turn, reading in zip(more, await ahead, strict=True):
                turn.ahead = reading
    finally:
        if ahead:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
    return sum(reading.entries for reading in readings)


async def _next(turn: Turn, count: int) -> Reading:
    return turn.ahead or await _read(turn, count)


async def _read(turn: Turn, count: int) -> Reading:
    wanted = min(count, turn.most)
    entries = await turn.journal.read(wanted)
    reading = assemble([*turn.tail, *entries])
    reading.entries, reading.more = len(entries), len(entries) >= wanted
    if entries:
        size = sum(len(value) for entry in entries for value in entry.fields.values())
        turn.most = max(1, min(2 * wanted, READ_BYTES * len(entries) // max(1, size)))
    return reading


async def _all(read: Callable[[Turn, int], Awaitable[Reading]], turns: Sequence[Turn], count: int) -> list[Reading]:
    """Wait for all, so that no read goes on when one of them has failed."""
    found = await asyncio.gather(*(read(turn, count) for turn in turns), return_exceptions=True)
    for reading in found:
        if isinstance(reading, BaseException):
            raise reading
    return [reading for reading in found if isinstance(reading, Reading)]


async def _settle(turns: Sequence[Turn], readings: Sequence[Reading], books: Books) -> None:
    both = list(zip(turns, readings, strict=True))
    for turn, reading in both:
        for broken in reading.broken:
            await turn.journal.set_aside(broken.entries, f"unreadable:{broken.reason}")
            turn.dead += 1
    await _apply([(turn, observation) for turn, reading in both for observation in reading.whole], books)
    for turn, reading in both:
        done = [entry.id for observation in reading.whole for entry in observation.entries]
        await turn.journal.acknowledge([*done, *reading.passed])
        turn.applied += len(reading.whole)


async def _apply(batch: _Batch, books: Books) -> None:
    if not batch:
        return
    try:
        await books.apply([observation for _, observation in batch])
    except ContractBroken as error:
        if len(batch) > 1:
            half = len(batch) // 2
            await _apply(batch[:half], books)
            await _apply(batch[half:], books)
            return
        ((turn, observation),) = batch
        log.warning("observation_set_aside", reason=error.reason, connector=str(observation.connector_id))
        await books.set_aside(observation, error.reason)
        await turn.journal.set_aside(observation.entries, error.reason)
        turn.dead += 1
