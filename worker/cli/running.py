"""The whole of Rollcall on one machine: servers, schema and processes, as `rollcall up`, demos and tests run it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import SecretStr

from worker.cli.supervisor import Program, Supervisor
from worker.dev.stack import EmbeddedStack, load_or_create_secret, write_running
from worker.errors import Misconfigured
from worker.redaction import redact
from worker.settings import Settings, catalogue
from worker.store.migrate import migrate
from worker.vault import Vault

PROGRAMS: Final = tuple(Program(name, ("-m", "worker.cli", name)) for name in ("beat", "worker", "writer"))
SIMULATOR: Final = "simulator"
_ROOT: Final = Path(__file__).parents[2]


class RunningStack:
    """Servers, schema and processes; started and stopped by its owner, from one thread.

    With DATABASE_URL and REDIS_URL in `settings` those servers are used, else embedded ones in its data folder.

    Args:
        settings: what every process gets; read `self.settings` once started for the complete ones.
        simulator: run a simulated provider too, and allow its address as a base URL.
        ephemeral: for tests: the embedded servers' data goes when it stops.
        say: is told, on one line, what happens.

    """

    def __init__(
        self, settings: Settings, *, simulator: bool = False, ephemeral: bool = False, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.servers: EmbeddedStack | None = None
        self.simulator_url: str | None = None
        self._with_simulator, self._ephemeral, self._say = simulator, ephemeral, say
        self._supervisor: Supervisor | None = None

    @property
    def supervisor(self) -> Supervisor:
        """The processes of a started stack."""
        if self._supervisor is None:
            raise RuntimeError("start the stack first")
        return self._supervisor

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start servers, bring the schema up to date, start the processes.

        Raises:
            Misconfigured: one of the two URLs is missing, or the vault's keys.
            StackError: the embedded servers do not start.
            TryLater: a given server cannot be reached.

        """
        programs = list(PROGRAMS)
        given = (self.settings.database_url, self.settings.redis_url)
        if any(given) and not all(given):
            missing = "REDIS_URL" if given[0] else "DATABASE_URL"
            raise Misconfigured("setting_missing", f"{missing} is not set: set both URLs, or none for embedded servers")
        try:
            if not any(given):
                self._start_servers()
            Vault(self.settings.require_vault_keys())
            self.settings.require_redis()
            if self._with_simulator:
                programs.append(self._simulator())
            database_url = self.settings.require_database().get_secret_value()
            for name in migrate(database_url, partitions=self.settings.partitions):
                self._say(f"applied migration {name}")
            self._supervisor = Supervisor(
                programs,
                environment(self.settings, os.environ),
                say=self._say,
                grace_s=self.settings.shutdown_grace_s + 5,
            )
            self._supervisor.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the processes, then the embedded servers; harmless if not started."""
        if self._supervisor is not None:
            self._supervisor.stop()
        if self.servers is not None:
            self.servers.stop()

    def describe(self) -> dict[str, object]:
        """Tell where everything answers, without passwords."""
        return {
            "database_url": redact(self.settings.require_database().get_secret_value()),
            "redis_url": redact(self.settings.require_redis().get_secret_value()),
            "simulator_url": self.simulator_url,
            "data_dir": str(self.servers.data_dir) if self.servers else None,
            "processes": self.supervisor.processes,
        }

    def _start_servers(self) -> None:
        self._say("starting Postgres and Valkey")
        self.servers = EmbeddedStack(self.settings.data_dir, ephemeral=self._ephemeral)
        urls = self.servers.start()
        keys = self.settings.vault_keys or load_or_create_secret(
            self.servers.data_dir, "vault_keys", lambda: Vault.generate_key("k1")
        )
        self._complete(database_url=urls.database_url, redis_url=urls.redis_url, vault_keys=keys)
        write_running(self.servers.data_dir, {"vault_keys": keys.get_secret_value()})

    def _simulator(self) -> Program:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.simulator_url = f"http://{host}"
        self._complete(api_hosts=self.settings.api_hosts | {host})
        if self.servers is not None:
            write_running(self.servers.data_dir, {"api_hosts": [host], "simulator_url": self.simulator_url})
        # The port stays the same when it is started again: connectors hold its address.
        return Program(SIMULATOR, ("-m", "worker.dev.simulator", "--quiet", "--port", host.rpartition(":")[2]))

    def _complete(self, **found: object) -> None:
        self.settings = self.settings.model_copy(update=found)


def environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Give a child's environment: `environ` with exactly these settings, secrets included."""
    ours = {setting.name for setting in catalogue()}
    kept = {name: text for name, text in environ.items() if name not in ours and name.removesuffix("_FILE") not in ours}
    written = {
        field.alias or "": _written(value)
        for name, field in Settings.model_fields.items()
        if (value := getattr(settings, name)) is not None
    }
    # A child is this program, wherever this one was imported from and wherever it was started.
    path = os.pathsep.join(filter(None, [str(_ROOT), environ.get("PYTHONPATH", "")]))
    return kept | written | {"PYTHONPATH": path}


def _written(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)
