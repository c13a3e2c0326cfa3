"""Observing alone: the recipe with a ledger in memory, beside the raw stream and beside bare fetching."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID, uuid4

import orjson
from pydantic import SecretStr
from redis import Redis

from schemas.connectors import Dataset, RunKind, Status
from tests.bench.apart import Figures, Go, run_apart
from tests.bench.case import Case, Sample, Side
from tests.bench.history import looked_at
from tests.bench.samples import EVENTS_PER_ENTRY
from tests.bench.stage import Stage, WrongResultError
from tests.bench.tenants import BACKFILL_DAYS, POLL_DAYS, Shape, Tenant, populate, warm
from tests.bench.truth import expected
from tests.fixtures.simulator import Simulator
from tests.fixtures.states import Folder, of_truth
from worker import memory
from worker.changes import GuardLimits
from worker.elevenlabs.asking import Asked, Window, ask
from worker.elevenlabs.client import Client
from worker.elevenlabs.protocol import Answer, Request, Verdict
from worker.observe import Published, Result, observe
from worker.plan import AccessRow, Calendar, PlannedPart, partition_of, plan
from worker.ports import Base, Claim, Failure, Ports, Quiet, Target
from worker.redis import client as redis_client
from worker.snapshots import RedisSnapshots, stream_key

PARTITIONS = 4
AT_ONCE = 16
"""Tenants observed at a time, as a worker has slots."""
CEILING = 10_000_000
FOLLOWED = 5


@dataclass(slots=True)
class MemoryLedger:
    """A ledger where every claim succeeds, and what is published counts as applied at once."""

    targets: dict[UUID, tuple[Target, PlannedPart]]
    as_of: datetime
    versions: dict[tuple[UUID, Dataset], int] = field(default_factory=dict)
    numbers: int = 0

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim every part; lanes as the product spreads them, directory and usage."""
        claims = []
        for part_id in part_ids:
            target, part = self.targets[part_id]
            self.numbers += 1
            window = Window(part.start, part.end) if part.start and part.end else None
            claims.append(
                Claim(
                    part_id, part_id, RunKind.POLL, part.dataset, target, self.numbers,
                    self.versions.get((target.connector_id, part.dataset), 0), self.as_of, self.as_of, window,
                    lane=2 if window else 1,
                )
            )  # fmt: skip
        return claims

    async def published(self, claims: Sequence[Claim]) -> None:
        """Advance the chains."""
        for claim in claims:
            self.versions[claim.target.connector_id, claim.dataset] = claim.number

    async def close_quiet(self, quiet: Sequence[Quiet]) -> None:
        """Nothing is kept of it."""

    async def failed(self, failure: Failure) -> None:
        """Nothing may fail here."""
        raise WrongResultError(f"{failure.claim.dataset}: {failure.verdict.reason}")

    async def give_back(self, claim: Claim, reason: str, wait_s: float) -> None:
        """Nothing may be given back here."""
        raise WrongResultError(f"{claim.dataset} was given back: {reason}, {wait_s} s")

    async def narrow(self, claim: Claim, window: Window, because: Verdict | None) -> Claim | None:
        """Nothing is too large here."""
        raise WrongResultError(f"{claim.dataset} was cut to {window}: {because}")

    async def remember_cost_since(self, claim: Claim, day: date) -> None:
        """Nobody is billed in money here."""


class NoFacts:
    """A Postgres that holds nothing yet."""

    async def base(self, connector_id: UUID, dataset: Dataset, *, since: date | None) -> Base:  # noqa: ARG002 - a port
        """Nothing, of version 0."""
        return Base(0)

    async def usage_days(self, connector_id: UUID, dataset: Dataset, days: Sequence[date]) -> tuple[int, Any]:
        """Nothing is doubtful here."""
        raise WrongResultError(f"doubted {days} of {connector_id} {dataset}")


@dataclass(frozen=True, slots=True)
class Asking:
    """The provider over HTTP, without a vault."""

    client: Client
    keys: Mapping[str, SecretStr]

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """See `worker.ports.Provider`."""
        return await self.client.converse(target.base_url, self.keys[target.tenant_id], asking, deadline_s=120)


@dataclass(slots=True)
class Remembering:
    """The provider out of memory: what it once answered, without the network."""

    asking: Asking
    answers: dict[tuple[str, str, bytes], Answer] = field(default_factory=dict)

    async def learn(self, target: Target, request: Request) -> Answer:
        """Ask for real, once."""
        key = self.asking.keys[target.tenant_id]
        return await self.asking.client.send(target.base_url, key, request, deadline_s=120)

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """Answer from memory; what is not there yet is asked for."""
        request = next(asking)
        while True:
            name = (target.tenant_id, request.path, _question(request))
            if name not in self.answers:
                self.answers[name] = await self.learn(target, request)
            try:
                request = asking.send(self.answers[name])
            except StopIteration as stop:
                asked: Asked = stop.value
                return asked


