"""Syncs of many tenants, step by step, by the product's own processes and by the floor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from tests.bench.apart import run_apart
from tests.bench.case import Case, Sample, Side
from tests.bench.crew import ALL, TWICE, WORKERS, await_middle_of_tick, crew
from tests.bench.history import told_by, witnessed
from tests.bench.runs import await_runs, make_due
from tests.bench.stage import Place, Stage
from tests.bench.tenants import (
    BACKFILL_DAYS,
    POLL_DAYS,
    RECONCILE_DAYS,
    Shape,
    Tenant,
    change,
    populate,
    register,
    warm,
)
from tests.bench.truth import KINDS, LEAST, check, expected
from tests.bench.watch import Watch
from tests.fixtures.simulator import Simulator

TICK_S = 5.0
"""Default of ROLLCALL_DISPATCH_INTERVAL_S."""
QUICK_TICK_S = 1.0
SHARE = 0.01
IDLE_S = 10.0
QUICK_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One sync of every tenant. `changed`: about 1 % of the records have changed since the last one."""

    name: str
    kind: str
    days: int
    changed: bool = False


FIRST = Step("first", "backfill", BACKFILL_DAYS)
STEPS = (
    FIRST,
    Step("poll_changed", "poll", POLL_DAYS, changed=True),
    Step("poll_same", "poll", POLL_DAYS),
    Step("reconcile_changed", "reconcile", RECONCILE_DAYS, changed=True),
    Step("reconcile_same", "reconcile", RECONCILE_DAYS),
)


@dataclass(slots=True)
class World:
    """Tenants of one shape in a running simulator; every side that syncs them may change them."""

    stage: Stage
    simulator: Simulator
    shape: Shape
    tenants: Sequence[Tenant]
    changes: int = 0

    def prepare(self, step: Step) -> None:
        """Change what is to be found, and have the simulator's answers ready."""
        if step.changed:
            self.changes += 1
            change(self.simulator, self.shape, self.tenants, share=SHARE, seed=self.changes)
        warm(self.simulator, self.tenants, step.days)

    def product(self, steps: Sequence[Step], tick_s: float = TICK_S, names: Sequence[str] = ALL) -> Sample:
        """Sync by worker, writer and beat, or by more of them."""
        sample: Sample = {}
        with (
            self.stage.fresh() as place,
            place.database() as database,
            place.redis() as client,
            witnessed(self.stage, place, told_by(self.simulator)) as history,
        ):
            register(database, self.stage.ring, self.simulator.url, self.tenants)
            history.note(self.tenants)
            with crew(self.stage, place, database, settings={"dispatch_interval_s": tick_s}, names=names) as team:
                sample |= self._idle({**team.pids, **self.stage.servers})
                for step in steps:
                    self.stage.note(f"{len(self.tenants)} tenants: {step.name}")
                    with history.changing(self.tenants):
                        self.prepare(step)
                    self.stage.settle(place)
                    await_middle_of_tick(database, tick_s)
                    with Watch({**team.pids, **self.stage.servers}) as seen:
                        since = make_due(database, step.kind)
                        done = await_runs(database, team, since, kind=step.kind, connectors=len(self.tenants))
                    check(database, self.simulator, self.tenants, BACKFILL_DAYS)
                    sample |= self._figures(step, done.last_s, seen)
                    sample |= {name: max(size, sample.get(name, 0.0)) for name, size in seen.peaks().items()}
                    sample[f"{step.name}.due_to_begun_s"] = done.first_s
                    sample |= _once_begun(step, sample[f"{step.name}.records"], done.last_s - done.first_s)
                    sample[f"{step.name}.changes"] = done.changes
                    if step is FIRST:
                        sample |= memory(client, len(self.tenants))
            sample |= history.verdict()
        return sample

    def floor(self, steps: Sequence[Step], *, least: bool = False) -> Sample:
        """Sync by fetching and upserting everything that the step asks for; `least`: but the workspace and groups."""
        sample: Sample = {}
        with self.stage.fresh() as place, place.database() as database:
            register(database, self.stage.ring, self.simulator.url, self.tenants)
            for step in steps:
                self.stage.note(f"{len(self.tenants)} tenants: floor of {step.name}")
                self.prepare(step)
                self.stage.settle(place)
                figures, seen = run_apart(
                    "tests.bench.floors:sync", self._asked(place, step, least=least), servers=self.stage.servers
                )
                check(database, self.simulator, self.tenants, BACKFILL_DAYS, kinds=LEAST if least else KINDS)
                sample |= self._figures(step, figures["seconds"], seen)
                sample |= _once_begun(step, sample[f"{step.name}.records"], figures["seconds"])
        return sample

    def _idle(self, pids: Mapping[str, int]) -> Sample:
        """Measure what waiting for work costs."""
        with Watch(pids) as seen:
            time.sleep(QUICK_IDLE_S if self.stage.quick else IDLE_S)
        return seen.cpu_per(seen.seconds, scale=1e3, prefix="idle.cpu_ms_per_s")

    def _asked(self, place: Place, step: Step, *, least: bool) -> dict[str, object]:
        return {
            "database_url": place.database_url,
            "url": self.simulator.url,
            "days": step.days,
            "least": least,
            "tenants": [(t.id, str(t.connector_id), t.api_key) for t in self.tenants],
        }

    def _figures(self, step: Step, seconds: float, seen: Watch) -> Sample:
        records = expected(self.simulator, self.tenants, step.days).total
        return {
            f"{step.name}.seconds": seconds,
            f"{step.name}.records": records,
            f"{step.name}.records_per_s": records / seconds,
            **seen.cpu_per(records, scale=1e6, prefix=f"{step.name}.cpu_us_per_record"),
            f"{step.name}.foreign_cores": seen.foreign_cores,
        }


