"""The command line against real servers and a simulated provider, as an operator and a script use it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import psutil  # type: ignore[import-untyped] # psutil publishes no types
import psycopg
import pytest
import redis
import structlog
from psycopg.rows import dict_row
from pydantic import SecretStr

from tests.fixtures.broker import forget_connections
from tests.fixtures.simulator import Simulator, start_simulator
from worker.cli import main
from worker.cli.finding import find_settings
from worker.cli.running import RunningStack, environment
from worker.cli.supervisor import Program, Supervisor
from worker.dev.stack import EmbeddedStack
from worker.settings import Settings
from worker.snapshots import stream_key
from worker.store.holds import digest_of
from worker.stream import DEAD_LETTERS
from worker.vault import Vault

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


@dataclass
class Shell:
    """A terminal without a person: runs commands in this process, remembers every output."""

    capsys: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch
    url: str
    redis: redis.Redis
    said: str = ""
    error: str = ""

    def __call__(self, *arguments: str, stdin: str = "", code: int = 0) -> Any:
        """Run a command with --json, expect its exit code; return its one object, or the list of them."""
        self.patch.setattr(sys, "stdin", io.StringIO(stdin))
        got = main([*arguments, "--json"])
        captured = self.capsys.readouterr()
        self.said += captured.out + captured.err
        self.error = captured.err
        assert got == code, captured
        found = [json.loads(line) for line in captured.out.splitlines()]
        return found[0] if len(found) == 1 else found

    @property
    def reason(self) -> str:
        return str(json.loads(self.error.splitlines()[-1])["error"]["reason"])

    def read(self, *arguments: str, code: int = 0) -> str:
        """Run a command as a person would; return what it printed."""
        assert main(list(arguments)) == code
        captured = self.capsys.readouterr()
        self.said += captured.out + captured.err
        return captured.out + captured.err

    def sql(self, query: str, *values: object) -> list[dict[str, Any]]:
        with psycopg.connect(self.url, autocommit=True, row_factory=dict_row) as connection:
            found = connection.execute(query, values)
            return found.fetchall() if found.description else []


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, hooks = root.handlers[:], root.level, (sys.excepthook, threading.excepthook)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with start_simulator(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def closed() -> Iterator[int]:
    """A port where nobody listens, and that nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


@pytest.fixture
def shell(
    database_url: str,
    redis_url: str,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Shell]:
    for name, value in {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "ROLLCALL_VAULT_KEYS": Vault.generate_key("k1"),
        "ROLLCALL_API_HOSTS": simulator.url.removeprefix("http://"),
    }.items():
        monkeypatch.setenv(name, value)
    with redis.Redis.from_url(redis_url, socket_timeout=10) as client:
        yield Shell(capsys, monkeypatch, database_url, client)
    forget_connections()


def add(shell: Shell, simulator: Simulator, name: str = "main", **spec: Any) -> dict[str, Any]:
    """Create a workspace and add its connector; return both's facts."""
    made = simulator.workspace(f"w{uuid4().hex[:8]}", members=5, **spec)
    arguments = ("--tenant", "acme", "--name", name, "--base-url", simulator.url, "--api-key-stdin")
    added = shell("connectors", "add", *arguments, stdin=made["api_key"] + "\n")
    return {**added, "api_key": made["api_key"], "workspace": made["name"], "key_id": made["key_id"]}


def test_the_life_of_a_connector(shell: Shell, simulator: Simulator) -> None:
    """Add, list, show, pause, resume, delete: each says what is so, none prints or keeps the key in the clear."""
    added = add(shell, simulator)
    assert added["status"] == "pending"
    assert [row["id"] for row in [shell("connectors", "list")]] == [added["id"]]
    shown = shell("connectors", "show", "main")
    assert {row["dataset"] for row in shown["access"]} >= {"members", "usage.api_key"}
    assert shown["counts"]["members"] == 0
    assert "sealed_key" not in shown
    assert shell("connectors", "pause", "main")["status"] == "paused"
    assert shell("connectors", "resume", added["id"])["status"] == "pending"
    assert "acme" in shell.read("connectors", "list")
    assert added["id"] in shell.read("connectors", "show", "main", "--tenant", "acme")
    shell("connectors", "delete", "main", code=2)
    assert shell("connectors", "delete", "main", "--yes")["status"] == "deleted"
    assert "revoke" in shell.error
    assert shell("connectors", "delete", added["id"], "--yes")["status"] == "deleted"
    assert shell("connectors", "list") == []
    assert shell("connectors", "list", "--deleted")["status"] == "deleted"
    shell("connectors", "pause", "main", code=1)
    assert shell.reason == "unknown_connector"
    assert added["api_key"] not in shell.said
    assert added["api_key"] not in str(shell.sql("SELECT * FROM rollcall.connectors"))


