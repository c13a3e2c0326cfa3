"""The crew: worker, writer and beat as real processes, started as an operator starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.stage import Database, Place, Stage, WrongResultError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "worker.cli")
READY_S = 60.0
STOP_S = 40.0
LOOK_S = 0.01

ALL = ("worker", "writer", "beat")
TWICE = ("worker", "worker-2", "writer", "writer-2", "beat")
"""As deploy/compose.yaml starts them."""
WORKERS = ("worker", "worker-2", "writer", "beat")
"""A worker for each of two cores, and the one writer that they need."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Running processes by name: the role, with a number if there are several of it."""

    processes: dict[str, subprocess.Popen[bytes]]
    logs: Path

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, process in self.processes.items()}

    def check(self) -> None:
        """Raise WrongResultError if a process has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                tail = self.log(name).read_text(errors="replace")[-2000:]
                raise WrongResultError(f"the {name} ended with status {process.returncode}: {tail}")

    def log(self, name: str) -> Path:
        """Name the file a process logs to."""
        return self.logs / f"{name}.log"


@contextmanager
def crew(
    stage: Stage, place: Place, database: Database, *, settings: Mapping[str, object], names: Sequence[str] = ALL
) -> Iterator[Crew]:
    """Run the processes until the block ends; they have beaten and, with a beat, ticked when it begins.

    Args:
        stage: gives vault keys and a folder for logs.
        place: the database and Valkey they use.
        database: a connection to it.
        settings: `ROLLCALL_` settings by field name, beside the defaults.
        names: which processes.

    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ROLLCALL_")},
        "DATABASE_URL": place.database_url,
        "REDIS_URL": place.redis_url,
        "ROLLCALL_VAULT_KEYS": stage.ring.get_secret_value(),
        "ROLLCALL_LOG_LEVEL": "WARNING",
        "ROLLCALL_LOG_FORMAT": "json",
        **{f"ROLLCALL_{name.upper()}": str(value) for name, value in settings.items()},
    }
    made = Crew({}, stage.folder)
    try:
        for name in names:
            with made.log(name).open("wb") as log:
                made.processes[name] = subprocess.Popen(
                    [*COMMAND, _role(name)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        _await_ready(made, database, [_role(name) for name in names])
        yield made
        made.check()
    finally:
        _stop(made)


def _role(name: str) -> str:
    return name.partition("-")[0]


def _await_ready(made: Crew, database: Database, roles: Sequence[str]) -> None:
    deadline = time.monotonic() + READY_S
    wanted = [role for role in roles if role != "beat"]
    while True:
        rows = database.execute("SELECT role FROM rollcall.workers WHERE role = ANY(%s)", [wanted]).fetchall()
        if len(rows) == len(wanted) and ("beat" not in roles or ticks(database) > 0):
            return
        made.check()
        if time.monotonic() > deadline:
            raise WrongResultError(f"the processes were not ready after {READY_S:.0f} s")
        time.sleep(LOOK_S)


def ticks(database: Database) -> int:
    """Read how often dispatch has ticked."""
    (row,) = database.execute("SELECT ticks FROM rollcall.meta").fetchall()
    return int(row["ticks"])


def await_middle_of_tick(database: Database, interval_s: float) -> None:
    """Wait until half an interval after a tick, so that what is due then waits for the mean time, always."""
    before, deadline = ticks(database), time.monotonic() + READY_S
    while ticks(database) == before:
        if time.monotonic() > deadline:
            raise WrongResultError("dispatch does not tick")
        time.sleep(LOOK_S)
    time.sleep(interval_s / 2)


def _stop(made: Crew) -> None:
    for process in made.processes.values():
        process.terminate()
    for process in made.processes.values():
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
