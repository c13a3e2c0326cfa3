"""What an answer says of the credential: access by dataset, and the connector's status. Pure.

Only a confirmed dead key disconnects; everything else degrades one dataset or changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from schemas.connectors import (
    ACTIONS,
    PERMISSIONS,
    Access,
    Action,
    Dataset,
    PartStatus,
    Status,
    StatusReason,
)
from worker.elevenlabs.protocol import Finding, Verdict
from worker.plan import AccessRow

STRIKES: Final = 3
"""Runs in a row with an unexplained 401 before the key counts as dead."""
CEILING_CONNECTORS: Final = 5
CEILING_SHARE: Final = 0.2
CEILING_WINDOW: Final = timedelta(minutes=15)

_DENIED: Final[dict[Finding, StatusReason]] = {
    Finding.SCOPE: StatusReason.SCOPE_MISSING,
    Finding.PLAN: StatusReason.PLAN_TOO_LOW,
    Finding.QUOTA: StatusReason.QUOTA,
    Finding.FORBIDDEN: StatusReason.ROLE_OR_IP,
}
DENIALS: Final = frozenset(_DENIED.values())
"""Why a dataset is denied while the key lives."""
_DEAD: Final[dict[Finding, StatusReason]] = {
    Finding.DEAD: StatusReason.KEY_INVALID,
    Finding.BLOCKED: StatusReason.ACCOUNT_BLOCKED,
    Finding.UNAUTHORIZED: StatusReason.KEY_INVALID,
}
_WORST_FIRST: Final = (
    StatusReason.SCOPE_MISSING,
    StatusReason.PLAN_TOO_LOW,
    StatusReason.ROLE_OR_IP,
    StatusReason.QUOTA,
)
DOUBTS: Final = frozenset(_DEAD)
"""Findings that speak against the key itself."""
RETRIED: Final = frozenset({Finding.TRANSIENT, Finding.EDGE})
CONCLUSIVE: Final = frozenset({Finding.DEAD, Finding.BLOCKED})
"""Findings that disconnect once a second probe says the same."""


@dataclass(frozen=True, slots=True)
class Health:
    """A connector's credential as stored. `strikes` counts runs with an unexplained 401."""

    status: Status
    reason: StatusReason | None = None
    action: Action = Action.NONE
    strikes: int = 0
    strike_run: str | None = None
    suspect_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Deaths:
    """How many connectors seem dead (this one not counted), of how many polled in the last 15 minutes."""

    seeming_dead: int = 0
    polled: int = 0

    @property
    def too_many(self) -> bool:
        """Tell whether one more would look like the provider's fault, not the keys'."""
        dead = self.seeming_dead + 1
        return dead > CEILING_CONNECTORS and dead > CEILING_SHARE * max(self.polled, 1)


def access_after(row: AccessRow, verdict: Verdict, *, now: datetime) -> AccessRow:
    """Give the access row after an answer; an answer that says nothing on access leaves it."""
    if verdict.ok:
        return AccessRow(row.dataset, Access.GRANTED, checked_at=now)
    if verdict.finding is Finding.UNAVAILABLE:
        return replace(row, state=Access.UNAVAILABLE, reason=verdict.reason, missing_permission=None, checked_at=now)
    if (reason := _DENIED.get(verdict.finding)) is None:
        return row
    missing = None
    if verdict.finding is Finding.SCOPE:
        missing = ",".join(verdict.permissions) or PERMISSIONS[row.dataset][0]
    return replace(row, state=Access.DENIED, reason=reason, missing_permission=missing, checked_at=now)


def derive(
    access: Mapping[Dataset, AccessRow], *, removals_held: bool, final: bool
) -> tuple[Status, StatusReason | None, Action]:
    """Give the status a living key deserves.

    Pending while some dataset was never answered, unless `final` (the run is over). A dataset that the
    provider does not have (`unavailable`) degrades nothing: there is nothing the owner could do.
    """
    rows = [access.get(d, AccessRow(d)) for d in Dataset]
    if not final and any(r.state is Access.UNKNOWN for r in rows):
        return Status.PENDING, None, Action.NONE
    denied = {r.reason for r in rows if r.state is Access.DENIED}
    for reason in _WORST_FIRST:
        if reason in denied:
            return Status.DEGRADED, reason, ACTIONS[reason]
    if removals_held:
        return Status.DEGRADED, StatusReason.REMOVALS_HELD, ACTIONS[StatusReason.REMOVALS_HELD]
    return Status.CONNECTED, None, Action.NONE


def alive(health: Health, status: tuple[Status, StatusReason | None, Action]) -> Health:
    """Give the health after an answer that proves the key lives. A paused connector stays paused."""
    calm = replace(health, strikes=0, strike_run=None, suspect_since=None)
    if health.status in {Status.PAUSED, Status.DELETED}:
        return calm
    new, reason, action = status
    if new is Status.PENDING and health.status is not Status.PENDING:
        new, reason, action = Status.CONNECTED, None, Action.NONE
    return replace(calm, status=new, reason=reason, action=action)


def doubted(health: Health, verdict: Verdict, *, run_id: str, deaths: Deaths, now: datetime) -> Health:
    """Give the health after an answer that speaks against the key; `verdict` was confirmed by a second probe.

    An unexplained 401 counts once a run and needs `STRIKES` runs in a row. While too many seem dead at once
    the verdict waits: `suspect_since` is set and the status stays.
    """
    reason = _DEAD.get(verdict.finding)
    if reason is None or health.status in {Status.PAUSED, Status.DELETED, Status.DISCONNECTED}:
        return health
    if verdict.finding is Finding.UNAUTHORIZED:
        if health.strike_run != run_id:
            health = replace(health, strikes=health.strikes + 1, strike_run=run_id)
        if health.strikes < STRIKES:
            return health
    if deaths.too_many:
        return replace(health, suspect_since=health.suspect_since or now)
    return replace(health, status=Status.DISCONNECTED, reason=reason, action=ACTIONS[reason], suspect_since=None)


def proves_alive(verdict: Verdict) -> bool:
    """Tell whether the provider accepted the key, whatever else it refused."""
    return verdict.ok or verdict.finding in _DENIED or verdict.finding is Finding.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class PartOutcome:
    """What becomes of a part. `error_class`: TryLater, OwnerMustAct, ContractBroken or None."""

    status: PartStatus
    error_class: str | None
    error_reason: str | None
    wait_s: float = 0.0


def part_after(verdict: Verdict, *, attempts: int, most: int, backoff_s: float) -> PartOutcome:
    """Decide what becomes of a part that got this answer at its `attempts`-th attempt of `most`."""
    if verdict.ok:
        return PartOutcome(PartStatus.SUCCEEDED, None, None)
    finding, reason = verdict.finding, verdict.reason
    if finding in RETRIED:
        unreadable = reason == "unparseable" and attempts > 1
        if attempts < most and not unreadable:
            return PartOutcome(PartStatus.WAITING, "TryLater", reason, max(backoff_s, verdict.retry_after_s or 0.0))
        return PartOutcome(PartStatus.FAILED, "ContractBroken" if unreadable else "TryLater", reason)
    if finding is Finding.UNAVAILABLE:
        return PartOutcome(PartStatus.SKIPPED, None, reason)
    if finding in {Finding.BUG, Finding.SCHEMA}:
        return PartOutcome(PartStatus.FAILED, "ContractBroken", reason)
    return PartOutcome(PartStatus.FAILED, "OwnerMustAct", reason)
