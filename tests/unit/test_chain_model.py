"""The chain of versions under random interleavings: whatever dies, Postgres and a subscriber equal the provider.

The real recipes (`observe`, `fold`) run against a world in memory; a seed decides who goes on at which port call,
what changes at the provider, and who is killed, flushed, rolled back or robbed of a lease.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

import pytest
import structlog

from schemas.connectors import Dataset, PartStatus, RunKind
from schemas.records import Listing
from tests.fixtures import model
from tests.fixtures.model import (
    CALENDAR,
    CONNECTOR,
    DATASETS,
    NOON,
    OPEN,
    POISON,
    TODAY,
    Actor,
    ModelBooks,
    ModelFacts,
    ModelJournal,
    ModelLedger,
    ModelProvider,
    ModelSnapshots,
    ModelWorld,
    Part,
    Told,
    Violation,
    insist,
)
from worker import entries
from worker.chain import Fate, fate
from worker.changes import GuardLimits
from worker.elevenlabs.asking import Window, ask, drive
from worker.elevenlabs.protocol import Answer
from worker.entries import Entry, Observation
from worker.entries import _observation as whole_or_torn
from worker.observe import observe
from worker.plan import OpenPart, pick
from worker.ports import Base, Ports, Target
from worker.writer import Turn, fold

SEEDS = 3000
DAY = timedelta(days=1)
RECENT, EARLIER = Window(TODAY - DAY, TODAY + DAY), Window(TODAY - 3 * DAY, TODAY - DAY)
WHOLE = Window(EARLIER.start, RECENT.end)
HABITS = {"advance": 30, "send": 5, "run": 3, "run_more": 1, "change": 4, "write": 5, "subscribe": 3}
"""What always happens, and how often."""
BLOWS = (
    "again",
    "stray",
    "kill",
    "interrupt",
    "break_lease",
    "flush",
    "copy_redis",
    "roll_back",
    "trim",
    "unlock",
    "back_up",
    "restore",
    "clock",
    "drop",
    "poison",
)
"""What happens in some stories: a few of these in each, and then often."""
FAULTS = ("outage", "incomplete", "full", "repeat", "away")


class Story:
    """One interleaving: `tell` lives through it, `settle` lets it end and compares."""

    def __init__(self, seed: int, blows: Sequence[str] | None = None) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a story, no secret
        self.world, self.trace = ModelWorld(self.rng), [f"seed {seed}"]
        self.messages: list[list[UUID]] = []
        self.copy, self.backup = self.world.redis.copy(), self.world.postgres.copy()
        self.blind = False
        """Redis was rolled back: what somebody read of the lost future, the next change or reconcile corrects."""
        blows = self.rng.sample(BLOWS, self.rng.randint(0, 5)) if blows is None else blows
        self.habits = HABITS | dict.fromkeys(blows, 4)
        self.limits = GuardLimits(records=1) if "drop" in self.habits else GuardLimits()
        self.world.faults = {name for name in FAULTS if self.rng.random() < 0.2}

    def tell(self, actions: int) -> None:
        names, weights = list(self.habits), list(self.habits.values())
        self.run()
        for name in self.rng.choices(names, weights, k=actions):
            getattr(self, name)()

    def note(self, line: str) -> None:
        self.trace.append(line)

    def advance(self) -> None:
        """Somebody goes on for a while, and the others wait."""
        ready = [actor for actor in self.world.actors if actor.parked]
        if ready:
            actor, steps = self.rng.choice(ready), self.rng.choice([1, 1, 2, 4, 9])
            self.note(f"{actor.name} goes on {steps}")
            while steps and actor.parked:
                actor.advance(self.rng)
                steps -= 1

    def run(self, kind: RunKind = RunKind.POLL) -> None:
        if sum(part.status in OPEN for part in self.world.postgres.parts.values()) > 4:
            return
        run_id = self._id()
        windows = [RECENT] if kind is RunKind.POLL else [RECENT, EARLIER]
        for dataset in DATASETS:
            for window in windows if dataset.dimension else [None]:
                part = Part(self._id(), run_id, kind, dataset, window)
                self.world.postgres.parts[part.id] = part
        self.note(f"a {kind}")

    def run_more(self) -> None:
        self.run(self.rng.choice([RunKind.RECONCILE, RunKind.BACKFILL]))

    def send(self) -> bool:
        """Send what `plan.pick` picks, as the ledger does."""
        postgres = self.world.postgres
        parts = [
            OpenPart(
                part.id,
                part.run_id,
                part.kind,
                part.dataset,
                part.window.start if part.window else None,
                NOON,
                part.lane,
                part.lane is not None and part.leased,
                postgres.chains[part.dataset].leased,
            )
            for part in postgres.parts.values()
            if part.status in OPEN
        ]
        sending = pick(CONNECTOR, parts, now=NOON, allow_bulk=True)
        if sending is None:
            return False
        self._send(sending.lanes)
        return True

    def _send(self, lanes: Mapping[UUID, int]) -> None:
        for part_id, lane in lanes.items():
            part = self.world.postgres.parts[part_id]
            part.status, part.lane, part.leased = PartStatus.QUEUED, lane, True
        self.messages.append(list(lanes))
        self._fetch(self.messages[-1])

    def stray(self) -> None:
        """Send any part, as if all leases were over."""
        parts = [part for part in self.world.postgres.parts.values() if part.status in OPEN]
        if parts:
            part = self.rng.choice(parts)
            self.world.postgres.chains[part.dataset].leased = False
            self._send({part.id: 1})

    def again(self) -> None:
        """Deliver some earlier message once more."""
        if self.messages:
            self._fetch(self.rng.choice(self.messages[-4:]))

    def _fetch(self, part_ids: list[UUID]) -> None:
        actor = self.world.actor(f"fetcher {len(self.trace)}")
        self.note(f"{actor.name} starts on {[part_id.int for part_id in part_ids]}")
        ports = Ports(
            ModelLedger(actor), ModelFacts(actor), ModelSnapshots(actor), ModelProvider(actor), CALENDAR, self.limits
        )
        actor.start(observe(part_ids, ports))

    def write(self) -> None:
        """A writer takes a turn, if nobody holds the lock."""
        if self.world.lock is None:
            actor = self.world.lock = self.world.actor(f"writer {len(self.trace)}")
            self.note(f"{actor.name} takes the lock")
            actor.start(self._turn(actor, self.rng.randint(1, 4), self.rng.randint(1, 3)))

    async def _turn(self, actor: Actor, reads: int, count: int) -> None:
        books, turn = ModelBooks(actor), Turn(ModelJournal(actor))
        try:
            while reads and await fold([turn], books, count=count):
                reads -= 1
        finally:
            if self.world.lock is actor:
                self.world.lock = None

    def subscribe(self) -> None:
        if not any(actor.name == "subscriber" for actor in self.world.actors):
            actor = self.world.actor("subscriber")
            actor.start(self.world.subscriber.read(actor, self.rng.randint(1, 3)))

    def change(self) -> None:
        """Somebody comes, goes or is renamed, or something is used; often back to what was before."""
        truth, user = self.world.truth, f"usr_{self.rng.randint(4, 6)}"
        if self.rng.random() < 0.2:
            truth.members.pop(user, None)
        elif self.rng.random() < 0.6:
            truth.members[user] = {"first_name": f"name {self.rng.randint(1, 2)}", "is_owner": False}
        if self.rng.random() < 0.5:
            truth.usage[self.rng.choice(list(truth.usage))] = {"tts": self.rng.randint(1, 2), "stt": 5, "sfx": 2}
        truth.backwards = self.rng.random() < 0.2
        self.note("the provider changes")

    def drop(self) -> None:
        """Many go at once."""
        self.note("a large drop")
        self.world.truth.members = {u: m for u, m in self.world.truth.members.items() if m["is_owner"]}
        self.world.truth.usage[TODAY] = {}

    def poison(self) -> None:
        self.note("poison")
        self.world.truth.members["usr_9"] = {"first_name": POISON, "is_owner": False}

    def kill(self, *, kill: bool = True) -> None:
        mortal = [actor for actor in self.world.actors if actor.name != "subscriber"]
        if mortal:
            actor = self.rng.choice(mortal)
            self.note(f"{actor.name} is {'killed' if kill else 'interrupted'}")
            actor.interrupt(kill=kill)

    def interrupt(self) -> None:
        """End somebody in order, as far as it goes."""
        self.kill(kill=False)

    def break_lease(self) -> None:
        """Let leases end, whoever is under way."""
        dataset = self.rng.choice(DATASETS)
        self.note(f"leases of {dataset} end")
        self._end_leases(dataset)

    def _end_leases(self, dataset: Dataset) -> None:
        self.world.postgres.chains[dataset].leased = False
        for part in self.world.postgres.parts.values():
            if part.dataset is dataset:
                part.leased = False

    def flush(self) -> None:
        self.note("Redis is flushed")
        self.world.redis = model.Redis(ids=self.world.redis.ids)

    def copy_redis(self) -> None:
        self.copy = self.world.redis.copy()

    def roll_back(self) -> None:
        self.note("Redis is rolled back")
        self.world.redis, self.blind = self.copy.copy(), True

    def trim(self) -> None:
        """Cut the stream behind the writer, whoever else has not read yet."""
        writer = self.world.redis.group("writer")
        reached = min(writer.pending, default=writer.last + 1)
        self.note(f"trimmed below {reached}")
        for number in [number for number in self.world.redis.stream if number < reached]:
            del self.world.redis.stream[number]
        self.world.redis.append([Entry({b"ce": b"[]"})])

    def unlock(self) -> None:
        """The connection that holds the lock breaks; its writer does not know yet."""
        self.note("the lock is lost")
        self.world.lock = None

    def back_up(self) -> None:
        self.backup = self.world.postgres.copy()

    def restore(self) -> None:
        self.note("Postgres is restored")
        self.world.postgres, self.world.lock = self.backup.copy(), None
        self.world.now += timedelta(seconds=60)

    def clock(self) -> None:
        self.world.now += timedelta(seconds=self.rng.randint(-3 if "restore" not in self.habits else 0, 3))

    def _id(self) -> UUID:
        return UUID(int=self.rng.getrandbits(64))

    def settle(self) -> None:
        world = self.world
        world.faults, self.messages = set(), []
        self.note("faults end")
        world.truth.members.pop("usr_9", None)
        self._drain()
        for _ in range(4 if "drop" in self.habits else 1):
            self.run()
            self._drain()
        self._compare(RECENT, subscriber=not self.blind)
        self.run(RunKind.RECONCILE)
        self._drain()
        self._compare(WHOLE, subscriber=True)
        before, old = len(world.redis.stream), set(world.postgres.parts)
        self.run()
        self._drain()
        insist(len(world.redis.stream) == before, "an unchanged poll said something")
        new = [part.status for part in world.postgres.parts.values() if part.id not in old]
        insist(new == [PartStatus.SUCCEEDED] * 2, "an unchanged poll failed")

    def _drain(self) -> None:
        """Let everybody finish, again and again, until no part is open and everything is read."""
        world = self.world
        for _ in range(60):
            sent = self.send()
            self.write()
            self.subscribe()
            while world.actors:
                self.advance()
            end = max(world.redis.stream, default=0)
            unread = any(world.redis.group(name).last < end for name in ("writer", "subscriber"))
            waiting = any(part.status in OPEN for part in world.postgres.parts.values())
            if not unread and not waiting:
                return
            if not sent and not unread:
                for dataset in DATASETS:
                    self._end_leases(dataset)
        raise Violation("parts stay open")

    def _compare(self, window: Window, *, subscriber: bool) -> None:
        for dataset in DATASETS:
            asked = drive(
                ask(dataset, window if dataset.dimension else None, now=NOON, cost_since=None),
                lambda request: Answer(200, {}, self.world.truth.answer(request)),
            )
            truth, _ = Told(0, window if dataset.dimension else None, asked).listing(dataset)
            insist(self._within(self.world.postgres.rows[dataset], truth) == truth, f"Postgres has {dataset} wrong")
            if subscriber:
                held = self._within(self.world.subscriber.rows[dataset], truth)
                insist(held == truth, f"the subscriber has {dataset} wrong")

    def _within(self, rows: Listing, truth: Listing) -> Listing:
        return {s: r for s, r in rows.items() if s in truth or not s.startswith("usage/")}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Observations span several entries, as large ones do; nothing is logged."""
    monkeypatch.setattr(entries, "MAX_BATCH", 2)
    old = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**old)


