"""A checked bench: the history of its cases has no violation, and a violation does not go by unseen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import orjson
import pytest
from pydantic import SecretStr

from tests.bench.case import FLOORS
from tests.bench.history import History, looked_at, told_by, witnessed
from tests.bench.stage import Place, Stage, WrongResultError
from tests.bench.tenants import Tenant
from tests.fixtures.harness import Harness
from tests.fixtures.simulator import ROOT, Simulator
from worker.dev.stack import EmbeddedStack

WITHIN_S: Final = 240
CASES: Final = ("sync", "writer")
PARTS: Final = ("observations", "events", "writes", "closes")


@pytest.mark.slow
def test_checked_cases_have_no_violation(tmp_path: Path) -> None:
    """Syncs and the writer alone, small: all that was done is looked at, nothing is wrong, and no floor is run."""
    argv = [sys.executable, "-m", "tests.bench", "--quick", "--check", *CASES, "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("no violation") == len(CASES)
    for case in orjson.loads((tmp_path / "results.json").read_bytes())["cases"]:
        assert not FLOORS & case["samples"].keys()
        for (sample,) in case["samples"].values():
            assert all(sample[f"history.{part}"] > 0 for part in PARTS)


@pytest.fixture
def stage(stack: EmbeddedStack, tmp_path: Path) -> Stage:
    return Stage(stack, tmp_path, SecretStr(""), quick=True, checked=True, note=lambda _: None)


@pytest.fixture
def history(stage: Stage, database_url: str, redis_url: str, simulator: Simulator) -> Iterator[History]:
    with witnessed(stage, Place(database_url, redis_url), told_by(simulator)) as made:
        yield made


async def test_a_tampered_row_fails_a_checked_case(history: History, harness: Harness) -> None:
    """What was witnessed of an honest sync is counted; one row that nobody told of is named."""
    watched = await harness.add_connector()
    history.note([Tenant(watched.tenant, watched.id, watched.workspace, watched.key)])
    await harness.poll(watched)
    assert history.verdict().keys() == {f"history.{part}" for part in PARTS}
    (row,) = await harness.rows(
        "UPDATE rollcall.members SET email = 'planted'"
        " WHERE user_id = (SELECT min(user_id) FROM rollcall.members) RETURNING user_id"
    )
    with pytest.raises(WrongResultError, match=rf"violations: .*{row['user_id']}: Postgres differs from the provider"):
        history.verdict()


def test_an_empty_history_fails_a_checked_case(history: History) -> None:
    """Where nobody saw anything nothing can be wrong, so it does not count as right."""
    with pytest.raises(WrongResultError, match="no observations, no events, no writes, no closes"):
        history.verdict()
    with pytest.raises(WrongResultError, match="no events"):
        looked_at(observations=1, events=0)


def test_a_run_that_is_not_checked_is_not_witnessed(
    stage: Stage, database_url: str, redis_url: str, simulator: Simulator
) -> None:
    """Unless asked for, no trigger slows down what is measured, and no figure tells of a check."""
    place = Place(database_url, redis_url)
    with witnessed(replace(stage, checked=False), place, told_by(simulator)) as history, place.database() as database:
        assert not database.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'witness'").fetchall()
        assert history.verdict() == {}
