"""Running cases: their sides in turn, round after round, each finished case kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.case import Case, Sample
from tests.bench.report import summary
from tests.bench.stage import Stage, WrongResultError, opened

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("worker", "tasks", "schemas", "tests/bench", "tests/fixtures")

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for."""

    cases: Sequence[Case]
    rounds: int
    quick: bool
    out: Path
    anew: bool
    """Measure even what is on disk already."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a kept result must have in common with this run to stand for it."""
        return {"rounds": self.rounds, "quick": self.quick, "source": source_digest()}

    def kept(self, case: Case) -> dict[str, Any] | None:
        """Read the result of an earlier run of the same source, if it was finished."""
        path = self.out / f"{case.name}.json"
        if self.anew or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["identity"] == self.identity and not found["error"] else None

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


def run(plan: Plan, *, note: Note, done: Callable[[Mapping[str, Any]], None]) -> list[Any]:
    """Measure every case of the plan that is not kept; return all results.

    Args:
        plan: what is asked for.
        note: told what goes on, often.
        done: called with each case's result.

    """
    results = {case.name: plan.kept(case) for case in plan.cases}
    if not all(results.values()):
        with opened(quick=plan.quick, note=note) as stage:
            for case in plan.cases:
                if results[case.name] is None:
                    results[case.name] = _measure(case, plan, stage, note=note)
                    plan.keep(case.name, results[case.name])
                done(results[case.name] or {})
    else:
        for case in plan.cases:
            done(results[case.name] or {})
    found = [results[case.name] for case in plan.cases]
    plan.keep("results", {"environment": environment(), "cases": found})
    return found


def _measure(case: Case, plan: Plan, stage: Stage, *, note: Note) -> dict[str, Any]:
    samples: dict[str, list[Sample]] = {}
    loads: list[float] = []
    error = ""
    began = time.monotonic()
    try:
        note(f"{case.name}: preparing")
        with case.prepare(stage) as sides:
            for number in range(plan.rounds):
                # Every other round goes backwards, so that a drift of the machine favours nobody.
                for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
                    note(f"{case.name}: {name}, round {number + 1} of {plan.rounds}")
                    samples.setdefault(name, []).append(sides[name]())
                    loads.append(os.getloadavg()[0])
    except WrongResultError as wrong:
        error = str(wrong)
    return {
        "case": case.name,
        "about": case.about,
        "identity": plan.identity,
        "environment": environment(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "load_average": loads,
        "error": error,
        "samples": samples,
        "against": dict(case.against),
        **summary(samples, case.against),
    }
