"""Supervisor: keeps our processes running, side by side, for as long as this one lives.

A child that dies is started again after a growing, bounded pause. When this process dies, however it dies, a
guard beside each child tells it to stop: a shell that waits on a pipe which only we hold open.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from worker.errors import Misconfigured

LOOK_S: Final = 0.1
LONGEST_PAUSE_S: Final = 30.0
STEADY_S: Final = 60.0
"""A child that lived so long did not die of its start: its pauses begin anew."""
MISCONFIGURED: Final = 78
"""Exit code of a child that no further start will help."""
KILL_WAIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Program:
    """A child: its name, and the arguments for our own Python. Secrets travel in the environment only."""

    name: str
    arguments: tuple[str, ...]


@dataclass(slots=True)
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    guard: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    due: float = 0.0


def restart_pause_s(deaths: int, draw: float) -> float:
    """Give the pause after so many deaths in a row, seconds: doubling up to 30, with full jitter `draw` (0..1)."""
    return draw * min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(deaths, 16))


class Supervisor:
    """Starts programs, starts them again when they die, stops them. Its owner calls it from any one thread.

    Args:
        programs: what to run.
        environ: the whole environment of every child.
        say: is told, on one line, what happened to a child.
        grace_s: seconds a child has to end after SIGTERM, before SIGKILL.

    """

    def __init__(
        self, programs: Sequence[Program], environ: Mapping[str, str], *, say: Callable[[str], None], grace_s: float
    ) -> None:
        self._children = {program.name: _Child(program) for program in programs}
        self._environ, self._say, self._grace_s = dict(environ), say, grace_s
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None
        self.failure: str | None = None
        """Why it gave up: a child that cannot start as things are set up."""

    @property
    def processes(self) -> dict[str, int | None]:
        """The children's process ids by name; None while one is down."""
        with self._lock:
            return {name: child.process.pid if _lives(child) else None for name, child in self._children.items()}  # type: ignore[union-attr] # `_lives` has looked

    def start(self) -> None:
        """Start every program, and watch over them."""
        with self._lock:
            for child in self._children.values():
                self._launch(child)
        self._watch = threading.Thread(target=self._watch_over, name="supervisor", daemon=True)
        self._watch.start()

    def stop(self) -> None:
        """Stop every child, with SIGKILL for those that take too long; harmless if not started."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        with self._lock:
            self._end(list(self._children.values()))

    def kill(self, name: str) -> None:
        """Kill a child, as a crash would: it is started again."""
        with self._lock:
            child = self._children[name]
            if child.process is not None:
                child.process.kill()

    def restart(self, name: str) -> None:
        """Stop a child in order and start it again."""
        with self._lock:
            child = self._children[name]
            self._end([child])
            self._launch(child)

    def check(self) -> None:
        """Raise Misconfigured when a child cannot start as things are set up; it has said why itself."""
        if self.failure is not None:
            raise Misconfigured("process_misconfigured", self.failure)

    def _launch(self, child: _Child) -> None:
        process = subprocess.Popen(
            [sys.executable, *child.program.arguments],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # our own stdout holds results only
            start_new_session=True,  # Ctrl-C is for us: we stop them in order
        )
        try:
            child.guard = subprocess.Popen(
                ["/bin/sh", "-c", f"read -r _ || kill -s TERM {process.pid}"],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError:
            process.kill()
            process.wait(KILL_WAIT_S)
            raise
        child.process, child.started, child.due = process, time.monotonic(), math.inf

    def _watch_over(self) -> None:
        while not self._stopping.wait(LOOK_S):
            with self._lock:
                for child in self._children.values():
                    self._look_after(child)

    def _look_after(self, child: _Child) -> None:
        if child.process is None:
            if time.monotonic() >= child.due:
                try:
                    self._launch(child)
                except OSError as error:
                    self._put_off(child, f"did not start ({error.strerror})")
            return
        code = child.process.poll()
        if code is None:
            return
        if time.monotonic() - child.started > STEADY_S:
            child.deaths = 0
        self._let_go(child)
        if code == MISCONFIGURED:
            self.failure = f"{child.program.name} cannot run as it is set up; its last line says why"
        else:
            self._put_off(child, f"ended ({_how(code)})")

    def _put_off(self, child: _Child, what: str) -> None:
        pause_s = restart_pause_s(child.deaths, random.random())  # noqa: S311 - jitter, no secret
        child.deaths += 1
        child.due = time.monotonic() + pause_s
        self._say(f"{child.program.name} {what}; starting it again in {pause_s:.1f} s")

    def _end(self, children: Sequence[_Child]) -> None:
        living = [child.process for child in children if child.process is not None]
        for process in living:
            process.terminate()
        give_up = time.monotonic() + self._grace_s
        for process in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, give_up - time.monotonic()))
        for process in living:
            process.kill()
            process.wait(KILL_WAIT_S)
        for child in children:
            self._let_go(child)

    @staticmethod
    def _let_go(child: _Child) -> None:
        guard, child.guard, child.process, child.due = child.guard, None, None, math.inf
        if guard is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.communicate(b"\n", KILL_WAIT_S)


def _lives(child: _Child) -> bool:
    return child.process is not None and child.process.poll() is None


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
