"""Dispatch: the tick. What stalled is found again, what is due becomes runs, no more than the queues hold."""

from __future__ import annotations

import asyncio
import time

import structlog

from schemas.connectors import RunKind
from tasks import bridge
from tasks.app import BACKFILL, FETCH, app, send_sync, send_tidy, waiting_messages
from tasks.sending import BULK, deliver
from tasks.upkeep import trim_stream
from worker import metrics
from worker.plan import POLLS_PER_MESSAGE, Sending
from worker.stream import backlog, tick
from worker.wiring import Runtime

log = structlog.get_logger()
DEADLINE_S = 60.0
POLLS = (RunKind.POLL,)
MESSAGES_PER_SLOT = 1
"""How much work may wait at the broker: enough to keep every slot busy until the next look, no more."""
FEED_S = 0.1
"""While there is more than the queues hold, a tick goes on feeding them until the next one comes."""


@app.task(name="rollcall.dispatch_due")
def dispatch_due(**_message: object) -> None:
    """Run one tick; two at once are harmless."""
    bridge.run("dispatch_due", _tick, deadline_s=DEADLINE_S)


async def _tick(runtime: Runtime) -> None:
    await _find_lost(runtime)
    await _look_after_streams(runtime)
    for run_id in await runtime.recovery.unplanned():
        await asyncio.to_thread(send_sync, run_id)
    until = time.monotonic() + runtime.settings.dispatch_interval_s
    waiting = await asyncio.to_thread(waiting_messages, [FETCH, BACKFILL])
    for queue, kinds in ((FETCH, POLLS), (BACKFILL, BULK)):
        if lost := await runtime.recovery.void_unclaimed(kinds, waiting=waiting[queue]):
            log.warning("messages_lost", parts_due_again=lost)
    more = await _send_due(runtime, waiting[FETCH])
    while more and time.monotonic() < until:
        await asyncio.sleep(FEED_S)
        more = await _send_due(runtime, (await asyncio.to_thread(waiting_messages, [FETCH]))[FETCH])
    for status, parts in (await runtime.recovery.open_parts()).items():
        metrics.PARTS.labels(status).set(parts)
    if await runtime.recovery.tidy_is_due():
        await asyncio.to_thread(send_tidy)


async def _find_lost(runtime: Runtime) -> None:
    """Make due again what a lost Redis or silent workers had in hand; give up what kills whoever asks for it."""
    recovery = runtime.recovery
    lost = await recovery.bury()
    if await recovery.redis_went_back(lambda: tick(runtime.redis)):
        # Subscribers may have read what Redis forgot: without snapshots the next polls publish, and show the break.
        await runtime.snapshots.forget_all()
        lost += await recovery.void_messages()
        await recovery.redis_is_known()
    if lost:
        log.warning("parts_lost", parts_due_again=lost)
    if exhausted := await recovery.give_up(runtime.settings.part_attempts):
        log.error("parts_given_up", parts=exhausted)


async def _look_after_streams(runtime: Runtime) -> None:
    """Tell published parts that wait for the writer from those whose entry is gone, and trim what grew long."""
    recovery = runtime.recovery
    looked = await recovery.now()
    logs = {n: await backlog(runtime.redis, n) for n in range(await recovery.partitions())}
    # Where nothing waits, that holds for all that was published before this look.
    if lost := await recovery.look_after_published({n: looked - found.age for n, found in logs.items()}):
        log.warning("entries_lost", parts_due_again=lost)
    for partition, found in logs.items():
        if found.entries > runtime.settings.stream_ceiling_entries // 2:
            await trim_stream(runtime, partition)


async def _send_due(runtime: Runtime, waiting: int) -> bool:
    """Send what stalled, then what is due, no more than the queues have room for; tell whether there is more.

    Room is counted in connectors, as if messages were full: `waiting` messages take it away.
    """
    recovery, dispatch = runtime.recovery, runtime.dispatch
    messages = await recovery.slots() * MESSAGES_PER_SLOT - waiting
    room = max(0, messages) * POLLS_PER_MESSAGE
    polls = await recovery.stalled(room, POLLS)
    bulk_room = await dispatch.bulk_room()  # apart: a backlog hides no poll, and takes none's room
    bulk = await recovery.stalled(bulk_room, BULK)
    await deliver(dispatch, await dispatch.more(polls | bulk))
    due: list[Sending] = []
    most = min(room - len(polls), runtime.settings.dispatch_batch)
    async for some in dispatch.due(most):
        await deliver(dispatch, some)
        due += some
    taken = len(bulk) + sum(sending.kind in BULK for sending in due)
    return taken >= bulk_room or len(polls) >= room or len(due) >= most
