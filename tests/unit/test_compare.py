"""Compare: a listing against its base, and the snapshot that follows from both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import Dataset, RunKind
from schemas.events import Op
from schemas.records import Listing, Record
from worker.changes import GuardLimits, Missing
from worker.compare import Found, answer_digest, compare_records, compare_usage, day_of, doubtful_days, fingerprints
from worker.elevenlabs.asking import Billing, Page, Window
from worker.packing import pack, unpack
from worker.ports import Base, Claim, Target
from worker.usage import usage_day

NOON = datetime(2026, 4, 10, 12, tzinfo=UTC)
SETTLED, HORIZON = date(2026, 4, 7), date(2026, 1, 1)
LIMITS = GuardLimits(records=2, share=0.5, runs=3)
TODAY, YESTERDAY = "2026-04-10", "2026-04-09"
WINDOW = Window(date(2026, 4, 9), date(2026, 4, 11))
KEYS = st.sets(st.sampled_from("abcdefgh"))
AMOUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), max_size=8)


def claim(dataset: Dataset = Dataset.MEMBERS, run: int = 1, **more: Any) -> Claim:
    given_ = Claim(
        part_id=UUID(int=1),
        run_id=UUID(int=run),
        kind=RunKind.POLL,
        dataset=dataset,
        target=Target(UUID(int=7), "acme", "https://provider.test", "sealed", 0),
        number=9,
        version=4,
        as_of=NOON,
        began=NOON,
        window=WINDOW if dataset.dimension else None,
    )
    return replace(given_, **more)


def listing(names: Mapping[str, object] | set[str]) -> Listing:
    values = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return {f"member/{name}": {"user_id": name, "first_name": value} for name, value in values.items()}


def day(amounts: Mapping[str, int], at: str = TODAY) -> Record:
    rows: list[Record] = [
        {"key": key, "label": None, "unit": "credits", "amount": str(amount)} for key, amount in sorted(amounts.items())
    ]
    return usage_day("product", at, rows, settled=False)


def days(**amounts: Mapping[str, int]) -> Listing:
    """Make usage days, by keyword `d10` for the tenth."""
    dates = {f"2026-04-{name[1:]}": found for name, found in amounts.items()}
    return {f"usage/product/{at}": day(found, at) for at, found in dates.items()}


def folded(rows: Listing, found: Found) -> Listing:
    """Fold the changes as the writer does."""
    rows = dict(rows)
    for change in found.changes:
        if change.after is None:
            del rows[change.subject]
        else:
            rows[change.subject] = change.after
    return rows


PAGE = Page(Billing.CREDITS, WINDOW, b'{"rows":[]}')


def test_the_same_answer_has_the_same_digest() -> None:
    """Also in another run and at another time of the day: its cut end does not make it another question."""
    first = answer_digest(claim(Dataset.USAGE_PRODUCT), (PAGE,), SETTLED)
    later = claim(Dataset.USAGE_PRODUCT, run=2, number=12, began=NOON + timedelta(hours=3))
    assert answer_digest(later, (PAGE,), SETTLED) == first


def test_another_question_or_answer_has_another_digest() -> None:
    """Dataset, window, settled day, billing, body, and where a body ends: all of it counts."""
    usage = claim(Dataset.USAGE_PRODUCT)
    earlier = Window(date(2026, 4, 8), date(2026, 4, 10))
    digests = [
        answer_digest(usage, (PAGE,), SETTLED),
        answer_digest(claim(Dataset.USAGE_MEMBER), (PAGE,), SETTLED),
        answer_digest(replace(usage, window=earlier), (PAGE,), SETTLED),
        answer_digest(usage, (PAGE,), SETTLED + timedelta(days=1)),
        answer_digest(usage, (replace(PAGE, billing=Billing.COST),), SETTLED),
        answer_digest(usage, (replace(PAGE, window=earlier),), SETTLED),
        answer_digest(usage, (replace(PAGE, body=b'{"rows":[1]}'),), SETTLED),
        answer_digest(usage, (PAGE, PAGE), SETTLED),
        answer_digest(usage, (), SETTLED),
        answer_digest(claim(), (Page(None, None, PAGE.body),), SETTLED),
    ]
    assert len({*digests}) == len(digests)


def test_a_directory_does_not_care_for_days() -> None:
    """Midnight changes nothing about members."""
    page = Page(None, None, b"[]")
    assert answer_digest(claim(), (page,), SETTLED) == answer_digest(claim(), (page,), SETTLED + timedelta(days=1))


@given(AMOUNTS, AMOUNTS, st.booleans(), KEYS, KEYS)
def test_the_next_snapshot_is_what_the_writer_will_hold(
    old: dict[str, int], new: dict[str, int], incomplete: bool, held: set[str], released: set[str]
) -> None:
    """Base plus changes is the following snapshot, held records included, under the claim's number."""
    before: Missing = {f"member/{name}": (2, "earlier") for name in held if name in old}
    asked = claim(held=before, released=frozenset(f"member/{name}" for name in released))
    base = Base(4, records=listing(old))
    found = compare_records(asked, base, listing(new), incomplete=incomplete, limits=LIMITS)
    assert found.following.records == folded(base.records, found)
    assert found.following.version == 9
    assert found.known == len(old)
    assert found.held.keys() <= found.following.records.keys() - listing(new).keys()
    assert listing(new).items() <= found.following.records.items()
    assert not (incomplete and any(change.op is Op.DELETED for change in found.changes))
    kept = unpack(pack(base))
    assert compare_records(asked, kept, listing(new), incomplete=incomplete, limits=LIMITS) == found


