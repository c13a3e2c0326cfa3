"""The history checker catches each kind of violation, and finds none in an honest run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson
import pytest

from tests.fixtures.evidence import Close, Evidence, Move, Said, Step, Truth, Values, Write
from tests.fixtures.history import Event, Kind, check
from tests.fixtures.states import dataset_of

CONNECTOR = "c1"
START_S = 1_790_000_000
DAY = "usage/product/2026-04-01"
NOW = {"u1": "Ana", "u2": "Bo"}
"""The members in the end."""
REPORT = orjson.dumps({"held": {}, "incomplete": None})


@dataclass
class Tale:
    """A run of one connector in which everybody did right, ten seconds between any two things."""

    truth: Truth = field(default_factory=Truth)
    said: list[Said] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    closes: list[Close] = field(default_factory=list)
    values: Values = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    now_s: int = START_S

    def be(self, *, used: dict[str, str] | None = None, **members: str) -> None:
        """The provider's members are called so now; `used` is the usage of one day."""
        values: Values = {f"member/{user}": {"name": name} for user, name in members.items()}
        if used is not None:
            values[DAY] = {(product, "credits"): Decimal(amount) for product, amount in used.items()}
        self.now_s += 10
        self.truth.add(values, began=self.now_s, done=self.now_s + 0.1)

    def poll(self, seeing: Values | None = None, *, applied: bool = True, asked_s: int = 0) -> None:
        """Observe and apply what changed.

        Here lies are planted: `seeing` what is not true, `applied` False for what never reaches Postgres,
        `asked_s` for how long before it was published the provider was asked.
        """
        self.now_s += 10
        wanted = self.truth.now if seeing is None else seeing
        subjects = [s for s in wanted.keys() | self.values.keys() if wanted.get(s) != self.values.get(s)]
        for dataset in sorted({dataset_of(s) for s in subjects}):
            mine = sorted(s for s in subjects if dataset_of(s) == dataset)
            self.publish(dataset, [self.event(s, wanted.get(s), asked_s) for s in mine])
            if applied:
                self.apply(dataset, {s: wanted.get(s) for s in mine})
            if applied and seeing is None and not asked_s:
                self.close(dataset)

    def event(self, subject: str, after: Any, asked_s: int = 0) -> Event:
        before = self.values.get(subject)
        data: dict[str, Any] = {"op": "d" if after is None else "u" if before else "c"}
        if subject.startswith("usage/"):
            rows = [{"key": key, "unit": unit, "amount": str(amount)} for (key, unit), amount in (after or {}).items()]
            data |= {"op": "u", "settled": False, "rows": rows}
        else:
            data |= {"before": before, "after": after, "changed": []}
        return {
            "id": f"{subject}@{self.now_s:020d}",
            "subject": subject,
            "type": "io.rollcall.elevenlabs.member.changed.v1",
            "time": datetime.fromtimestamp(self.now_s - asked_s, UTC).isoformat().replace("+00:00", "Z"),
            "data": data,
        }

    def publish(self, dataset: str, events: list[Event]) -> None:
        """Say an observation in pieces of one event."""
        base = str(self.versions.get(dataset, 0)).encode()
        head = {b"connector": CONNECTOR.encode(), b"dataset": dataset.encode(), b"base": base}
        pieces = [[event] for event in events] or [[]]
        for number, piece in enumerate(pieces):
            last = {b"part": b"p", b"report": REPORT} if number == len(pieces) - 1 else {}
            fields = {**head, b"sequence": str(self.now_s).encode(), b"ce": orjson.dumps(piece), **last}
            self.said.append(Said(0, f"{(self.now_s + 1) * 1000}-{number}", fields))

    def apply(self, dataset: str, values: Values) -> None:
        self.versions[dataset] = self.now_s
        self.steps.append(Step(CONNECTOR, dataset, self.now_s))
        for subject, after in values.items():
            self.writes.append(Write(CONNECTOR, subject, self.now_s, removed=not after and subject != DAY))
            self.values.pop(subject, None)
            if after is not None:
                self.values[subject] = after

    def close(self, dataset: str) -> None:
        """Call what Postgres holds of a dataset what the provider has now."""
        version = self.versions[dataset]
        self.closes.append(Close(CONNECTOR, dataset, version, self.now_s, began=self.now_s, done=self.now_s + 1))

    def announce(self, what: str, sequence: int, *, reason: str = "") -> None:
        event = {
            "id": f"row-{sequence}",
            "type": f"io.rollcall.elevenlabs.{what}.v1",
            "connectorid": CONNECTOR,
            "sequence": f"{sequence:020d}",
            "data": {"reason": reason},
        }
        fields = {b"connector": CONNECTOR.encode(), b"ce": orjson.dumps([event])}
        self.said.append(Said(0, f"{self.now_s * 1000}-9", fields))

    def evidence(self) -> Evidence:
        return Evidence(
            truths={CONNECTOR: self.truth},
            said=self.said,
            steps=self.steps,
            writes=self.writes,
            closes=self.closes,
            moves=[Move(CONNECTOR, "connected")],
            values={CONNECTOR: self.values},
            versions={(CONNECTOR, dataset): version for dataset, version in self.versions.items()},
        )

    def kinds(self) -> set[Kind]:
        return kinds(self.evidence())


