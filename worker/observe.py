"""Observe: claim parts, ask the provider, publish what changed. START HERE.

    claim (Postgres) -> ask -> normalize -> compare with the base -> publish (Redis, one atomic step)

What did not change is closed without the stream. Connectors of one message are asked side by side, each over its
lanes, and settled together. Nothing here opens a connection: the ports do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import structlog

from worker import metrics
from worker.elevenlabs.protocol import Verdict
from worker.errors import TryLater
from worker.logs import bind
from worker.look import REFUSED_WAIT_S, Draft, look
from worker.ports import Claim, Failure, Head, Ports, Publication, Quiet, Returned
from worker.verdict import CONCLUSIVE

log = structlog.get_logger()

FULL_WAIT_S = 15.0
TOGETHER_S = 0.5
"""Connectors that end within so long of each other are settled in one transaction: what it costs is mostly its own.

What was published is in the stream already, so nobody sees it any later. What did not change is closed later by that
much, if another connector of the message goes on."""


@dataclass(frozen=True, slots=True)
class Published:
    """A part whose observation is in the stream."""

    claim: Claim
    changes: int


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
        TryLater: Postgres or Redis is not there; what was not settled is given back, or missed by the worker's heart.

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
        unsettled = asking
        try:
            while asking:
                _, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                if asking:
                    _, asking = await asyncio.wait(asking, timeout=TOGETHER_S)
                found = _results(unsettled - asking, failures)
                try:
                    await _settle(found, ports, done)
                except TryLater as away:
                    failures.append(away)
                unsettled = asking
                results += found
                await _note_digests(found, ports)
        except asyncio.CancelledError:
            with suppress(TryLater):  # what has ended by now is not asked once more
                await _settle(_results({task for task in unsettled if task.done()}, failures), ports, done)
            raise
    if failures:
        ours = [failure for failure in failures if not isinstance(failure, TryLater)]
        raise ours[0] if ours else failures[0]
    order = {claim.part_id: place for place, claim in enumerate(claims)}
    return sorted(results, key=lambda result: order[result.claim.part_id])


def _results(ended: Iterable[asyncio.Task[list[Result] | Exception]], failures: list[Exception]) -> list[Result]:
    """Give what came of connectors; what failed goes to `failures`."""
    results: list[Result] = []
    for task in ended:
        outcome = task.result()
        if isinstance(outcome, Exception):
            failures.append(outcome)
        else:
            results += outcome
    return results


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


async def _note_digests(results: Sequence[Result], ports: Ports) -> None:
    """Note by what unchanged snapshots are known from now on; who is not told compares once more."""
    if noted := [r for r in results if isinstance(r, Quiet) and r.digest]:
        try:
            await ports.snapshots.note_digests(noted)
        except TryLater as away:
            log.warning("digests_not_renewed", reason=away.reason, parts=len(noted))


async def _lanes(claims: Sequence[Claim], heads: Mapping[UUID, Head], ports: Ports, done: set[UUID]) -> list[Result]:
    lanes: dict[int, list[Claim]] = {}
    for claim in claims:
        lanes.setdefault(claim.lane, []).append(claim)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_lane(lane, heads, ports, done)) for lane in lanes.values()]
    return [result for task in running for result in task.result()]


async def _lane(claims: Sequence[Claim], heads: Mapping[UUID, Head], ports: Ports, done: set[UUID]) -> list[Result]:
    """Observe parts one by one, as a task of its own."""
    bind(tenant=claims[0].target.tenant_id, connector=claims[0].target.connector_id)
    results: list[Result] = []
    dead: Verdict | None = None
    for claim in claims:
        bind(run=claim.run_id, dataset=claim.dataset)
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
    seen = await look(claim, head, ports)
    return await _publish(seen, ports) if isinstance(seen, Draft) else seen


async def _publish(draft: Draft, ports: Ports) -> Result:
    claim = draft.claim
    publication = await ports.snapshots.publish(
        claim.target, claim.dataset, draft.expected, draft.snapshot, draft.digest, draft.entries
    )
    if publication is Publication.DONE:
        metrics.EVENTS_PUBLISHED.labels(claim.dataset).inc(draft.changes)
        return Published(claim, draft.changes)
    full = publication is Publication.FULL
    return Returned(claim, "stream_full" if full else "snapshot_moved", FULL_WAIT_S if full else REFUSED_WAIT_S)
