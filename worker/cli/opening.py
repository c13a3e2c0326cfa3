"""Opening: what a command needs of the servers, for its short life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from worker.errors import Misconfigured
from worker.redis import client
from worker.settings import Settings
from worker.store.db import Database, connect, repeated
from worker.wiring import Runtime, database, runtime


@asynccontextmanager
async def opened_database(settings: Settings) -> AsyncIterator[Database]:
    """Open Postgres.

    Raises:
        TryLater: it cannot be reached.
        Misconfigured: it was never migrated.

    """
    await _look(settings)
    db = database(settings, "cli")
    await db.open()
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def opened_redis(settings: Settings) -> AsyncIterator[Redis]:
    """Open Redis; it connects when first used."""
    redis = client(settings.require_redis())
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def opened_runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Open everything, the provider and the vault as well. Raises as `opened_database`."""
    await _look(settings)
    async with runtime(settings, "cli") as opened:
        yield opened


async def _look(settings: Settings) -> None:
    """See at once what a pool would only tell at the end of its wait."""

    async def once() -> bool:
        async with await connect(settings.require_database(), "cli") as connection:
            found = await (await connection.execute("SELECT to_regclass('rollcall.meta') AS meta")).fetchone()
            return bool(found and found["meta"])

    if not await repeated(once):
        raise Misconfigured("not_migrated", "The database has no schema of ours yet: run `rollcall migrate`")