@given(AMOUNTS)
def test_an_unchanged_listing_has_no_changes(old: dict[str, int]) -> None:
    """Nothing is invented."""
    found = compare_records(claim(), Base(4, records=listing(old)), listing(old), incomplete=False, limits=LIMITS)
    assert (found.changes, found.held) == ([], {})


def test_a_large_drop_is_held_for_three_runs() -> None:
    """The records stay in the snapshot, so that the next run misses them again; the third run removes them."""
    base = Base(4, records=listing(set("abcdef")))
    held: Missing = {}
    removed = []
    for run in (1, 2, 3):
        asked = claim(run=run, held=held)
        found = compare_records(asked, base, listing(set("ab")), incomplete=False, limits=LIMITS)
        base, held = found.following, found.held
        removed.append([change.subject for change in found.changes])
    assert removed == [[], [], [f"member/{name}" for name in "cdef"]]
    assert (held, base.records) == ({}, listing(set("ab")))


def compare_days(asked: Claim, base: Base, seen: Listing, rows: Listing) -> Found:
    """Compare as `observe` does: doubtful days are read from `rows`."""
    doubtful = doubtful_days(asked, base, fingerprints(seen), LIMITS)
    before = {subject: rows[subject] for subject in doubtful if subject in rows}
    return compare_usage(asked, base, seen, fingerprints(seen), before=before, limits=LIMITS, horizon=HORIZON)


@given(AMOUNTS, AMOUNTS, AMOUNTS)
def test_the_next_fingerprints_are_those_of_the_days_written(
    old: dict[str, int], new: dict[str, int], other: dict[str, int]
) -> None:
    """Days plus changes have the following snapshot's fingerprints, and days that were not asked keep theirs."""
    rows = days(d08=other, d09=other, d10=old)
    found = compare_days(claim(Dataset.USAGE_PRODUCT), Base(4, days=fingerprints(rows)), days(d09=other, d10=new), rows)
    written = folded(rows, found)
    assert found.following.days == fingerprints(written)
    assert {change.subject for change in found.changes} <= {"usage/product/2026-04-10"}
    assert found.following.version == 9
    assert all(subject.startswith("usage/product/2026-04-10#") for subject in found.held)


def test_a_new_day_is_created_and_a_known_one_updated() -> None:
    """The op says whether the day was known; the event carries the whole day and nothing else."""
    rows = days(d09={"a": 1})
    seen = days(d09={"a": 2}, d10={"b": 1})
    found = compare_days(claim(Dataset.USAGE_PRODUCT), Base(4, days=fingerprints(rows)), seen, rows)
    assert [(change.op, change.before, change.after) for change in found.changes] == [
        (Op.UPDATED, None, seen["usage/product/2026-04-09"]),
        (Op.CREATED, None, seen["usage/product/2026-04-10"]),
    ]


def test_a_day_that_becomes_settled_is_told() -> None:
    """Its rows are the same, but it will not be polled any more."""
    rows = days(d09={"a": 1})
    seen = {subject: record | {"settled": True} for subject, record in rows.items()}
    found = compare_days(claim(Dataset.USAGE_PRODUCT), Base(4, days=fingerprints(rows)), seen, rows)
    assert [change.after for change in found.changes] == list(seen.values())


