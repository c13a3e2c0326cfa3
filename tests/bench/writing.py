"""The writer alone: a stream that is full already, folded into Postgres, beside raw upserts of the same rows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import groupby
from operator import itemgetter
from uuid import UUID, uuid5

from redis import Redis

from schemas.connectors import Dataset
from schemas.events import Op
from tests.bench import samples
from tests.bench.apart import run_apart
from tests.bench.case import Case, Sample, Side, joined
from tests.bench.crew import Crew, crew
from tests.bench.history import witnessed
from tests.bench.samples import Size
from tests.bench.stage import Database, Place, Stage, WrongResultError
from tests.bench.tenants import Tenant, register
from tests.bench.watch import Watch
from tests.fixtures.evidence import Values
from worker.changes import Change
from worker.entries import Report, batches
from worker.folding import LOCK_CLASS
from worker.plan import partition_of
from worker.snapshots import stream_key
from worker.stream import GROUP
from worker.usage import usage_day

PHASES = ("fresh", "update", "repeat")
SIZES = {"usage": Size(connectors=60), "members": Size(connectors=1_500)}
QUICK_SIZES = {"usage": Size(connectors=3), "members": Size(connectors=25)}
LIMIT_S = 600.0
LOOK_S = 0.01
GLANCE_S = 0.001
_DATASETS = {
    "usage": (Dataset.USAGE_PRODUCT, Dataset.USAGE_MEMBER, Dataset.USAGE_API_KEY),
    "members": (Dataset.MEMBERS,),
}

Changes = dict[tuple[UUID, str, Dataset], list[Change]]
"""By connector, tenant and dataset."""


def _usage_changes(size: Size, version: int) -> Changes:
    found: Changes = {}
    for (tenant, connector, dimension, day), rows in groupby(
        samples.usage_rows(size, version), key=itemgetter(0, 1, 2, 3)
    ):
        named = [{"key": r[4], "label": r[6], "unit": r[5], "amount": str(r[7])} for r in rows]
        named.sort(key=itemgetter("key"))
        record = usage_day(dimension, day.isoformat(), named, settled=True)
        op = Op.CREATED if version == 1 else Op.UPDATED
        change = Change(f"usage/{dimension}/{day}", op, None, record, ())
        found.setdefault((connector, tenant, Dataset(f"usage.{dimension}")), []).append(change)
    return found


def _member_changes(size: Size, version: int) -> Changes:
    before = samples.listings(size, version - 1) if version > 1 else {}
    return {
        (connector, tenant, Dataset.MEMBERS): [
            Change(subject, Op.UPDATED, before[connector, tenant][subject], record, ("email",))
            if before
            else Change(subject, Op.CREATED, None, record, ())
            for subject, record in listing.items()
        ]
        for (connector, tenant), listing in samples.listings(size, version).items()
    }


def _true(what: str, size: Size, version: int) -> dict[str, Values]:
    """Tell what is so of every connector at a version."""
    if what == "members":
        return {str(connector): dict(listing) for (connector, _), listing in samples.listings(size, version).items()}
    found: dict[str, Values] = defaultdict(dict)
    for _, connector, dimension, day, key, unit, _, amount, _ in samples.usage_rows(size, version):
        found[str(connector)].setdefault(f"usage/{dimension}/{day}", {})[key, unit] = amount
    return found


_CHANGES = {"usage": _usage_changes, "members": _member_changes}


@dataclass(frozen=True, slots=True)
class Filled:
    """A database whose writer is held back by the partitions' locks while its streams are filled."""

    stage: Stage
    place: Place
    database: Database
    redis: Redis
    what: str
    size: Size
    partitions: int
    began: dict[int, datetime] = field(default_factory=dict)
    """When each version was first published: a repeat is the same to the byte."""

    def number(self, version: int) -> int:
        """Give the number of the parts that tell of a version, as the ledger would: microseconds."""
        return int(self.began[version].timestamp() * 1e6) if version else 0

    def fill(self, version: int, *, repeat: bool) -> None:
        """Publish every connector's observations of a version; with `repeat` they were applied already."""
        began = self.began.setdefault(version, datetime.now(UTC))
        changes = _CHANGES[self.what](self.size, version)
        if not repeat:
            self._open_parts(list(changes), version)
        with self.redis.pipeline(transaction=False) as pipe:
            for (connector, tenant, dataset), found in changes.items():
                entries = batches(
                    found,
                    tenant_id=tenant,
                    connector_id=connector,
                    dataset=dataset,
                    base=self.number(version - 1),
                    sequence=self.number(version),
                    part_id=_part(connector, dataset, version),
                    began=began,
                    report=Report(run_id=_run(connector, version), records=len(found), changes=len(found)),
                )
                for entry in entries:
                    pipe.xadd(stream_key(partition_of(connector, self.partitions)), dict(entry.fields))  # type: ignore[arg-type] # bytes are field names
            pipe.execute()
        self.stage.settle(self.place)

    def _open_parts(self, keys: Sequence[tuple[UUID, str, Dataset]], version: int) -> None:
        """Write the ledger as fetchers leave it: one running part of each dataset, published."""
        runs = {connector: tenant for connector, tenant, _ in keys}
        number = self.number(version)
        today = datetime.now(UTC).date()
        first = today - timedelta(days=self.size.days - 1)
        with self.database.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, started_at,"
                " parts_total) VALUES (%s, %s, %s, 'backfill', 'schedule', 'running', now(), %s)",
                [(_run(c, version), c, tenant, len(_DATASETS[self.what])) for c, tenant in runs.items()],
            )
            cursor.executemany(
                "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, window_start, window_end,"
                " status, claimed, published_at, lease_until)"
                " VALUES (%s, %s, %s, 'backfill', %s, %s, %s, 'running', %s, now(), now() + interval '1 hour')",
                [(_part(c, d, version), _run(c, version), c, d, *_window(d, first), number) for c, _, d in keys],
            )
        self.database.execute(
            "UPDATE rollcall.connector_access SET claimed = %s, lease_until = now() + interval '1 hour'"
            " WHERE dataset = ANY(%s)",
            [number, [str(d) for d in _DATASETS[self.what]]],
        )

    def release(self, held: ExitStack, team: Crew) -> None:
        """Let the writer have the partitions, and wait until it reads: until then it waits for news, not for us.

        Raises:
            WrongResultError: it took too long.

        """
        before, deadline = self._delivered(), time.monotonic() + LIMIT_S
        held.close()
        while self._delivered() == before:
            team.check()
            if time.monotonic() > deadline:
                raise WrongResultError(f"the writer read nothing in {LIMIT_S:.0f} s")
            time.sleep(GLANCE_S)

    def _delivered(self) -> list[object]:
        keys = [key for key in map(stream_key, range(self.partitions)) if self.redis.xlen(key)]
        return [group["last-delivered-id"] for key in keys for group in self.redis.xinfo_groups(key)]

    def await_folded(self, team: Crew) -> None:
        """Wait until everything in the streams is read and acknowledged.

        Raises:
            WrongResultError: it took too long.

        """
        deadline = time.monotonic() + LIMIT_S
        while not all(self._folded(stream_key(n)) for n in range(self.partitions)):
            team.check()
            if time.monotonic() > deadline:
                raise WrongResultError(f"the writer was not done after {LIMIT_S:.0f} s")
            time.sleep(LOOK_S)

    def _folded(self, key: str) -> bool:
        if not self.redis.xlen(key):
            return True
        groups = [g for g in self.redis.xinfo_groups(key) if g["name"] in {GROUP, GROUP.encode()}]
        last = self.redis.xinfo_stream(key)["last-generated-id"]
        return bool(groups) and not groups[0]["pending"] and groups[0]["last-delivered-id"] == last

    def check(self, version: int) -> None:
        """Compare rows, versions, and the sums of amounts, and that every run has ended well.

        Raises:
            WrongResultError: something differs.

        """
        if self.what == "usage":
            extra, table = "sum(amount) AS amount", "credit_usage"
            wanted = {
                "rows": self.size.usage_rows,
                "amount": sum((row[7] for row in samples.usage_rows(self.size, version)), Decimal()),
            }
        else:
            extra, table = "count(DISTINCT email) AS mails", "members"
            wanted = {"rows": self.size.member_rows, "mails": self.size.member_rows}
        query = f"SELECT count(*) AS rows, min(version) AS least, max(version) AS most, {extra} FROM rollcall.{table}"  # noqa: S608 - constants
        (found,) = self.database.execute(query).fetchall()
        wanted |= dict.fromkeys(("least", "most"), self.number(version))
        (runs,) = self.database.execute(
            "SELECT count(*) FILTER (WHERE status <> 'succeeded') AS bad FROM rollcall.sync_runs"
        ).fetchall()
        if found != wanted or runs["bad"]:
            raise WrongResultError(f"{self.what}: expected {wanted}, found {found}, runs not succeeded: {runs['bad']}")


