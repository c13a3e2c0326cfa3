"""Observe: claim parts, ask the provider, publish what changed. START HERE.

    claim (Postgres) -> ask -> normalize -> compare with the base -> publish (Redis, one atomic step)

The base is the snapshot when it is of the version that Postgres holds, else Postgres itself. What did not
change is closed without the stream. Nothing here opens a connection: the ports do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

import structlog

from schemas.connectors import RunKind
from schemas.records import Listing
from worker import metrics
from worker.chain import believed
from worker.changes import GuardLimits
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
from worker.entries import Report, batches
from worker.errors import ContractBroken, TryLater
from worker.logs import bound
from worker.normalize import directory
from worker.plan import Calendar, settled_before
from worker.ports import (
    Base,
    Claim,
    Facts,
    Failure,
    Head,
    Ledger,
    Provider,
    Publication,
    Quiet,
    Snapshots,
)
from worker.usage import usage_days
from worker.verdict import CONCLUSIVE

log = structlog.get_logger()

USAGE_HORIZON = timedelta(days=100)
"""Usage days that are older at the time of the run are never asked again: they leave the snapshot."""
REFUSED_WAIT_S = 1.0
FULL_WAIT_S = 15.0
TOGETHER_S = 0.02
"""Connectors that end within so long of each other are settled in one transaction."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What observing needs of the world."""

    ledger: Ledger
    facts: Facts
    snapshots: Snapshots
    provider: Provider
    calendar: Calendar
    limits: GuardLimits


@dataclass(frozen=True, slots=True)
class Published:
    """A part whose observation is in the stream."""

    claim: Claim
    changes: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A part that was given back, to be fetched again."""

    claim: Claim
    reason: str
    wait_s: float


Result = Quiet | Published | Failure | Returned
_RESULTS = {
    Quiet: metrics.Result.QUIET,
    Published: metrics.Result.PUBLISHED,
    Failure: metrics.Result.FAILED,
    Returned: metrics.Result.REFUSED,
}


async def observe(part_ids: Sequence[UUID], ports: Ports) -> list[Result]:
    """Observe these parts; every part succeeds, waits or fails by itself, and no connector waits for another.

    Parts of a connector that share a lane are asked one after the other, so it never has more requests in flight
    than it has lanes.

    Raises:
        TryLater: Postgres or Redis is not there; what was not settled is given back, or found by its lease.

    """
    claims = await ports.ledger.claim(part_ids)
    if not claims:
        return []
    done: set[UUID] = set()
    try:
        return await _connectors(claims, ports, done)
    except (asyncio.CancelledError, TryLater) as interruption:
        wait_s = FULL_WAIT_S if isinstance(interruption, TryLater) else 0.0
        for claim in claims:
            if claim.part_id not in done:
                await ports.ledger.give_back(claim, "interrupted", wait_s)
        raise


async def _connectors(claims: Sequence[Claim], ports: Ports, done: set[UUID]) -> list[Result]:
    heads = await ports.snapshots.heads(claims)
    connectors: dict[UUID, list[Claim]] = {}
    for claim in claims:
        connectors.setdefault(claim.target.connector_id, []).append(claim)
    results: list[Result] = []
    failures: list[Exception] = []
    async with asyncio.TaskGroup() as group:
        asking = {group.create_task(_connector(some, heads, ports, done)) for some in connectors.values()}
        while asking:
            ended, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            if asking:
                soon, asking = await asyncio.wait(asking, timeout=TOGETHER_S)
                ended |= soon
            found: list[Result] = []
            for task in ended:
                outcome = task.result()
                if isinstance(outcome, Exception):
                    failures.append(outcome)
                else:
                    found += outcome
            try:
                await _settle(found, ports, done)
            except TryLater as away:
                failures.append(away)
            results += found
    if failures:
        ours = [failure for failure in failures if not isinstance(failure, TryLater)]
        raise ours[0] if ours else failures[0]
    order = {claim.part_id: place for place, claim in enumerate(claims)}
    return sorted(results, key=lambda result: order[result.claim.part_id])


async def _connector(
    claims: Sequence[Claim], heads: Mapping[UUID, Head], ports: Ports, done: set[UUID]
) -> list[Result] | Exception:
    """Observe one connector's parts; its failure is returned, so that it ends nobody else's work."""
    try:
        return await _lanes(claims, heads, ports, done)
    except ExceptionGroup as failures:
        away, ours = failures.split(TryLater)
        first = ours or away
        return first.exceptions[0] if first else failures


async def _settle(results: Sequence[Result], ports: Ports, done: set[UUID]) -> None:
    """Write what came of several connectors' parts in one transaction of each kind."""
    if quiet := [r for r in results if isinstance(r, Quiet)]:
        await ports.ledger.close_quiet(quiet)
        done |= {r.claim.part_id for r in quiet}
    if published := [r.claim for r in results if isinstance(r, Published)]:
        await ports.ledger.published(published)


