"""The whole product as a user runs it: `rollcall up`, commands beside it, and what must never leak."""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis

from tests.fixtures.simulator import ROOT
from tests.fixtures.upstack import Up, up

WITHIN_S = 45.0
QUICK = {
    "ROLLCALL_POLL_INTERVAL_S": "2",
    "ROLLCALL_DISPATCH_INTERVAL_S": "1",
    "ROLLCALL_LOG_LEVEL": "DEBUG",
    "ROLLCALL_LOG_FORMAT": "json",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Give a stack in a folder with a space in its name."""
    with up(tmp_path_factory.mktemp("up stack"), **QUICK) as stack:
        yield stack


def eventually(look: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
    """Look until there is something."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {within_s} s: {what}")


def add(running: Up, name: str, api_key: str) -> str:
    """Add a connector of the simulator's workspace with this key."""
    made = running.json(
        "connectors", "add", "--tenant", "t1", "--name", name, "--base-url", running.simulator.url, "--api-key-stdin",
        given=api_key,
    )  # fmt: skip
    return str(made["id"])


def status(running: Up, connector: str) -> Any:
    """Read a connector as `connectors show` tells it."""
    return running.json("connectors", "show", connector)


def test_no_trace_of_a_planted_key(running: Up) -> None:
    """A planted API key is found nowhere: not in Valkey, Postgres, events, logs of any process, or `ps`."""
    canary = f"sk_{secrets.token_hex(24)}"
    running.simulator.workspace("canary", members=10, api_key=canary)
    connector = add(running, "canary", canary)
    eventually(lambda: status(running, connector)["status"] == "connected", "connected")
    rules: list[dict[str, Any]] = [
        {"match": {"path_prefix": "/v1/workspace/members"}, "kind": "schema_broken"},
        {"match": {"path_prefix": "/v1/service-accounts"}, "kind": "reset"},
        {"match": {"path_prefix": "/v1/workspace/groups"}, "kind": "s500_text"},
    ]
    running.simulator.faults("canary", *rules)
    assert canary not in running.rollcall("connectors", "check", connector).stdout
    time.sleep(3)
    running.simulator.faults("canary")
    running.simulator.kill("canary", canary, "deleted")
    eventually(lambda: status(running, connector)["status"] == "disconnected", "disconnected")
    for arguments in (["connectors", "check", connector], ["events", "tail", "--from", "start", "--no-follow"]):
        done = running.rollcall(*arguments)
        assert canary not in done.stdout + done.stderr
    again = running.rollcall(
        "connectors", "add", "--tenant", "t1", "--name", "again", "--base-url", running.simulator.url,
        "--api-key-stdin", given=canary,
    )  # fmt: skip
    assert again.returncode != 0
    assert canary not in again.stdout + again.stderr

    secret = canary.removeprefix("sk_")
    assert secret not in running.log.read_text(encoding="utf-8")
    assert "provider_request" in running.log.read_text(encoding="utf-8"), "debug lines are in that log"
    assert secret not in _redis_contents(str(running.running["redis_url"]))
    assert secret not in _database_contents(str(running.running["database_url"]))
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if secret in line]
    folder = b"".join(p.read_bytes() for p in running.data_dir.rglob("*") if p.is_file())
    assert secret.encode() not in folder


def test_vault_keys_are_in_no_log(running: Up) -> None:
    """The vault's master keys and the servers' passwords are in no log line and no argument."""
    password = re.compile(r":([^:@/]+)@")
    hidden = [str(running.running["vault_keys"]).partition(":")[2]]
    hidden += [m[1] for name in ("database_url", "redis_url") if (m := password.search(str(running.running[name])))]
    text = running.log.read_text(encoding="utf-8")
    arguments = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    for secret in hidden:
        assert secret not in text
        assert not [line for line in arguments if secret in line]


def test_asked_for_sync_shows_its_outcome(running: Up) -> None:
    """`sync --wait` runs to its end and says so; a second one of the same kind meanwhile is no error of ours."""
    api_key = running.simulator.workspace("asked", members=5)["api_key"]
    connector = add(running, "asked", api_key)
    eventually(lambda: status(running, connector)["status"] == "connected", "connected")
    done = running.rollcall("sync", connector, "--kind", "reconcile", "--wait")
    assert done.returncode == 0, done.stderr
    runs = running.json("runs", connector)
    assert {"reconcile", "backfill"} <= {r["kind"] for r in runs}


def test_a_dead_process_is_started_again(running: Up) -> None:
    """After kill -9 of worker, writer and beat, changes still arrive."""
    api_key = running.simulator.workspace("phoenix", members=5)["api_key"]
    connector = add(running, "phoenix", api_key)
    eventually(lambda: status(running, connector)["status"] == "connected", "connected")
    living = [p for p in psutil.Process(running.process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    ours = [p for p in living if p.cmdline()[-1] in {"worker", "writer", "beat"}]
    assert len(ours) == 3
    for process in ours:
        process.send_signal(signal.SIGKILL)
    running.simulator.mutate("phoenix", {"op": "member_join", "user_id": "usr_phoenix"})
    url = str(running.running["database_url"])

    def arrived() -> bool:
        with psycopg.connect(url) as connection:
            query = "SELECT count(*) FROM rollcall.members WHERE user_id = 'usr_phoenix'"
            row = connection.execute(query).fetchone()
        return bool(row and row[0])

    eventually(arrived, "the member that joined after the kill")


def test_second_stack_on_the_same_folder_is_refused(running: Up) -> None:
    """A lock refuses a second stack on the same data folder, with a line that says what to do."""
    done = running.rollcall("up")
    assert done.returncode != 0
    assert "already running" in done.stderr


def test_without_servers_one_line_says_what_to_do(tmp_path: Path) -> None:
    """A command that finds no servers ends with 78 and one line."""
    found = Up.__new__(Up)
    found.environ = {"ROLLCALL_DATA_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = found.rollcall("connectors", "list")
    assert done.returncode == 78
    assert "rollcall up" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def _redis_contents(url: str) -> str:
    client = redis.Redis.from_url(url)
    try:
        return "".join(repr((key, client.dump(key))) for key in client.scan_iter())
    finally:
        client.close()


def _database_contents(url: str) -> str:
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'rollcall'"
        ).fetchall()
        return "".join(
            repr(connection.execute(f'SELECT * FROM rollcall."{name}"').fetchall())  # type: ignore[arg-type] # noqa: S608 - names from the catalogue
            for (name,) in tables
        )


def test_demo_agrees() -> None:
    """`rollcall demo` runs its story and finds every table equal to the simulator's truth."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"agrees":true' in done.stdout
