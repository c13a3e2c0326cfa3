"""Steady state: many connectors that do not change, more of them due than can be polled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

from pydantic import SecretStr

from schemas.connectors import Dataset, RunKind, Status
from tests.bench.apart import run_apart
from tests.bench.case import HISTORY, Case, Sample, Side
from tests.bench.crew import crew
from tests.bench.history import History, told_by, witnessed
from tests.bench.runs import await_runs, make_due
from tests.bench.stage import Database, Place, Stage, WrongResultError
from tests.bench.sync import memory
from tests.bench.tenants import Shape, Tenant, populate, register, warm
from tests.bench.watch import Watch
from tests.fixtures.simulator import Simulator
from worker.compare import answer_digest, fingerprints
from worker.elevenlabs.asking import Window, ask
from worker.elevenlabs.client import Client
from worker.normalize import directory
from worker.packing import pack
from worker.plan import AccessRow, Calendar, partition_of, plan, settled_before
from worker.ports import Base, Claim, Publication, Target
from worker.redis import client as redis_client
from worker.snapshots import RedisSnapshots
from worker.usage import usage_days

LATENCY_MS = 100
POLL_DAYS = 4
PARTS = len(Dataset)
"""Requests of one poll."""
AT_ONCE = 64
VERSION = 1_700_000_000_000_000
TUNED: Mapping[str, object] = {"worker_slots": 48, "dispatch_interval_s": 1, "db_pool_size": 16}


@dataclass(frozen=True, slots=True)
class Size:
    """How many connectors share how many simulated workspaces, and how long is measured."""

    connectors: int = 20_000
    workspaces: int = 200
    warmup_s: float = 20.0
    seconds: float = 60.0
    interval_s: int = 40
    """Poll interval: what it offers, connectors / interval, must be above what can be polled."""


@dataclass(frozen=True, slots=True)
class Steady:
    """Connectors whose snapshots are as their last poll left them."""

    stage: Stage
    simulator: Simulator
    place: Place
    size: Size
    workspaces: Sequence[Tenant]
    history: History

    def polls(self, settings: Mapping[str, object]) -> Sample:
        """Let the product poll; count what it finishes in the time measured."""
        with self.place.database() as database, self.place.redis() as client:
            self._reset(database)
            for key in client.scan_iter(match="rollcall.*"):
                client.delete(key)
            with crew(self.stage, self.place, database, settings=settings) as team:
                self.stage.note(f"{self.size.connectors} connectors: polling")
                self.simulator.reset_stats()
                _spread(database, self.size)
                time.sleep(self.size.warmup_s)
                with Watch({**team.pids, **self.stage.servers}) as seen:
                    began = self._now(database)
                    time.sleep(self.size.seconds)
                    ended = self._now(database)
                team.check()
                polls = self._polled(database, began, ended)
            snapshots = memory(client, self.size.connectors)["redis_bytes_per_connector.snapshots"]
            checked = self._checked(polls)
        seconds = (ended - began).total_seconds()
        return {
            "polls_per_s": polls / seconds,
            "connectors_at_15_min": polls / seconds * 900,
            **seen.cpu_per(polls, scale=1e3, prefix="cpu_ms_per_poll"),
            **{f"cores_busy.{name}": spent / seconds for name, spent in seen.cpu.items()},
            "foreign_cores": seen.foreign_cores,
            **seen.peaks(),
            "redis_bytes_per_connector.snapshots": snapshots,
            **checked,
        }

    def _checked(self, polls: int) -> Sample:
        """Check the history; before the polls there were two syncs of each connector.

        Raises:
            WrongResultError: something is wrong, or not every poll was witnessed.

        """
        found = self.history.verdict()
        if found and found[HISTORY + "closes"] < (polls + 2 * self.size.connectors) * PARTS:
            raise WrongResultError(f"{polls} polls were not all witnessed: {found}")
        return found

    def floor(self) -> Sample:
        """Fetch the same, and do nothing with it."""
        seconds = min(20.0, self.size.seconds)
        asked = {
            "url": self.simulator.url,
            "keys": [t.api_key for t in self.workspaces],
            "days": POLL_DAYS,
            "at_once": 1024,
            "seconds": seconds,
        }
        figures, seen = run_apart("tests.bench.floors:gets", asked, servers={})
        polls = figures["requests"] / figures["requests_per_poll"]
        return {
            "polls_per_s": polls / figures["seconds"],
            **seen.cpu_per(polls, scale=1e3, prefix="cpu_ms_per_poll"),
            "foreign_cores": seen.foreign_cores,
        }

    def _reset(self, database: Database) -> None:
        """Forget what an earlier measurement left under way."""
        database.execute("TRUNCATE rollcall.sync_parts, rollcall.sync_runs, rollcall.workers")
        database.execute("UPDATE rollcall.connector_access SET lease_until = NULL WHERE lease_until IS NOT NULL")
        database.execute("UPDATE rollcall.connectors SET next_sync_at = NULL")
        database.execute("UPDATE rollcall.meta SET ticks = 0")
        database.execute("VACUUM ANALYZE rollcall.connectors, rollcall.connector_access")
        self.stage.settle(self.place)

    def _now(self, database: Database) -> datetime:
        (row,) = database.execute("SELECT clock_timestamp() AS now").fetchall()
        now: datetime = row["now"]
        return now

    def _polled(self, database: Database, began: datetime, ended: datetime) -> int:
        """Count the polls finished in between, every one of them quiet.

        Raises:
            WrongResultError: one was not, or published something.

        """
        (row,) = database.execute(
            """
            SELECT count(*) FILTER (WHERE finished_at BETWEEN %(began)s AND %(ended)s) AS polls,
                   count(*) FILTER (WHERE status <> 'succeeded' OR kind <> 'poll' OR parts_done <> %(parts)s) AS bad,
                   (SELECT count(*) FROM rollcall.sync_parts WHERE published_at IS NOT NULL) AS published
            FROM rollcall.sync_runs WHERE finished_at IS NOT NULL
            """,
            {"began": began, "ended": ended, "parts": PARTS},
        ).fetchall()
        statuses = self.simulator.stats()["statuses"]
        if row["bad"] or row["published"] or not row["polls"] or statuses.keys() != {"200"}:
            raise WrongResultError(f"not every poll was quiet: {row}, statuses {statuses}")
        return int(row["polls"])


def _spread(database: Database, size: Size) -> None:
    """Make connectors due evenly over one interval."""
    database.execute(
        """
        UPDATE rollcall.connectors c SET next_sync_at = now() + make_interval(secs => n.place * %s)
        FROM (SELECT id, (row_number() OVER (ORDER BY id))::float / %s AS place FROM rollcall.connectors) n
        WHERE n.id = c.id
        """,
        [size.interval_s, size.connectors],
    )


def _prime(place: Place, stage: Stage, simulator: Simulator, size: Size, workspaces: Sequence[Tenant]) -> None:
    """Write connectors and snapshots as a first sync and a poll would leave them, without syncing each."""
    tenants = [
        replace(workspaces[n % size.workspaces], id=f"tenant-{n}", connector_id=uuid4()) for n in range(size.connectors)
    ]
    with place.database() as database:
        register(database, stage.ring, simulator.url, tenants, poll_interval_s=size.interval_s)
        database.execute(
            "UPDATE rollcall.connectors SET status = 'connected', backfilled_at = now(), reconciled_at = now(),"
            " last_polled_at = now(), last_synced_at = now()"
        )
        database.execute(
            "UPDATE rollcall.connector_access SET state = 'granted', version = %s, claimed = %s, checked_at = now()",
            [VERSION, VERSION],
        )
        (meta,) = database.execute("SELECT partitions FROM rollcall.meta").fetchall()
    asyncio.run(_snapshots(place, simulator, tenants, meta["partitions"], size))


def _sync(place: Place, stage: Stage, simulator: Simulator, size: Size, workspaces: Sequence[Tenant]) -> None:
    """Bring connectors there by syncing each, since a witness knows only what it saw: a first sync, and a poll."""
    with place.database() as database:
        register(database, stage.ring, simulator.url, workspaces)
        with crew(stage, place, database, settings={"dispatch_interval_s": 1}) as team:
            for kind in ("backfill", "poll"):
                since = make_due(database, kind)
                await_runs(database, team, since, kind=kind, connectors=len(workspaces))
        database.execute("UPDATE rollcall.connectors SET poll_interval_s = %s", [size.interval_s])


async def _snapshots(
    place: Place, simulator: Simulator, tenants: Sequence[Tenant], partitions: int, size: Size
) -> None:
    found: dict[str, dict[Dataset, tuple[Base, str]]] = {}
    async with Client() as provider:
        for tenant in tenants[: size.workspaces]:
            found[tenant.workspace] = await _answers(provider, simulator.url, tenant)
    redis = redis_client(SecretStr(place.redis_url))
    snapshots = RedisSnapshots(redis, ceiling_entries=1)
    waiting = iter(tenants)

    async def some() -> None:
        for tenant in waiting:
            partition = partition_of(tenant.connector_id, partitions)
            target = Target(tenant.connector_id, tenant.id, simulator.url, "", partition)
            for dataset, (base, digest) in found[tenant.workspace].items():
                if await snapshots.publish(target, dataset, None, pack(base), digest, ()) is not Publication.DONE:
                    raise WrongResultError("a snapshot was there already")

    try:
        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    finally:
        await snapshots.close()
        await redis.aclose()


async def _answers(provider: Client, url: str, tenant: Tenant) -> dict[Dataset, tuple[Base, str]]:
    """Ask what a poll asks; give each dataset's records as a snapshot has them, and the digest of the answer."""
    now, calendar = datetime.now(UTC), Calendar()
    settled = settled_before(now, calendar)
    target = Target(tenant.connector_id, tenant.id, url, "", 0)
    access = {dataset: AccessRow(dataset) for dataset in Dataset}
    found = {}
    for part in plan(RunKind.POLL, Status.CONNECTED, access, as_of=now, calendar=calendar):
        window = Window(part.start, part.end) if part.start and part.end else None
        claim = Claim(UUID(int=0), UUID(int=0), RunKind.POLL, part.dataset, target, VERSION, VERSION, now, now, window)
        asked = await provider.converse(
            url, SecretStr(tenant.api_key), ask(part.dataset, window, now=now, cost_since=None), deadline_s=60
        )
        if window is None:
            base = Base(VERSION, records=directory(part.dataset, asked.pages[0].body).records)
        else:
            days = usage_days(part.dataset, asked.pages, window=window, settled_before=settled)
            base = Base(VERSION, days=fingerprints(days))
        found[part.dataset] = base, answer_digest(claim, asked.pages, settled)
    return found


