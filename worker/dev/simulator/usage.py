"""The usage of one workspace: credits per UTC day and atom, generated until somebody edits a day."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from zlib import crc32

from worker.dev.simulator.generate import Atom, Spec, amounts, sources

DAY_S: Final = 86_400
DAY_MS: Final = 86_400_000

# A hundredth of a credit costs two millionths of the currency and counts as three hundredths of a unit.
MICROS_PER_HUNDREDTH: Final = 2
COUNT_PER_HUNDREDTH: Final = 3


@lru_cache(maxsize=65_536)
def second_of_day(atom: Atom) -> int:
    """Place an atom's usage within its day; a quarter falls on midnight, where inclusive ends show."""
    mark = crc32(repr(atom).encode())
    return 0 if mark % 4 == 0 else mark % DAY_S


@dataclass(slots=True)
class Usage:
    """Amounts in hundredths of a credit; days are counted from 1970-01-01.

    `today` is only half used up and falls on midnight whole, so that a reader sees the same figures all day.
    """

    tag: str
    spec: Spec
    anchor_day: int
    edits: dict[int, dict[Atom, int]] = field(default_factory=dict)

    def first_day(self, today: int) -> int:
        """Tell the oldest generated day; it stays where it was when the clock moves on."""
        return min(self.anchor_day, today) - self.spec.history_days

    def of_day(self, day: int, today: int) -> Iterable[tuple[Atom, int]]:
        """Give the atoms of one day; an atom may come twice and an amount may be zero."""
        edited = self.edits.get(day)
        if edited is not None:
            return edited.items()
        if not self.first_day(today) <= day <= today:
            return ()
        atoms = sources(self.tag, self.spec)
        drawn = amounts(self.tag, day, len(atoms))
        if day == today:
            drawn = [amount // 2 for amount in drawn]
        return zip(atoms, drawn, strict=True)

    def days(self, first: int, last: int, today: int) -> Iterator[int]:
        """Give the days from first to last, both included, that may hold usage."""
        generated = range(max(first, self.first_day(today)), min(last, today) + 1)
        outside = [day for day in self.edits if first <= day <= last and day not in generated]
        yield from sorted([*generated, *outside])

    def edit(self, day: int, today: int) -> dict[Atom, int]:
        """Give a day's amounts to be changed; from now on the day holds what is written there."""
        summed: dict[Atom, int] = {}
        for atom, amount in self.of_day(day, today):
            if amount:
                summed[atom] = summed.get(atom, 0) + amount
        self.edits[day] = summed
        return summed
