"""Changes fold one listing into the next; nobody is removed on weak grounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import Op
from schemas.records import Listing, Record
from worker.changes import (
    Change,
    GuardLimits,
    Missing,
    diff,
    guard,
    keep_rows,
    merged,
    row_subjects,
)
from worker.usage import usage_day

LIMITS = GuardLimits()
SMALL = GuardLimits(records=2, share=0.5, runs=3)


def judge(missing: set[str], **given_: Any) -> tuple[set[str], Missing]:
    """Ask the guard about a complete listing of a hundred known records, unless told otherwise."""
    known = given_.pop("known", 100)
    options = {
        "known": known,
        "missing": missing,
        "seen": known - len(missing),
        "incomplete": False,
        "held": {},
        "released": (),
        "run_id": "r1",
        "limits": LIMITS,
    } | given_
    answer = guard(**options)
    return set(answer.remove), answer.held


def names(count: int, start: int = 0) -> set[str]:
    return {f"member/{n}" for n in range(start, start + count)}


def fold(base: Listing, changes: list[Change]) -> Listing:
    """Apply changes as a subscriber does."""
    held = dict(base)
    for change in changes:
        if change.op is Op.DELETED:
            assert held.pop(change.subject) == change.before
        else:
            assert held.get(change.subject) == change.before
            assert change.after is not None
            held[change.subject] = change.after
    return held


def test_diff_names_what_happened() -> None:
    """Created, updated and removed records stand by subject, an update with the fields that differ."""
    base = {"m/b": {"x": 1, "y": 1, "z": 1}, "m/c": {"x": 1}, "m/d": {"x": 1}, "m/e": {"x": 1}}
    seen = {"m/e": {"x": 1}, "m/b": {"x": 2, "y": 1, "z": 2}, "m/a": {"x": 1}}
    assert diff(base, seen, remove={"m/d", "m/e", "m/unknown"}) == [
        Change("m/a", Op.CREATED, None, {"x": 1}, ()),
        Change("m/b", Op.UPDATED, base["m/b"], seen["m/b"], ("x", "z")),
        Change("m/d", Op.DELETED, {"x": 1}, None, ()),
    ]


def test_diff_sees_fields_that_come_and_go() -> None:
    """A base of an older version may lack a field or have one more: that is an update."""
    found = diff({"m": {"old": None, "x": 1}}, {"m": {"x": 1, "new": None}}, remove=())
    assert found[0].changed == ("new", "old")


LISTINGS = st.dictionaries(
    st.sampled_from(sorted(names(6))),
    st.fixed_dictionaries({"a": st.integers(0, 2), "b": st.none() | st.booleans()}),
)


@given(LISTINGS, LISTINGS)
def test_diff_folds_base_into_seen(base: Listing, seen: Listing) -> None:
    """With all missing records removed, the changes turn the base into what was seen."""
    assert fold(base, diff(base, seen, remove=base.keys() - seen.keys())) == seen


@given(LISTINGS)
def test_diff_of_equals_is_empty(listing: Listing) -> None:
    """Nothing happened between a listing and its copy."""
    assert diff(listing, {subject: dict(record) for subject, record in listing.items()}, remove=listing) == []


@given(LISTINGS, LISTINGS, st.sets(st.sampled_from(sorted(names(6)))))
def test_merged_is_the_folded_base(base: Listing, seen: Listing, remove: set[str]) -> None:
    """The next base is what a subscriber holds after the changes, and comparing again finds nothing."""
    after = merged(base, seen, remove)
    assert fold(base, diff(base, seen, remove=remove)) == after
    assert diff(after, seen, remove=remove) == []


def test_small_drop_is_removed_at_once() -> None:
    """Ten missing records, or a fifth of the known ones, are ordinary."""
    assert judge(names(10), known=12) == (names(10), {})
    assert judge(names(20)) == (names(20), {})


def test_large_drop_is_held() -> None:
    """More than ten and more than a fifth: nobody is removed, everybody is held once."""
    assert judge(names(21)) == (set(), dict.fromkeys(names(21), (1, "r1")))


def test_nothing_missing_ends_the_hold() -> None:
    """When all are listed again there is neither a removal nor a hold."""
    assert judge(set(), held={"member/1": (2, "r0")}) == (set(), {})


@pytest.mark.parametrize("known", [1, 5, 100])
def test_empty_listing_is_a_large_drop(known: int) -> None:
    """An empty listing removes nobody, however few were known."""
    assert judge(names(known), known=known) == (set(), dict.fromkeys(names(known), (1, "r1")))


def test_empty_listing_of_nothing_is_fine() -> None:
    """Where nothing was known, nothing is missing."""
    assert judge(set(), known=0) == (set(), {})


def test_held_record_goes_after_three_runs() -> None:
    """A held record is removed by the third run in a row that misses it."""
    held: Missing = {}
    for run_id, gone in (("r1", set()), ("r2", set()), ("r3", names(30))):
        removed, held = judge(names(30), held=held, run_id=run_id)
        assert removed == gone
    assert held == {}


def test_repeats_within_a_run_count_once() -> None:
    """A listing asked again in the same run is no further evidence."""
    held = dict.fromkeys(names(30), (2, "r2"))
    assert judge(names(30), held=held, run_id="r2") == (set(), held)


def test_seen_again_leaves_the_hold() -> None:
    """A held record that is listed again starts anew when it is missed again."""
    removed, held = judge(names(25), held=dict.fromkeys(names(30), (2, "r1")), run_id="r2")
    assert (removed, held) == (names(25), {})
    _, held = judge(names(25, start=5), held=dict.fromkeys(names(25), (1, "r1")), run_id="r2")
    assert held == dict.fromkeys(names(20, start=5), (2, "r2")) | dict.fromkeys(names(5, start=25), (1, "r2"))


def test_small_drop_beside_a_hold() -> None:
    """Once the drop is small, newly missing records go at once and held ones keep counting."""
    removed, held = judge(names(3), held={"member/0": (1, "r1")}, run_id="r2")
    assert (removed, held) == ({"member/1", "member/2"}, {"member/0": (2, "r2")})


def test_released_records_go_at_once() -> None:
    """An operator's release removes just the records it names, if they are still missing."""
    removed, held = judge(names(30), held=dict.fromkeys(names(30), (1, "r1")), released=names(2) | {"member/99"})
    assert removed == names(2)
    assert held == dict.fromkeys(names(28, start=2), (1, "r1"))


