"""The beat's process: the clock that makes dispatch tick. Several at once are harmless."""

from __future__ import annotations

import signal
from types import FrameType

from celery.beat import Scheduler, Service

from tasks.app import configure
from worker.settings import Settings


class MemoryScheduler(Scheduler):
    """Keeps no schedule file: the one entry is static, and what is due stands in Postgres."""


def main(settings: Settings) -> int:
    """Run until SIGTERM."""
    app = configure(settings)
    service = Service(app, max_interval=settings.dispatch_interval_s, scheduler_cls=MemoryScheduler)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        service.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    service.start()
    return 0
