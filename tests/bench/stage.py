"""The stage: servers as users have them (fsync on), the provider's simulator, and a fresh database on demand."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis
from psycopg.rows import dict_row
from pydantic import SecretStr

from tests.fixtures.servers import cloned_database, make_template
from tests.fixtures.simulator import Simulator, start_simulator
from worker.dev.stack import EmbeddedStack
from worker.store.migrate import migrate
from worker.vault import Vault

TEMPLATE = "rollcall_bench"
CALM_S = 0.5
"""Between clearing away and measuring: what dropped databases leave to be done in the background."""

Row = dict[str, Any]
Database = psycopg.Connection[Row]


class WrongResultError(Exception):
    """A case ended with data that is not what the provider holds, or did not end at all."""


@dataclass(frozen=True, slots=True)
class Place:
    """A fresh, migrated database and an emptied Valkey."""

    database_url: str
    redis_url: str

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Connect, each statement committed at once."""
        with psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row, connect_timeout=10) as opened:
            yield opened

    @contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        """Connect to the Valkey."""
        with redis.Redis.from_url(self.redis_url, socket_timeout=60) as client:
            yield client


@dataclass(slots=True)
class Stage:
    """What every case stands on.

    `quick` asks for small sizes, `checked` for a history that is witnessed and checked. `note` tells the onlooker
    what is going on.
    """

    stack: EmbeddedStack
    folder: Path
    ring: SecretStr
    quick: bool
    checked: bool
    note: Callable[[str], None]

    @contextmanager
    def fresh(self) -> Iterator[Place]:
        """Give a fresh database and an empty Valkey, at rest; the database is dropped afterwards."""
        url = self.stack.valkey.url.get_secret_value()
        with cloned_database(self.stack.postgres, TEMPLATE) as database_url:
            place = Place(database_url, url)
            with place.redis() as client:
                client.flushall()
            self.settle(place)
            yield place

    def settle(self, place: Place) -> None:
        """Write out what is pending, so that it does not fall into somebody's measured time."""
        with place.database() as database:
            database.execute("CHECKPOINT")
        time.sleep(CALM_S)

    @contextmanager
    def simulator(self, *, latency_ms: float = 0) -> Iterator[Simulator]:
        """Run a simulator of one's own."""
        with start_simulator(self.folder, latency_ms=latency_ms) as started:
            yield started

    @property
    def servers(self) -> dict[str, int]:
        """The first process of each server, by name."""
        found = {"postgres": self.stack.postgres.pid, "valkey": self.stack.valkey.pid}
        return {name: pid for name, pid in found.items() if pid is not None}


@contextmanager
def opened(*, quick: bool, checked: bool, note: Callable[[str], None]) -> Iterator[Stage]:
    """Bring up the servers in a folder of their own, and leave nothing of them behind."""
    folder = Path(tempfile.mkdtemp(prefix="rollcall-bench-"))
    stack = EmbeddedStack(folder / "stack")
    try:
        note("starting servers")
        stack.start()
        make_template(stack.postgres, TEMPLATE, migrate)
        yield Stage(stack, folder, SecretStr(Vault.generate_key("bench")), quick, checked, note)
    finally:
        stack.stop()
        stack.delete()
        shutil.rmtree(folder, ignore_errors=True)
