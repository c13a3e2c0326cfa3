"""Dispatch: the tick. What stalled is found again, what is due becomes runs, no more than the queues hold."""

from __future__ import annotations

import asyncio

import structlog

from tasks import bridge
from tasks.app import FETCH, app, send_sync, send_tidy, waiting_messages
from tasks.sending import deliver
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
    unapplied = {n: (await backlog(runtime.redis, n)).oldest for n in range(await recovery.partitions())}
    await recovery.renew({n: at for n, at in unapplied.items() if at is not None})
    for run_id in await recovery.unplanned():
        await asyncio.to_thread(send_sync, run_id)
    waiting = await asyncio.to_thread(waiting_messages)
    room = await recovery.slots() * MESSAGES_PER_SLOT - waiting[FETCH]
    if room > 0:
        stalled = await recovery.stalled(room)
        await deliver(dispatch, await dispatch.more(stalled))
        room -= len(stalled)
    if room > 0:
        await deliver(dispatch, await dispatch.due(min(room, runtime.settings.dispatch_batch)))
    if await recovery.tidy_is_due():
        await asyncio.to_thread(send_tidy)
