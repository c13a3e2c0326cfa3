"""Observe, connector by connector: who is settled together, and who waits for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest
import structlog

from schemas.connectors import Dataset, RunKind
from worker import observe as recipe
from worker.changes import GuardLimits
from worker.compare import answer_digest
from worker.elevenlabs.asking import Asked, Page
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Finding, Request, Verdict
from worker.errors import TryLater
from worker.observe import observe
from worker.packing import pack
from worker.plan import Calendar, settled_before
from worker.ports import Base, Claim, Failure, Head, Ports, Quiet, Target

NOW = datetime(2026, 4, 1, tzinfo=UTC)
PAGE = Page(None, None, b"[]")


@dataclass(slots=True)
class Quietness:
    """A ledger, snapshots and a provider by which nothing has changed; the provider answers as the gates open."""

    parts: Sequence[UUID]
    gates: dict[UUID, asyncio.Event] = field(default_factory=dict)
    settled: list[set[UUID]] = field(default_factory=list)
    returned: set[UUID] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim every part, each of a connector of its own."""
        return [
            Claim(p, p, RunKind.POLL, Dataset.MEMBERS, Target(p, "acme", "http://x", "", 0), 2, 1, NOW, NOW)
            for p in part_ids
        ]

    async def heads(self, claims: Sequence[Claim]) -> dict[UUID, Head]:
        """Know every answer already."""
        return {c.part_id: Head(1, answer_digest(c, (PAGE,), settled_before(NOW, Calendar()))) for c in claims}

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """Answer once the gate is open."""
        asking.close()
        await self.gates.setdefault(target.connector_id, asyncio.Event()).wait()
        return Asked(OK_VERDICT, (PAGE,))

    async def close_quiet(self, quiet: Sequence[Quiet]) -> None:
        """Note who is closed together."""
        self.settled.append({q.claim.part_id for q in quiet})
        self.news.set()

    async def give_back(self, claim: Claim, _reason: str, _wait_s: float) -> None:
        """Note who is given back."""
        self.returned.add(claim.part_id)

    def start(self) -> asyncio.Task[Any]:
        """Observe everything."""
        anything = cast("Any", self)
        ports = Ports(anything, anything, anything, anything, Calendar(), GuardLimits())
        return asyncio.create_task(observe(self.parts, ports))

    def open(self, *parts: UUID) -> None:
        """Let these be answered."""
        for part in parts:
            self.gates.setdefault(part, asyncio.Event()).set()


def afterwards(call: Callable[[], object], turns: int = 100) -> None:
    """Call after so many turns of the loop: what was begun by then has ended, and no time has gone by."""
    loop = asyncio.get_running_loop()
    loop.call_soon(afterwards, call, turns - 1) if turns else call()


async def test_connectors_that_end_soon_after_each_other_are_closed_together() -> None:
    """A transaction costs as much for many as for one."""
    first, second, third = parts = [UUID(int=n) for n in range(3)]
    world = Quietness(parts)
    world.open(first)
    observing = world.start()
    afterwards(lambda: world.open(second))
    afterwards(lambda: world.open(third), 200)
    await observing
    assert world.settled == [{first, second, third}]


