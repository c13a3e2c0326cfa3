"""Chaos in the suite: one seeded run, and the same history told with and without faults."""

from __future__ import annotations

import random
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from pprint import pformat

import pytest

from tests.fixtures.evidence import Values
from tests.fixtures.history import check
from tests.system.chaos import FIRST_SYNC_S, POLL_S, ROLES, SETTINGS, SETTLE_S, SHAPE, Changes, Storm, live
from tests.system.deployment import deployed, wait_for

pytestmark = pytest.mark.slow

SEED = 20_260_401
DURATION_S = 60.0
TENANTS = 6
CHANGES = 150
SHORT_S = 18.0


def test_chaos(tmp_path: Path) -> None:
    """After a minute in which everything breaks nothing is lost, invented, said twice or out of order."""
    report = live(tmp_path, seed=SEED, duration_s=DURATION_S)
    assert report.good, pformat(asdict(report))
    assert {"valkey flushed", "valkey rolled back"} <= report.faults.keys()


def retell(folder: Path, now: datetime, *, faults: bool) -> dict[str, Values]:
    """Tell the same history of changes; give the final tables by tenant."""
    folder.mkdir()
    names = [f"tenant-{n}" for n in range(TENANTS)]
    with deployed(folder, ROLES, settings=SETTINGS, seed=SEED, now=now) as deployment:
        deployment.add(names, poll_interval_s=POLL_S, **SHAPE)
        wait_for("the first sync", deployment.agrees, timeout_s=FIRST_SYNC_S)
        changes = Changes(deployment, SEED, most=CHANGES)
        changes.start()
        try:
            if faults:
                Storm(deployment, random.Random(SEED), known=names).rage(SHORT_S)  # noqa: S311 - a story, no secret
        finally:
            changes.finish()
        wait_for("agreement", deployment.agrees, timeout_s=SETTLE_S)
        deployment.rest(timeout_s=SETTLE_S)
        for process in deployment.processes:
            process.stop()
        evidence = deployment.evidence()
        assert check(evidence) == []
        return {name: evidence.values[connector] for name, connector in deployment.connectors.items()}


def test_same_history_with_and_without_faults(tmp_path: Path) -> None:
    """The same changes at the provider fold to the same tables, whether everything broke meanwhile or nothing."""
    now = datetime.now(UTC)
    calm = retell(tmp_path / "calm", now, faults=False)
    assert len(calm) == TENANTS
    assert all(calm.values())
    assert retell(tmp_path / "stormy", now, faults=True) == calm
