"""Transactions: what Postgres may say to one, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from tests.fixtures.harness import Harness
from tests.fixtures.installation import until
from worker.errors import ContractBroken, TryLater
from worker.store.conclude import lock_connectors
from worker.store.db import Connection, Database

SIZE: Final = 3


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """A worker's pool."""
    made = Database(SecretStr(database_url), application="worker", size=SIZE)
    await made.open()
    yield made
    await made.close()


async def count_tick(connection: Connection) -> None:
    await connection.execute("UPDATE rollcall.meta SET ticks = ticks + 1")


async def test_a_table_may_get_columns_meanwhile(db: Database, database_url: str) -> None:
    """Whoever works while a migration adds a column goes on, with the statement that reads all columns too."""

    async def work(connection: Connection) -> str:
        await lock_connectors(connection, [uuid4()])
        row = await (await connection.execute("SHOW plan_cache_mode")).fetchone()
        return str(row)

    assert "force_generic_plan" in await db.transaction(work)
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("ALTER TABLE rollcall.connectors ADD COLUMN more text")
    await db.transaction(work)


async def test_serialization_failures_are_repeated(harness: Harness) -> None:
    """A transaction that Postgres asks to repeat is repeated, and then counts."""
    db, attempts = harness.runtime.db, 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("SELECT * FROM rollcall.meta")
        if attempts == 1:
            await harness.rows("UPDATE rollcall.meta SET ticks = 10")
        await connection.execute("UPDATE rollcall.meta SET ticks = ticks + 1")

    await db.transaction(work, isolation="REPEATABLE READ")
    assert attempts == 2
    assert (await harness.one("SELECT ticks FROM rollcall.meta"))["ticks"] == 11


async def test_repeats_are_bounded(harness: Harness) -> None:
    """A transaction that fails so every time is given up as TryLater."""

    async def work(_: Connection) -> None:
        raise psycopg.errors.DeadlockDetected

    with pytest.raises(TryLater) as later:
        await harness.runtime.db.transaction(work)
    assert later.value.reason == "database_contended"
    assert "40P01" in later.value.message, "what Postgres said last"


async def test_unwritable_data_is_no_outage(harness: Harness) -> None:
    """Data that Postgres refuses is a broken contract, never an outage to wait for."""

    async def work(connection: Connection) -> None:
        await connection.execute("INSERT INTO rollcall.meta (singleton, partitions) VALUES (false, 1)")

    with pytest.raises(ContractBroken) as broken:
        await harness.runtime.db.transaction(work)
    assert broken.value.reason == "unwritable"


async def test_a_server_that_only_reads_is_left(db: Database) -> None:
    """Connections to what has become a standby are left, however many there are, and what it refused is done."""
    async with AsyncExitStack() as lent:
        for _ in range(SIZE):
            connection = await lent.enter_async_context(db.connection())
            await connection.execute("SET default_transaction_read_only = on")
    await db.transaction(count_tick)
    await db.statement(count_tick)


async def test_a_lasting_standby_is_told(db: Database, database_url: str) -> None:
    """While there is no primary everybody hears so, and to try later; once there is one, all go on."""
    with psycopg.connect(database_url, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        await db.transaction(count_tick)
        admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        async with AsyncExitStack() as lent:
            for _ in range(SIZE):
                await (await lent.enter_async_context(db.connection())).close()
        for ask in (db.transaction, db.statement):
            with pytest.raises(TryLater, match="standby") as later:
                await ask(count_tick)
            assert later.value.reason == "database_unreachable"
        admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
    await db.transaction(count_tick)


async def test_a_session_that_was_ended_is_replaced(db: Database, database_url: str) -> None:
    """Whoever slept in a transaction for longer than Postgres allows tries later; the pool then lends another one."""
    with psycopg.connect(database_url, autocommit=True) as other:

        async def work(connection: Connection) -> None:
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 1")
            session = [connection.info.backend_pid]

            def ended() -> bool:
                return not other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", session).fetchone()

            await asyncio.to_thread(until, ended, "Postgres has ended the session")
            await count_tick(connection)

        with pytest.raises(TryLater, match="idle-in-transaction") as later:
            await db.transaction(work)
    assert later.value.reason == "database_unreachable"
    await db.transaction(count_tick)
