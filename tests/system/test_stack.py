"""The embedded stack with its real servers: what it promises to its user, and what survives a crash."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import psutil  # type: ignore[import-untyped] # psutil publishes no types
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.fixtures.servers import cloned_database, make_template, revive
from worker.dev.stack import EmbeddedStack, StackError, StackUrls, find_running

ROOT = Path(__file__).parents[2]
WAIT_S = 20.0
OWNER = """# another process that owns a stack, to be killed
import sys, time
from pathlib import Path
from worker.dev.stack import EmbeddedStack
stack = EmbeddedStack(Path(sys.argv[1]), ephemeral=True)
stack.start()
print(stack.postgres.pid, stack.valkey.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """A stack as users run it, in a path that breaks careless programs; the tests leave it running."""
    stack = EmbeddedStack(tmp_path_factory.mktemp("it's a döta") / "data folder")
    stack.start()
    yield stack
    stack.stop()
    stack.delete()


@pytest.fixture(scope="module")
def throw_away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """A stack that tests may break."""
    with EmbeddedStack(tmp_path_factory.mktemp("throw away"), ephemeral=True) as stack:
        yield stack


def urls_of(stack: EmbeddedStack) -> StackUrls:
    return StackUrls(stack.postgres.url, stack.valkey.url)


def sql(stack: EmbeddedStack, statement: LiteralString) -> list[Any]:
    with psycopg.connect(stack.postgres.url.get_secret_value(), connect_timeout=5) as connection:
        cursor = connection.execute(statement)
        return [row[0] for row in cursor] if cursor.description else []


def valkey(stack: EmbeddedStack, *, timeout_s: float = 10) -> redis.Redis:
    url, no_retry = stack.valkey.url.get_secret_value(), Retry(NoBackoff(), 0)
    return redis.Redis.from_url(url, socket_timeout=timeout_s, retry=no_retry, decode_responses=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def wait_for_end(numbers: list[int]) -> None:
    give_up = time.monotonic() + WAIT_S
    while [p for p in psutil.process_iter(["status"]) if p.pid in numbers and p.info["status"] != "zombie"]:
        assert time.monotonic() < give_up, "the servers did not end"
        time.sleep(0.05)


def start_owner(data_dir: Path) -> tuple[subprocess.Popen[str], list[int]]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(data_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, [int(word) for word in owner.stdout.readline().split()]


def test_both_serve_with_safe_settings(durable: EmbeddedStack) -> None:
    """Postgres syncs, speaks UTF-8 and UTC; Valkey keeps an append-only file and evicts nothing."""
    names = ("fsync", "synchronous_commit", "server_encoding", "TimeZone")
    assert [sql(durable, f"SHOW {name}")[0] for name in names] == ["on", "on", "UTF8", "UTC"]
    with valkey(durable) as client:
        kept = client.config_get("appendonly", "appendfsync", "maxmemory-policy")
    assert kept == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


def test_both_listen_on_loopback_only(durable: EmbeddedStack) -> None:
    """Each server listens on 127.0.0.1 and its port, and on nothing else."""
    for server in (durable.postgres, durable.valkey):
        listening = [
            (c.laddr.ip, c.laddr.port)
            for c in psutil.Process(server.pid).net_connections("all")
            if c.status == psutil.CONN_LISTEN or c.family == socket.AF_UNIX
        ]
        assert listening == [("127.0.0.1", server.port)]


def test_nobody_enters_without_the_password(durable: EmbeddedStack) -> None:
    """Neither server serves a client that does not know the generated password."""
    wrong = durable.postgres.url.get_secret_value().replace("rollcall:", "rollcall:x", 1)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong, connect_timeout=5)
    with (
        redis.Redis("127.0.0.1", durable.valkey.port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_passwords_are_seen_by_nobody(durable: EmbeddedStack) -> None:
    """The passwords are in private files only: in no process's arguments or environment, in no log."""
    passwords = [server.password.get_secret_value() for server in (durable.postgres, durable.valkey)]
    seen = [repr(urls_of(durable))]
    for server in (durable.postgres, durable.valkey):
        process = psutil.Process(server.pid)
        seen += [*process.cmdline(), *process.environ().values(), server.log.read_text()]
    assert not [password for password in passwords if password in "\n".join(seen)]
    kept = [durable.data_dir / name for name in ("secrets.json", "stack.json", "state.json", "lock")]
    folders = [durable.data_dir, durable.postgres.folder, durable.valkey.folder]
    assert [{mode(path) for path in paths} for paths in (kept, folders)] == [{0o600}, {0o700}]


def test_root_lends_postgres_and_valkey_an_unprivileged_account(durable: EmbeddedStack) -> None:
    """No server runs as root, whoever starts the stack, and none can become it."""
    for server in (durable.postgres, durable.valkey):
        process = psutil.Process(server.pid)
        assert set(process.uids()) == {server.folder.stat().st_uid} != {0}
        assert os.geteuid() != 0 or 0 not in process.gids()


def test_a_second_stack_is_refused(durable: EmbeddedStack) -> None:
    """One folder, one stack: the second is told who runs and what to do, and the first does not notice."""
    with pytest.raises(StackError) as caught:
        EmbeddedStack(durable.data_dir).start()
    assert f"already running (pid {os.getpid()})" in caught.value.message
    assert "ROLLCALL_DATA_DIR" in caught.value.message
    assert sql(durable, "SELECT 1") == [1]
    info = find_running(durable.data_dir) or {}
    assert (info["pid"], info["redis_url"]) == (os.getpid(), durable.valkey.url.get_secret_value())


def test_a_throw_away_stack_never_takes_a_users_folder(durable: EmbeddedStack) -> None:
    """A stack whose stop deletes the data refuses a folder made to be kept."""
    durable.stop()
    try:
        with pytest.raises(StackError, match="ephemeral"):
            EmbeddedStack(durable.data_dir, ephemeral=True).start()
    finally:
        durable.start()


def test_data_ports_and_passwords_outlive_a_restart(durable: EmbeddedStack) -> None:
    """After stop and start everything is where it was; while stopped, nobody is told that it runs."""
    urls = urls_of(durable)
    sql(durable, "CREATE TABLE kept AS SELECT 7 AS n")
    with valkey(durable) as client:
        client.set("kept", "7")
    durable.stop()
    assert find_running(durable.data_dir) is None
    assert durable.start() == urls
    assert sql(durable, "SELECT n FROM kept") == [7]
    with valkey(durable) as client:
        assert client.get("kept") == "7"


def test_a_taken_port_is_replaced_at_start(durable: EmbeddedStack) -> None:
    """A port that somebody else took meanwhile is no error: the next start picks another."""
    former = durable.valkey.port
    durable.stop()
    with socket.create_server(("127.0.0.1", former)):
        durable.start()
    assert durable.valkey.port != former
    with valkey(durable) as client:
        assert client.ping()


def test_no_permission_outside_the_data_folder_changes(tmp_path: Path) -> None:
    """The folders above the data folder and those of the wheels keep their modes and owners, for root too."""
    above = tmp_path / "above"
    above.mkdir(mode=0o700)
    watched = [*above.parents, above, *Path(psycopg.__file__).parents, Path("/var/lib"), Path.home()]
    before = {path: (mode(path), path.stat().st_uid, path.stat().st_gid) for path in watched if path.exists()}
    with EmbeddedStack(above / "data", ephemeral=True):
        pass
    assert {path: (mode(path), path.stat().st_uid, path.stat().st_gid) for path in before} == before


def test_stopping_a_throw_away_stack_leaves_nothing(tmp_path: Path) -> None:
    """A throw-away stack's databases are gone after its stop, root's home included."""
    stack = EmbeddedStack(tmp_path / "data", ephemeral=True)
    stack.start()
    folders = [stack.postgres.folder, stack.valkey.folder]
    stack.stop()
    assert not any(folder.exists() for folder in folders)
    assert stack.data_dir in folders[0].parents or not folders[0].parent.exists()


def test_a_stack_of_one_server(tmp_path: Path) -> None:
    """Who brings one of the two gets the other alone, with an empty address for the one not run."""
    with EmbeddedStack(tmp_path / "data", postgres=False, ephemeral=True) as stack:
        info = find_running(tmp_path / "data")
        assert info is not None
        assert info["database_url"] == ""
        with valkey(stack) as client:
            assert client.ping()


def test_a_killed_server_comes_back_with_its_data(throw_away: EmbeddedStack) -> None:
    """After SIGKILL to all its processes a server starts on the same port with all that was committed."""
    sql(throw_away, "CREATE TABLE committed AS SELECT generate_series(1, 1000) AS n")
    with valkey(throw_away) as client:
        client.set("written", "1")
    for server in (throw_away.postgres, throw_away.valkey):
        numbers, port = [p.pid for p in server._processes()], server.port
        server.kill()
        assert server.pid is None
        wait_for_end(numbers)
        server.start()
        assert server.port == port
    assert sql(throw_away, "SELECT count(*) FROM committed") == [1000]
    with valkey(throw_away) as client:
        assert client.get("written") == "1"


def test_a_paused_server_answers_nobody_until_resumed(throw_away: EmbeddedStack) -> None:
    """A frozen server keeps its connections and answers late; `revive` brings it back for the next test."""
    with valkey(throw_away, timeout_s=1) as client:
        client.ping()
        throw_away.valkey.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
    throw_away.postgres.pause()
    with pytest.raises(psycopg.OperationalError, match="timeout"):
        psycopg.connect(throw_away.postgres.url.get_secret_value(), connect_timeout=2)
    for server in (throw_away.postgres, throw_away.valkey):
        revive(server)
    assert sql(throw_away, "SELECT 1") == [1]


def test_a_crashed_postmaster_is_no_obstacle(throw_away: EmbeddedStack) -> None:
    """When only the first process was killed, start clears away its children and serves again."""
    postmaster = throw_away.postgres.pid
    assert postmaster is not None
    os.kill(postmaster, signal.SIGKILL)
    wait_for_end([postmaster])
    throw_away.postgres.start()
    assert sql(throw_away, "SELECT 1") == [1]


def test_a_frozen_server_can_be_stopped(throw_away: EmbeddedStack) -> None:
    """Stop ends a frozen server in order, without waiting for SIGKILL's turn."""
    throw_away.postgres.pause()
    began = time.monotonic()
    throw_away.postgres.stop()
    assert time.monotonic() - began < 10
    assert "database system is shut down" in throw_away.postgres.log.read_text()
    throw_away.postgres.start()


def test_a_failed_start_shows_the_log(throw_away: EmbeddedStack) -> None:
    """A server that does not start is reported with what it said."""
    throw_away.postgres.stop()
    settings = throw_away.postgres.folder / "postgresql.conf"
    good = settings.read_text()
    settings.write_text(good + "\nno_such_setting = 1\n")
    with pytest.raises(StackError, match="no_such_setting"):
        throw_away.postgres.start()
    settings.write_text(good)
    throw_away.postgres.start()


def test_servers_end_with_their_owner(tmp_path: Path) -> None:
    """After kill -9 of the owner its servers shut down, its word does not count, and its data is still there."""
    owner, numbers = start_owner(tmp_path / "data")
    assert (find_running(tmp_path / "data") or {}).get("pid") == owner.pid
    owner.kill()
    owner.communicate(timeout=WAIT_S)
    assert find_running(tmp_path / "data") is None
    wait_for_end(numbers)
    log = tmp_path / "data" / "logs" / "postgres.log"
    assert "database system is shut down" in log.read_text()
    stack = EmbeddedStack(tmp_path / "data", ephemeral=True)
    stack.delete()
    assert not stack.data_dir.joinpath("postgres").exists()


def test_orphans_are_ended_by_the_next_start(tmp_path: Path) -> None:
    """Servers left alone, even frozen ones, are found by where they work and give way, ports and data kept."""
    owner, numbers = start_owner(tmp_path / "data")
    info = find_running(tmp_path / "data")
    assert info is not None
    with psycopg.connect(info["database_url"], connect_timeout=5) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    guards = [child for child in psutil.Process(owner.pid).children() if child.pid not in numbers]
    assert len(guards) == 2
    for guard in guards:
        guard.kill()
    os.kill(numbers[0], signal.SIGSTOP)
    owner.kill()
    owner.communicate(timeout=WAIT_S)
    assert all(psutil.pid_exists(number) for number in numbers)
    with EmbeddedStack(tmp_path / "data", ephemeral=True) as stack:
        wait_for_end(numbers)
        assert stack.postgres.url.get_secret_value() == info["database_url"]
        assert stack.valkey.url.get_secret_value() == info["redis_url"]
        assert sql(stack, "SELECT n FROM kept") == [7]


def test_a_strangers_process_is_left_alone(throw_away: EmbeddedStack, tmp_path: Path) -> None:
    """A process id in a stale file proves nothing: only a process that works in our folder is ended."""
    throw_away.postgres.kill()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path)
    stale = throw_away.postgres.folder / "postmaster.pid"
    stale.write_text(f"{stranger.pid}\n{throw_away.postgres.folder}\n")
    throw_away.postgres.start()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait(WAIT_S)
    assert sql(throw_away, "SELECT 1") == [1]


def test_each_test_gets_a_database_of_its_own(throw_away: EmbeddedStack) -> None:
    """A clone has what the template's migration made, nothing of other clones, and is gone afterwards."""

    def migrate(url: str) -> None:
        with psycopg.connect(url, connect_timeout=5) as connection:
            connection.execute("CREATE TABLE thing (n int)")

    template = make_template(throw_away.postgres, "template_of_test", migrate)
    names = set()
    for _ in range(2):
        with cloned_database(throw_away.postgres, template) as url, psycopg.connect(url) as connection:
            names.add(connection.info.dbname)
            assert connection.execute("SELECT count(*) FROM thing").fetchone() == (0,)
            connection.execute("INSERT INTO thing VALUES (1)")
            connection.commit()
    assert len(names) == 2
    assert not names & set(sql(throw_away, "SELECT datname FROM pg_database"))
