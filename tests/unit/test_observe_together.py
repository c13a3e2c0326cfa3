"""Observe, connector by connector: who is settled together, and who waits for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest

from schemas.connectors import Dataset, RunKind
from worker import observe as recipe
from worker.changes import GuardLimits
from worker.compare import answer_digest
from worker.elevenlabs.asking import Asked, Page
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Request
from worker.observe import observe
from worker.plan import Calendar, settled_before
from worker.ports import Claim, Head, Ports, Quiet, Target

NOW = datetime(2026, 4, 1, tzinfo=UTC)
PAGE = Page(None, None, b"[]")


@dataclass(slots=True)
class Quietness:
    """A ledger, snapshots and a provider by which nothing has changed; the provider answers as the gates open."""

    parts: Sequence[UUID]
    gates: dict[UUID, asyncio.Event] = field(default_factory=dict)
    settled: list[set[UUID]] = field(default_factory=list)
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

    def start(self) -> asyncio.Task[Any]:
        """Observe everything."""
        anything = cast("Any", self)
        ports = Ports(anything, anything, anything, anything, Calendar(), GuardLimits())
        return asyncio.create_task(observe(self.parts, ports))

    def open(self, *parts: UUID) -> None:
        """Let these be answered."""
        for part in parts:
            self.gates.setdefault(part, asyncio.Event()).set()


async def test_connectors_that_end_soon_after_each_other_are_closed_together() -> None:
    """A transaction costs as much for many as for one."""
    world = Quietness([UUID(int=n) for n in range(12)])
    for part in world.parts:
        asyncio.get_running_loop().call_soon(world.open, part)
    await world.start()
    assert world.settled == [set(world.parts)]


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