def live_through(seeds: Iterable[int], blows: Sequence[str] | None = None) -> None:
    """Live through stories; an error's notes tell the seed and the trace."""
    for seed in seeds:
        story = Story(seed, blows)
        try:
            story.tell(80)
            story.settle()
        except Exception as error:
            error.add_note("\n".join(story.trace))
            raise
        finally:
            story.world.close()


@pytest.mark.parametrize("first", range(0, SEEDS, 500))
def test_postgres_and_a_subscriber_end_equal_to_the_provider(first: int) -> None:
    """Whatever dies, breaks or is lost: once things are quiet nothing is lost, invented, doubled or said twice."""
    live_through(range(first, first + 500))


def test_a_story_is_told_the_same_way_again() -> None:
    """A seed is enough to see a failure again."""
    traces = []
    for _ in range(2):
        story = Story(7)
        story.tell(80)
        story.world.close()
        traces.append(story.trace)
    assert traces[0] == traces[1]


def _any_snapshot(*, snapshot: int | None, version: int) -> bool:
    return snapshot is not None


def _not_counting(claimed: int, now: datetime) -> int:
    return max(claimed, int(now.timestamp()))


def _always(*_: object) -> bool:
    return True


def _any_newer(*, version: int, claimed: int, base: int, sequence: int) -> Fate:
    return Fate.APPLY if sequence > version else Fate.SEEN