SUBJECTS = sorted(names(8))
SETS = st.sets(st.sampled_from(SUBJECTS))
HELD = st.dictionaries(st.sampled_from(SUBJECTS), st.tuples(st.integers(1, 2), st.sampled_from(["r0", "r1"])))


@given(SETS, HELD, SETS, st.integers(0, 8))
def test_incomplete_listing_removes_nothing(missing: set[str], held: Missing, released: set[str], seen: int) -> None:
    """An incomplete listing removes and counts nothing; it only ends the hold of what it shows."""
    removed, after = judge(missing, known=8, seen=seen, held=held, released=released, incomplete=True, limits=SMALL)
    assert removed == set()
    assert after == {subject: held[subject] for subject in held if subject in missing}


@given(SETS, HELD, SETS)
def test_guard_judges_each_missing_record_once(missing: set[str], held: Missing, released: set[str]) -> None:
    """Every missing record is either removed or held, nothing else is, and counts stay below the limit."""
    removed, after = judge(missing, known=8, held=held, released=released, limits=SMALL)
    assert removed | after.keys() == missing
    assert not removed & after.keys()
    assert released & missing <= removed
    assert all(runs < SMALL.runs and last == "r1" for runs, last in after.values())


@given(st.lists(st.tuples(st.sampled_from(["r1", "r2", "r3", "r4", "r5", "r6"]), SETS, st.booleans()), max_size=20))
def test_held_record_is_missed_by_three_runs_before_it_goes(
    listings: list[tuple[str, set[str], bool]],
) -> None:
    """A record once held is removed by the third different run in a row that misses it, never earlier or later."""
    base = set(SUBJECTS)
    held: Missing = {}
    runs_missed: dict[str, list[str]] = {}
    for run_id, missing_of_all, incomplete in sorted(listings, key=lambda listing: listing[0]):
        missing = missing_of_all & base
        was_held = set(held)
        for subject in SUBJECTS:
            if subject not in missing:
                runs_missed.pop(subject, None)
            elif not incomplete and run_id not in runs_missed.setdefault(subject, []):
                runs_missed[subject].append(run_id)
        removed, held = judge(missing, known=len(base), held=held, run_id=run_id, incomplete=incomplete, limits=SMALL)
        for subject in was_held & missing:
            assert (subject in removed) == (len(runs_missed[subject]) >= 3 and not incomplete)
        for subject in removed:
            runs_missed.pop(subject, None)
        base -= removed


def day(*rows: tuple[str, str, str], number: int = 1) -> Record:
    """Make a usage day of rows of (key, unit, amount)."""
    return usage_day(
        "member",
        f"2026-03-{number:02d}",
        [{"key": key, "label": None, "unit": unit, "amount": amount} for key, unit, amount in rows],
        settled=False,
    )


def test_kept_rows_come_back_with_their_totals() -> None:
    """Held rows stay in the day as they were last seen, in order and counted; what is listed anew wins."""
    before = day(("a", "credits", "1"), ("b", "credits", "2.5"), ("c", "usd", "3"), ("d", "credits", "4"))
    after = day(("d", "credits", "5"))
    keep = {"usage/member/2026-03-01#" + row for row in ("b|credits", "c|usd", "d|credits", "x|credits")}
    assert keep_rows(before, after, keep) == day(("b", "credits", "2.5"), ("c", "usd", "3"), ("d", "credits", "5"))
    assert row_subjects(after) == ["usage/member/2026-03-01#d|credits"]


DAYS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["credits", "usd"])),
    st.integers(-9, 9).filter(bool).map(str),
).map(lambda rows: day(*((key, unit, amount) for (key, unit), amount in sorted(rows.items()))))


@given(DAYS, DAYS)
def test_keeping_follows_the_listing_rule(before: Record, after: Record) -> None:
    """Keeping no row is the day as seen; keeping every row loses none; keeping is idempotent."""
    assert keep_rows(before, after, ()) == after
    every = row_subjects(before)
    kept = keep_rows(before, after, every)
    assert set(row_subjects(kept)) == {*every, *row_subjects(after)}
    assert keep_rows(before, kept, every) == kept
