"""The embedded stack: Postgres and Valkey of a data folder, for one machine and without any installation.

The data folder (0700) holds the databases, `secrets.json` and `state.json` (0600), the logs, and the `lock`
that one stack at a time holds; `stack.json` tells another terminal where the running stack answers.
"""

from __future__ import annotations

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from secrets import SystemRandom, token_urlsafe
from types import TracebackType
from typing import Self

from pydantic import SecretStr

from worker.dev.accounts import Place, root_place, user_place
from worker.dev.folder import (
    StackError,
    find_running,
    load_or_create_secret,
    make_private,
    read_json,
    take_lock,
    write_private,
    write_running,
)
from worker.dev.postgres import PostgresServer
from worker.dev.server import Server
from worker.dev.valkey import ValkeyServer

__all__ = [
    "EmbeddedStack",
    "StackError",
    "StackUrls",
    "find_running",
    "load_or_create_secret",
    "write_running",
]

PORTS = range(20_000, 32_000)
"""Below what systems give to outgoing connections. Else, while a server is down, a client that keeps trying
may get the server's port as its own, connect to itself, and hold the port against the server."""
TRIES = 3


@dataclass(frozen=True, slots=True)
class StackUrls:
    """Where the stack answers; an address is empty when that server is not part of the stack."""

    database_url: SecretStr
    redis_url: SecretStr


class EmbeddedStack:
    """Postgres and Valkey on 127.0.0.1, with ports, passwords and data that stay with the data folder.

    Args:
        data_dir: made if missing; nobody else may have access to it.
        postgres: whether Postgres is part of it.
        valkey: whether Valkey is part of it.
        ephemeral: for tests: quicker, may not survive a crash of the machine, and `stop` deletes its data.

    """

    def __init__(self, data_dir: Path, *, postgres: bool = True, valkey: bool = True, ephemeral: bool = False) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self._wanted = (postgres, valkey)
        self._ephemeral = ephemeral
        self._lock: int | None = None
        self._place: Place | None = None
        self._postgres: PostgresServer | None = None
        self._valkey: ValkeyServer | None = None

    @property
    def postgres(self) -> PostgresServer:
        """The Postgres of a started stack."""
        if self._postgres is None:
            raise StackError("not_started", "This stack runs no Postgres.")
        return self._postgres

    @property
    def valkey(self) -> ValkeyServer:
        """The Valkey of a started stack."""
        if self._valkey is None:
            raise StackError("not_started", "This stack runs no Valkey.")
        return self._valkey

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> StackUrls:
        """Start both side by side and wait until they answer (60 s at most).

        Raises:
            StackError: another stack runs on the folder, the folder is not fit, or a server does not start.

        """
        if self._lock is not None:
            raise StackError("stack_running", "This stack is started already.")
        make_private(self.data_dir)
        self._lock = take_lock(self.data_dir)
        try:
            self._assemble()
            with ThreadPoolExecutor(len(self._servers) or 1) as pool:
                list(pool.map(_start, self._servers))
            self._save_ports()
            urls = StackUrls(_url(self._postgres), _url(self._valkey))
            write_running(
                self.data_dir,
                {
                    "database_url": urls.database_url.get_secret_value(),
                    "redis_url": urls.redis_url.get_secret_value(),
                },
            )
        except OSError as error:
            self.stop()
            message = f"The stack on {self.data_dir} cannot start ({error}): mend that, or set ROLLCALL_DATA_DIR."
            raise StackError("stack_failed", message) from error
        except BaseException:
            self.stop()
            raise
        return urls

    def stop(self) -> None:
        """Shut both down, by SIGKILL if they take too long, and release the lock; harmless if not started."""
        if self._lock is None:
            return
        try:
            with ThreadPoolExecutor(len(self._servers) or 1) as pool:
                list(pool.map(lambda server: server.stop(), self._servers))
            if self._ephemeral:
                self._delete_data()
        finally:
            (self.data_dir / "stack.json").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = self._postgres = self._valkey = self._place = None

    def delete(self) -> None:
        """Delete the databases of a stack that does not run, in root's home as well; keep the secrets.

        Raises:
            StackError: a stack runs on the folder, or the folder is not fit.

        """
        make_private(self.data_dir)
        self._lock = take_lock(self.data_dir)
        try:
            self._assemble()
            for server in self._servers:
                server.stop()
            self._delete_data()
        finally:
            self.stop()

    @property
    def _servers(self) -> list[Server]:
        return [server for server in (self._postgres, self._valkey) if server is not None]

    def _assemble(self) -> None:
        """Find place, ports and passwords; a home goes on record before anything of worth lies in it."""
        state = read_json(self.data_dir / "state.json")
        if state.setdefault("ephemeral", self._ephemeral) != self._ephemeral:
            raise StackError(
                "data_folder_kind",
                f"{self.data_dir} was made with another value of `ephemeral`: use another folder.",
            )
        if os.geteuid() == 0:
            home = Path(state["home"]) if "home" in state else None
            self._place = root_place(self.data_dir, home, throw_away=self._ephemeral)
            state["home"] = str(self._place.folder)
        else:
            self._place = user_place(self.data_dir)
        write_private(self.data_dir / "state.json", state)
        logs = self.data_dir / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        if self._wanted[0]:
            self._postgres = PostgresServer(
                self._place,
                port=state.get("postgres_port") or _free_port(),
                password=load_or_create_secret(self.data_dir, "postgres_password", _password),
                log=logs / "postgres.log",
                throw_away=self._ephemeral,
            )
        if self._wanted[1]:
            self._valkey = ValkeyServer(
                self._place,
                port=state.get("valkey_port") or _free_port(),
                password=load_or_create_secret(self.data_dir, "valkey_password", _password),
                log=logs / "valkey.log",
            )

    def _save_ports(self) -> None:
        ports = {f"{server.name.lower()}_port": server.port for server in self._servers}
        write_private(self.data_dir / "state.json", read_json(self.data_dir / "state.json") | ports)

    def _delete_data(self) -> None:
        if self._place is None:
            return
        for server in self._servers:
            shutil.rmtree(server.folder, ignore_errors=True)
        if self._place.account:
            shutil.rmtree(self._place.folder, ignore_errors=True)
            state = read_json(self.data_dir / "state.json")
            state.pop("home", None)
            write_private(self.data_dir / "state.json", state)


def _start(server: Server) -> None:
    """Start on its port, or on another when that is taken; what an earlier life left running goes first."""
    server.stop()
    for tries_left in reversed(range(TRIES)):
        if not _is_free(server.port):
            server.port = _free_port()
        try:
            return server.start()
        except StackError:
            if tries_left == 0 or _is_free(server.port):
                raise
    return None


def _free_port() -> int:
    for port in SystemRandom().sample(PORTS, 100):
        if _is_free(port):
            return port
    raise StackError("no_port", f"No free port was found between {PORTS.start} and {PORTS.stop}.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as both servers do
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _password() -> str:
    return token_urlsafe(32)


def _url(server: Server | None) -> SecretStr:
    return server.url if server else SecretStr("")