def test_deleting_forgets_snapshots_and_dead_letters(shell: Shell, simulator: Simulator) -> None:
    """Deleting a connector deletes its snapshots and dead letters in Redis, and no others."""
    mine, other = add(shell, simulator), add(shell, simulator, "other")
    for connector in (mine, other):
        partition = shell.sql("SELECT partition FROM rollcall.connectors WHERE id = %s", connector["id"])[0][
            "partition"
        ]
        shell.redis.hset(f"rollcall:snapshot:{{{partition}}}:{connector['id']}:members", "v", "1")
        shell.redis.xadd(DEAD_LETTERS, {"connector": connector["id"], "reason": "unwritable"})
    shell("connectors", "delete", "main", "--yes")
    left = [key.decode() for key in shell.redis.scan_iter("rollcall:snapshot:*")]
    assert len(left) == 1
    assert other["id"] in left[0]
    assert shell("deadletter", "list")["connector"] == other["id"]


def test_a_key_with_few_permissions_is_explained(shell: Shell, simulator: Simulator) -> None:
    """`check` exits with 77 and names each missing permission as the wire and as the dashboard have it."""
    add(shell, simulator, scopes=["user_read", "workspace_members_read"])
    matrix = {row["dataset"]: row for row in shell("connectors", "check", "main", code=77)}
    assert matrix["members"]["state"] == "granted"
    assert matrix["usage.member"]["missing"] == [
        {"permission": "workspace_analytics_full_read", "label": "Workspace analytics: Full read"}
    ]
    assert matrix["groups"]["action"] == "add_permission"
    told = shell.read("connectors", "check", "main", code=77)
    assert "workspace_read" in told
    assert max(len(line) for line in told.splitlines()) <= 100


def test_dead_keys_and_their_replacement(shell: Shell, simulator: Simulator) -> None:
    """A dead key is the owner's matter: 77 at adding, checking and reconnecting, until a live one comes."""
    added = add(shell, simulator)
    simulator.kill(added["workspace"], added["key_id"])
    shell("connectors", "check", "main", code=77)
    arguments = ("--tenant", "acme", "--name", "second", "--base-url", simulator.url, "--api-key-stdin")
    shell("connectors", "add", *arguments, stdin="sk_" + "0" * 48, code=77)
    assert json.loads(shell.error)["error"]["action"] == "reconnect"
    shell("connectors", "reconnect", "main", "--api-key-stdin", stdin=added["api_key"], code=77)
    fresh = simulator.mint(added["workspace"])["api_key"]
    shell("connectors", "reconnect", "main", "--api-key-stdin", stdin=fresh)
    assert all(row["state"] == "granted" for row in shell("connectors", "check", "main"))
    strange = simulator.workspace(f"w{uuid4().hex[:8]}", members=3)["api_key"]
    shell("connectors", "reconnect", "main", "--api-key-stdin", stdin=strange, code=1)
    assert shell.reason == "other_workspace"
    assert not {key for key in (fresh, strange, "sk_" + "0" * 48) if key in shell.said}


def test_what_is_away_is_told_apart(shell: Shell, stack: EmbeddedStack, closed: int) -> None:
    """An absent database or Redis is 69, an absent provider 75, a database without schema 78."""
    shell.patch.setenv("ROLLCALL_API_HOSTS", "127.0.0.1")
    arguments = ("--tenant", "acme", "--name", "main", "--base-url", f"http://127.0.0.1:{closed}", "--api-key-stdin")
    shell("connectors", "add", *arguments, stdin="sk_" + "0" * 48, code=75)
    assert shell.reason == "provider_unreachable"
    shell("connectors", "add", *arguments, "--no-check", stdin="sk_" + "0" * 48)
    shell.patch.setenv("REDIS_URL", f"redis://127.0.0.1:{closed}/0")
    assert shell("status", code=69)["connectors"] == {"pending": 1}
    shell.patch.setenv("DATABASE_URL", stack.postgres.url_of("postgres").get_secret_value())
    shell("connectors", "list", code=78)
    assert shell.reason == "not_migrated"
    shell.patch.setenv("DATABASE_URL", f"postgresql://u:c4n4ry@127.0.0.1:{closed}/x")
    began = time.monotonic()
    shell("connectors", "list", code=69)
    assert time.monotonic() - began < 5
    assert "c4n4ry" not in shell.said


