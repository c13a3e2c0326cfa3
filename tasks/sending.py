"""From a coroutine to the broker: take what may be sent, send it off the loop, take it back when that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from uuid import UUID

from schemas.connectors import RunKind
from tasks.app import send
from worker.errors import TryLater
from worker.plan import Sending
from worker.store.sending import Dispatch
from worker.wiring import Runtime

BULK = (RunKind.BACKFILL, RunKind.RECONCILE)


async def deliver(dispatch: Dispatch, sendings: Sequence[Sending]) -> None:
    """Send messages; when the broker is away their parts are due again at once.

    Raises:
        TryLater: the broker is away.

    """
    if not sendings:
        return
    try:
        await asyncio.to_thread(send, sendings)
    except TryLater:
        await dispatch.unsend([part_id for s in sendings for part_id in s.lanes])
        raise


async def advance(runtime: Runtime, connector_ids: Collection[UUID]) -> None:
    """Send what may be sent next of these connectors."""
    await deliver(runtime.dispatch, await runtime.dispatch.more(connector_ids))


async def refill(runtime: Runtime) -> None:
    """Send the backfills and reconciles that there is room for now: a message ends long before the next look."""
    if room := await runtime.dispatch.bulk_room():
        await advance(runtime, await runtime.recovery.stalled(room, BULK))