def kinds(evidence: Evidence) -> set[Kind]:
    return {violation.kind for violation in check(evidence)}


@pytest.fixture
def tale() -> Tale:
    """Members come, change, go and come back; a day's usage grows."""
    made = Tale()
    made.be(u1="Ana", u2="Bo")
    made.poll()
    made.be(u1="Anna", u3="Cy", used={"tts": "10"})
    made.poll()
    made.be(u1="Ana", u2="Bo", used={"tts": "10", "stt": "2.5"})
    made.poll()
    return made


def spoil(entry: Said, change: Callable[[Event], object]) -> Said:
    """Change the first event of an entry."""
    events = orjson.loads(entry.fields[b"ce"])
    change(events[0])
    return replace(entry, fields={**entry.fields, b"ce": orjson.dumps(events)})


def test_an_honest_run_has_no_violation(tale: Tale) -> None:
    """Changes, removals, returns and usage that everybody tells alike are no violation."""
    assert check(tale.evidence()) == []


def test_saying_a_thing_again_is_no_violation(tale: Tale) -> None:
    """Delivery is at least once: the same entries again, and the same announcement again, are allowed."""
    tale.announce("connector.connected", 1)
    tale.said += [replace(entry, id=f"9{entry.id}") for entry in tale.said]
    assert tale.kinds() == set()


def test_what_was_published_but_not_applied_is_no_violation(tale: Tale) -> None:
    """An observation that a flush took away is made up for by the next one."""
    tale.be(u1="Lost on the way")
    tale.poll(applied=False)
    tale.poll()
    assert tale.kinds() == set()


def test_a_change_under_way_may_be_seen_or_not() -> None:
    """While a change is made both states are true; afterwards only the new one is."""
    truth = Truth()
    truth.add({"member/u1": "old"}, began=0, done=1)
    truth.add({"member/u1": "new"}, began=10, done=11)
    seen = {
        at: [bool(truth.when("member/u1", name, since=at, until=at)) for name in ("old", "new")] for at in (9, 10.5, 12)
    }
    assert seen == {9: [True, False], 10.5: [True, True], 12: [False, True]}


def test_a_record_missing_in_the_end_is_lost(tale: Tale) -> None:
    """What the provider has and Postgres has not is lost."""
    del tale.values["member/u2"]
    assert tale.kinds() == {Kind.LOST}


def test_a_stale_record_or_amount_is_lost(tale: Tale) -> None:
    """What Postgres has otherwise than the provider is a lost change."""
    tale.be(**{**NOW, "u1": "Somebody else"}, used={"tts": "10", "stt": "2.5"})
    assert tale.kinds() == {Kind.LOST}
    tale.be(**NOW, used={"tts": "11"})
    assert tale.kinds() == {Kind.LOST}


def test_a_record_too_many_is_invented(tale: Tale) -> None:
    """What Postgres has and the provider has not is invented."""
    tale.values["member/u9"] = {"name": "Nobody"}
    assert tale.kinds() == {Kind.INVENTED}


