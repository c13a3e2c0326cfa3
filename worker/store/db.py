"""The pool, and transactions that repeat what Postgres asks to be repeated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from pydantic import SecretStr

from worker.errors import ContractBroken, TryLater
from worker.store.migrate import READS_ONLY, is_away, unreachable

T = TypeVar("T")
Row = dict[str, Any]
Connection = AsyncConnection[Row]

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
REPEATS = 5
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""A server that stopped answering is noticed within about ten seconds."""

_PLANS = "".join(
    f" -c {setting}=off"
    for setting in ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit")
)
"""Rollcall only looks up keys. Of tables whose rows come and go, what the planner knows is old: it would read them
whole, or an index of which most is dead. Plain index scans also clear away what is dead. What can only be read whole
then seems dear enough to compile, which it is not."""

_LASTING = frozenset({"worker", "writer"})
"""Processes that do the same again and again. Most of their statements take longer to plan than to execute, and none is
better planned for certain values: so they are prepared when first used, and planned for any. What somebody asks for at
a command line may leave out conditions by its values."""
_PREPARED_MOST = 500
"""A statement counts anew for each combination of its parameters' types, which follow the values."""


def connection_options(application: str) -> dict[str, Any]:
    """Give libpq options: bounded waits, rows as dictionaries."""
    lasting = application in _LASTING
    plans = f"{_PLANS} -c plan_cache_mode={'force_generic_plan' if lasting else 'auto'}"
    return {
        "autocommit": True,
        "row_factory": dict_row,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "prepare_threshold": 0 if lasting else 5,
        "application_name": f"rollcall {application}",
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c timezone=UTC{plans}"
        " -c idle_in_transaction_session_timeout=60000",
        **KEEPALIVE,
    }


@contextmanager
def answering() -> Iterator[None]:
    """Turn a database that is away into `TryLater`.

    Raises:
        TryLater: the connection broke, cannot be made, or leads to a server that only reads, as a standby does.

    """
    try:
        yield
    except psycopg.Error as error:
        if not is_away(error):
            raise
        raise unreachable(error) from error


async def connect(url: SecretStr, application: str) -> Connection:
    """Open one connection of one's own.

    Raises:
        TryLater: the database cannot be reached.

    """
    with answering():
        connection = await AsyncConnection[Row].connect(url.get_secret_value(), **connection_options(application))
    await _configure(connection)
    return connection


async def _configure(connection: Connection) -> None:
    connection.prepared_max = _PREPARED_MOST


class Database:
    """A pool of connections, opened and closed by its owner, on the owner's event loop."""

    def __init__(self, url: SecretStr, *, application: str, size: int = 8, wait_s: float = 10.0) -> None:
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url.get_secret_value(),
            connection_class=AsyncConnection[Row],
            kwargs=connection_options(application),
            configure=_configure,
            min_size=1,
            max_size=size,
            timeout=wait_s,
            max_waiting=1000,
            reconnect_timeout=30.0,
            open=False,
            name=f"rollcall-{application}",
        )

    async def open(self) -> None:
        """Start the pool; a database that is down now is tried again in the background."""
        await self._pool.open()

    async def close(self) -> None:
        """Close every connection within five seconds."""
        await self._pool.close(timeout=5.0)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection in autocommit mode.

        Raises:
            TryLater: no connection could be had in time.

        """
        try:
            async with self._pool.connection() as connection:
                try:
                    yield connection
                except psycopg.errors.ReadOnlySqlTransaction:
                    await connection.close()  # the pool would lend it again
                    raise
        except (PoolTimeout, TooManyRequests, PoolClosed):
            raise TryLater("database_unreachable", "Postgres gives no connection; trying again later.") from None

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, isolation: str = "") -> T:
        """Run `work` in one transaction; see `repeated`."""
        begun = False

        async def once() -> T:
            nonlocal begun
            begun = False
            async with self.connection() as connection, connection.transaction():
                begun = True
                if isolation:
                    await connection.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
                return await work(connection)

        return await self._on_a_living_connection(once, lambda: not begun)

    async def statement(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work`, a single statement that is harmless to repeat, without a transaction around it.

        Raises:
            TryLater: Postgres is away.

        """

        async def once() -> T:
            async with self.connection() as connection:
                return await work(connection)

        return await self._on_a_living_connection(once, lambda: True)

    async def _on_a_living_connection(self, once: Callable[[], Awaitable[T]], harmless: Callable[[], bool]) -> T:
        """Try the pool's connections until one works, while trying again is harmless.

        The pool does not know which of its connections a restart has broken, or lead to what is a standby by now. To
        drop one that could not even begin, or was refused, is cheaper than to ask each before each use.
        """
        for _ in range(self._pool.max_size):
            try:
                return await repeated(once)
            except TryLater as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error) or not (harmless() or cause.sqlstate == READS_ONLY):
                    raise
        return await repeated(once)


async def repeated(once: Callable[[], Awaitable[T]]) -> T:
    """Run a whole transaction, again on serialization failures and deadlocks, bounded and with full jitter.

    And when a table has got another column since a statement was prepared; it is prepared anew after the rollback.

    Raises:
        TryLater: Postgres is away, or the repeats are used up.
        ContractBroken: the data cannot be written (SQLSTATE class 21, 22 or 23).

    """
    said: str | None = None
    for attempt in range(REPEATS):
        with answering():
            try:
                return await once()
            except (
                psycopg.errors.SerializationFailure,
                psycopg.errors.DeadlockDetected,
                psycopg.errors.FeatureNotSupported,
            ) as error:
                # Caught in here, since to the driver these are failures of the server as well.
                said = error.sqlstate
                await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - jitter, no secret
            except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.CardinalityViolation) as error:
                # The last of them: a key twice in one statement. As two rows it would violate the key's constraint.
                raise ContractBroken("unwritable", f"SQLSTATE {error.sqlstate}: {_constraint(error)}") from error
    raise TryLater("database_contended", f"Postgres asked for too many repeats of one transaction: SQLSTATE {said}.")


def _constraint(error: psycopg.Error) -> str:
    return error.diag.constraint_name or error.diag.message_primary or type(error).__name__
