"""Chaos: tenants that change all the while, and everything that can break, breaks; then nothing may be wrong.

    python -m tests.system.chaos --seed 1 --duration 60 [--json]

A seed decides what breaks, when and for how long, and what changes; how it all interleaves is the machine's.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import orjson

from tests.fixtures.history import check, read
from tests.fixtures.processes import Role
from tests.system.deployment import Deployment, deployed, wait_for
from tests.system.faults import Fault, lanes_of, planned_of

TENANTS: Final = 20
POLL_S: Final = 2
ROLES: Final[tuple[Role, ...]] = ("worker", "worker", "writer", "writer", "beat", "beat")
SHAPE: Final = {"members": 40, "groups": 3, "service_accounts": 3, "keys_per_account": 2, "history_days": 6}
"""Members enough that a half-empty listing of them is a large drop."""
SETTINGS: Final = {"ROLLCALL_RECONCILE_INTERVAL_S": "30", "ROLLCALL_WORKER_SLOTS": "8"}
KINDS: Final = (
    "member_join", "member_leave", "member_update", "group_add", "group_update", "group_remove",
    "service_account_add", "service_account_update", "key_add", "key_update", "key_remove",
    "usage_add", "usage_set", "usage_scale", "volatile_tick",
)  # fmt: skip
"""All but what takes many records away at once: that is held on purpose, and tells what is true no more."""
FIRST_SYNC_S: Final = 60.0
SETTLE_S: Final = 150.0
QUIET_S: Final = 2.0 * POLL_S
LOOK_S: Final = 0.05
BETWEEN_S: Final = (0.02, 0.2)
"""Between two changes at the provider."""
LAST_CHANGE: Final = 0.02
"""How likely a change is its tenant's last: what is overlooked then, no later change brings to light."""