def _question(request: Request) -> bytes:
    """Give what a request asks, without the end that is cut to now."""
    asked = orjson.loads(request.body or b"{}")
    return orjson.dumps([asked.get("start_time"), asked.get("group_by")])


async def observe_all(asked: dict[str, Any], go: Go) -> Figures:
    """Observe every tenant for the first time, then again unchanged: `url`, `redis_url`, `tenants`, `http`."""
    as_of, calendar = datetime.now(UTC), Calendar()
    targets = [
        Target(UUID(connector), tenant, asked["url"], "", partition_of(UUID(connector), PARTITIONS))
        for tenant, connector, _ in asked["tenants"]
    ]
    keys = {tenant: SecretStr(key) for tenant, _, key in asked["tenants"]}
    redis = redis_client(SecretStr(asked["redis_url"]))
    snapshots = RedisSnapshots(redis, ceiling_entries=CEILING)
    ledger = MemoryLedger({}, as_of)
    async with Client(timeout_s=60) as client:
        over_http = Asking(client, keys)
        remembered = Remembering(over_http)
        ports = Ports(
            ledger,
            NoFacts(),
            snapshots,
            over_http if asked["http"] else remembered,
            calendar,
            GuardLimits(10, 0.2, 3),
        )
        first, polls = (_waves(ledger, targets, kind, as_of, calendar) for kind in (RunKind.BACKFILL, RunKind.POLL))
        if not asked["http"]:
            await _each(targets, lambda target: _learn(remembered, ledger, [*first[target], *polls[target]]))
        memory.settle()  # as workers do
        await go()
        figures = await _measured("first", ports, first)
        await _measured("settling", ports, polls)  # leaves the digests of what a poll asks
        figures |= await _measured("same", ports, polls)
    await snapshots.close()
    await redis.aclose()
    return figures


Waves = dict[Target, list[list[UUID]]]
"""By target, the parts of one message each: a dataset has one open observation at a time."""


def _waves(
    ledger: MemoryLedger, targets: Sequence[Target], kind: RunKind, as_of: datetime, calendar: Calendar
) -> Waves:
    access = {dataset: AccessRow(dataset) for dataset in Dataset}
    parts = plan(kind, Status.CONNECTED, access, as_of=as_of, calendar=calendar)
    found: Waves = {}
    for target in targets:
        by_dataset: dict[Dataset, int] = {}
        waves: list[list[UUID]] = []
        for part in parts:
            place = by_dataset[part.dataset] = by_dataset.get(part.dataset, -1) + 1
            if place == len(waves):
                waves.append([])
            part_id = uuid4()
            ledger.targets[part_id] = target, part
            waves[place].append(part_id)
        found[target] = waves
    return found


async def _each(targets: Iterable[Target], work: Callable[[Target], Awaitable[object]]) -> None:
    waiting = iter(targets)

    async def some() -> None:
        for target in waiting:
            await work(target)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def _learn(remembered: Remembering, ledger: MemoryLedger, waves: list[list[UUID]]) -> None:
    for part_id in (part_id for wave in waves for part_id in wave):
        target, part = ledger.targets[part_id]
        window = Window(part.start, part.end) if part.start and part.end else None
        await remembered.converse(target, ask(part.dataset, window, now=ledger.as_of, cost_since=None))


async def _measured(phase: str, ports: Ports, waves: Waves) -> Figures:
    results: list[Result] = []

    async def work(target: Target) -> None:
        for wave in waves[target]:
            results.extend(await observe(wave, ports))

    began, cpu = time.perf_counter(), time.process_time()
    await _each(waves, work)
    return {
        f"{phase}.seconds": time.perf_counter() - began,
        f"{phase}.cpu_s": time.process_time() - cpu,
        f"{phase}.parts": len(results),
        f"{phase}.quiet": sum(isinstance(r, Quiet) for r in results),
        f"{phase}.events": sum(r.changes for r in results if isinstance(r, Published)),
    }


