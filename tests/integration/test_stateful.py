"""Whatever happens in whatever order, once things are quiet Postgres and a subscriber equal the provider."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from schemas.connectors import RunKind
from tests.fixtures.harness import Harness, Subscriber, opened
from tests.fixtures.servers import cloned_database
from tests.fixtures.simulator import Simulator
from worker.dev.stack import EmbeddedStack
from worker.observe import observe
from worker.plan import Sending
from worker.ports import Claim, Quiet
from worker.store.books import PgBooks
from worker.stream import DEAD_LETTERS, RedisJournal
from worker.writer import Turn, fold

T = TypeVar("T")

PROFILE = settings(
    max_examples=10,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TINY: dict[str, Any] = {
    "members": 14,
    "groups": 2,
    "service_accounts": 1,
    "keys_per_account": 2,
    "history_days": 6,
    "usage_rows_per_day": 5,
}
NAMES = ("acme", "globex")
STORMS = ("s503", "rate429", "html403", "empty", "conflict409", "reset", "forbidden")
MISHAPS = ("late message", "broken leases", "flush", "copy", "put back")
RESTLESS = """
    SELECT connector_id FROM rollcall.deletion_holds WHERE state IN ('open', 'released')
    UNION ALL SELECT id FROM rollcall.connectors WHERE backfilled_at IS NULL
"""
"""Connectors with something held back, or with usage that is granted again and still to be filled."""
POLLS_UNTIL_CALM = 6
"""Three for a hold that has just begun, and the backfills between."""


@contextmanager
def killing() -> Iterator[None]:
    """End a killed process here, whether it died by itself or in a group of tasks."""
    try:
        yield
    except Killed:
        return
    except BaseExceptionGroup as group:
        if group.split(Killed)[1]:
            raise


class Killed(BaseException):
    """The process ended here, without any chance to say goodbye."""


@dataclass(frozen=True)
class Doomed:
    """A ledger whose process is killed after publishing, before it can write anything down."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def published(self, _: Sequence[Claim]) -> None:
        raise Killed

    async def close_quiet(self, _: Sequence[Quiet]) -> None:
        raise Killed


