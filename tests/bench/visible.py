"""How long a change takes from the provider's answer to Postgres, and to a subscriber."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from uuid import uuid4

import aiohttp
import orjson
from aiohttp import web
from psycopg import AsyncConnection, sql
from pydantic import SecretStr
from redis.asyncio import Redis

from tasks.app import configure, send_sync
from tests.bench.case import Case, Sample, Side
from tests.bench.crew import Crew, await_middle_of_tick, crew
from tests.bench.floors import streams
from tests.bench.history import History, told_by, witnessed
from tests.bench.runs import await_runs, make_due
from tests.bench.stage import Database, Place, Stage, WrongResultError
from tests.bench.tenants import BACKFILL_DAYS, POLL_DAYS, Shape, Tenant, populate, register, warm
from tests.bench.truth import check
from tests.bench.watch import Watch
from tests.fixtures.simulator import Simulator
from worker.plan import partition_of
from worker.settings import Settings
from worker.snapshots import stream_key

PROBES = 200
LIMIT_S = 60.0
CHANNEL = "bench_visible"
BUSY = "SELECT 1 FROM rollcall.sync_runs WHERE connector_id = %s AND status IN ('queued', 'running')"


@dataclass(slots=True)
class Seen:
    """When a mark went by, by place: `read` (the provider's answer), `commit`, `event`."""

    at: dict[tuple[str, str], float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, place: str, text: str) -> None:
        """Note the mark in a text, the first time it goes by."""
        self.at.setdefault((place, text), perf_counter())
        self.news.set()

    async def wait(self, mark: str) -> tuple[float, float]:
        """Wait until the mark was everywhere; give milliseconds from the answer to the commit, and to the event.

        Raises:
            WrongResultError: it did not come through.

        """
        try:
            async with asyncio.timeout(LIMIT_S):
                while not all((place, mark) in self.at for place in ("read", "commit", "event")):
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise WrongResultError(f"the change {mark} did not become visible within {LIMIT_S:.0f} s") from None
        read = self.at["read", mark]
        return (self.at["commit", mark] - read) * 1000, (self.at["event", mark] - read) * 1000


def _mark(text: str) -> str | None:
    at = text.find("mark.")
    return None if at < 0 else text[at : text.index("@", at)]


@asynccontextmanager
async def _tap(simulator: Simulator, seen: Seen) -> AsyncIterator[str]:
    """Stand between one connector and the simulator, to note when the answer with a mark leaves."""
    async with aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.Response:
            kept = {n: v for n, v in request.headers.items() if n.lower() in {"xi-api-key", "content-type"}}
            async with session.request(
                request.method, simulator.url + request.path_qs, data=await request.read(), headers=kept
            ) as answer:
                body = await answer.read()
            if request.path.endswith("/members") and (mark := _mark(body.decode())):
                seen.note("read", mark)
            return web.Response(body=body, status=answer.status, content_type="application/json")

        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def _listen(place: Place, seen: Seen, probe: Tenant) -> None:
    """Note commits: a trigger on the probe's members, heard when its transaction is committed."""
    async with await AsyncConnection.connect(place.database_url, autocommit=True) as connection:
        await connection.execute(
            sql.SQL(
                """
                CREATE OR REPLACE FUNCTION rollcall.bench_tell() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN PERFORM pg_notify({channel}, NEW.email); RETURN NULL; END $$;
                CREATE OR REPLACE TRIGGER bench_tell AFTER INSERT OR UPDATE ON rollcall.members
                    FOR EACH ROW WHEN (NEW.connector_id = {probe} AND NEW.email LIKE 'mark.%')
                    EXECUTE FUNCTION rollcall.bench_tell()
                """
            ).format(channel=sql.Literal(CHANNEL), probe=sql.Literal(str(probe.connector_id)))
        )
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        async for notice in connection.notifies():
            if mark := _mark(notice.payload):
                seen.note("commit", mark)


async def _subscribe(place: Place, seen: Seen, probe: Tenant, partition: int) -> None:
    """Note events as a subscriber reads them: decoded, one stream, no group."""
    key = stream_key(partition)
    after: bytes | str = "$"
    async with Redis.from_url(place.redis_url, socket_timeout=60) as redis:
        while True:
            found = await redis.xread({key: after}, count=100, block=1000)
            for entry_id, fields in streams(found).get(key.encode(), ()):
                after = entry_id
                if fields[b"connector"] != str(probe.connector_id).encode():
                    continue
                for event in orjson.loads(fields[b"ce"]):
                    changed = event["data"].get("after") or {}
                    if mark := _mark(changed.get("email") or ""):
                        seen.note("event", mark)


@dataclass(slots=True)
class Probing:
    """One connector with a `member` whose changes are followed, one after the other.

    `name` tells its marks from those of an earlier round, the last of which the provider still shows.
    """

    simulator: Simulator
    database: Database
    probe: Tenant
    member: str
    seen: Seen
    history: History
    sent: int = 0
    name: str = field(default_factory=lambda: uuid4().hex)

    async def once(self) -> tuple[float, float]:
        """Change a member, always the same one, ask for a poll, and follow the change."""
        self.sent += 1
        mark = f"mark.{self.name}.{self.sent}"
        change = {"op": "member_update", "user_id": self.member, "email": f"{mark}@probe.example"}
        with self.history.changing([self.probe]):
            self.simulator.mutate(self.probe.workspace, change)
        run_id = uuid4()
        self.database.execute(
            "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status)"
            " VALUES (%s, %s, %s, 'poll', 'bench', 'queued')",
            [run_id, self.probe.connector_id, self.probe.id],
        )
        await asyncio.to_thread(send_sync, run_id)
        found = await self.seen.wait(mark)
        async with asyncio.timeout(LIMIT_S):
            while self.database.execute(BUSY, [self.probe.connector_id]).fetchall():  # noqa: ASYNC110 - in a database
                await asyncio.sleep(0.01)
        return found


def _percentiles(step: str, found: list[tuple[float, float]]) -> Sample:
    sample: Sample = {f"{step}.changes": len(found)}
    for name, values in zip(("commit_ms", "event_ms"), map(sorted, zip(*found, strict=True)), strict=True):
        for percent in (50, 99):
            sample[f"{step}.{name}.p{percent}"] = values[min(len(values) - 1, len(values) * percent // 100)]
    return sample


@dataclass(frozen=True, slots=True)
class Visible:
    """A probe connector beside a herd that is backfilled."""

    stage: Stage
    simulator: Simulator
    probe: Tenant
    herd: list[Tenant]
    tick_s: float

    def product(self) -> Sample:
        """Follow changes while nothing else goes on, then while the herd has its first sync."""
        with (
            self.stage.fresh() as place,
            place.database() as database,
            witnessed(self.stage, place, told_by(self.simulator)) as history,
        ):
            settings = Settings(database_url=SecretStr(place.database_url), redis_url=SecretStr(place.redis_url))
            configure(settings)
            ticking = {"dispatch_interval_s": self.tick_s}
            with crew(self.stage, place, database, settings=ticking) as team, Watch({}) as seen:
                found = asyncio.run(self._follow(place, database, team, history))
            found |= history.verdict()
        return {**found, "foreign_cores": seen.foreign_cores}

    async def _follow(self, place: Place, database: Database, team: Crew, history: History) -> Sample:
        seen = Seen()
        partition = partition_of(self.probe.connector_id, 4)
        async with _tap(self.simulator, seen) as url, asyncio.TaskGroup() as group:
            register(database, self.stage.ring, url, [self.probe])
            history.note([self.probe])
            since = make_due(database, "backfill")
            await asyncio.to_thread(await_runs, database, team, since, kind="backfill", connectors=1)
            tasks = [
                group.create_task(_listen(place, seen, self.probe)),
                group.create_task(_subscribe(place, seen, self.probe, partition)),
            ]
            await asyncio.sleep(0.5)
            member = self.simulator.truth(self.probe.workspace)["members"][1]["user_id"]
            probing = Probing(self.simulator, database, self.probe, member, seen, history)
            self.stage.note("following changes, idle")
            sample = _percentiles("idle", [await probing.once() for _ in range(10 if self.stage.quick else PROBES)])
            sample |= await self._busy(database, team, probing)
            for task in tasks:
                task.cancel()
        check(database, self.simulator, [*self.herd, self.probe], BACKFILL_DAYS)
        return sample

    async def _busy(self, database: Database, team: Crew, probing: Probing) -> Sample:
        self.stage.note("following changes while a backfill runs")
        register(database, self.stage.ring, self.simulator.url, self.herd)
        probing.history.note(self.herd)
        await asyncio.to_thread(await_middle_of_tick, database, self.tick_s)
        database.execute(
            "UPDATE rollcall.connectors SET next_sync_at = now() WHERE id <> %s", [self.probe.connector_id]
        )
        found: list[tuple[float, float]] = []
        while True:
            (row,) = database.execute(
                "SELECT count(*) FILTER (WHERE finished_at IS NULL) AS open, count(*) AS begun"
                " FROM rollcall.sync_runs WHERE kind = 'backfill' AND connector_id <> %s",
                [self.probe.connector_id],
            ).fetchall()
            team.check()
            if row["begun"] == len(self.herd) and not row["open"]:
                return _percentiles("backfill", found)
            if row["begun"]:
                found.append(await probing.once())
            else:
                await asyncio.sleep(0.05)


@contextmanager
def _prepare(stage: Stage) -> Iterator[Mapping[str, Side]]:
    shape = Shape(12, members=50) if stage.quick else Shape()
    with stage.simulator() as simulator:
        herd = populate(simulator, shape)
        (probe,) = populate(simulator, Shape(1, members=20), "probe")
        warm(simulator, [*herd, probe], BACKFILL_DAYS, POLL_DAYS)
        made = Visible(stage, simulator, probe, herd, 1.0 if stage.quick else 5.0)
        yield {"product": made.product}


CASE = Case(
    "visible",
    "from the provider's answer that holds a change to its commit in Postgres and to a subscriber",
    _prepare,
)
