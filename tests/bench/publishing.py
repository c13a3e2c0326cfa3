"""Publishing alone: changes in memory become entries in the streams, with their snapshots; beside the raw stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

from pydantic import SecretStr

from schemas.connectors import Dataset
from schemas.events import Op
from tests.bench import observing, samples
from tests.bench.apart import Figures, Go, run_apart
from tests.bench.case import Case, Sample, Side, joined
from tests.bench.history import looked_at
from tests.bench.samples import Size
from tests.bench.stage import Stage, WrongResultError
from worker import memory
from worker.changes import Change
from worker.entries import Entry, Observation, Report, assemble, batches
from worker.packing import pack
from worker.plan import partition_of
from worker.ports import Base, Publication, Target
from worker.redis import client as redis_client
from worker.snapshots import RedisSnapshots, stream_key

SIZES = {"members": Size(connectors=1_500), "large": Size(connectors=60, members=5_000)}
QUICK_SIZES = {"members": Size(connectors=20), "large": Size(connectors=2, members=1_000)}
NUMBER = 1


async def publish_all(asked: dict[str, Any], go: Go) -> Figures:
    """Publish the first listing of every connector: `redis_url`, `size`; give seconds and events."""
    listings = {
        Target(connector, tenant, "", "", partition_of(connector, observing.PARTITIONS)): listing
        for (connector, tenant), listing in samples.listings(Size(**asked["size"]), NUMBER).items()
    }
    found = {
        target: [Change(subject, Op.CREATED, None, record, ()) for subject, record in listing.items()]
        for target, listing in listings.items()
    }
    ids = {target: (uuid5(target.connector_id, "run"), uuid5(target.connector_id, "part")) for target in found}
    redis = redis_client(SecretStr(asked["redis_url"]))
    snapshots, began_at = RedisSnapshots(redis, ceiling_entries=observing.CEILING), datetime.now(UTC)
    waiting = iter(found.items())

    async def some() -> None:
        for target, changes in waiting:
            run_id, part_id = ids[target]
            await snapshots.room()  # as observing does
            entries = _entries(target, changes, began_at, run_id, part_id)
            packed = pack(Base(NUMBER, records=listings[target]))
            done = await snapshots.publish(target, Dataset.MEMBERS, None, packed, "", entries)
            if done is not Publication.DONE:
                raise WrongResultError(f"publishing ended as {done}")

    memory.settle()  # as workers do
    await go()
    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(observing.AT_ONCE)))
    seconds = time.perf_counter() - began
    await snapshots.close()
    await redis.aclose()
    return {"seconds": seconds, "events": sum(map(len, found.values()))}


def _entries(target: Target, changes: Sequence[Change], at: datetime, run_id: UUID, part_id: UUID) -> list[Entry]:
    return batches(
        changes,
        tenant_id=target.tenant_id,
        connector_id=target.connector_id,
        dataset=Dataset.MEMBERS,
        base=0,
        sequence=NUMBER,
        part_id=part_id,
        began=at,
        report=Report(run_id=run_id, records=len(changes), changes=len(changes)),
    )


@dataclass(frozen=True, slots=True)
class Publishing:
    """Listings of two sizes to publish."""

    stage: Stage

    def product(self) -> Sample:
        """Publish both, and read back what stands in the streams."""
        return joined(self._step(what) for what in SIZES)

    def _step(self, what: str) -> Sample:
        size = (QUICK_SIZES if self.stage.quick else SIZES)[what]
        self.stage.note(f"publishing alone: {what}")
        with self.stage.fresh() as place:
            asked = {"redis_url": place.redis_url, "size": asdict(size)}
            found, seen = run_apart("tests.bench.publishing:publish_all", asked, servers=self.stage.servers)
            with place.redis() as redis:
                stood: list[Observation] = []
                for partition in range(observing.PARTITIONS):
                    rows: list[Any] = redis.xrange(stream_key(partition)) or []
                    stood += assemble([Entry(fields, entry_id.decode()) for entry_id, fields in rows]).whole
        told = {one.connector_id: {event.subject: event.data.after for event in one.records} for one in stood}
        events = sum(one.changes for one in stood)
        wanted = {connector: listing for (connector, _), listing in samples.listings(size, NUMBER).items()}
        if told != wanted or (len(stood), events) != (size.connectors, size.member_rows):
            raise WrongResultError("the streams do not hold what was published, each once")
        return {
            **(looked_at(observations=len(stood), events=events) if self.stage.checked else {}),
            f"{what}.events_per_s": found["events"] / found["seconds"],
            **seen.cpu_per(found["events"], scale=1e6, prefix=f"{what}.cpu_us_per_event"),
            f"{what}.foreign_cores": seen.foreign_cores,
        }

    def stream(self) -> Sample:
        """Move as many events, always the same bytes, through a raw stream."""
        self.stage.note("raw stream")
        with self.stage.fresh() as place:
            asked = {"redis_url": place.redis_url, "entries": 20 if self.stage.quick else 1_000}
            found, seen = run_apart("tests.bench.floors:stream", asked, servers={})
        rate = found["events"] / found["write_s"]
        return {**{f"{what}.events_per_s": rate for what in SIZES}, "foreign_cores": seen.foreign_cores}


@contextmanager
def _prepare(stage: Stage) -> Iterator[Mapping[str, Side]]:
    made = Publishing(stage)
    yield {"publish": made.product, "stream": made.stream}


CASE = Case(
    "publish",
    "publishing alone: new members of 1,500 small listings and of 60 large ones, from memory to the streams",
    _prepare,
    {"publish": "stream"},
)
