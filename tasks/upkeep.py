"""Upkeep: streams trimmed behind the slowest group, old rows aged out, late traces of deleted connectors erased."""

from __future__ import annotations

import structlog

from tasks import bridge
from tasks.app import app
from worker.deadletters import DeadLetters
from worker.store.upkeep import age_out, deleted_lately
from worker.stream import trim
from worker.wiring import Runtime

log = structlog.get_logger()
DEADLINE_S = 120.0


@app.task(name="rollcall.upkeep.tidy")
def tidy(**_message: object) -> None:
    """Trim the streams, forget what was kept long enough."""

    async def work(runtime: Runtime) -> None:
        settings = runtime.settings
        for partition in range(await runtime.recovery.partitions()):
            await trim_stream(runtime, partition)
        gone = await age_out(
            runtime.db, run_days=settings.run_retention_days, people_days=settings.people_retention_days
        )
        await forget_deleted(runtime)
        log.info("tidied", **gone)

    bridge.run("upkeep_tidy", work, deadline_s=DEADLINE_S)


async def forget_deleted(runtime: Runtime) -> None:
    """Forget in Redis what a task under way wrote of connectors after they were deleted."""
    if deleted := await deleted_lately(runtime.db):
        for partition, connector_id in deleted:
            await runtime.snapshots.forget(partition, connector_id)
        await DeadLetters(runtime.redis).drop_of([connector_id for _, connector_id in deleted])


async def trim_stream(runtime: Runtime, partition: int) -> None:
    """Trim one stream, and tell the groups that lost entries by it."""
    behind = await trim(
        runtime.redis,
        partition,
        retention_s=runtime.settings.event_retention_s,
        ceiling_entries=runtime.settings.stream_ceiling_entries,
    )
    if behind:
        log.warning("stream_reset", partition=partition, groups=behind)
