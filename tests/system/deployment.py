"""A whole installation on one machine: real servers behind fault proxies, real processes, a provider, witnesses."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from pydantic import SecretStr

from tests.fixtures import witness
from tests.fixtures.evidence import Evidence, Truth, Values
from tests.fixtures.processes import Process, Role, running
from tests.fixtures.proxy import Proxy
from tests.fixtures.simulator import Simulator, start_simulator
from tests.fixtures.witness import Connection, Reader
from worker import connectors
from worker.dev.server import Server
from worker.dev.stack import EmbeddedStack
from worker.settings import load
from worker.store.migrate import migrate
from worker.vault import Vault
from worker.wiring import runtime

PARTITIONS: Final = 4
BACKFILL_DAYS: Final = 30
"""As many as a reconcile asks for, so that it finds no day that was never asked for."""
LOOKBACK_DAYS: Final = 3
"""Of usage that every poll asks for."""
LOOK_S: Final = 0.1
SETTINGS: Final = {
    "ROLLCALL_API_HOSTS": "127.0.0.1",
    "ROLLCALL_BACKFILL_DAYS": str(BACKFILL_DAYS),
    "ROLLCALL_DISPATCH_INTERVAL_S": "1",
    "ROLLCALL_FETCH_TIMEOUT_S": "1",
    "ROLLCALL_PART_LEASE_S": "2",
    "ROLLCALL_SHUTDOWN_GRACE_S": "2",
    "ROLLCALL_LOG_FORMAT": "json",
}
"""Waits short enough that what was lost is found again within a test."""


@dataclass
class Deployment:
    """What runs. `connectors` are ids by workspace name, `truths` by connector."""

    stack: EmbeddedStack
    simulator: Simulator
    redis: Proxy
    postgres: Proxy
    reader: Reader
    database: str
    environ: Mapping[str, str]
    folder: Path
    today: date
    processes: list[Process] = field(default_factory=list)
    connectors: dict[str, str] = field(default_factory=dict)
    truths: dict[str, Truth] = field(default_factory=dict)

    def add(self, names: Sequence[str], *, poll_interval_s: int, **spec: object) -> None:
        """Make simulated workspaces and connectors to them, each of a tenant of its own, due at once."""
        made = self.simulator.workspaces([{"name": name, **spec} for name in names])
        self.connectors |= asyncio.run(self._add(made, poll_interval_s))
        for name in names:
            self.truths[self.connectors[name]] = Truth()
            self.note_truth(name, began=0.0)

    async def _add(self, made: Sequence[Mapping[str, Any]], poll_interval_s: int) -> dict[str, str]:
        settings = load({**self.environ, "DATABASE_URL": self.database})
        async with runtime(settings, "test") as opened:
            ports = connectors.Ports(opened.registry, opened.provider, opened.vault)
            added = {}
            for one in made:
                new = connectors.NewConnector(
                    f"tenant {one['name']}", one["name"], SecretStr(one["api_key"]), base_url=self.simulator.url
                )
                connector = await connectors.add(
                    new,
                    ports,
                    api_hosts=settings.api_hosts,
                    poll_interval_s=poll_interval_s,
                    check=False,
                )
                added[one["name"]] = str(connector.id)
        return added

    def change(self, name: str, *operations: dict[str, Any]) -> None:
        """Change a workspace, and take note of what is true from now on."""
        began = time.time()
        self.simulator.mutate(name, *operations)
        self.note_truth(name, began=began)

    def note_truth(self, name: str, *, began: float) -> None:
        """Take note of what is true of a workspace since a change that was begun then."""
        days = [self.today - timedelta(days=n) for n in range(BACKFILL_DAYS)]
        values = witness.true_values(self.simulator.truth(name, first=min(days).isoformat()), days)
        self.truths[self.connectors[name]].add(values, began=began, done=time.time())

    def look(self) -> Connection:
        """Open a connection to the database past the proxy; the caller closes it."""
        return witness.look(self.database)

    def process(self, role: Role) -> Process:
        """Give the first process of a role."""
        return next(process for process in self.processes if process.role == role)

    def agrees(self, *names: str) -> bool:
        """Tell whether the tables equal what is true, of these connectors or of all."""
        wanted = [self.connectors[name] for name in names] or self.truths
        with self.look() as connection:
            held = witness.values(connection)
        return all(held.get(connector) == self.truths[connector].now for connector in wanted)

    def tables(self, name: str) -> Values:
        """Read the living rows of a connector."""
        with self.look() as connection:
            return witness.values(connection)[self.connectors[name]]

    def rows(self, query: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Run one statement past the proxy."""
        with self.look() as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def rest(self, *, timeout_s: float) -> None:
        """End all polls, and await all runs: what says that nothing changed may wait behind equal tables."""
        self.rows("UPDATE rollcall.connectors SET next_sync_at = NULL")
        running = "SELECT 1 FROM rollcall.sync_runs WHERE status IN ('queued', 'running')"
        wait_for("the end of all runs", lambda: not self.rows(running), timeout_s=timeout_s)

    def evidence(self) -> Evidence:
        """Collect all accounts; the tables must agree with the truth, as they do once things are quiet (`rest`)."""
        recent = self.today - timedelta(days=LOOKBACK_DAYS - 1)
        return witness.collect(self.database, self.reader, self.truths, recent=recent.isoformat())


@contextmanager
def deployed(
    folder: Path,
    roles: Sequence[Role],
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
    seed: int = 0,
    now: datetime | None = None,
) -> Iterator[Deployment]:
    """Run an installation until the context ends; nothing of it is left.

    Args:
        folder: for its data and the logs of its processes.
        roles: which processes to run.
        settings: of the processes, beside `SETTINGS`.
        seed: what the simulated data are derived from.
        now: the provider's time, which stands still; else the present.

    """
    with ExitStack() as opened:
        servers = opened.enter_context(EmbeddedStack(folder / "data", ephemeral=True))
        redis_url, database = (server.url.get_secret_value() for server in (servers.valkey, servers.postgres))
        migrate(database, partitions=PARTITIONS)
        witness.watch_commits(database)
        simulator = opened.enter_context(start_simulator(folder, seed=seed))
        now = now or datetime.now(UTC)
        simulator.clock(now.isoformat())
        redis = opened.enter_context(Proxy(servers.valkey.port))
        postgres = opened.enter_context(Proxy(servers.postgres.port))
        environ = {
            **SETTINGS,
            **settings,
            "DATABASE_URL": postgres.through(database),
            "REDIS_URL": redis.through(redis_url),
            "ROLLCALL_VAULT_KEYS": Vault.generate_key("test"),
        }
        reader = opened.enter_context(Reader(redis_url, PARTITIONS))
        made = Deployment(servers, simulator, redis, postgres, reader, database, environ, folder, today=now.date())
        made.processes = opened.enter_context(running(roles, environ, folder))
        yield made


def wait_for(what: str, condition: Callable[[], object], *, timeout_s: float) -> float:
    """Wait until a condition holds; give the seconds it took.

    Raises:
        AssertionError: it does not, in time.

    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(LOOK_S)
    return time.monotonic() - began


def copy_of(server: Server, copy: Path) -> Path:
    """Copy the data of a server that does not run."""
    _copy(server.folder, copy)
    return copy


def put_back(server: Server, copy: Path) -> None:
    """Replace the data of a server that does not run by a copy taken earlier."""
    shutil.rmtree(server.folder)
    _copy(copy, server.folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder with its owners, which may be an account of the servers' own."""
    program = shutil.which("cp")
    assert program is not None
    subprocess.run([program, "-a", "--", source, target], check=True, timeout=60)
