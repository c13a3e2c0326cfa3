"""Observe, port call by port call: what is asked, what is believed, what is published, and what goes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from uuid import UUID

import orjson
import pytest

from schemas.connectors import Dataset, PartStatus, RunKind
from schemas.records import Listing
from tests.fixtures.model import (
    CALENDAR,
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
    Redis,
)
from worker import look as recipe
from worker.changes import GuardLimits
from worker.elevenlabs.asking import Window
from worker.elevenlabs.protocol import Answer, Finding, Request
from worker.entries import Observation, assemble
from worker.observe import Published, Result, observe
from worker.ports import Claim, Failure, Ports, Quiet, Returned
from worker.writer import Turn, fold

MEMBERS, USAGE = Dataset.MEMBERS, Dataset.USAGE_PRODUCT
RECENT = Window(TODAY - timedelta(days=1), TODAY + timedelta(days=1))
USER, PRODUCTS, COSTS = (
    "/v1/user",
    "/v1/workspace/analytics/query/usage-by-product-over-time",
    "/v1/workspace/analytics/usage",
)
DEAD = Answer(401, {}, b'{"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}')
ALIVE = Answer(200, {}, b'{"user_id": "u", "subscription": {"tier": "pro"}}')
REFUSED = Answer(403, {}, b'{"detail": {"status": "forbidden", "message": "no"}}')
BUSY = Answer(503, {}, b"")


@dataclass(slots=True)
class Scripted(ModelProvider):
    """A provider that answers a path as told, the last answer again and again; else as the world does."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def _answer(self, request: Request) -> Answer:
        self.asked.append(request.path)
        answers = self.answers.get(request.path)
        if not answers:
            return ModelProvider._answer(self, request)
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Bench:
    """A world with somebody who observes in it."""

    def __init__(self) -> None:
        self.world = ModelWorld(random.Random(0))  # noqa: S311 - a test, no secret
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.results: list[Result] = []

    def part(self, dataset: Dataset = MEMBERS, kind: RunKind = RunKind.POLL, *, lane: int = 1) -> Part:
        """Put a part into the ledger, sent already, of a run of its own."""
        number = len(self.world.postgres.parts) + 1
        window = RECENT if dataset.dimension else None
        part = Part(UUID(int=number), UUID(int=100 + number), kind, dataset, window, lane=lane)
        self.world.postgres.parts[part.id] = part
        return part

    def start(self, *parts: Part) -> Actor:
        """Begin to observe these parts."""
        actor = self.world.actor("fetcher")
        provider, limits = Scripted(actor, self.answers, self.asked), GuardLimits(records=1)
        ports = Ports(ModelLedger(actor), ModelFacts(actor), ModelSnapshots(actor), provider, CALENDAR, limits)

        async def work() -> None:
            self.results = await observe([part.id for part in parts], ports)

        actor.start(work())
        return actor

    def finish(self, actor: Actor) -> list[Result]:
        while actor.parked:
            actor.advance(self.world.rng)
        return self.results

    def observe(self, *parts: Part) -> list[Result]:
        return self.finish(self.start(*parts))

    def poll(self, dataset: Dataset = MEMBERS, kind: RunKind = RunKind.POLL) -> Result:
        """Observe one new part, and let the writer apply what came of it."""
        (result,) = self.observe(self.part(dataset, kind))
        self.apply()
        return result

    def apply(self) -> None:
        actor = self.world.lock = self.world.actor("writer")

        async def work() -> None:
            turn = Turn(ModelJournal(actor, None))
            while await fold([turn], ModelBooks(actor), count=9):
                pass

        actor.start(work())
        self.finish(actor)

    @property
    def published(self) -> list[Observation]:
        return assemble(self.world.redis.stream.values()).whole


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.world.close()