async def _lanes(claims: Sequence[Claim], heads: Mapping[UUID, Head], ports: Ports, done: set[UUID]) -> list[Result]:
    lanes: dict[int, list[Claim]] = {}
    for claim in claims:
        lanes.setdefault(claim.lane, []).append(claim)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_lane(lane, heads, ports, done)) for lane in lanes.values()]
    return [result for task in running for result in task.result()]


async def _lane(claims: Sequence[Claim], heads: Mapping[UUID, Head], ports: Ports, done: set[UUID]) -> list[Result]:
    results: list[Result] = []
    dead: Verdict | None = None
    for claim in claims:
        target = claim.target
        with bound(
            tenant=target.tenant_id,
            connector=str(target.connector_id),
            run=str(claim.run_id),
            dataset=str(claim.dataset),
        ):
            result: Result = (
                Failure(claim, dead) if dead else await _observe_one(claim, heads.get(claim.part_id, Head()), ports)
            )
            if isinstance(result, Failure):
                dead = result.verdict if result.verdict.finding in CONCLUSIVE else None
                log.info("part_failed", finding=str(result.verdict.finding), reason=result.verdict.reason)
                await ports.ledger.failed(result)
            elif isinstance(result, Returned):
                await ports.ledger.give_back(claim, result.reason, result.wait_s)
        if not isinstance(result, Quiet):
            done.add(claim.part_id)
        metrics.OBSERVATIONS.labels(claim.dataset, _RESULTS[type(result)]).inc()
        results.append(result)
    return results


async def _observe_one(claim: Claim, head: Head, ports: Ports) -> Result:
    settled = settled_before(claim.as_of, ports.calendar)
    try:
        question = ask(claim.dataset, claim.window, now=claim.began, cost_since=claim.target.cost_since)
        with metrics.REQUEST_SECONDS.time():
            asked = await ports.provider.converse(claim.target, question)
        metrics.REQUESTS.labels(claim.dataset, asked.verdict.finding).inc()
        if not asked.verdict.ok:
            return Failure(claim, await _confirmed(claim, asked.verdict, ports))
        if asked.cost_since is not None and asked.cost_since != claim.target.cost_since:
            await ports.ledger.remember_cost_since(claim, asked.cost_since)
        trust = claim.kind is not RunKind.RECONCILE and believed(snapshot=head.version, version=claim.version)
        digest = answer_digest(claim, asked.pages, settled)
        if trust and head.digest == digest and not claim.held:
            return Quiet(claim, claim.version, records=None)
        seen, incomplete = _normalized(claim, asked, settled)
    except ContractBroken as error:
        log.warning("provider_contract_broken", reason=error.reason, detail=error.message)
        return Failure(claim, Verdict(Finding.SCHEMA, error.reason, error.message))
    base, trust = await _base(claim, ports, trust=trust)
    found = await _compare(claim, base, seen, incomplete, ports)
    if found is None:
        return Returned(claim, "base_moved", REFUSED_WAIT_S)
    if found.held or incomplete:
        digest = ""
    if trust and not found.changes and found.held == claim.held:
        if digest:
            await ports.snapshots.note_digest(claim.target, claim.dataset, base.version, digest)
        return Quiet(claim, base.version, records=len(seen), incomplete=incomplete)
    return await _publish(claim, head, base.version, found, digest, len(seen), incomplete, ports)


async def _base(claim: Claim, ports: Ports, *, trust: bool) -> tuple[Base, bool]:
    """Read what to compare with, and tell whether it is the snapshot."""
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
    if doubtful := doubtful_days(claim, base, fingerprints(seen), ports.limits):
        version, before = await ports.facts.usage_days(
            claim.target.connector_id, claim.dataset, [day_of(subject) for subject in doubtful]
        )
        if version != base.version:
            return None
    return compare_usage(claim, base, seen, before=before, limits=ports.limits, horizon=horizon)


async def _publish(
    claim: Claim,
    head: Head,
    base: int,
    found: Found,
    digest: str,
    records: int,
    incomplete: str | None,
    ports: Ports,
) -> Result:
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
    publication = await ports.snapshots.publish(
        claim.target, claim.dataset, head.version, found.following, digest, entries
    )
    if publication is Publication.DONE:
        metrics.EVENTS_PUBLISHED.labels(claim.dataset).inc(len(found.changes))
        return Published(claim, len(found.changes))
    full = publication is Publication.FULL
    return Returned(claim, "stream_full" if full else "snapshot_moved", FULL_WAIT_S if full else REFUSED_WAIT_S)