def _whatever_was_claimed(*, version: int, claimed: int, base: int, sequence: int) -> Fate:
    return fate(version=version, claimed=sequence, base=base, sequence=sequence)


def _applied_again(*, version: int, claimed: int, base: int, sequence: int) -> Fate:
    found = fate(version=version, claimed=claimed, base=base, sequence=sequence)
    return Fate.APPLY if sequence == version else found


def _whatever_is_there(pieces: Sequence[Entry]) -> Observation:
    found = whole_or_torn(pieces)
    return replace(found, report=found.report.model_copy(update={"changes": found.changes}))


async def _load_any(self: ModelSnapshots, target: Target, dataset: Dataset, version: int) -> Base | None:
    await self.actor.step()
    base, _ = self.actor.world.redis.snapshots.get(dataset, (None, ""))
    return base and replace(base, version=version)


async def _no_replay(self: model.Subscriber, actor: Actor, dataset: Dataset) -> None:
    await actor.step()


@pytest.mark.parametrize(
    ("broken", "blows"),
    [
        ({"worker.look.believed": _any_snapshot}, ["stray"]),
        ({"worker.chain.fate": _any_newer}, ["restore", "back_up"]),
        ({"worker.chain.fate": _whatever_was_claimed}, ["stray"]),
        ({"worker.chain.fate": _applied_again}, ["kill"]),
        ({"worker.chain.draw": _not_counting}, ["flush", "stray"]),
        ({"worker.entries._observation": _whatever_is_there}, ["unlock"]),
        ({"tests.fixtures.model.may_close": _always}, ["stray", "break_lease", "again"]),
        ({"tests.fixtures.model.ModelSnapshots.load": _load_any}, ["stray"]),
        ({"tests.fixtures.model.Subscriber._replay": _no_replay}, ["flush"]),
    ],
    ids=[
        "believe_any",
        "fate_any_newer",
        "fate_unclaimed",
        "fate_again",
        "draw_again",
        "torn",
        "close",
        "load",
        "replay",
    ],
)
def test_the_model_has_teeth(broken: dict[str, object], blows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule of the chain is needed: without it some story ends wrong."""
    for name, rule in broken.items():
        monkeypatch.setattr(name, rule)
    with pytest.raises(Violation):
        live_through(range(SEEDS), blows)