@dataclass(slots=True)
class Report:
    """What a run did.

    `answers` are the provider's, by status (499: it hung, or sent a reset). `settle_s`: from the end of all faults
    until everything agreed. `stuck`: what never happened after it.
    """

    seed: int
    duration_s: float
    faults: dict[str, int] = field(default_factory=dict)
    changes: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    events: int = 0
    observations: int = 0
    settle_s: float | None = None
    stuck: str | None = None
    died: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    deadlocks: int = 0
    events_when_quiet: int = 0
    violations: list[dict[str, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.stuck or self.died or self.violations or self.events_when_quiet)


class Storm:
    """Strikes and heals, in every lane by itself, until its time is over; `known`: see `lanes_of`."""

    def __init__(self, deployment: Deployment, rng: random.Random, *, known: Sequence[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.died: list[str] = []
        self._deployment = deployment
        self._rng = rng
        self._lanes = lanes_of(deployment, rng, known=known)
        self._healing: dict[str, tuple[float, Callable[[], None]]] = {}

    def rage(self, duration_s: float) -> None:
        """Break things for so long, then heal them all."""
        began = time.monotonic()
        following = [began] * len(self._lanes)
        planned = [(began + duration_s * place, fault) for place, fault in planned_of(self._deployment)]
        while (now := time.monotonic()) - began < duration_s:
            self._heal(now)
            self._look_for_dead()
            if planned and now >= planned[0][0] and planned[0][1].target not in self._healing:
                self._strike(planned.pop(0)[1])
            for number, lane in enumerate(self._lanes):
                free = [fault for fault in lane.faults if fault.target not in self._healing]
                broken = len({fault.target for fault in lane.faults} & self._healing.keys())
                if now >= following[number] and broken < lane.at_once:
                    (fault,) = self._rng.choices(free, [fault.weight for fault in free])
                    self._strike(fault)
                    following[number] = time.monotonic() + self._rng.uniform(*lane.pause_s)
            time.sleep(LOOK_S)
        self._heal(float("inf"))

    def _strike(self, fault: Fault) -> None:
        heal = fault.strike()
        self._healing[fault.target] = (time.monotonic() + self._rng.uniform(*fault.seconds), heal)
        self.counts[fault.name] += 1

    def _heal(self, now: float) -> None:
        for target, (due, heal) in list(self._healing.items()):
            if now >= due:
                heal()
                del self._healing[target]

    def _look_for_dead(self) -> None:
        for number, process in enumerate(self._deployment.processes):
            if process.pid is None and f"process-{number}" not in self._healing:
                self.died.append(process.log.name)
                process.start()


class Changes:
    """Changes workspaces, on a thread, until it is stopped or has made `most` changes.

    The same seed makes the same changes in the same order, whatever else happens.
    """

    def __init__(self, deployment: Deployment, seed: int, *, most: int | None = None) -> None:
        self.made = 0
        self._deployment = deployment
        self._rng = random.Random(seed)  # noqa: S311 - repeatable changes, no secret
        self._most = most
        self._stop = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="changes")

    def start(self) -> None:
        """Start changing."""
        self._thread.start()

    def finish(self) -> None:
        """Await the last of `most` changes, or stop at once when there is no such number; raise what went wrong."""
        if self._most is None:
            self._stop.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        names = sorted(self._deployment.connectors)
        try:
            while self._most is None or self.made < self._most:
                if self._stop.wait(self._rng.uniform(*BETWEEN_S)):
                    return
                size, seed = self._rng.randint(1, 3), self._rng.randrange(2**31)
                operation = {"op": "random", "n": size, "seed": seed, "usage_days": 3, "kinds": KINDS}
                name = self._rng.choice(names)
                self._deployment.change(name, operation)
                self.made += 1
                if self._rng.random() < LAST_CHANGE and len(names) > 1:
                    names.remove(name)
        except Exception as error:  # noqa: BLE001 - raised again by who waits for the end
            self._failed = error


def live(folder: Path, *, seed: int, duration_s: float, tenants: int = TENANTS) -> Report:
    """Live through a run in `folder`, where its logs stay."""
    report = Report(seed, duration_s)
    rng = random.Random(seed)  # noqa: S311 - a story, no secret
    with deployed(folder, ROLES, settings=SETTINGS, seed=seed) as deployment:
        names = [f"tenant-{n}" for n in range(tenants)]
        early = names[: tenants // 2]
        deployment.add(early, poll_interval_s=POLL_S, **SHAPE)
        wait_for("the first sync", deployment.agrees, timeout_s=FIRST_SYNC_S)
        deployment.add(names[len(early) :], poll_interval_s=POLL_S, **SHAPE)
        storm, changes = Storm(deployment, rng, known=early), Changes(deployment, seed)
        changes.start()
        try:
            storm.rage(duration_s)
        finally:
            changes.finish()
        report.faults, report.died, report.changes = dict(sorted(storm.counts.items())), storm.died, changes.made
        _settle(deployment, report)
        for process in deployment.processes:
            if process.pid is None:
                report.died.append(process.log.name)
            process.stop()
        _conclude(deployment, report)
    return report


def _settle(deployment: Deployment, report: Report) -> None:
    try:
        _come_to_rest(deployment, report)
    except AssertionError as error:
        report.stuck = str(error)


def _come_to_rest(deployment: Deployment, report: Report) -> None:
    """Await that everything agrees, count what is said although nothing changes, and end all polls."""
    # Polls alone must mend everything: a reconcile would hide what they overlook.
    deployment.rows("UPDATE rollcall.connectors SET reconciled_at = now() + interval '1 hour'")
    began = time.monotonic()
    wait_for("agreement", deployment.agrees, timeout_s=SETTLE_S)
    report.settle_s = round(time.monotonic() - began, 1)
    (row,) = deployment.rows("SELECT now() AS since")
    # What no truth tells (the labels of usage) may follow with the next whole poll.
    wait_for("a whole poll of everybody", lambda: _all_polled(deployment, row["since"]), timeout_s=SETTLE_S)
    deployment.reader.drain()
    told = len(deployment.reader.said)
    time.sleep(QUIET_S)
    deployment.reader.drain()
    events = [event for one in read(deployment.reader.said[told:]).once() for event in one.events]
    # Labels of settled days are mended by the next reconcile, whenever that comes.
    report.events_when_quiet = sum(not event["data"].get("settled", False) for event in events)
    deployment.rest(timeout_s=SETTLE_S)


def _all_polled(deployment: Deployment, since: datetime) -> bool:
    """Tell whether everybody was polled since then, from the beginning to a good end."""
    polled = deployment.rows(
        "SELECT count(DISTINCT connector_id) AS n FROM rollcall.sync_runs"
        " WHERE created_at > %s AND status = 'succeeded'",
        [since],
    )
    return bool(polled[0]["n"] == len(deployment.connectors))


def _conclude(deployment: Deployment, report: Report) -> None:
    evidence = deployment.evidence()
    report.violations = [asdict(violation) for violation in check(evidence)]
    observations = read(evidence.said).once()
    report.observations, report.events = len(observations), sum(len(one.events) for one in observations)
    for row in deployment.rows(
        "SELECT kind || ' ' || status AS what, count(*) AS n FROM rollcall.sync_runs GROUP BY 1"
    ):
        report.runs[row["what"]] = row["n"]
    report.answers = deployment.simulator.stats()["statuses"]
    report.errors = dict(_errors(deployment))
    report.deadlocks = deployment.stack.postgres.log.read_text(encoding="utf-8").count("deadlock detected")


def _errors(deployment: Deployment) -> Counter[str]:
    """Count the errors that processes logged, by what they say first."""
    found: Counter[str] = Counter()
    for process in deployment.processes:
        for line in process.said().splitlines():
            try:
                said = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if said.get("level") in {"error", "critical"}:
                found[f"{process.role}: {str(said.get('event')).splitlines()[0][:120]}"] += 1
    return found


def main(argv: list[str] | None = None) -> int:
    """Run once and print the report; 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of faults")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--folder", type=Path, help="keep the logs of the processes here")
    asked = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="rollcall-chaos-") as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = live(folder, seed=asked.seed, duration_s=asked.duration)
    if asked.json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
    else:
        for name, value in asdict(report).items():
            sys.stdout.write(f"{name}: {value}\n")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
