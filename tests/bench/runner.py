"""Running cases: their sides in turn, round after round, every measurement kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
import redis

from tests.bench.case import FLOORS, HISTORY, Case, Sample, Side
from tests.bench.report import summary
from tests.bench.stage import Stage, WrongResultError, opened
from tests.fixtures.simulator import ControlError

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("worker", "tasks", "schemas", "tests/bench", "tests/fixtures")

Note = Callable[[str], None]
Result = dict[str, Any]
"""A case as it is kept: its samples, and what they come to."""


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    cases: Sequence[Case]
    rounds: int
    quick: bool
    checked: bool
    out: Path
    anew: bool
    """Measure even what is on disk already."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a kept result must have in common with this run to stand for it."""
        return {
            "rounds": self.rounds,
            "quick": self.quick,
            "checked": self.checked,
            "source": source_digest(),
        }

    def kept(self, case: Case) -> Result:
        """Read what an earlier run of the same source has measured, or begin with nothing."""
        path = self.out / f"{case.name}.json"
        if not self.anew and path.exists():
            found: Result = json.loads(path.read_text(encoding="utf-8"))
            if found["identity"] == self.identity:
                return found
        return {
            "case": case.name,
            "about": case.about,
            "against": dict(case.against),
            "identity": self.identity,
            "complete": False,
            "minutes": 0.0,
            "samples": {},
            "load_average": [],
        }

    def keep(self, name: str, result: object) -> None:
        """Write a result so that nobody ever reads half of it."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def source_digest() -> str:
    """Digest the code that is measured and that measures."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".sql"}:
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Describe the machine, as far as figures depend on it."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def run(plan: Plan, *, note: Note, done: Callable[[Mapping[str, Any]], None]) -> list[Result]:
    """Measure what of the plan is not kept; return the results of all its cases.

    Args:
        plan: what is asked for.
        note: told what goes on, often.
        done: called with each case's result.

    """
    results = {case.name: plan.kept(case) for case in plan.cases}
    with ExitStack() as stack:
        stage: Stage | None = None
        for case in plan.cases:
            if not results[case.name]["complete"]:
                stage = stage or stack.enter_context(opened(quick=plan.quick, checked=plan.checked, note=note))
                results[case.name] = _measure(case, plan, stage, results[case.name], note=note)
            done(results[case.name])
    found = list(results.values())
    plan.keep("results", {"environment": environment(), "cases": found})
    return found


def _measure(case: Case, plan: Plan, stage: Stage, kept: Result, *, note: Note) -> Result:
    """Measure a case from where it was left; what is measured is kept at once."""
    samples: dict[str, list[Sample]] = kept["samples"]
    loads: list[float] = kept["load_average"]
    error = ""
    began = time.monotonic() - kept["minutes"] * 60

    def keep(*, complete: bool) -> Result:
        result = {
            **kept,
            "environment": environment(),
            "complete": complete,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "error": error,
            "samples": samples,
            "load_average": loads,
            **summary(samples, case.against),
        }
        plan.keep(case.name, result)
        return result

    try:
        note(f"{case.name}: preparing")
        with case.prepare(stage) as sides:
            names = _wanted(sides, checked=plan.checked)
            for number in range(plan.rounds):
                # Every other round goes backwards, so that a drift of the machine favours nobody.
                for name in names if number % 2 == 0 else reversed(names):
                    measured = samples.setdefault(name, [])
                    if len(measured) > number:
                        continue
                    note(f"{case.name}: {name}, round {number + 1} of {plan.rounds}")
                    measured.append(_sample(sides[name], checked=plan.checked))
                    loads.append(os.getloadavg()[0])
                    keep(complete=False)
    except (WrongResultError, ControlError, OSError, psycopg.Error, redis.RedisError) as failed:
        error = f"{type(failed).__name__}: {failed}"
    return keep(complete=not error)


def _wanted(sides: Mapping[str, Side], *, checked: bool) -> list[str]:
    names = [name for name in sides if not (checked and name in FLOORS)]
    if not names:
        raise WrongResultError("no side has a history")
    return names


def _sample(side: Side, *, checked: bool) -> Sample:
    sample = side()
    if checked and not sample.get(HISTORY + "events"):
        raise WrongResultError("no history was checked")
    return sample