def test_a_first_observation_is_published_and_applied(bench: Bench) -> None:
    """Everything is new; the part ends with the transaction that wrote its data, its lane before."""
    part = bench.part()
    (result,) = bench.observe(part)
    assert isinstance(result, Published)
    assert (result.changes, part.status, part.lane) == (6, PartStatus.RUNNING, None)
    (found,) = bench.published
    assert (found.base, found.sequence, found.part_id, found.report.records) == (0, result.claim.number, part.id, 6)
    bench.apply()
    assert part.status is PartStatus.SUCCEEDED
    assert len(bench.world.postgres.rows[MEMBERS]) == 6


def test_an_unchanged_answer_is_not_even_parsed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is that of the snapshot: the part is closed without the stream."""
    bench.poll()
    monkeypatch.setattr(recipe, "directory", None)
    part = bench.part()
    (result,) = bench.observe(part)
    assert isinstance(result, Quiet)
    assert (result.records, part.status) == (None, PartStatus.SUCCEEDED)
    assert len(bench.published) == 1


@pytest.mark.parametrize("dataset", [MEMBERS, USAGE])
def test_another_order_is_no_change(bench: Bench, dataset: Dataset) -> None:
    """It is parsed once; then its digest is known too."""
    bench.poll(dataset)
    bench.world.truth.backwards = True
    first, second = bench.poll(dataset), bench.poll(dataset)
    assert isinstance(first, Quiet)
    assert isinstance(second, Quiet)
    assert first.records is not None
    assert second.records is None
    assert len(bench.published) == 1


@pytest.mark.parametrize("dataset", [MEMBERS, USAGE])
def test_without_a_snapshot_postgres_is_the_base(bench: Bench, dataset: Dataset) -> None:
    """And then even nothing new is published: who reads the stream may have lost something."""
    bench.poll(dataset)
    version = bench.world.postgres.chains[dataset].version
    bench.world.redis = Redis(ids=bench.world.redis.ids)
    result = bench.poll(dataset)
    assert isinstance(result, Published)
    assert result.changes == 0
    assert [found.base for found in bench.published] == [version]


def test_a_rolled_back_snapshot_is_no_base(bench: Bench) -> None:
    """An older snapshot would say that what Postgres has is new."""
    bench.poll()
    old = bench.world.redis.copy()
    del bench.world.truth.members["usr_5"]
    bench.poll()
    version = bench.world.postgres.chains[MEMBERS].version
    bench.world.redis = old
    result = bench.poll()
    assert isinstance(result, Published)
    assert (result.changes, bench.published[-1].base) == (0, version)


def test_a_reconcile_is_compared_with_postgres_and_always_published(bench: Bench) -> None:
    """Whatever the snapshot says."""
    bench.poll()
    result = bench.poll(kind=RunKind.RECONCILE)
    assert isinstance(result, Published)
    assert result.changes == 0


def test_a_change_is_published_with_its_base(bench: Bench) -> None:
    """One event for one change, against the version that Postgres holds."""
    bench.poll()
    version = bench.world.postgres.chains[MEMBERS].version
    bench.world.truth.members["usr_5"]["first_name"] = "renamed"
    bench.poll()
    found = bench.published[-1]
    assert found.base == version
    assert [
        (e["subject"], e["data"]["op"], e["data"]["changed"]) for e in orjson.loads(found.entries[0].fields[b"ce"])
    ] == [("member/usr_5", "u", ["first_name"])]


def test_a_snapshot_that_moved_refuses(bench: Bench) -> None:
    """What was compared with a base that is gone is not published; the part goes back without an attempt."""
    bench.poll()
    bench.world.truth.members["usr_5"]["first_name"] = "renamed"
    part = bench.part()
    actor = bench.start(part)
    while not bench.asked[1:]:
        actor.advance(bench.world.rng)
    bench.world.redis = Redis(ids=bench.world.redis.ids)
    (result,) = bench.finish(actor)
    assert isinstance(result, Returned)
    assert (result.reason, result.wait_s) == ("snapshot_moved", 1.0)
    assert (part.status, part.attempts, bench.published) == (PartStatus.WAITING, 0, [])


def test_a_full_stream_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetchers pause for the writer."""
    monkeypatch.setattr(bench.world, "happens", lambda fault, _share: fault == "full")
    part = bench.part()
    (result,) = bench.observe(part)
    assert isinstance(result, Returned)
    assert (result.reason, result.wait_s, part.status) == ("stream_full", 15.0, PartStatus.WAITING)