def test_migrate_is_repeatable(shell: Shell) -> None:
    """A database that is up to date is left as it is."""
    assert shell("migrate") == {"applied": []}


def test_sync_asks_and_reports(shell: Shell, simulator: Simulator) -> None:
    """A sync is a queued run and one message; a second is refused; a paused connector's too; a dead one's is 77."""
    added = add(shell, simulator)
    run = shell("sync", "main", "--kind", "reconcile")
    assert (run["status"], run["kind"], run["requested_by"]) == ("queued", "reconcile", "cli")
    message = orjson.loads(shell.redis.lrange("rollcall.sync", 0, 0)[0])
    assert message["headers"]["task"] == "rollcall.sync_connector"
    shell("sync", "main", "--kind", "reconcile", code=1)
    assert shell.reason == "already_running"
    assert shell("runs", "main", "-n", "1")["status"] == "refused"
    assert "already_running" in shell.read("runs")
    shell("connectors", "pause", "main")
    shell("sync", "main", code=1)
    assert shell.reason == "paused"
    shell.sql("UPDATE rollcall.connectors SET status = 'disconnected' WHERE id = %s", added["id"])
    shell("sync", "main", code=77)
    assert json.loads(shell.error)["error"]["action"] == "reconnect"


@pytest.mark.parametrize(
    ("status", "error_class", "code"),
    [
        ("succeeded", None, 0),
        ("partial", "TryLater", 0),
        ("failed", "TryLater", 1),
        ("failed", "OwnerMustAct", 77),
        ("cancelled", None, 1),
    ],
)
def test_waiting_ends_with_the_run(
    shell: Shell, simulator: Simulator, status: str, error_class: str | None, code: int
) -> None:
    """--wait ends when the run does, and its exit code is the run's outcome; a partial one warns."""
    add(shell, simulator)

    def end() -> None:
        _until(lambda: bool(shell.sql("SELECT 1 FROM rollcall.sync_runs WHERE status = 'queued'")))
        shell.sql(
            "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, status, error_class)"
            " SELECT gen_random_uuid(), id, connector_id, kind, 'members', 'failed', %s FROM rollcall.sync_runs",
            error_class,
        )
        shell.sql("UPDATE rollcall.sync_runs SET status = %s, error_reason = 'why', finished_at = now()", status)

    ending = threading.Thread(target=end)
    ending.start()
    run = shell("sync", "main", "--wait", "--timeout-s", "20", code=code)
    ending.join()
    assert run["status"] == status
    assert ("Only a part" in shell.error) is (status == "partial")


def test_waiting_joins_a_run_under_way_and_gives_up(shell: Shell, simulator: Simulator) -> None:
    """--wait on a kind that runs already waits for that run; it ends with 75 when it takes too long."""
    add(shell, simulator)
    shell("sync", "main")
    shell("sync", "main", "--wait", "--timeout-s", "1", code=75)
    assert shell.reason == "still_running"


def event(number: int, tenant: str = "acme", what: str = "member.changed") -> dict[str, Any]:
    return {
        "id": f"member/u{number}@1",
        "type": f"io.rollcall.elevenlabs.{what}.v1",
        "subject": f"member/u{number}",
        "time": "2026-05-20T12:00:00Z",
        "tenantid": tenant,
        "data": {"op": "u", "changed": ["email"]},
    }


def test_events_of_all_partitions_come_in_order(shell: Shell) -> None:
    """Events of every stream are merged by their time, also when there are more than are read at once."""
    for number in range(900):
        partition = 3 if number < 500 else number % 4
        shell.redis.xadd(stream_key(partition), {"ce": orjson.dumps([event(number)])}, id=f"{1000 + number}-0")
    found = shell("events", "tail", "--no-follow")
    assert [e["subject"] for e in found] == [f"member/u{n}" for n in range(900)]
    assert len(shell("events", "tail", "--no-follow", "--from", "1449-0")) == 450
    assert shell("events", "tail", "--no-follow", "--from", "now") == []
    assert len(shell("events", "tail", "--count", "7")) == 7
    assert shell.read("events", "tail", "--no-follow", "--count", "1").count("\n") == 1
    shell("events", "tail", "--from", "yesterday", code=2)