class Unacknowledged(RedisJournal):
    """A journal whose process is killed before it acknowledges what it applied."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        if ids:
            raise Killed


class Machine(RuleBasedStateMachine):
    """Two connectors of two tenants, everything that befalls them, and a subscriber of each."""

    def __init__(self, stack: EmbeddedStack, template: str, simulator: Simulator) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        database_url = self.stack.enter_context(cloned_database(stack.postgres, template))
        redis_url = stack.valkey.url.get_secret_value()
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        entering = opened(database_url, redis_url, simulator, backfill_days=8, part_days=4, window_days=2)
        self.harness: Harness = self.run(self.stack.enter_async_context(entering))
        self.subscribers: list[Subscriber] = []
        self.delivered: list[Sending] = []
        self.copies: list[dict[bytes, bytes]] = []
        # What a rule's condition looks at must follow from the steps alone, not from what the servers did.
        self.started = self.unwritten = self.unread = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize(synced=st.booleans())
    def add(self, synced: bool) -> None:
        for name in NAMES:
            watched = self.run(self.harness.add_connector(name, tenant=f"t_{name}", **TINY))
            self.subscribers.append(Subscriber(self.harness, watched))
        if synced:
            self.run(self.harness.poll())

    # The provider.

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 2**20), n=st.integers(1, 8))
    def change(self, name: str, seed: int, n: int) -> None:
        self.harness.simulator.mutate(name, {"op": "random", "n": n, "seed": seed, "usage_days": 2})

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(STORMS), times=st.integers(1, 6), after=st.integers(0, 9))
    def storm(self, name: str, kind: str, times: int, after: int) -> None:
        self.harness.simulator.faults(name, {"kind": kind, "times": times, "after": after})

    # The flow.

    @rule(kind=st.sampled_from([RunKind.POLL, RunKind.POLL, RunKind.RECONCILE, RunKind.BACKFILL]))
    def start(self, kind: RunKind) -> None:
        self.run(self.harness.make_due(kind=kind))
        self.run(self.harness.tick())
        self.started = True

    @precondition(lambda self: self.started)
    @rule(place=st.integers(0, 5))
    def deliver(self, place: int) -> None:
        for message in self._taken(place):
            self.run(self.harness.deliver(message))

    @precondition(lambda self: self.started)
    @rule(place=st.integers(0, 5))
    def deliver_twice_at_once(self, place: int) -> None:
        async def both(message: Sending) -> None:
            ports = self.harness.runtime.ports
            await asyncio.gather(*(observe(list(message.lanes), ports) for _ in range(2)))

        for message in self._taken(place):
            self.run(both(message))

    def _taken(self, place: int) -> list[Sending]:
        """Take a message from the broker, in any order, if there is one."""
        self.unwritten = self.unread = True
        messages = self.harness.messages
        if not messages:
            return []
        messages.rotate(place)
        self.delivered.append(messages.popleft())
        return self.delivered[-1:]

    @precondition(lambda self: self.unwritten)
    @rule()
    def write(self) -> None:
        self.run(self.harness.write())
        self.unwritten = False

    @precondition(lambda self: self.unread)
    @rule()
    def subscribers_read(self) -> None:
        self.unread = False
        for subscriber in self.subscribers:
            self.run(subscriber.read())

    # What goes wrong.

    @precondition(lambda self: self.started)
    @rule(place=st.integers(0, 5), published=st.booleans())
    def kill_fetcher(self, place: int, published: bool) -> None:
        ports = self.harness.runtime.ports
        doomed = replace(ports, ledger=Doomed(ports.ledger))
        for message in self._taken(place):
            parts = list(message.lanes)
            with killing():
                self.run(observe(parts, doomed) if published else self._claim(parts))

    async def _claim(self, parts: Sequence[UUID]) -> None:
        await self.harness.runtime.ports.ledger.claim(parts)

    @precondition(lambda self: self.unwritten)
    @rule(count=st.integers(1, 3))
    def kill_writer(self, count: int) -> None:
        harness = self.harness
        for partition in range(harness.partitions):
            journal = Unacknowledged(harness.redis, partition)
            with killing():
                self.run(fold([Turn(journal)], PgBooks(harness.books_connection), count=count))

    @rule(what=st.sampled_from(MISHAPS), place=st.integers(0, 5))
    def mishap(self, what: str, place: int) -> None:
        harness = self.harness
        if what == "late message" and self.delivered:
            self.run(harness.deliver(self.delivered[-1 - place % len(self.delivered)]))
        elif what == "broken leases":
            self.run(harness.break_leases())
        elif what == "flush":
            self.run(harness.redis.flushall())
        elif what == "copy":
            self.copies.append(self.run(harness.copy_redis()))
        elif what == "put back" and self.copies:
            self.run(harness.put_back(self.copies[-1 - place % len(self.copies)]))

    # The end.

    def teardown(self) -> None:
        try:
            if self.subscribers:
                self.run(self._quiet())
        finally:
            self.run(self.stack.aclose())
            self.runner.close()

    async def _quiet(self) -> None:
        harness = self.harness
        for name in NAMES:
            harness.simulator.faults(name)
        await harness.pass_time()
        await harness.tick()
        await harness.settle()
        for _ in range(POLLS_UNTIL_CALM):
            await harness.poll()
            if not await harness.rows(RESTLESS):
                break
        runs = await harness.poll(kind=RunKind.RECONCILE)
        assert {(run["kind"], run["status"]) for run in runs} == {("reconcile", "succeeded")}
        assert not await harness.redis.xlen(DEAD_LETTERS)
        for subscriber in self.subscribers:
            await subscriber.read()
            assert subscriber.state == await harness.true(subscriber.watched)
            assert await harness.health(subscriber.watched) == ("connected", None, "none")
            events = await harness.events(subscriber.watched)
            assert {e["tenantid"] for e in events} == {subscriber.watched.tenant}


def test_any_order_of_events_ends_right(stack: EmbeddedStack, template_database: str, simulator: Simulator) -> None:
    """Changes, storms, doubled messages, killed processes, a lost or older Redis: in the end all is equal."""

    class Here(Machine):
        def __init__(self) -> None:
            super().__init__(stack, template_database, simulator)

    run_state_machine_as_test(Here, settings=PROFILE)
