"""What changed between two listings, and which of the missing records may be called removed.

A *base* is what was last published, held records included; *seen* is what the provider lists now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from schemas.events import Op
from schemas.records import Listing, Record
from worker.usage import usage_day

Missing: TypeAlias = dict[str, tuple[int, str]]
"""Held subjects: in how many runs in a row each was missing, and the id of the last of these runs."""


class Change(NamedTuple):
    """One record's step from `before` to `after`; `changed` names the fields that differ in an update.

    A usage day carries the whole day in `after` and nothing else.
    """

    subject: str
    op: Op
    before: Record | None
    after: Record | None
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """When a drop is large: more than `records` of them *and* more than `share` of the known ones.

    `runs` is in how many listings in a row a held record must be missing to be removed.
    """

    records: int = 10
    share: float = 0.2
    runs: int = 3

    def exceeded(self, *, missing: int, known: int, seen: int) -> bool:
        """Tell whether losing `missing` of `known` records is a large drop; losing all always is."""
        if seen == 0 and known > 0:
            return True
        return missing > self.records and missing > self.share * known


@dataclass(frozen=True, slots=True)
class Guarded:
    """The guard's answer: what to remove now, and what is held after this listing."""

    remove: frozenset[str]
    held: Missing


def diff(base: Mapping[str, Record], seen: Listing, *, remove: Collection[str]) -> list[Change]:
    """Compare two listings, sorted by subject; what is missing is a deletion only if `remove` names it."""
    changes = []
    for subject, after in seen.items():
        before = base.get(subject)
        if before is None:
            changes.append(Change(subject, Op.CREATED, None, after, ()))
        elif before is not after and before != after:
            changes.append(Change(subject, Op.UPDATED, before, after, _changed(before, after)))
    changes.extend(
        Change(subject, Op.DELETED, base[subject], None, ()) for subject in (base.keys() & remove) - seen.keys()
    )
    return sorted(changes, key=lambda change: change.subject)


def merged(base: Mapping[str, Record], seen: Listing, remove: Collection[str]) -> Listing:
    """Make the next base: what is seen, and what is missing but not removed as it was last seen."""
    held = {subject: base[subject] for subject in base if subject not in seen and subject not in remove}
    return seen | held


def guard(
    *,
    known: int,
    missing: Collection[str],
    seen: int,
    incomplete: bool,
    held: Missing,
    released: Collection[str],
    run_id: str,
    limits: GuardLimits,
) -> Guarded:
    """Decide which missing records are removed now and which are held, from one listing.

    An incomplete listing removes nothing and counts for nothing, but what it shows is missing no more. From
    a complete one the missing are removed, unless the drop is large: then they become held. A held record
    goes when it was missing in `limits.runs` runs in a row, or at once when an operator released it; whether
    the drop is still large does not matter to it.

    Args:
        known: how many records the base has.
        missing: the subjects of the base that were not listed.
        seen: how many records were listed.
        incomplete: the listing may not be the whole one.
        held: what was held before.
        released: subjects an operator has released.
        run_id: the listing's run; a repeat within a run counts once.
        limits: what a large drop is.

    """
    if incomplete:
        return Guarded(frozenset(), {subject: held[subject] for subject in missing if subject in held})
    large = limits.exceeded(missing=len(missing), known=known, seen=seen)
    remove = set()
    still: Missing = {}
    for subject in missing:
        runs, last = held.get(subject, (0, ""))
        if subject in released or not (runs or large):
            remove.add(subject)
            continue
        if last != run_id:
            runs += 1
        if runs >= limits.runs:
            remove.add(subject)
        else:
            still[subject] = (runs, run_id)
    return Guarded(frozenset(remove), still)


def row_subjects(record: Record) -> list[str]:
    """Name the rows of a usage day, in their order: `<the day's subject>#<key>|<unit>`."""
    day = f"usage/{record['dimension']}/{record['bucket_start']}"
    return [f"{day}#{row_name(row['key'], row['unit'])}" for row in record["rows"]]


def row_name(key: str, unit: str) -> str:
    """Name a row within its day."""
    return f"{key}|{unit}"


def keep_rows(before: Record, after: Record, keep: Collection[str]) -> Record:
    """Give the day `after` with the rows of `before` that `keep` names and `after` lacks; totals are anew."""
    rows = dict(zip(row_subjects(after), after["rows"], strict=True))
    for subject, row in zip(row_subjects(before), before["rows"], strict=True):
        if subject in keep:
            rows.setdefault(subject, row)
    in_order = sorted(rows.values(), key=lambda row: (row["key"], row["unit"]))
    return usage_day(after["dimension"], after["bucket_start"], in_order, settled=after["settled"])


def _changed(before: Record, after: Record) -> tuple[str, ...]:
    # A field may stand in one only: a base written by an older version.
    return tuple(name for name in {**after, **before} if before.get(name, ...) != after.get(name, ...))
