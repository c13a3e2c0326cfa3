"""The worker's process: one Celery worker on threads, one event loop beside it."""

from __future__ import annotations

import os
import socket
import threading
import warnings

import celery.apps.worker
from celery.exceptions import SecurityWarning
from celery.signals import worker_shutting_down

from tasks import bridge, consumer
from tasks.app import QUEUES, configure
from tasks.bridge import Bridge
from worker import memory, metrics
from worker.settings import Settings


def main(settings: Settings) -> int:
    """Run until SIGTERM: what is in hand is finished, or given back when the grace period is over.

    A second SIGTERM is immediate, and still loses nothing: the ledger finds it again.
    """
    app = configure(settings)
    # Celery warns of root because of pickle; we take JSON only, and whoever runs us as root knows.
    warnings.simplefilter("ignore", SecurityWarning)
    # It writes past the log to standard output, which may be a pipe of JSON lines.
    celery.apps.worker.safe_say = lambda *_: None
    server = metrics.serve(settings.metrics_port, settings.metrics_host) if settings.metrics_port else None
    here = Bridge(settings, role="worker", slots=settings.worker_slots)
    here.open()
    bridge.install(here)
    stopping = threading.Event()

    def stop(**_: object) -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()
        grace = threading.Timer(settings.shutdown_grace_s, here.interrupt)
        grace.daemon = True
        grace.start()

    worker_shutting_down.connect(stop, weak=False)
    consumer.pulse = consumer.Pulse(here.name)
    app.conf.task_queues = [*app.conf.task_queues, consumer.pulse.queue]
    try:
        worker = app.Worker(
            pool="threads",
            concurrency=settings.worker_slots,
            queues=[*QUEUES, consumer.pulse.queue.name],
            hostname=f"rollcall-{os.getpid()}@{socket.gethostname()}",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            optimization="fair",
            quiet=True,
        )
        consumer.pulse.start()
        memory.settle()
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        consumer.pulse.stop()
        bridge.install(None)
        here.close()
        if server is not None:
            server.close()
