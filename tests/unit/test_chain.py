"""The chain of versions: numbers rise, one observation fits, one snapshot is believed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.chain import Fate, believed, draw, fate

NOW = datetime(2026, 4, 10, 12, tzinfo=UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000
NUMBERS = st.integers(0, 6)


@given(st.integers(0, 2 * NOW_US), st.lists(st.timedeltas(-timedelta(days=1), timedelta(days=1)), max_size=10))
def test_numbers_rise_whatever_the_clock_does(claimed: int, jumps: list[timedelta]) -> None:
    """Each number is above all that were drawn before, though the clock stands still or goes back."""
    for jump in jumps:
        number = draw(claimed, NOW + jump)
        assert number > claimed
        claimed = number


def test_a_number_is_the_time_in_microseconds() -> None:
    """A person reads a number as a time; and after a restored backup it is above those of the lost future."""
    assert draw(0, NOW) == NOW_US
    assert draw(NOW_US - 1, NOW) == NOW_US
    assert draw(NOW_US + 5, NOW) == NOW_US + 6


@pytest.mark.parametrize(
    ("version", "claimed", "base", "sequence", "expected"),
    [
        (5, 9, 5, 9, Fate.APPLY),
        (0, 9, 0, 9, Fate.APPLY),
        (9, 9, 5, 9, Fate.SEEN),
        (9, 12, 5, 7, Fate.SEEN),
        (5, 9, 4, 9, Fate.RETURN),
        (5, 9, 6, 9, Fate.RETURN),
        (5, 9, 5, 7, Fate.RETURN),
        (5, 9, 5, 11, Fate.RETURN),
    ],
)
def test_the_fate_of_an_observation(version: int, claimed: int, base: int, sequence: int, expected: Fate) -> None:
    """It applies in its place and as the one that was claimed last; it is seen, or it goes back."""
    assert fate(version=version, claimed=claimed, base=base, sequence=sequence) is expected


@given(NUMBERS, NUMBERS, NUMBERS)
def test_at_most_one_number_applies(version: int, claimed: int, base: int) -> None:
    """Of all observations with one base only the open one applies, and none once it was applied."""
    applying = [n for n in range(8) if fate(version=version, claimed=claimed, base=base, sequence=n) is Fate.APPLY]
    assert applying == ([claimed] if base == version < claimed else [])
    for number in applying:
        again = fate(version=number, claimed=claimed, base=base, sequence=number)
        assert again is Fate.SEEN


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_nothing_old_is_applied_or_fetched_again(version: int, claimed: int, base: int, sequence: int) -> None:
    """What is not above the version is over, whatever its base."""
    found = fate(version=version, claimed=claimed, base=base, sequence=sequence)
    assert (found is Fate.SEEN) == (sequence <= version)


@pytest.mark.parametrize(
    ("snapshot", "version", "expected"),
    [(7, 7, True), (None, 7, False), (6, 7, False), (8, 7, False), (None, 0, False), (0, 0, False)],
)
def test_only_a_snapshot_of_the_held_version_is_believed(snapshot: int | None, version: int, expected: bool) -> None:
    """A missing, older or newer snapshot is no base, nor is anything before the first observation."""
    assert believed(snapshot=snapshot, version=version) is expected
