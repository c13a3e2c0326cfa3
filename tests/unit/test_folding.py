"""How long a writer rests between batches. Neither the stream nor the time is real."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from worker.folding import LULL_S, MAX_REST_S, rest_while_growing


async def rested(lengths: Sequence[int], most_s: float) -> list[float]:
    """Give the rests taken while the stream is as long as this, from one look to the next."""
    looks, rests = iter(lengths), list[float]()

    async def measure() -> int:
        return next(looks)

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    await rest_while_growing(measure, rest, most_s)
    return rests


async def test_a_writer_waits_for_more_while_more_comes() -> None:
    """The larger a batch, the less each entry costs; but nobody waits for longer than `MAX_REST_S` for it."""
    rests = await rested(range(100), MAX_REST_S)
    assert sum(rests) == pytest.approx(MAX_REST_S)
    assert max(rests) <= LULL_S


@pytest.mark.parametrize("grows", range(3))
async def test_what_has_come_last_is_not_kept_waiting(grows: int) -> None:
    """When a burst is over, its last entries are folded after a lull, not after the longest rest."""
    assert await rested([*range(grows), grows, grows], 60.0) == [LULL_S] * (grows + 1)


async def test_short_rests_ask_for_nothing() -> None:
    """Where little comes, resting costs no question."""
    assert await rested([], LULL_S / 2) == [LULL_S / 2]
