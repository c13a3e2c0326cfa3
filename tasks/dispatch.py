"""Dispatch: the tick. What stalled is found again, what is due becomes runs, no more than the queues hold."""

from __future__ import annotations

import asyncio

import structlog

from tasks import bridge
from tasks.app import FETCH, app, send_sync, send_tidy, waiting_messages
from tasks.sending import deliver
from tasks.upkeep import trim_stream
from worker.stream import backlog, tick
from worker.wiring import Runtime

log = structlog.get_logger()
DEADLINE_S = 60.0
MESSAGES_PER_SLOT = 4
"""How much work may wait at the broker: enough to keep every slot busy until the next tick, no more."""


@app.task(name="rollcall.dispatch_due")
def dispatch_due(**_message: object) -> None:
    """Run one tick; two at once are harmless."""
    bridge.run("dispatch_due", _tick, deadline_s=DEADLINE_S)


async def _tick(runtime: Runtime) -> None:
    dispatch, recovery = runtime.dispatch, runtime.recovery
    if await recovery.redis_went_back(await tick(runtime.redis)) and (lost := await recovery.void_messages()):
        log.warning("redis_lost_data", parts_due_again=lost)
    logs = {n: await backlog(runtime.redis, n) for n in range(await recovery.partitions())}
    await recovery.renew({n: found.oldest for n, found in logs.items() if found.oldest is not None})
    for partition, found in logs.items():
        if found.entries > runtime.settings.stream_ceiling_entries // 2:
            await trim_stream(runtime, partition)
    if exhausted := await recovery.give_up(runtime.settings.part_attempts):
        log.error("parts_given_up", parts=exhausted)
    for run_id in await recovery.unplanned():
        await asyncio.to_thread(send_sync, run_id)
    waiting = await asyncio.to_thread(waiting_messages)
    lost = await recovery.bury() + (0 if any(waiting.values()) else await recovery.void_unclaimed())
    if lost:
        log.warning("parts_lost", parts_due_again=lost)
    room = await recovery.slots() * MESSAGES_PER_SLOT - waiting[FETCH]
    if room > 0:
        stalled = await recovery.stalled(room)
        await deliver(dispatch, await dispatch.more(stalled))
        room -= len(stalled)
    if room > 0:
        await deliver(dispatch, await dispatch.due(min(room, runtime.settings.dispatch_batch)))
    if await recovery.tidy_is_due():
        await asyncio.to_thread(send_tidy)
