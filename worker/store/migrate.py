"""Migrations: numbered SQL files, each applied once in a transaction of its own.

Plain SQL, because the schema is a contract that people read. Safe to run twice, and from two places at once
(an advisory lock makes one wait for the other).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import psycopg
from psycopg import sql

from worker.errors import Misconfigured, Refused, TryLater

LOCK_KEY = 0x726F6C6C
"""Advisory lock of whoever migrates ("roll")."""
CONNECT_TIMEOUT_S = 10
LOCK_TIMEOUT_MS = 60_000
MIN_SERVER_VERSION = 150000
READS_ONLY = "25006"
_LOST = {READS_ONLY, "25P03", "25P04"}
"""A standby's refusal, and sessions ended for their time in a transaction: to the driver these are errors of ours."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file `NNNN_name.sql`."""

    number: int
    name: str
    statements: str


def migrations() -> list[Migration]:
    """Read the shipped migrations in order of their numbers."""
    files = [f for f in resources.files("worker.store").joinpath("migrations").iterdir() if f.name.endswith(".sql")]
    found = [Migration(int(f.name[:4]), f.name[5:-4], f.read_text(encoding="utf-8")) for f in files]
    return sorted(found, key=lambda m: m.number)


def migrate(database_url: str, *, partitions: int = 4) -> list[str]:
    """Bring the schema `rollcall` up to date; return the names of what was applied now.

    Args:
        database_url: a libpq URL.
        partitions: the number of event streams, fixed at the very first migration.

    Raises:
        TryLater: the database cannot be reached, or another session holds what must be locked.
        Misconfigured: the user may not migrate.
        Refused: the server is too old, or the schema is newer than this program.

    """
    with (
        _explained(),
        psycopg.connect(
            database_url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="rollcall migrate",
        ) as connection,
    ):
        if connection.info.server_version < MIN_SERVER_VERSION:
            raise Refused("server_too_old", "PostgreSQL 15 or newer is needed; this server is older.")
        connection.execute(sql.SQL("SET lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT_MS)))
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
        return _apply(connection, partitions)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what an operator can mend into one line."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise TryLater(
            "database_locked",
            f"Another session has held what must be locked for {LOCK_TIMEOUT_MS / 1000:g} s:"
            " wait until it ends, or end it, then migrate again.",
        ) from error
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidSchemaName) as error:
        raise Misconfigured(
            "database_forbids",
            f"Postgres says: {error.diag.message_primary}. Migrate as the owner of the schema rollcall;"
            " for the first time, as a user who may create schemas in this database.",
        ) from error
    except psycopg.Error as error:
        if not is_away(error):
            raise
        raise unreachable(error) from None


def _apply(connection: psycopg.Connection, partitions: int) -> list[str]:
    # Asked first: for IF NOT EXISTS, too, one needs the right to create schemas.
    if not connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'rollcall'").fetchone():
        connection.execute("CREATE SCHEMA rollcall")
    connection.execute("SET search_path = rollcall")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations"
        " (number integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    done = {row[0] for row in connection.execute("SELECT number FROM schema_migrations")}
    known = migrations()
    if ahead := done - {m.number for m in known}:
        raise Refused(
            "database_from_the_future",
            f"The database has migration {max(ahead)}, which this version of Rollcall does not know:"
            " run the newer version, or restore a backup taken before it.",
        )
    applied = []
    for migration in known:
        if migration.number in done:
            continue
        with connection.transaction():
            connection.execute(sql.SQL(migration.statements))
            connection.execute(
                "INSERT INTO schema_migrations (number, name) VALUES (%s, %s)",
                [migration.number, migration.name],
            )
        applied.append(f"{migration.number:04d}_{migration.name}")
    connection.execute("INSERT INTO meta (partitions) VALUES (%s) ON CONFLICT DO NOTHING", [partitions])
    return applied


def is_away(error: psycopg.Error) -> bool:
    """Tell whether a later try, over another connection, may succeed."""
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) or error.sqlstate in _LOST


def unreachable(error: psycopg.Error) -> TryLater:
    """Say in one line, without the URL (which may hold a password), why a database is away."""
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if error.sqlstate == READS_ONLY:
        message = (
            "Postgres only reads here, as a standby does. DATABASE_URL must lead to the primary:"
            " of several hosts, target_session_attrs=read-write finds it."
        )
    elif error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
        message = f"Postgres cannot be reached: {detail}. Check DATABASE_URL and that it is running."
    else:
        message = f"Postgres gives up: {detail}."
    return TryLater("database_unreachable", message)