def test_events_are_filtered_and_followed(shell: Shell) -> None:
    """Only the asked-for tenant and type pass; following waits for what comes."""
    batch = [event(1), event(2, tenant="globex"), event(3, what="connector.connected")]
    shell.redis.xadd(stream_key(0), {"ce": orjson.dumps(batch)})
    assert shell("events", "tail", "--no-follow", "--tenant", "globex")["subject"] == "member/u2"
    assert shell("events", "tail", "--no-follow", "--type", "connector.*")["subject"] == "member/u3"

    followed = threading.Event()

    def append() -> None:
        while not followed.wait(0.3):
            shell.redis.xadd(stream_key(2), {"ce": orjson.dumps([event(4)])})

    appending = threading.Thread(target=append, daemon=True)
    appending.start()
    assert shell("events", "tail", "--from", "now", "--count", "1")["subject"] == "member/u4"
    followed.set()
    appending.join()


def hold(shell: Shell, connector: dict[str, Any], records: list[str]) -> str:
    rows = shell.sql(
        "INSERT INTO rollcall.deletion_holds (tenant_id, connector_id, dataset, known, missing, missing_digest, runs,"
        " state, records) VALUES ('acme', %s, 'members', 20, %s, %s, 1, 'open', %s) RETURNING id",
        connector["id"],
        len(records),
        digest_of(records),
        orjson.dumps({record: [1, "run"] for record in records}).decode(),
    )
    return str(rows[0]["id"])


def test_a_release_is_bound_to_its_records_and_expires(shell: Shell, simulator: Simulator) -> None:
    """A release names the held records, who let them go and until when, and makes the connector due."""
    connector = add(shell, simulator)
    shell.sql("UPDATE rollcall.connectors SET next_sync_at = now() + interval '1 day'")
    one = hold(shell, connector, ["member/u1", "member/u2"])
    assert shell("holds", "list")["id"] == one
    assert shell("holds", "show", one)["records"] == {"member/u1": 1, "member/u2": 1}
    assert "member/u2" in shell.read("holds", "show", one)
    shell("holds", "release", one, code=2)
    released = shell("holds", "release", one, "--yes", "--actor", "ops@x", "--hours", "2")
    assert (released["state"], released["released"]) == ("released", ["member/u1", "member/u2"])
    row = shell.sql("SELECT expires_at - now() AS left, released_by FROM rollcall.deletion_holds")[0]
    assert row["released_by"] == "ops@x"
    assert 7000 < row["left"].total_seconds() <= 7200
    assert shell.sql("SELECT 1 FROM rollcall.connectors WHERE next_sync_at <= now()")


def test_a_hold_that_changed_is_not_released(shell: Shell, simulator: Simulator) -> None:
    """Records that joined the hold after the operator looked are never let go with the others."""
    one = hold(shell, add(shell, simulator), ["member/u1"])
    shell.patch.setattr(
        "worker.cli.holds.confirm",
        lambda _question, **_: shell.sql(
            "UPDATE rollcall.deletion_holds SET records = '{}', missing_digest = %s", digest_of([])
        ),
    )
    shell("holds", "release", one, code=1)
    assert shell.reason == "hold_changed"


def test_a_rejected_hold_is_announced(shell: Shell, simulator: Simulator) -> None:
    """Rejecting closes the hold, removes nothing and is announced; a closed hold takes no decision."""
    connector = add(shell, simulator)
    one = hold(shell, connector, ["member/u1"])
    assert shell("holds", "reject", one)["state"] == "rejected"
    types = [row["type"] for row in shell.sql("SELECT type FROM rollcall.announcements ORDER BY seq")]
    assert types[-1] == "io.rollcall.elevenlabs.removals.rejected.v1"
    shell("holds", "reject", one, code=1)
    assert shell.reason == "unknown_hold"
    assert shell("holds", "list") == []
    assert shell("holds", "list", "--all")["id"] == one


def test_dead_letters_can_be_read_and_dropped(shell: Shell) -> None:
    """Dead letters are listed with reason and origin, shown with their events even if broken, and dropped."""
    first, second = "1000-0", "2000-0"
    shell.redis.xadd(DEAD_LETTERS, {"ce": orjson.dumps([event(1)]), "reason": "schema", "origin": "s 1-0"}, id=first)
    shell.redis.xadd(DEAD_LETTERS, {"ce": b"\xffnot json", "reason": "unreadable:ValueError"}, id=second)
    assert [row["reason"] for row in shell("deadletter", "list")] == ["schema", "unreadable:ValueError"]
    assert shell("deadletter", "show", first)["events"][0]["subject"] == "member/u1"
    assert "not json" in shell("deadletter", "show", second)["events"]
    assert "schema" in shell.read("deadletter", "list")
    shell("deadletter", "drop", code=2)
    shell("deadletter", "drop", "--all", code=2)
    assert shell("deadletter", "drop", first, "--yes") == {"dropped": 1}
    assert shell("deadletter", "drop", "--all", "--yes") == {"dropped": 1}
    shell("deadletter", "show", first, code=1)
    shell("deadletter", "show", "x", code=1)