def test_old_days_leave_the_snapshot() -> None:
    """What will never be asked again need not be remembered; leaving is no change."""
    rows = {**days(d10={"a": 1}), "usage/product/2025-12-31": day({"a": 1}, "2025-12-31")}
    found = compare_days(claim(Dataset.USAGE_PRODUCT), Base(4, days=fingerprints(rows)), days(d10={"a": 1}), rows)
    assert (found.changes, set(found.following.days)) == ([], {"usage/product/2026-04-10"})


@pytest.mark.parametrize(
    ("before", "after", "doubtful"),
    [
        ("abcdef", "abc", False),
        ("abcdef", "ab", True),
        ("abcdef", "abcdefgh", False),
        ("ab", "", True),
        ("", "", False),
        ("abc", "ab", False),
        ("abcd", "efgh", False),
    ],
)
def test_a_day_that_lost_many_rows_is_doubtful(before: str, after: str, doubtful: bool) -> None:
    """More than two and more than half of them, or all."""
    base = Base(4, days=fingerprints(days(d10=dict.fromkeys(before, 1))))
    prints = fingerprints(days(d10=dict.fromkeys(after, 1)))
    found = doubtful_days(claim(Dataset.USAGE_PRODUCT), base, prints, LIMITS)
    assert found == (["usage/product/2026-04-10"] if doubtful else [])


def test_a_day_with_held_rows_stays_doubtful() -> None:
    """Until they are gone or back, its rows are compared one by one."""
    asked = claim(Dataset.USAGE_PRODUCT, held={"usage/product/2026-04-10#a|credits": (1, "earlier")})
    prints = fingerprints(days(d09={"a": 1}, d10={"a": 1}))
    assert doubtful_days(asked, Base(4, days=prints), prints, LIMITS) == ["usage/product/2026-04-10"]


def test_dropped_rows_are_kept_for_three_runs() -> None:
    """Updates of the day flow on, with the held rows in it; the third run lets them go."""
    rows = days(d10=dict.fromkeys("abcdef", 1))
    held: Missing = {}
    amounts = []
    for run in (1, 2, 3):
        asked = claim(Dataset.USAGE_PRODUCT, run=run, held=held)
        found = compare_days(asked, Base(4, days=fingerprints(rows)), days(d10={"a": run + 1}), rows)
        rows, held = folded(rows, found), found.held
        amounts.append({row["key"]: row["amount"] for row in rows["usage/product/2026-04-10"]["rows"]})
        assert found.following.days == fingerprints(rows)
    kept = dict.fromkeys("bcdef", "1")
    assert amounts == [{"a": "2", **kept}, {"a": "3", **kept}, {"a": "4"}]
    assert held == {}


def test_rows_that_come_back_are_held_no_more() -> None:
    """A provider that forgot for a while is forgiven, and the day is no change."""
    rows = days(d10=dict.fromkeys("abcdef", 1))
    asked = claim(Dataset.USAGE_PRODUCT, held={f"usage/product/2026-04-10#{key}|credits": (2, "x") for key in "bcdef"})
    found = compare_days(asked, Base(4, days=fingerprints(rows)), rows, rows)
    assert (found.changes, found.held) == ([], {})


def test_a_hold_of_another_day_is_carried_on() -> None:
    """A poll that does not ask for a day says nothing of its held rows."""
    held: Missing = {"usage/product/2026-03-01#a|credits": (1, "earlier")}
    rows = days(d10={"a": 1})
    found = compare_days(claim(Dataset.USAGE_PRODUCT, held=held), Base(4, days=fingerprints(rows)), rows, rows)
    assert found.held == held


def test_released_rows_go_at_once() -> None:
    """An operator's release needs no third run."""
    rows = days(d10=dict.fromkeys("abcdef", 1))
    gone = frozenset(f"usage/product/2026-04-10#{key}|credits" for key in "bcdef")
    asked = claim(Dataset.USAGE_PRODUCT, held=dict.fromkeys(gone, (1, "x")), released=gone)
    found = compare_days(asked, Base(4, days=fingerprints(rows)), days(d10={"a": 1}), rows)
    assert folded(rows, found) == days(d10={"a": 1})
    assert found.held == {}


def test_a_row_knows_its_day() -> None:
    """Subjects of days and of rows lead to the same date."""
    assert day_of("usage/product/2026-04-10") == day_of("usage/product/2026-04-10#a|credits") == date(2026, 4, 10)
