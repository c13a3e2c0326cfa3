"""Wiring: the one place that opens things. A process has one of each, on one event loop, and closes them here."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis

from worker.changes import GuardLimits
from worker.elevenlabs.asking import Asked
from worker.elevenlabs.client import Client
from worker.elevenlabs.protocol import Answer, Request
from worker.plan import Calendar
from worker.ports import Ports, Target
from worker.redis import client as redis_client
from worker.settings import Settings
from worker.snapshots import RedisSnapshots
from worker.store.connectors import PgConnectors
from worker.store.db import Database
from worker.store.facts import PgFacts
from worker.store.ledger import PgLedger
from worker.store.recovery import Recovery
from worker.store.sending import Dispatch, Schedule
from worker.vault import Vault

REQUESTS_OF_A_PART = 4
"""A part rarely asks more often (usage around a switch of billing): its deadline is that many timeouts. What was
answered by then counts; the days before become a part of their own."""


@dataclass(frozen=True, slots=True)
class Provider:
    """`worker.ports.Provider`: opens the key for the length of a conversation."""

    client: Client
    vault: Vault
    deadline_s: float

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """Carry a conversation to its end; see `worker.ports.Provider`."""
        key = self.vault.open(target.sealed_key, tenant_id=target.tenant_id, connector_id=target.connector_id)
        return await self.client.converse(target.base_url, key, asking, deadline_s=self.deadline_s)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a process has open."""

    settings: Settings
    db: Database
    redis: Redis
    vault: Vault
    provider: Provider
    snapshots: RedisSnapshots
    dispatch: Dispatch
    recovery: Recovery
    registry: PgConnectors
    ports: Ports


def process_name() -> str:
    """Name this process among all: host and pid."""
    return f"{socket.gethostname()}-{os.getpid()}"


def calendar(settings: Settings) -> Calendar:
    """Read how far back usage is asked for."""
    return Calendar(settings.usage_lookback_days, settings.backfill_days, settings.window_days, settings.part_days)


def database(settings: Settings, application: str) -> Database:
    """Make the process's pool."""
    return Database(settings.require_database(), application=application, size=settings.db_pool_size)


@asynccontextmanager
async def runtime(settings: Settings, application: str) -> AsyncIterator[Runtime]:
    """Open everything; close it in reverse order.

    Raises:
        Misconfigured: a setting is missing or wrong.

    """
    vault = Vault(settings.require_vault_keys())
    async with AsyncExitStack() as stack:
        db = database(settings, application)
        stack.push_async_callback(db.close)
        await db.open()
        redis = redis_client(settings.require_redis())
        stack.push_async_callback(redis.aclose)
        provider = Provider(
            await stack.enter_async_context(Client(timeout_s=settings.fetch_timeout_s)),
            vault,
            settings.fetch_timeout_s * REQUESTS_OF_A_PART,
        )
        snapshots = RedisSnapshots(redis, ceiling_entries=settings.stream_ceiling_entries)
        stack.push_async_callback(snapshots.close)
        days = calendar(settings)
        yield Runtime(
            settings=settings,
            db=db,
            redis=redis,
            vault=vault,
            provider=provider,
            snapshots=snapshots,
            dispatch=Dispatch(
                db,
                Schedule(days, settings.reconcile_interval_s, settings.reprobe_interval_s, settings.part_attempts),
            ),
            recovery=Recovery(db),
            registry=PgConnectors(db),
            ports=Ports(
                ledger=PgLedger(
                    db,
                    lease_s=settings.part_lease_s,
                    request_s=settings.fetch_timeout_s,
                    attempts=settings.part_attempts,
                    worker=process_name(),
                ),
                facts=PgFacts(db),
                snapshots=snapshots,
                provider=provider,
                calendar=days,
                limits=GuardLimits(settings.hold_records, settings.hold_share, settings.hold_runs),
            ),
        )