def test_rotation_reseals_every_key(shell: Shell, simulator: Simulator) -> None:
    """After rotating, only the new master key is needed, and the connector's key still works."""
    old, new = os.environ["ROLLCALL_VAULT_KEYS"], Vault.generate_key("k2")
    added = add(shell, simulator)
    shell.patch.setenv("ROLLCALL_VAULT_KEYS", f"{new},{old}")
    assert shell("vault", "check") == {"first": "k2", "keys": {"k1": 1}, "to_rotate": 1, "damaged": []}
    assert shell("vault", "rotate") == {"resealed": 1}
    assert shell("vault", "rotate") == {"resealed": 0}
    shell.patch.setenv("ROLLCALL_VAULT_KEYS", new)
    assert shell("vault", "check")["keys"] == {"k2": 1}
    assert len(shell("connectors", "check", "main")) == 7
    arguments = ("--tenant", "acme", "--name", "again", "--base-url", simulator.url, "--api-key-stdin")
    shell("connectors", "add", *arguments, stdin=added["api_key"], code=1)
    assert shell.reason == "key_in_use"
    shell.patch.setenv("ROLLCALL_VAULT_KEYS", old)
    for command in (["vault", "check"], ["vault", "rotate"], ["worker"]):
        shell(*command, code=78)
        assert "k2" in shell.error


def test_a_damaged_key_is_named_and_hinders_no_other(shell: Shell, simulator: Simulator) -> None:
    """A sealed key that does not open is reported by its connector's name; the others are rotated."""
    old = os.environ["ROLLCALL_VAULT_KEYS"]
    broken = add(shell, simulator, "broken")
    add(shell, simulator, "sound")
    shell.sql("UPDATE rollcall.connectors SET tenant_id = 'moved' WHERE id = %s", broken["id"])
    shell.patch.setenv("ROLLCALL_VAULT_KEYS", f"{Vault.generate_key('k2')},{old}")
    assert shell("vault", "check", code=1)["damaged"] == [broken["id"]]
    assert shell("vault", "rotate", code=1) == {"resealed": 1}
    assert "moved/broken" in shell.error


def test_status_shows_what_waits(shell: Shell, simulator: Simulator) -> None:
    """Status counts connectors, parts, stream entries and announcements, lists processes, and names suspects."""
    added = add(shell, simulator)
    shell("sync", "main")
    shell.sql(
        "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset)"
        " SELECT gen_random_uuid(), id, connector_id, kind, 'members' FROM rollcall.sync_runs"
    )
    shell.sql(
        "INSERT INTO rollcall.workers (name, role, slots, details) VALUES ('h-1', 'worker', 16, '{\"quiet_s\": 3}')"
    )
    shell.sql("UPDATE rollcall.connectors SET suspect_since = now()")
    shell.redis.xadd(stream_key(1), {"ce": b"[]"})
    found = shell("status")
    assert found["connectors"] == {"pending": 1}
    assert [(p["kind"], p["status"], p["n"]) for p in found["parts"]] == [("poll", "queued", 1)]
    assert [s["entries"] for s in found["streams"]] == [0, 1, 0, 0]
    assert found["streams"][1]["oldest_unapplied"] is not None
    assert (found["unpublished"], found["processes"][0]["alive"]) == (2, True)
    assert found["suspects"][0]["id"] == added["id"]
    told = shell.read("status")
    assert "acme/main" in told
    assert "h-1" in told


def _until(condition: Callable[[], bool], wait_s: float = WAIT_S) -> None:
    give_up = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.05)


def _gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


SLEEPER = ("-c", "import time; time.sleep(600)")
STUBBORN = ("-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")