@dataclass(frozen=True, slots=True)
class Observing:
    """Tenants to observe."""

    stage: Stage
    simulator: Simulator
    tenants: Sequence[Tenant]

    def product(self, *, http: bool) -> Sample:
        """Observe all, then all again; `http` False: answers come out of memory."""
        self.stage.note(f"observing, {'over HTTP' if http else 'answers in memory'}")
        with self.stage.fresh() as place:
            asked = {
                "url": self.simulator.url,
                "redis_url": place.redis_url,
                "http": http,
                "tenants": [(t.id, str(t.connector_id), t.api_key) for t in self.tenants],
            }
            found, seen = run_apart("tests.bench.observing:observe_all", asked, servers={})
            with place.redis() as redis:
                checked = self._check(redis, found)
        records = expected(self.simulator, self.tenants, BACKFILL_DAYS).total
        return {
            "first.records_per_s": records / found["first.seconds"],
            "first.events_per_s": found["first.events"] / found["first.seconds"],
            "first.cpu_us_per_record": found["first.cpu_s"] / records * 1e6,
            "same.parts_per_s": found["same.parts"] / found["same.seconds"],
            "same.cpu_us_per_part": found["same.cpu_s"] / found["same.parts"] * 1e6,
            "foreign_cores": seen.foreign_cores,
            **checked,
        }

    def _check(self, redis: Redis, found: Mapping[str, float]) -> Sample:
        """Fold the streams of a few tenants, or of all, and compare with the truth; tell how much a checked run saw.

        The second time nothing may have changed.
        """
        if found["same.quiet"] != found["same.parts"]:
            raise WrongResultError(f"{found['same.parts'] - found['same.quiet']:.0f} unchanged parts were not quiet")
        followed = self.tenants[:: 1 if self.stage.checked else max(1, len(self.tenants) // FOLLOWED)]
        folders = {str(t.connector_id).encode(): Folder() for t in followed}
        observations = events = 0
        for partition in range(PARTITIONS):
            entries: list[Any] = redis.xrange(stream_key(partition)) or []
            for _, fields in entries:
                folder = folders.get(fields[b"connector"])
                if folder and (observation := folder.read(fields)):
                    observations, events = observations + 1, events + len(observation[3])
                    if not folder.fits(observation):
                        raise WrongResultError("the stream has a break")
        for tenant in followed:
            state = folders[str(tenant.connector_id).encode()].state()
            truth = of_truth(self.simulator.truth(tenant.workspace), state.usage)
            if state.records != truth.records or state.usage != truth.usage:
                raise WrongResultError(f"the stream of {tenant.workspace} is not what is true")
        return looked_at(observations=observations, events=events) if self.stage.checked else {}

    def stream(self) -> Sample:
        """Move as much through a raw stream."""
        self.stage.note("raw stream")
        entries = 20 if self.stage.quick else 400
        with self.stage.fresh() as place:
            found, seen = run_apart(
                "tests.bench.floors:stream", {"redis_url": place.redis_url, "entries": entries}, servers={}
            )
        if found["events"] != entries * EVENTS_PER_ENTRY:
            raise WrongResultError("the raw stream lost events")
        return {
            "first.events_per_s": found["events"] / found["write_s"],
            "read.events_per_s": found["events"] / found["read_s"],
            "bytes_per_event": found["bytes_per_event"],
            "foreign_cores": seen.foreign_cores,
        }

    def fetching(self) -> Sample:
        """Fetch the same, and do nothing with it."""
        self.stage.note("bare fetching")
        asked = {
            "url": self.simulator.url,
            "keys": [t.api_key for t in self.tenants],
            "days": POLL_DAYS,
            "at_once": AT_ONCE * 2,
            "seconds": 2.0 if self.stage.quick else 10.0,
        }
        found, seen = run_apart("tests.bench.floors:gets", asked, servers={})
        return {
            "same.parts_per_s": found["requests"] / found["seconds"],
            "same.cpu_us_per_part": seen.cpu["floor"] / found["requests"] * 1e6,
            "foreign_cores": seen.foreign_cores,
        }


@contextmanager
def _prepare(stage: Stage) -> Iterator[Mapping[str, Side]]:
    shape = Shape(12, members=50) if stage.quick else Shape()
    with stage.simulator() as simulator:
        tenants = populate(simulator, shape)
        warm(simulator, tenants, BACKFILL_DAYS, POLL_DAYS)
        made = Observing(stage, simulator, tenants)
        yield {
            "observe": lambda: made.product(http=False),
            "observe_http": lambda: made.product(http=True),
            "stream": made.stream,
            "fetch": made.fetching,
        }


CASE = Case(
    "observe",
    "observing and publishing alone, a ledger in memory: every tenant for the first time, then unchanged",
    _prepare,
    {"observe": "stream", "observe_http": "fetch"},
)
