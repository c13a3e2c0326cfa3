"""Look: ask the provider for a part, and compare what it lists with what was published last.

The base is the snapshot when it is of the version that Postgres holds, else Postgres itself. A listing may be large
and have several forms on its way (body, records, changes, entries): each is let go when the next is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import structlog

from schemas.connectors import RunKind
from schemas.records import Listing
from worker import metrics
from worker.chain import believed
from worker.compare import (
    Found,
    answer_digest,
    compare_records,
    compare_usage,
    day_of,
    doubtful_days,
    fingerprints,
)
from worker.elevenlabs.asking import Asked, ask, probe
from worker.elevenlabs.protocol import Finding, Verdict
from worker.entries import Entry, Report, batches
from worker.errors import ContractBroken
from worker.normalize import directory
from worker.packing import pack, unpack
from worker.plan import settled_before
from worker.ports import Base, Claim, Failure, Head, Packed, Ports, Quiet, Returned
from worker.usage import usage_days
from worker.verdict import CONCLUSIVE

log = structlog.get_logger()

USAGE_HORIZON = timedelta(days=100)
"""Usage days that are older at the time of the run are never asked again: they leave the snapshot."""
REFUSED_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be published, all that is left of the listing; `expected` is the snapshot read before asking."""

    claim: Claim
    expected: int | None
    snapshot: Packed
    digest: str
    entries: Sequence[Entry]
    changes: int


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the provider lists, normalized; `trust`: the snapshot is of the version that Postgres holds."""

    claim: Claim
    seen: Listing
    incomplete: str | None
    digest: str
    trust: bool


async def look(claim: Claim, head: Head, ports: Ports) -> Draft | Quiet | Failure | Returned:
    """Ask for a part, and give what changed since it was published last, if anything.

    Raises:
        TryLater: Postgres or Redis is not there.

    """
    listed = await _listed(claim, head, ports)
    return await _changed(listed, head, ports) if isinstance(listed, _Listed) else listed


async def _listed(claim: Claim, head: Head, ports: Ports) -> _Listed | Quiet | Failure | Returned:
    question = ask(
        claim.dataset,
        claim.window,
        now=claim.began,
        cost_since=claim.target.cost_since,
        most_days=ports.calendar.window_days,
    )
    with metrics.REQUEST_SECONDS.time():
        asked = await ports.provider.converse(claim.target, question)
    for verdict in filter(None, (asked.verdict, asked.rest)):
        metrics.REQUESTS.labels(claim.dataset, verdict.finding).inc()
    if not asked.verdict.ok:
        return Failure(claim, await _confirmed(claim, asked.verdict, ports))
    if asked.cost_since is not None and asked.cost_since != claim.target.cost_since:
        await ports.ledger.remember_cost_since(claim, asked.cost_since)
    return await _read(claim, head, asked, ports)


async def _read(claim: Claim, head: Head, asked: Asked, ports: Ports) -> _Listed | Quiet | Failure | Returned:
    if asked.window is not None and asked.window != claim.window:
        log.info("part_narrowed", days=str(asked.window), rest=asked.rest.reason if asked.rest else "large")
        narrowed = await ports.ledger.narrow(claim, asked.window, asked.rest)
        if narrowed is None:
            return Returned(claim, "chain_moved", REFUSED_WAIT_S)
        claim = narrowed
    settled = settled_before(claim.as_of, ports.calendar)
    trust = claim.kind is not RunKind.RECONCILE and believed(snapshot=head.version, version=claim.version)
    digest = answer_digest(claim, asked.pages, settled)
    if trust and head.digest == digest and not claim.held:
        return Quiet(claim, claim.version, records=None)
    try:
        seen, incomplete = _normalized(claim, asked, settled)
    except ContractBroken as error:
        if latest := asked.latest(ports.calendar.window_days):
            return await _read(claim, head, latest, ports)  # what cannot be read costs no other days
        log.warning("provider_contract_broken", reason=error.reason, detail=error.message)
        return Failure(claim, Verdict(Finding.SCHEMA, error.reason, error.message))
    return _Listed(claim, seen, incomplete, digest, trust)


async def _changed(listed: _Listed, head: Head, ports: Ports) -> Draft | Quiet | Returned:
    claim, seen, incomplete = listed.claim, listed.seen, listed.incomplete
    base, trust = await _base(claim, head, ports, trust=listed.trust)
    found = await _compare(claim, base, seen, incomplete, ports)
    if found is None:
        return Returned(claim, "base_moved", REFUSED_WAIT_S)
    digest = "" if found.held or incomplete else listed.digest
    if trust and not found.changes and found.held == claim.held:
        return Quiet(claim, base.version, records=len(seen), incomplete=incomplete, digest=digest)
    await ports.snapshots.room()  # a draft is several times as large as what it is made of
    return _draft(claim, head, base.version, found, digest, len(seen), incomplete)


async def _base(claim: Claim, head: Head, ports: Ports, *, trust: bool) -> tuple[Base, bool]:
    """Read what to compare with, and tell whether it is the snapshot."""
    if trust and head.packed:
        return unpack(head.packed), True
    if trust and (base := await ports.snapshots.load(claim.target, claim.dataset, claim.version)):
        return base, True
    if not claim.version:
        return Base(0), False  # nothing was ever observed
    return await ports.facts.base(claim.target.connector_id, claim.dataset, since=_horizon(claim)), False


async def _confirmed(claim: Claim, verdict: Verdict, ports: Ports) -> Verdict:
    """Ask once more before a key is called dead: another answer makes the first a passing fault."""
    if verdict.finding not in CONCLUSIVE:
        return verdict
    second = (await ports.provider.converse(claim.target, probe())).verdict
    if second.finding is verdict.finding:
        return verdict
    return Verdict(Finding.TRANSIENT, "unconfirmed", f"first {verdict.reason}, then {second.reason}")


def _normalized(claim: Claim, asked: Asked, settled: date) -> tuple[Listing, str | None]:
    if claim.window is None:
        listed = directory(claim.dataset, asked.pages[0].body)
        return listed.records, listed.incomplete
    return usage_days(claim.dataset, asked.pages, window=claim.window, settled_before=settled), None


def _horizon(claim: Claim) -> date | None:
    return (claim.as_of - USAGE_HORIZON).date() if claim.dataset.dimension else None


async def _compare(claim: Claim, base: Base, seen: Listing, incomplete: str | None, ports: Ports) -> Found | None:
    horizon = _horizon(claim)
    if horizon is None:
        return compare_records(claim, base, seen, incomplete=incomplete is not None, limits=ports.limits)
    before: Listing = {}
    prints = fingerprints(seen)
    if doubtful := doubtful_days(claim, base, prints, ports.limits):
        version, before = await ports.facts.usage_days(
            claim.target.connector_id, claim.dataset, [day_of(subject) for subject in doubtful]
        )
        if version != base.version:
            return None
    return compare_usage(claim, base, seen, prints, before=before, limits=ports.limits, horizon=horizon)


def _draft(
    claim: Claim, head: Head, base: int, found: Found, digest: str, records: int, incomplete: str | None
) -> Draft:
    snapshot = pack(found.following)
    report = Report(
        run_id=claim.run_id,
        records=records,
        changes=len(found.changes),
        known=found.known,
        held=found.held,
        incomplete=incomplete,
    )
    entries = batches(
        found.changes,
        tenant_id=claim.target.tenant_id,
        connector_id=claim.target.connector_id,
        dataset=claim.dataset,
        base=base,
        sequence=claim.number,
        part_id=claim.part_id,
        began=claim.began,
        report=report,
    )
    return Draft(claim, head.version, snapshot, digest, entries, len(found.changes))