def test_a_dead_child_is_started_again() -> None:
    """A killed child comes back as another process and it is said; stopping ends them all, stubborn ones too."""
    said: list[str] = []
    programs = [Program("a", SLEEPER), Program("b", STUBBORN)]
    supervisor = Supervisor(programs, os.environ, say=said.append, grace_s=1.0)
    supervisor.start()
    try:
        before = supervisor.processes
        supervisor.kill("a")
        _until(lambda: supervisor.processes["a"] not in {None, before["a"]})
        assert said[0].startswith("a ended (SIGKILL)")
        supervisor.restart("b")
        after = supervisor.processes
        assert after["b"] != before["b"]
    finally:
        supervisor.stop()
    pids = [pid for pid in (*before.values(), *after.values()) if pid]
    assert all(_gone(pid) for pid in pids)
    assert supervisor.processes == {"a": None, "b": None}
    supervisor.stop()


def test_a_misconfigured_child_is_not_started_again() -> None:
    """A child that exits with 78 is left alone, and whoever checks is told which one."""
    supervisor = Supervisor([Program("w", ("-c", "raise SystemExit(78)"))], os.environ, say=print, grace_s=1.0)
    supervisor.start()
    try:
        _until(lambda: supervisor.failure is not None)
        with pytest.raises(Exception, match="w cannot run"):
            supervisor.check()
    finally:
        supervisor.stop()


OWNER = """
import os, sys, time
from worker.cli.supervisor import Program, Supervisor
supervisor = Supervisor([Program("a", ("-c", "import time; time.sleep(600)"))], os.environ, say=print, grace_s=1)
supervisor.start()
print(supervisor.processes["a"], flush=True)
time.sleep(600)
"""


def test_children_do_not_outlive_their_owner() -> None:
    """When the supervising process is killed, its children stop by themselves."""
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert not _gone(child)
        owner.kill()
    _until(lambda: _gone(child))


@pytest.mark.slow
def test_up_runs_everything_and_stops_in_order(shell: Shell, simulator: Simulator, tmp_path: Path) -> None:
    """With given servers `up` brings a connector to its first full sync; a killed process returns; SIGTERM ends all."""
    command = [sys.executable, "-m", "worker.cli", "up", "--json"]
    settings = find_settings()
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            command, cwd=ROOT, env=environment(settings, os.environ), stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert up.stdout is not None
        described = json.loads(up.stdout.readline())
        assert "***" in described["database_url"]
        pids = described["processes"]
        assert set(pids) == {"beat", "worker", "writer"}
        added = add(shell, simulator)
        os.kill(pids["writer"], signal.SIGKILL)
        _until(lambda: shell("connectors", "show", "main")["status"] == "connected", 60)
        assert shell("connectors", "show", "main")["counts"]["members"] == 5
        assert shell("sync", "main", "--kind", "reconcile", "--wait")["status"] == "succeeded"
        assert shell("events", "tail", "--no-follow", "--type", "connector.created")["connectorid"] == added["id"]
        assert {p["role"] for p in shell("status")["processes"] if p["alive"]} == {"worker", "writer"}
        children = psutil.Process(up.pid).children(recursive=True)
        up.send_signal(signal.SIGTERM)
        assert up.wait(40) == 0
        assert [child for child in children if not _gone(child.pid)] == []
        assert added["api_key"] not in (tmp_path / "up.log").read_text(encoding="utf-8")
    finally:
        up.kill()
        up.wait(10)
        if up.stdout is not None:
            up.stdout.close()


@pytest.mark.slow
def test_the_embedded_stack_is_found_by_commands(tmp_path: Path) -> None:
    """Without any URL a stack brings its servers and a simulator, and commands find all of it by the data folder."""
    said: list[str] = []
    given = {"ROLLCALL_DATA_DIR": str(tmp_path / "data")}
    settings = Settings(data_dir=tmp_path / "data")
    with RunningStack(settings, simulator=True, ephemeral=True, say=said.append) as running:
        found = find_settings(given)
        assert found.database_url == running.settings.database_url
        assert found.require_vault_keys() == running.settings.require_vault_keys()
        assert running.simulator_url is not None
        assert found.api_hosts == {running.simulator_url.removeprefix("http://")}
        assert isinstance(found.redis_url, SecretStr)
        pids = [pid for pid in running.supervisor.processes.values() if pid]
        assert len(pids) == 4
        password = found.require_redis().get_secret_value().split("@")[0].rpartition(":")[2]
        assert not any(password in " ".join(psutil.Process(pid).cmdline()) for pid in pids)
        assert any(line.startswith("applied migration") for line in said)
    assert all(_gone(pid) for pid in pids)
    with pytest.raises(Exception, match="rollcall up"):
        find_settings(given)
