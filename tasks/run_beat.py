"""The beat's process: the clock that makes dispatch tick. Several at once are harmless."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import structlog
from celery.beat import Scheduler, Service

from tasks.app import configure
from worker.settings import Settings

log = structlog.get_logger()


class MemoryScheduler(Scheduler):
    """Keeps no schedule file: the one entry is static, and what is due stands in Postgres."""

    def _ensure_connected(self) -> Any:
        """Connect, trying again at short, bounded intervals: started before its broker, it begins when that does."""
        return self.connection.ensure_connection(
            lambda error, _: log.warning("beat_waits", reason="broker_unreachable", detail=type(error).__name__),
            interval_start=0.2,
            interval_step=0.3,
            interval_max=2.0,
        )


def main(settings: Settings) -> int:
    """Run until SIGTERM; a tick that is not sent then is another beat's, or the next one's."""
    app = configure(settings)
    service = Service(app, max_interval=settings.dispatch_interval_s, scheduler_cls=MemoryScheduler)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit  # `service.stop` would sleep until the next tick is due

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    service.start()
    return 0
