"""Compare a listing with its base: what changed, what is held back, what the next snapshot is. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final

from schemas.events import Op
from schemas.records import Listing, Record
from worker.changes import Change, GuardLimits, Missing, diff, guard, keep_rows, merged, row_subjects
from worker.elevenlabs.asking import Page
from worker.packing import Kept
from worker.ports import Base, Claim, Fingerprints
from worker.usage import day_digest, row_count

DIGEST_DIGITS: Final = 32


@dataclass(frozen=True, slots=True)
class Found:
    """What an observation found: changes, the whole new hold, and the snapshot that follows."""

    changes: list[Change]
    held: Missing
    known: int
    following: Base


def answer_digest(claim: Claim, pages: tuple[Page, ...], settled: date) -> str:
    """Digest the request and the raw answer, before any parsing.

    The request counts by its whole days: that its end is cut to now does not make it another question.
    """
    digest = hashlib.sha256(f"{claim.dataset}|{claim.window}|".encode())
    if claim.window is not None:
        digest.update(settled.isoformat().encode())
    for page in pages:
        digest.update(f"|{page.billing}|{page.window}|{len(page.body)}|".encode())
        digest.update(page.body)
    return digest.hexdigest()[:DIGEST_DIGITS]


def compare_records(claim: Claim, base: Base, seen: Listing, *, incomplete: bool, limits: GuardLimits) -> Found:
    """Compare a directory listing with its base."""
    guarded = guard(
        known=len(base.records),
        missing=[subject for subject in base.records if subject not in seen],
        seen=len(seen),
        incomplete=incomplete,
        held=claim.held,
        released=claim.released,
        run_id=str(claim.run_id),
        limits=limits,
    )
    unlike = base.records.unlike(seen) if isinstance(base.records, Kept) else seen
    return Found(
        changes=diff(base.records, unlike, remove=guarded.remove - seen.keys()),
        held=guarded.held,
        known=len(base.records),
        following=Base(claim.number, records=merged(base.records, seen, guarded.remove)),
    )


def day_of(subject: str) -> date:
    """Give the day of `usage/<dimension>/<day>` or of one of its rows."""
    return date.fromisoformat(subject.split("/")[2][:10])


def doubtful_days(claim: Claim, base: Base, prints: Fingerprints, limits: GuardLimits) -> list[str]:
    """List the days whose rows must be compared one by one: a large drop, or rows of it are held already."""
    if not base.days and not claim.held:
        return []
    held = {subject.partition("#")[0] for subject in claim.held}
    return [
        subject
        for subject, (_, rows) in prints.items()
        if subject in held or _lost_many(base.days.get(subject, ("", 0))[1], rows, limits)
    ]


def _lost_many(before: int, after: int, limits: GuardLimits) -> bool:
    return limits.exceeded(missing=before - after, known=before, seen=after)


def fingerprints(days: Listing) -> dict[str, tuple[str, int]]:
    """Digest usage days."""
    return {subject: (day_digest(record), row_count(record)) for subject, record in days.items()}


def compare_usage(
    claim: Claim,
    base: Base,
    seen: Listing,
    prints: Fingerprints,
    *,
    before: Listing,
    limits: GuardLimits,
    horizon: date,
) -> Found:
    """Compare usage days by their fingerprints with those in `base`; `before` holds the doubtful days as last written.

    A doubtful day keeps the rows that are held; days before `horizon` leave the snapshot.
    """
    held: Missing = {s: v for s, v in claim.held.items() if s.partition("#")[0] not in before}
    seen, known = dict(seen), 0
    for subject, old in before.items():
        seen[subject], day_held, rows = _kept(claim, subject, old, seen[subject], limits)
        held |= day_held
        known += rows
    prints = {**prints, **fingerprints({subject: seen[subject] for subject in before})}
    changes = [
        Change(subject, Op.UPDATED if subject in base.days else Op.CREATED, None, record, ())
        for subject, record in sorted(seen.items())
        if base.days.get(subject) != prints[subject]
    ]
    first = horizon.isoformat()
    days = {s: p for s, p in base.days.items() if s[-len(first) :] >= first}  # a subject ends with its day
    following = Base(claim.number, days={**days, **prints})
    return Found(changes, held, known or sum(rows for _, rows in base.days.values()), following)


def _kept(
    claim: Claim, subject: str, old: Record, new: Record, limits: GuardLimits
) -> tuple[Record, Mapping[str, tuple[int, str]], int]:
    known = set(row_subjects(old))
    now = set(row_subjects(new))
    guarded = guard(
        known=len(known),
        missing=sorted(known - now),
        seen=len(now),
        incomplete=False,
        held={s: v for s, v in claim.held.items() if s.partition("#")[0] == subject},
        released=claim.released,
        run_id=str(claim.run_id),
        limits=limits,
    )
    return keep_rows(old, new, keep=guarded.held), guarded.held, len(known)
