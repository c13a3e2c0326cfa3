"""`python -m tests.bench`: measure, print tables, and write JSON. It ends by itself and takes up where it was."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench import observing, publishing, scaling, steady, sync, visible, writing
from tests.bench.case import Case
from tests.bench.report import show
from tests.bench.runner import Plan, run
from worker import logs

CASES: Sequence[Case] = (
    sync.SYNC,
    sync.LARGE,
    steady.CASE,
    writing.CASE,
    observing.CASE,
    publishing.CASE,
    visible.CASE,
    scaling.TENANTS,
    scaling.MEMBERS,
)
ROUNDS = 3
RESULTS = Path("bench-results")
CHECKED_RESULTS = RESULTS / "checked"
WIDTH = 180
"""Of reports that go to a file or a pipe."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure Rollcall beside floors of the same machine and minute.",
        epilog="Cases: " + "; ".join(f"{case.name}: {case.about}" for case in CASES),
    )
    parser.add_argument("names", nargs="*", metavar="CASE", help="what to measure, default all")
    parser.add_argument("--case", nargs="+", default=[], choices=names, metavar="NAME", help="the same")
    parser.add_argument(
        "--rounds", type=int, help=f"how often each side is measured, default {ROUNDS}, quick or checked 1"
    )
    parser.add_argument("--out", type=Path, help=f"folder of results, default {RESULTS}, checked {CHECKED_RESULTS}")
    parser.add_argument("--quick", action="store_true", help="everything small, to prove the bench itself")
    parser.add_argument(
        "--check",
        action="store_true",
        help="witness all that each case does and check its history; no floors, figures comparable with no others",
    )
    parser.add_argument("--fresh", action="store_true", help="measure anew what an earlier run has finished")
    found = parser.parse_args(argv)
    found.wanted = [*found.names, *found.case] or names
    if unknown := set(found.wanted) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))} (there are {', '.join(names)})")
    return found


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 0: every case ended with right data, 1: some did not, 130: stopped."""
    asked = _arguments(argv)
    plan = Plan(
        cases=[case for case in CASES if case.name in asked.wanted],
        rounds=asked.rounds or (1 if asked.quick or asked.check else ROUNDS),
        quick=asked.quick,
        checked=asked.check,
        out=asked.out or (CHECKED_RESULTS if asked.check else RESULTS),
        anew=asked.fresh,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    logs.configure("auto", "WARNING", process="bench")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    progress = Progress(
        SpinnerColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        bar = progress.add_task("", total=len(plan.cases))

        def done(result: Mapping[str, Any]) -> None:
            show(result, console)
            progress.advance(bar)

        try:
            results = run(plan, note=lambda text: progress.update(bar, description=text), done=done)
        except KeyboardInterrupt:
            console.print("stopped; finished cases are kept")
            return 130
    with (plan.out / "report.txt").open("w", encoding="utf-8") as file:
        for result in results:
            show(result, Console(file=file, width=WIDTH))
    console.print(f"\nresults: {plan.out / 'results.json'}, {plan.out / 'report.txt'}")
    return 1 if any(result["error"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