def test_an_event_that_never_was_true_is_invented(tale: Tale) -> None:
    """A state that the provider never had is invented, even if the next poll mends it."""
    tale.poll(seeing={**tale.truth.now, "member/u1": {"name": "Nobody"}})
    tale.poll()
    assert tale.kinds() == {Kind.INVENTED}


def test_an_event_out_of_its_time_is_invented(tale: Tale) -> None:
    """What was true, but not while the provider was asked, is invented."""
    tale.poll(seeing={**tale.truth.now, "member/u1": {"name": "Anna"}})
    tale.poll()
    assert tale.kinds() == {Kind.INVENTED}


def test_a_version_that_no_entry_tells_of_is_invented(tale: Tale) -> None:
    """What Postgres applied must have come through the stream."""
    gone = tale.said[-1].fields[b"sequence"]
    tale.said = [entry for entry in tale.said if entry.fields[b"sequence"] != gone]
    assert Kind.INVENTED in tale.kinds()


def test_a_write_that_no_event_tells_of_is_invented(tale: Tale) -> None:
    """A row written beside what was observed is invented."""
    tale.writes.append(Write(CONNECTOR, "member/u9", tale.now_s))
    assert tale.kinds() == {Kind.INVENTED}


def test_an_event_that_was_not_written_is_lost(tale: Tale) -> None:
    """Applying a version means writing each of its events."""
    tale.writes.pop()
    assert tale.kinds() == {Kind.LOST}


def test_half_an_observation_is_lost(tale: Tale) -> None:
    """An observation whose last entry is missing tells of a loss."""
    first = tale.said[0]
    assert b"part" not in first.fields
    tale.said.append(replace(first, id="9-0"))
    assert tale.kinds() == {Kind.LOST}


def test_a_change_between_two_others_is_lost(tale: Tale) -> None:
    """An event must start from what the last one of its record said."""
    last = next(n for n, entry in enumerate(tale.said) if b'"before":{"name":"Anna"}' in entry.fields[b"ce"])
    tale.said[last] = spoil(tale.said[last], lambda event: event["data"].update(before={"name": "Ann"}))
    assert tale.kinds() == {Kind.LOST}


def test_a_subscriber_that_is_misled_has_lost_something(tale: Tale) -> None:
    """What was published and not applied must be followed by something that tells subscribers to replay."""
    before = tale.truth.now
    tale.be(u1="Only for subscribers", used={"tts": "10", "stt": "2.5"})
    tale.poll(applied=False)
    tale.truth.add(before, began=tale.now_s + 5, done=tale.now_s + 6)
    assert tale.kinds() == {Kind.LOST}
    tale.now_s += 10
    tale.publish("members", [])
    tale.apply("members", {})
    assert tale.kinds() == set()


def test_an_announcement_that_nobody_heard_is_lost(tale: Tale) -> None:
    """What Postgres counts as relayed must have been on the stream."""
    tale.announce("connector.connected", 1)
    heard, silent = tale.evidence(), tale.evidence()
    heard.announced, silent.announced = ["row-1"], ["row-2"]
    assert kinds(heard) == set()
    assert kinds(silent) == {Kind.LOST}


def test_a_part_that_is_done_too_early_is_not_done(tale: Tale) -> None:
    """What a part calls unchanged must be so, even if a later one mends it."""
    tale.close("members")
    assert tale.kinds() == set()
    tale.be(u1="Overlooked", used={"tts": "10", "stt": "2.5"})
    tale.now_s += 10
    tale.close("members")
    tale.poll()
    assert tale.kinds() == {Kind.NOT_DONE}


def test_versions_that_go_back_are_reordered(tale: Tale) -> None:
    """A dataset's versions only rise, and each rests on the one before."""
    members = [step for step in tale.steps if step.dataset == "members"]
    rest = [step for step in tale.steps if step.dataset != "members"]
    tale.steps = [*rest, members[0], members[2], members[1]]
    assert Kind.REORDERED in tale.kinds()