def _run(connector: UUID, version: int) -> UUID:
    return uuid5(connector, f"run {version}")


def _part(connector: UUID, dataset: Dataset, version: int) -> UUID:
    return uuid5(connector, f"part {dataset} {version}")


def _window(dataset: Dataset, first: object) -> tuple[object, object]:
    return (first, datetime.now(UTC).date() + timedelta(days=1)) if dataset.dimension else (None, None)


@contextmanager
def _held(place: Place, partitions: int) -> Iterator[None]:
    """Keep writers away from every partition."""
    with place.database() as database:
        for partition in range(partitions):
            database.execute("SELECT pg_advisory_lock(%s, %s)", [LOCK_CLASS, partition])
        yield


def _product(stage: Stage, what: str, size: Size, names: Sequence[str] = ("writer",)) -> Sample:
    sample: Sample = {}
    version = 1
    with (
        stage.fresh() as place,
        place.database() as database,
        place.redis() as redis,
        witnessed(stage, place, lambda _: _true(what, size, version)) as history,
    ):
        (meta,) = database.execute("SELECT partitions FROM rollcall.meta").fetchall()
        made = Filled(stage, place, database, redis, what, size, meta["partitions"])
        tenants = [
            Tenant(f"tenant-{n}", samples.connector_id(n), f"w{n}", "no-key-is-used") for n in range(size.connectors)
        ]
        register(database, stage.ring, "http://127.0.0.1:9", tenants)
        history.note(tenants)
        with crew(stage, place, database, settings={}, names=names) as team:
            for phase in PHASES:
                stage.note(f"writer alone: {what}, {phase}")
                if phase == "update":
                    with history.changing(tenants):
                        version = 2
                with ExitStack() as held:
                    held.enter_context(_held(place, made.partitions))
                    made.fill(version, repeat=phase == "repeat")
                    made.release(held, team)
                    with Watch({**team.pids, **stage.servers}) as seen:
                        made.await_folded(team)
                made.check(version)
                sample |= _figures(what, phase, size, seen.seconds, seen)
        sample |= history.verdict()
    return sample


