"""Writer: fold the stream into Postgres, one partition at a time, each observation exactly once.

A turn holds the partition's lock: read what is pending, then what is new; apply many observations in one
transaction; acknowledge after the commit. What cannot be applied is found by halving the batch and set aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from worker.entries import Entry, Observation, Reading, assemble
from worker.errors import ContractBroken
from worker.ports import Books, Journal

log = structlog.get_logger()


@dataclass(slots=True)
class Turn:
    """What one turn on a partition did.

    `tail` is an observation whose end was not read yet, `ahead` the next batch if it was read already; both stay
    pending, and a next turn begins with them.
    """

    applied: int = 0
    dead: int = 0
    tail: Sequence[Entry] = ()
    ahead: Reading | None = None


async def fold(journal: Journal, books: Books, *, count: int, block_ms: int | None, turn: Turn) -> bool:
    """Read and apply one batch; tell whether there was anything.

    Raises:
        TryLater: Postgres or Redis is not there; nothing was acknowledged that is not committed.

    """
    reading = turn.ahead or await _read(journal, count, block_ms, turn.tail)
    turn.ahead, turn.tail = None, reading.tail
    if not reading.entries:
        # Publishing is one step: what is not there now never comes, and the part will be fetched again.
        await journal.acknowledge([piece.id for piece in reading.tail])
        turn.tail = ()
        return False
    if reading.entries < count:
        await _settle(reading, journal, books, turn)
        return True
    # There is a backlog: the next batch is read and decoded while Postgres works on this one.
    ahead = asyncio.create_task(_read(journal, count, block_ms, reading.tail), name="read ahead")
    try:
        await _settle(reading, journal, books, turn)
        turn.ahead = await ahead
    finally:
        ahead.cancel()
        await asyncio.gather(ahead, return_exceptions=True)
    return True


async def _settle(reading: Reading, journal: Journal, books: Books, turn: Turn) -> None:
    for broken in reading.broken:
        await journal.set_aside(broken.entries, f"unreadable:{broken.reason}")
        turn.dead += 1
    await _apply(reading.whole, journal, books, turn)
    done = [entry.id for observation in reading.whole for entry in observation.entries]
    await journal.acknowledge([*done, *reading.passed])
    turn.applied += len(reading.whole)


async def _read(journal: Journal, count: int, block_ms: int | None, tail: Sequence[Entry]) -> Reading:
    entries = await journal.read(count, block_ms=block_ms)
    reading = assemble([*tail, *entries])
    reading.entries = len(entries)
    return reading


async def _apply(batch: Sequence[Observation], journal: Journal, books: Books, turn: Turn) -> None:
    if not batch:
        return
    try:
        await books.apply(batch)
    except ContractBroken as error:
        if len(batch) > 1:
            half = len(batch) // 2
            await _apply(batch[:half], journal, books, turn)
            await _apply(batch[half:], journal, books, turn)
            return
        log.warning("observation_set_aside", reason=error.reason, connector=str(batch[0].connector_id))
        await books.set_aside(batch[0], error.reason)
        await journal.set_aside(batch[0].entries, error.reason)
        turn.dead += 1
