"""`rollcall up`: everything on this machine, with one command and no installation."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Annotated, Final

import typer

from worker import logs
from worker.cli.printing import AsJson, note, print_fields, print_json, say
from worker.cli.running import RunningStack
from worker.settings import load

LOOK_S: Final = 0.5

_NEXT = """
Next, in another terminal:
  rollcall connectors add --tenant acme --name main      add a connector (asks for its API key)
  rollcall status                                        is everything running?
  rollcall events tail                                   watch the changes
Stop with Ctrl-C.
"""


class _StopSignal(BaseException):
    """A stop signal; no `except Exception` takes it for a failure."""


def up(
    simulator: Annotated[bool, typer.Option("--simulator", help="Run a simulated provider too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine: Postgres, Valkey, beat, worker and writer.

    With DATABASE_URL and REDIS_URL set, those servers are used instead. A process that dies is started again.
    Ctrl-C or SIGTERM stops in order; a second one at once, and loses nothing.
    """
    settings = load()
    logs.configure(settings.log_format, settings.log_level, process="up")
    _stop_on_signals()
    stack = RunningStack(settings, simulator=simulator, say=note)
    try:
        stack.start()
        if as_json:
            print_json(stack.describe())
        else:
            _introduce(stack)
        while True:
            stack.supervisor.check()
            time.sleep(LOOK_S)
    except _StopSignal:
        note("Stopping; once more to stop at once.")
    finally:
        stack.stop()


def _introduce(stack: RunningStack) -> None:
    found = stack.describe()
    processes = ", ".join(stack.supervisor.processes)
    print_fields(
        {
            "Postgres": found["database_url"],
            "Redis": found["redis_url"],
            "simulator": found["simulator_url"],
            "data folder": found["data_dir"],
            "processes": processes,
        }
    )
    say(_NEXT)


def _stop_on_signals() -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        # From the second signal on, the guards beside the processes and the servers stop them as we are gone.
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGINT, _leave)
        raise _StopSignal

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _leave(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