def test_usage_rows_of_another_version_are_no_base(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day that lost many rows is compared row by row only within one version of Postgres."""

    async def moved(*_: object) -> tuple[int, Listing]:
        return 1, {}

    bench.poll(USAGE)
    bench.world.truth.usage[TODAY] = {}
    monkeypatch.setattr(ModelFacts, "usage_days", moved)
    (result,) = bench.observe(bench.part(USAGE))
    assert isinstance(result, Returned)
    assert result.reason == "base_moved"


def test_an_interrupted_part_is_given_back(bench: Bench) -> None:
    """A worker that is told to stop leaves its parts for the next one; a killed one leaves them to their lease."""
    for kill, status, leased in ((False, PartStatus.WAITING, False), (True, PartStatus.RUNNING, True)):
        part = bench.part()
        actor = bench.start(part)
        actor.advance(bench.world.rng)
        assert part.status is PartStatus.RUNNING
        actor.interrupt(kill=kill)
        bench.finish(actor)
        assert (part.status, bench.world.postgres.chains[MEMBERS].leased) == (status, leased)


def test_a_dataset_under_observation_is_left_alone(bench: Bench) -> None:
    """Nobody asks for what somebody else is asking; the part waits."""
    actor = bench.start(bench.part())
    actor.advance(bench.world.rng)
    part = bench.part()
    assert bench.observe(part) == []
    assert (part.status, bench.asked) == (PartStatus.WAITING, [])


def test_a_part_that_is_done_is_not_asked_again(bench: Bench) -> None:
    """A message that comes twice costs one look at the ledger."""
    part = bench.part()
    bench.observe(part)
    bench.apply()
    bench.results = []
    assert bench.observe(part) == []
    assert len(bench.asked) == 1


def test_a_passing_fault_waits(bench: Bench) -> None:
    """An outage says nothing; the part is tried again."""
    bench.answers["/v1/workspace/members"] = [BUSY]
    part = bench.part()
    (result,) = bench.observe(part)
    assert isinstance(result, Failure)
    assert (result.verdict.finding, part.status, part.attempts) == (Finding.TRANSIENT, PartStatus.WAITING, 1)
    assert bench.asked == ["/v1/workspace/members"]


def test_a_dead_key_is_confirmed_and_ends_its_lane(bench: Bench) -> None:
    """A second probe says the same; the lane's further parts fail without another request."""
    bench.answers |= {"/v1/workspace/members": [DEAD], USER: [DEAD]}
    results = bench.observe(bench.part(), bench.part(USAGE))
    assert [r.verdict.finding for r in results if isinstance(r, Failure)] == [Finding.DEAD, Finding.DEAD]
    assert bench.asked == ["/v1/workspace/members", USER]


@pytest.mark.parametrize("second", [ALIVE, BUSY, REFUSED])
def test_an_unconfirmed_death_is_a_passing_fault(bench: Bench, second: Answer) -> None:
    """Another answer to the probe clears the key, and the lane goes on."""
    bench.answers |= {"/v1/workspace/members": [DEAD], USER: [second]}
    part = bench.part()
    first, other = bench.observe(part, bench.part(USAGE))
    assert isinstance(first, Failure)
    assert (first.verdict.finding, first.verdict.reason) == (Finding.TRANSIENT, "unconfirmed")
    assert part.status is PartStatus.WAITING
    assert isinstance(other, Published)


def test_an_unknown_shape_fails_its_part_only(bench: Bench) -> None:
    """It is no answer about the key, and it removes nobody."""
    bench.poll()
    bench.answers["/v1/workspace/members"] = [Answer(200, {}, b'{"weather": "fine"}')]
    part = bench.part()
    first, other = bench.observe(part, bench.part(USAGE))
    assert isinstance(first, Failure)
    assert (first.verdict.finding, part.status) == (Finding.SCHEMA, PartStatus.FAILED)
    assert isinstance(other, Published)
    assert len(bench.world.postgres.rows[MEMBERS]) == 6


def test_the_day_a_workspace_became_billed_in_money_is_remembered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next question then goes to the right door at once."""
    since = []

    async def remember(_ledger: ModelLedger, _claim: Claim, day: date) -> None:
        since.append(day)

    monkeypatch.setattr(ModelLedger, "remember_cost_since", remember)
    table = {
        "columns": ["timestamp", "product_type", "total_cost", "total_charge_count"],
        "column_types": ["DateTime", "String", "Float", "Float"],
        "column_units": [None, None, "usd", None],
        "rows": [[f"{RECENT.start}T00:00:00Z", "tts", 1.5, 20]],
    }
    bench.answers |= {PRODUCTS: [REFUSED], COSTS: [Answer(200, {}, orjson.dumps(table))]}
    (result,) = bench.observe(bench.part(USAGE))
    assert isinstance(result, Published)
    assert since == [RECENT.start]


def test_an_incomplete_listing_removes_nobody(bench: Bench) -> None:
    """It is told as incomplete, and asked again although the answer is the same."""
    bench.poll()
    listing = bench.world.truth.answer(Request("GET", "/"), without_owner=True)
    bench.answers["/v1/workspace/members"] = [Answer(200, {}, listing)]
    for _ in range(2):
        result = bench.poll()
        assert isinstance(result, Quiet)
        assert (result.incomplete, result.records) == ("no_owner", 5)
    assert len(bench.world.postgres.rows[MEMBERS]) == 6


@pytest.mark.parametrize(("dataset", "rows"), [(MEMBERS, 6), (USAGE, 2)])
def test_a_large_drop_is_held_until_the_third_run(bench: Bench, dataset: Dataset, rows: int) -> None:
    """The same answer counts each time: while removals are held no digest closes a part."""
    truth, postgres = bench.world.truth, bench.world.postgres
    bench.poll(dataset)
    truth.members = {user: member for user, member in truth.members.items() if member["is_owner"]}
    truth.usage[TODAY] = {}
    held = []
    for _ in range(3):
        assert isinstance(bench.poll(dataset), Published)
        held.append(sorted({count for count, _ in postgres.chains[dataset].held.values()}))
    assert held == [[1], [2], []]
    assert isinstance(bench.poll(dataset), Quiet)
    assert len(postgres.rows[dataset]) == (1 if dataset is MEMBERS else rows)


def test_a_repeat_within_a_run_counts_once(bench: Bench) -> None:
    """A part that was fetched twice is no second listing: nothing changed, so it is quiet."""
    bench.poll()
    bench.world.truth.members = {"usr_0": bench.world.truth.members["usr_0"]}
    bench.poll()
    part = bench.part()
    part.run_id = UUID(int=100 + len(bench.world.postgres.parts) - 1)
    (result,) = bench.observe(part)
    assert isinstance(result, Quiet)
    assert {count for count, _ in bench.world.postgres.chains[MEMBERS].held.values()} == {1}


@pytest.mark.parametrize(("lanes", "in_flight"), [((1, 1), 1), ((1, 2), 2)])
def test_a_lane_asks_one_thing_at_a_time(bench: Bench, lanes: tuple[int, int], in_flight: int) -> None:
    """A connector never has more requests in flight than lanes."""
    actor = bench.start(bench.part(lane=lanes[0]), bench.part(USAGE, lane=lanes[1]))
    most = 0
    while actor.parked:
        most = max(most, len(actor.parked))
        actor.advance(bench.world.rng)
    assert most == in_flight
    assert sorted(str(result.claim.dataset) for result in bench.results) == [MEMBERS, USAGE]
