"""The bridge: Celery's threads hand coroutines to the one event loop of their process.

Celery has no pool for coroutines and would report an `async def` task as done without running it. So tasks are
plain functions; what they do runs on one loop thread that owns the HTTP session and the pools.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID

import structlog
import uvloop

from worker import metrics
from worker.errors import RollcallError, TryLater
from worker.settings import Settings
from worker.store.workers import beat_heart, leave
from worker.wiring import Runtime, process_name, runtime

log = structlog.get_logger()
T = TypeVar("T")

START_TIMEOUT_S = 30.0
HEARTBEAT_S = 5.0


class Bridge:
    """A loop thread with a runtime; made once a process, closed by whoever made it."""

    def __init__(self, settings: Settings, *, role: str, slots: int) -> None:
        self._settings, self._role, self._slots = settings, role, slots
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollcall-loop", daemon=True)
        self._ready: Future[Runtime] = Future()
        self._stop = asyncio.Event()
        self._main: Future[None] | None = None
        self._working: set[asyncio.Task[Any] | None] = set()
        self._in_hand: Counter[UUID] = Counter()
        self.name = process_name()
        self.progress = time.monotonic()

    def open(self) -> None:
        """Start the loop and open the runtime.

        Raises:
            Misconfigured: a setting is missing or wrong.

        """
        self._thread.start()
        self._main = asyncio.run_coroutine_threadsafe(self._live(), self._loop)
        self._ready.result(START_TIMEOUT_S)

    async def _live(self) -> None:
        try:
            async with runtime(self._settings, self._role) as opened:
                self._ready.set_result(opened)
                await self._heart(opened)
                with suppress(TryLater):
                    await leave(opened.db, self.name)
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
                return
            raise

    async def _heart(self, opened: Runtime) -> None:
        """Tell Postgres that this process is there and what it can take, and measure the loop's lag.

        What Postgres thinks it has in hand beyond what it has is due again.
        """
        while not self._stop.is_set():
            with suppress(TryLater):
                await beat_heart(
                    opened.db, self.name, self._role, self._slots, quiet_s=time.monotonic() - self.progress
                )
                if strays := await opened.recovery.return_strays(self.name, lambda: self._in_hand):
                    log.warning("claims_returned", parts_due_again=strays)
            due = time.monotonic() + HEARTBEAT_S
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._stop.wait()
            metrics.LOOP_LAG_SECONDS.observe(max(0.0, time.monotonic() - due))

    def run(
        self, work: Callable[[Runtime], Coroutine[Any, Any, T]], *, deadline_s: float, parts: Collection[UUID] = ()
    ) -> T:
        """Run a coroutine on the loop and wait for it; its deadline is enforced on the loop.

        Until it ends, `parts` are in this process's hands.

        Raises:
            TryLater: the deadline passed, or the process is shutting down.

        """

        async def bounded() -> T:
            task = asyncio.current_task()
            self._working.add(task)
            self._in_hand.update(parts)
            try:
                async with asyncio.timeout(deadline_s):
                    return await work(self._ready.result(0))
            finally:
                self._working.discard(task)
                self._in_hand -= Counter(parts)

        try:
            result = asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(deadline_s + 5)
        except TimeoutError:
            raise TryLater("deadline", f"Took longer than {deadline_s:.0f} s.") from None
        except CancelledError:
            raise TryLater("shutting_down", "The process is shutting down.") from None
        self.progress = time.monotonic()
        return result

    def interrupt(self) -> None:
        """Cancel the work in hand: what was claimed is given back, and the tasks end."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._working if task])

    def close(self) -> None:
        """Cancel what runs, close the runtime, stop the loop; bounded."""
        if self._main is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            with suppress(TimeoutError, CancelledError, RollcallError):
                self._main.result(10)
        self._loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()

    def _cancel_all(self) -> None:
        async def drain() -> None:
            tasks = [t for t in asyncio.all_tasks(self._loop) if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        self._drain = self._loop.create_task(drain())


_current: Bridge | None = None


def install(bridge: Bridge | None) -> None:
    """Make `bridge` the one that this process's tasks use."""
    global _current  # noqa: PLW0603 - Celery calls tasks as plain functions: the process's bridge must be found
    _current = bridge


def run(
    name: str, work: Callable[[Runtime], Awaitable[T]], *, deadline_s: float, parts: Collection[UUID] = ()
) -> T | None:
    """Run a task's coroutine; an answer that names itself is logged and ends the task, the rest fails loudly.

    Nothing is retried by Celery: what is not done is due again in the ledger, `parts` that stay claimed too.
    """
    if _current is None:
        raise RuntimeError("no bridge: run tasks in a process started by `rollcall worker`")

    async def coroutine(opened: Runtime) -> T:
        return await work(opened)

    began = time.perf_counter()
    outcome = metrics.Outcome.FAILED
    try:
        result = _current.run(coroutine, deadline_s=deadline_s, parts=parts)
        outcome = metrics.Outcome.DONE
    except TryLater as error:
        outcome = metrics.Outcome.RETRIED
        log.warning("task_waits", task=name, reason=error.reason, detail=error.message)
        return None
    finally:
        metrics.TASK_SECONDS.labels(name, outcome).observe(time.perf_counter() - began)
    return result
