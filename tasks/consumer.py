"""Staying connected: quick retries, and a pulse that proves the worker consumes."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from typing import Any, Final

import structlog
from celery import Task
from celery.worker.consumer import Consumer
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from tasks.app import SOCKET_TIMEOUT_S, app

log = structlog.get_logger()

PULSE_S: Final = 5.0
SILENCE_S: Final = 12.0
"""A worker that the broker takes pulses from, but that gets none for so long, is deaf."""


class PromptConsumer(Consumer):
    """Celery's consumer, but quicker, harder to kill, and more discreet.

    A broker that returns is noticed within two seconds, not within thirty; a text that is no message ends nobody; and
    a message that is no task of ours is rejected without its body in the log: whoever sent it may have put a key there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # What is no message at all fails inside kombu, and the queue has it no more: connect anew, and go on.
        known = super().__getattribute__("connection_errors")
        self.connection_errors = (*known, AttributeError, KeyError, TypeError, ValueError)

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying again at short, bounded intervals."""
        conn.ensure_connection = functools.partial(
            conn.ensure_connection, interval_start=0.2, interval_step=0.3, interval_max=2.0
        )
        return super().ensure_connected(conn)

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Reject what is no message of Celery's."""
        self._reject(message, "not_a_task_message")

    def on_unknown_task(self, _body: Any, message: Any, _error: Any) -> None:
        """Reject a task that we do not have."""
        self._reject(message, "unknown_task")

    def on_invalid_task(self, _body: Any, message: Any, _error: Any) -> None:
        """Reject a task message of a wrong shape."""
        self._reject(message, "invalid_task_message")

    def on_decode_error(self, message: Any, _error: Any) -> None:
        """Reject a body that cannot be decoded."""
        self._reject(message, "undecodable_message")

    def _reject(self, message: Any, what: str) -> None:
        log.error("message_rejected", reason=what, queue=(message.delivery_info or {}).get("routing_key"))
        message.reject_log_error(logging.getLogger("tasks.consumer"), self.connection_errors)


class Pulse:
    """Sends this worker a message on a queue of its own, and starts the process anew when none arrives.

    A Celery worker can look alive and consume nothing after its broker hiccuped (seen in the wild:
    celery/celery#8030, celery/celery#10302). A process that replaces itself keeps its pid; what it had in hand
    is due again in the ledger.
    """

    def __init__(self, name: str) -> None:
        self.queue = Queue(f"rollcall.pulse.{name}", auto_delete=True, expires=60.0, message_ttl=PULSE_S)
        self._heard = time.monotonic()
        self._answered = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rollcall-pulse", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending."""
        self._stop.set()
        self._thread.join(SOCKET_TIMEOUT_S * 2)

    def heard(self) -> None:
        """Note that a pulse arrived."""
        self._heard = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(PULSE_S):
            began = time.monotonic()
            if not self._send():
                self._answered = 0.0
                continue
            self._answered = self._answered or began
            if self.deaf(time.monotonic()):
                log.critical("worker_deaf", detail="the broker takes messages but none arrive; starting anew")
                os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program, with its own arguments

    def deaf(self, now: float) -> bool:
        """Tell whether the broker has answered, and nothing has been heard, for too long."""
        return bool(self._answered) and min(now - self._heard, now - self._answered) > SILENCE_S

    def _send(self) -> bool:
        try:
            app.send_task("rollcall.pulse", queue=self.queue, expires=PULSE_S, retry=False, ignore_result=True)
        except (OSError, OperationalError, *app.connection_for_write().recoverable_connection_errors):
            return False
        return True


pulse: Pulse | None = None


@app.task(name="rollcall.pulse", bind=True, acks_late=False)
def heard(_task: Task, **_message: object) -> None:
    """Hear this worker's own pulse."""
    if pulse is not None:
        pulse.heard()