def _floor(stage: Stage, what: str, size: Size) -> Sample:
    sample: Sample = {}
    with stage.fresh() as place:
        for phase in PHASES:
            stage.note(f"raw upserts: {what}, {phase}")
            stage.settle(place)
            asked = {"database_url": place.database_url, "what": what, "phase": phase, "size": asdict(size)}
            figures, seen = run_apart("tests.bench.floors:upserts", asked, servers=stage.servers)
            sample |= _figures(what, phase, size, figures["seconds"], seen)
    return sample


def _figures(what: str, phase: str, size: Size, seconds: float, seen: Watch) -> Sample:
    rows = size.usage_rows if what == "usage" else size.member_rows
    step = f"{what}_{phase}"
    return {
        f"{step}.rows": rows,
        f"{step}.rows_per_s": rows / seconds,
        **seen.cpu_per(rows, scale=1e6, prefix=f"{step}.cpu_us_per_row"),
        f"{step}.foreign_cores": seen.foreign_cores,
    }


@contextmanager
def _prepare(stage: Stage) -> Iterator[Mapping[str, Side]]:
    sizes = QUICK_SIZES if stage.quick else SIZES

    def both(measure: Callable[[Stage, str, Size], Sample]) -> Side:
        return lambda: joined(measure(stage, what, size) for what, size in sizes.items())

    sides = {"writer": both(_product), "floor": both(_floor)}
    if not stage.quick:
        sides["writer_twice"] = both(partial(_product, names=("writer", "writer-2")))
    yield sides


CASE = Case(
    "writer",
    "the writer alone on full streams: new rows, every row changed, and what was applied already",
    _prepare,
    {"writer": "floor", "writer_twice": "floor"},
)
