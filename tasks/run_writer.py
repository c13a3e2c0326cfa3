"""The writer's process: folds the streams, and sends what may be sent next."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

import structlog
import uvloop

from tasks.app import configure
from tasks.sending import advance
from worker import memory, metrics
from worker.errors import TryLater
from worker.folding import MAX_PAUSE_S, Writer
from worker.settings import Settings
from worker.store.workers import beat_heart, leave
from worker.wiring import Runtime, process_name, runtime

log = structlog.get_logger()
HEARTBEAT_S = 5.0


def main(settings: Settings) -> int:
    """Run until SIGTERM; a second one is immediate, and what was not acknowledged is read again."""
    configure(settings)
    memory.settle()
    server = metrics.serve(settings.metrics_port, settings.metrics_host) if settings.metrics_port else None
    try:
        uvloop.run(_run(settings))
    finally:
        if server is not None:
            server.close()
    return 0


async def _run(settings: Settings) -> None:
    async with runtime(settings, "writer") as opened:
        writer = Writer(settings, opened.redis, lambda ids: _advance(opened, ids), await _partitions(opened))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _stop, writer)
        heart = asyncio.create_task(_heart(opened, writer), name="heartbeat")
        try:
            await writer.run()
        finally:
            heart.cancel()
            with suppress(asyncio.CancelledError):
                await heart
            with suppress(TryLater):
                await leave(opened.db, process_name())


def _stop(writer: Writer) -> None:
    if writer.stop.is_set():
        os._exit(1)
    writer.stop.set()


async def _partitions(opened: Runtime) -> int:
    pause_s = 0.1
    while True:
        try:
            return await opened.recovery.partitions()
        except TryLater as error:
            log.warning("writer_waits", reason=error.reason, detail=error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)


async def _advance(opened: Runtime, connector_ids: Sequence[UUID]) -> None:
    """Send the next parts; when the broker is away the tick does it later."""
    try:
        await advance(opened, connector_ids)
    except TryLater as error:
        log.info("advance_waits", reason=error.reason)


async def _heart(opened: Runtime, writer: Writer) -> None:
    name = process_name()
    while True:
        with suppress(TryLater):
            await beat_heart(opened.db, name, "writer", 0, quiet_s=time.monotonic() - writer.progress)
        await asyncio.sleep(HEARTBEAT_S)