def _once_begun(step: Step, records: float, seconds: float) -> Sample:
    """Give the speed without the wait for the next tick, which is the same however much there is to do."""
    return {f"{step.name}.once_begun.records_per_s": records / seconds}


def memory(client: redis.Redis, connectors: int) -> Sample:
    """Give what a connector holds in Redis: its snapshots, and its first sync in the streams."""
    sizes = {"snapshots": 0, "stream": 0}
    for key in client.scan_iter(match="rollcall:*", count=1000):
        name = key.decode()
        for kind, prefix in (("snapshots", "rollcall:snapshot:"), ("stream", "rollcall:events:")):
            if name.startswith(prefix):
                sizes[kind] += int(client.memory_usage(key, samples=0) or 0)
    return {f"redis_bytes_per_connector.{kind}": size / connectors for kind, size in sizes.items()}


@contextmanager
def world(stage: Stage, shape: Shape) -> Iterator[World]:
    """Run a simulator with tenants of one shape."""
    with stage.simulator() as simulator:
        yield World(stage, simulator, shape, populate(simulator, shape))


@contextmanager
def _many(stage: Stage) -> Iterator[Mapping[str, Side]]:
    shape = Shape(tenants=12, members=50) if stage.quick else Shape()
    with world(stage, shape) as made:
        tick_s = QUICK_TICK_S if stage.quick else TICK_S
        sides = {"product": lambda: made.product(STEPS, tick_s), "floor": lambda: made.floor(STEPS)}
        if not stage.quick:
            sides["product_workers"] = lambda: made.product(STEPS, names=WORKERS)
            sides["product_twice"] = lambda: made.product(STEPS, names=TWICE)
            sides["floor_least"] = lambda: made.floor(STEPS, least=True)
        yield sides


@contextmanager
def _one_large(stage: Stage) -> Iterator[Mapping[str, Side]]:
    shape = Shape(1, 50_000, service_accounts=20, keys_per_account=10, products=5, usage_rows_per_day=1_340)
    if stage.quick:
        shape = Shape(1, 2_000, service_accounts=4, keys_per_account=5, products=5, usage_rows_per_day=60)
    with world(stage, shape) as made:
        tick_s = QUICK_TICK_S if stage.quick else TICK_S
        yield {"product": lambda: made.product(STEPS, tick_s), "floor": lambda: made.floor(STEPS)}


SYNC = Case(
    "sync",
    "200 tenants of 200 members, 20 keys and 90 days of usage: first sync, then polls and reconciles",
    _many,
    dict.fromkeys(("product", "product_workers", "product_twice", "floor_least"), "floor"),
)
LARGE = Case(
    "large",
    "one tenant of 50,000 members, 200 keys and 5 products: first sync, then polls and reconciles",
    _one_large,
    {"product": "floor"},
)
