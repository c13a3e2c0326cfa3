"""Measuring apart: a coroutine in a process of its own, made ready first, started on a word.

The function is named `module:function` and called with what was asked and `go`; it awaits `go()` when it is
ready, and returns figures by name. What it does before `go` is not measured.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.stage import WrongResultError
from tests.bench.watch import Watch
from worker import logs

LIMIT_S = 1800.0
ROOT = Path(__file__).resolve().parents[2]

Go = Callable[[], Awaitable[None]]
Figures = dict[str, float]


def run_apart(target: str, asked: Mapping[str, Any], *, servers: Mapping[str, int]) -> tuple[Figures, Watch]:
    """Run `target` in a new process; give its figures, and what it (`floor`) and the servers took.

    Raises:
        WrongResultError: it failed, or took longer than half an hour.

    """
    argv = [sys.executable, "-m", "tests.bench.apart", target]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(LIMIT_S, process.kill)
        killer.start()
        try:
            _tell(process, json.dumps(asked))
            _hear(process, target)
            with Watch({"floor": process.pid, **servers}) as seen:
                _tell(process, "go")
                figures: Figures = json.loads(_hear(process, target))
            return figures, seen
        finally:
            killer.cancel()
            process.kill()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str], target: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise WrongResultError(f"{target} ended with status {process.wait()}")
    return line


async def _go() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)


def _main(target: str) -> None:
    logs.configure("auto", "WARNING", process="bench")
    module, _, name = target.partition(":")
    function = getattr(import_module(module), name)
    figures = uvloop.run(function(json.loads(sys.stdin.readline()), _go))
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # stay, so that the CPU time can still be read


if __name__ == "__main__":
    _main(sys.argv[1])