def _size(stage: Stage) -> Size:
    if stage.checked:  # few, and each with a workspace of its own: they are really synced
        few = 20 if stage.quick else 200
        return Size(few, few, warmup_s=2.0, seconds=4.0 if stage.quick else 20.0, interval_s=1)
    return Size(200, 20, warmup_s=2.0, seconds=4.0, interval_s=4) if stage.quick else Size()


@contextmanager
def _steady(stage: Stage, simulator: Simulator, size: Size, workspaces: Sequence[Tenant]) -> Iterator[Steady]:
    """Have connectors in a fresh place that are as their last poll left them."""
    simulator.latency(0)
    with stage.fresh() as place, witnessed(stage, place, told_by(simulator)) as history:
        stage.note(f"{size.connectors} connectors: preparing")
        history.note(workspaces)
        (_sync if stage.checked else _prime)(place, stage, simulator, size, workspaces)
        simulator.latency(LATENCY_MS)
        yield Steady(stage, simulator, place, size, workspaces, history)


@contextmanager
def _prepare(stage: Stage) -> Iterator[Mapping[str, Side]]:
    size = _size(stage)
    defaults: Mapping[str, object] = {"dispatch_interval_s": 1} if stage.quick else {}
    shape = Shape(size.workspaces, members=20, service_accounts=2, keys_per_account=3, usage_rows_per_day=8)
    with stage.simulator() as simulator:
        workspaces = populate(simulator, shape)
        warm(simulator, workspaces, POLL_DAYS)

        def apart(settings: Mapping[str, object]) -> Sample:
            with _steady(stage, simulator, size, workspaces) as made:
                return made.polls(settings)

        if stage.checked:  # a history of its own for each
            yield {"defaults": lambda: apart(defaults), "tuned": lambda: apart(TUNED)}
            return
        with _steady(stage, simulator, size, workspaces) as made:
            yield {"defaults": lambda: made.polls(defaults), "tuned": lambda: made.polls(TUNED), "floor": made.floor}


CASE = Case(
    "steady",
    "20,000 connectors (checked: 200), nothing changes, answers take 100 ms: as many quiet polls as the machine takes",
    _prepare,
    {"defaults": "floor", "tuned": "floor"},
)