def test_a_base_that_was_not_held_is_reordered(tale: Tale) -> None:
    """An observation applied to another version than it was compared with is out of its place."""
    for number, entry in enumerate(tale.said):
        if entry.fields[b"sequence"] == tale.said[-1].fields[b"sequence"]:
            tale.said[number] = replace(entry, fields={**entry.fields, b"base": b"5"})
    assert Kind.REORDERED in tale.kinds()


def test_a_record_written_out_of_order_is_reordered(tale: Tale) -> None:
    """The versions of one record only rise."""
    mine = [write for write in tale.writes if write.subject == "member/u1"]
    rest = [write for write in tale.writes if write.subject != "member/u1"]
    tale.writes = [*rest, mine[0], mine[2], mine[1]]
    assert tale.kinds() == {Kind.REORDERED}


def test_going_back_in_the_providers_time_is_reordered() -> None:
    """An older answer applied after a newer one is out of order, though both were true while they were asked."""
    tale = Tale()
    for name in ("A", "B", "C"):
        tale.be(u1=name)
    tale.poll(asked_s=15)
    tale.poll(seeing={"member/u1": {"name": "B"}}, asked_s=25)
    tale.poll()
    assert tale.kinds() == {Kind.REORDERED}


def test_announcements_out_of_order_are_reordered(tale: Tale) -> None:
    """A connector's announcements come in the order in which they were written."""
    tale.announce("connector.degraded", 2)
    tale.announce("connector.connected", 1)
    assert tale.kinds() == {Kind.REORDERED}


def test_a_version_applied_again_is_twice(tale: Tale) -> None:
    """A version is applied once."""
    tale.steps.append(tale.steps[-1])
    assert tale.kinds() == {Kind.TWICE}


def test_a_record_written_again_is_twice(tale: Tale) -> None:
    """A record is written once at a version."""
    tale.writes.append(tale.writes[-1])
    assert tale.kinds() == {Kind.TWICE}


def test_an_event_that_changes_nothing_is_twice(tale: Tale) -> None:
    """What was said already, of a record or of a usage day, is not said again under a new number."""
    for subject in ("member/u1", DAY):
        tale.now_s += 10
        value = tale.values[subject]
        tale.publish(dataset_of(subject), [tale.event(subject, value)])
        tale.apply(dataset_of(subject), {subject: value})
        assert tale.kinds() == {Kind.TWICE}


def test_one_number_for_two_things_is_altered(tale: Tale) -> None:
    """An observation said again must be the same."""
    entry = tale.said[-1]
    assert b"part" in entry.fields
    tale.said.append(spoil(entry, lambda event: event["data"].update(rows=[])))
    assert Kind.ALTERED in tale.kinds()


def test_an_event_with_another_id_is_altered(tale: Tale) -> None:
    """An event's id follows from its subject and sequence."""
    tale.said[0] = spoil(tale.said[0], lambda event: event.update(id="other"))
    assert tale.kinds() == {Kind.ALTERED}


def test_an_announcement_that_changes_is_altered(tale: Tale) -> None:
    """An announcement published again is the same."""
    tale.announce("connector.degraded", 1)
    tale.announce("connector.degraded", 1, reason="quota")
    assert tale.kinds() == {Kind.ALTERED}


def test_a_disconnect_of_a_living_key_is_false(tale: Tale) -> None:
    """A connector may be disconnected only if its key died, in the table and in what is announced."""
    written = tale.evidence()
    written.moves = [Move(CONNECTOR, "disconnected")]
    assert kinds(written) == {Kind.FALSE_DISCONNECT}
    written.dead = {CONNECTOR}
    assert kinds(written) == set()
    tale.announce("connector.disconnected", 1, reason="key_invalid")
    assert tale.kinds() == {Kind.FALSE_DISCONNECT}


def test_a_deletion_of_what_was_there_is_false(tale: Tale) -> None:
    """A record that the provider had all the while must not be deleted, not even for a moment."""
    tale.poll(seeing={subject: value for subject, value in tale.truth.now.items() if subject != "member/u1"})
    tale.poll()
    assert tale.kinds() == {Kind.FALSE_DELETION}