async def test_nobody_waits_for_a_connector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended is closed although another of the same message goes on and on."""
    monkeypatch.setattr(recipe, "TOGETHER_S", 0.0)
    quick, hanging = UUID(int=1), UUID(int=2)
    world = Quietness([quick, hanging])
    world.open(quick)
    observing = world.start()
    async with asyncio.timeout(5):
        await world.news.wait()
    assert world.settled == [{quick}]
    assert not observing.done()
    world.open(hanging)
    await observing
    assert world.settled == [{quick}, {hanging}]


async def test_what_has_ended_is_closed_by_who_is_told_to_stop() -> None:
    """Only what is still asked is given back: the rest waited for company, not for an answer."""
    quick, hanging = UUID(int=1), UUID(int=2)
    world = Quietness([quick, hanging])
    world.open(quick)
    observing = world.start()
    afterwards(observing.cancel)
    with pytest.raises(asyncio.CancelledError):
        await observing
    assert (world.settled, world.returned) == ([{quick}], {hanging})


class Forgetfulness(Quietness):
    """Groups of which there are none, as before; but the answer is known by no digest, and Redis cannot note one."""

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim groups."""
        return [replace(claim, dataset=Dataset.GROUPS) for claim in await super().claim(part_ids)]

    async def heads(self, claims: Sequence[Claim]) -> dict[UUID, Head]:
        """Know the records only."""
        return {c.part_id: Head(1, "", pack(Base(1))) for c in claims}

    async def note_digests(self, quiet: Sequence[Quiet]) -> None:
        """Fail, with something to note."""
        assert all(q.digest for q in quiet)
        raise TryLater("redis_refuses", "Redis refuses to write.")


async def test_a_digest_that_cannot_be_noted_keeps_nothing_open() -> None:
    """It only saves a comparison: what was compared and is unchanged is closed all the same."""
    parts = [UUID(int=1), UUID(int=2)]
    world = Forgetfulness(parts)
    world.open(*parts)
    with structlog.testing.capture_logs() as logs:
        results = await world.start()
    assert [type(result) for result in results] == [Quiet, Quiet]
    assert (world.settled, world.returned) == ([set(parts)], set())
    assert [line["event"] for line in logs] == ["digests_not_renewed"]


async def test_who_is_told_to_stop_while_noting_digests_settles_nothing_twice() -> None:
    """What is closed by then is closed; a Redis that hangs does not have it settled once more."""

    class Hanging(Forgetfulness):
        async def note_digests(self, quiet: Sequence[Quiet]) -> None:
            assert quiet
            await asyncio.Event().wait()

    quick, hanging = UUID(int=1), UUID(int=2)
    world = Hanging([quick, hanging])
    world.open(quick, hanging)
    observing = world.start()
    async with asyncio.timeout(5):
        await world.news.wait()
        afterwards(observing.cancel)
        with pytest.raises(asyncio.CancelledError):
            await observing
    assert (world.settled, world.returned) == ([{quick, hanging}], set())


class Refusals(Quietness):
    """A ledger and a provider that refuses everything: each connector has two lanes of two parts."""

    claims: Sequence[Claim] = ()

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim every part, four in a row of one connector."""
        datasets = (Dataset.MEMBERS, Dataset.GROUPS, Dataset.USAGE_MEMBER, Dataset.USAGE_API_KEY)
        targets = [Target(UUID(int=n), f"tenant {n}", "http://x", "", 0) for n in range(len(part_ids) // 4)]
        self.claims = [
            Claim(
                p, UUID(int=n // 2), RunKind.POLL, datasets[n % 4], targets[n // 4], 2, 1, NOW, NOW, lane=1 + n % 4 // 2
            )
            for n, p in enumerate(part_ids)
        ]
        return list(self.claims)

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """Refuse, once the gate is open."""
        await super().converse(target, asking)
        return Asked(Verdict(Finding.SCOPE, "scope_missing", ""))

    async def failed(self, _failure: Failure) -> None:
        """Know it."""


async def test_a_line_of_the_log_names_whose_it_is() -> None:
    """It tells the tenant, connector, run and dataset of its part, whoever is asked beside it; later ones tell none."""
    world = Refusals([UUID(int=n) for n in range(8)])
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        observing = world.start()
        afterwards(lambda: world.open(UUID(int=0), UUID(int=1)))
        await observing
        structlog.get_logger().info("after")
    after = lines.pop()
    told = {(line["tenant"], line["connector"], line["run"], line["dataset"]) for line in lines}
    assert len(lines) == len(world.claims)
    assert told == {(c.target.tenant_id, c.target.connector_id, c.run_id, c.dataset) for c in world.claims}
    assert set(after) == {"event", "log_level"}
