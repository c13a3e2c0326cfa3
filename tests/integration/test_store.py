"""Postgres as the store: its schema, who may see what, and what its hot statements cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from schemas.connectors import Dataset, RunKind
from tests.fixtures.harness import Harness
from worker.elevenlabs.protocol import Finding, Verdict
from worker.entries import Observation, Report
from worker.plan import BULK_PER_MESSAGE, messages
from worker.store import sending as sending_module
from worker.store.books import apply
from worker.store.conclude import conclude, lock_connectors
from worker.store.db import connect
from worker.store.upkeep import age_out

TENANTLESS = {"meta", "workers", "schema_migrations"}
BY_CONNECTOR = {"connector_access", "sync_parts"}
BIG = {"connectors", "connector_access", "sync_runs", "sync_parts"}
MANY = 4_000


# Tenants.


async def test_a_reader_sees_its_tenant_only(harness: Harness) -> None:
    """Through every table and view a reader sees the rows of the tenant it names, and none without naming one."""
    watched = {tenant: await harness.add_connector(f"w_{tenant}", tenant=tenant, members=40) for tenant in ("t1", "t2")}
    await harness.poll()
    for one in watched.values():
        members = harness.simulator.truth(one.workspace)["members"]
        leavers = [{"op": "member_leave", "user_id": m["user_id"]} for m in members[20:]]
        harness.simulator.mutate(one.workspace, *leavers)
    await harness.poll()
    relations = [
        row["name"]
        for row in await harness.rows(
            "SELECT relname AS name FROM pg_class WHERE relnamespace = 'rollcall'::regnamespace"
            " AND relkind IN ('r', 'v', 'm', 'p')"
        )
        if row["name"] not in TENANTLESS
    ]
    assert {"seat_counts", "api_key_use", "deletion_holds", *BY_CONNECTOR} <= set(relations)
    connectors = {tenant: one.id for tenant, one in watched.items()}
    async with reading(harness) as role:
        await harness.rows(role)
        for tenant in ("t1", "t2", "nobody", ""):
            await harness.rows("SELECT set_config('rollcall.tenant_id', %s, false)", [tenant])
            for relation in relations:
                rows = await harness.rows(sql.SQL("SELECT * FROM rollcall.{}").format(sql.Identifier(relation)))
                key = "connector_id" if relation in BY_CONNECTOR else "tenant_id"
                expected = {connectors[tenant] if key == "connector_id" else tenant} if tenant in watched else set()
                assert (relation, {row[key] for row in rows}) == (relation, expected)


class reading:  # noqa: N801 - reads as a verb where it is used
    """A role that may read everything of the schema, for as long as the context lasts."""

    def __init__(self, harness: Harness) -> None:
        self.harness, self.role = harness, sql.Identifier(f"reader_{uuid4().hex[:8]}")

    async def __aenter__(self) -> sql.Composed:
        for statement in (
            "CREATE ROLE {}",
            "GRANT USAGE ON SCHEMA rollcall TO {}",
            "GRANT SELECT ON ALL TABLES IN SCHEMA rollcall TO {}",
        ):
            await self.harness.rows(sql.SQL(statement).format(self.role))
        return sql.SQL("SET ROLE {}").format(self.role)

    async def __aexit__(self, *_: object) -> None:
        for statement in ("RESET ROLE", "DROP OWNED BY {}", "DROP ROLE {}"):
            await self.harness.rows(sql.SQL(statement).format(self.role))


# Claims.


async def test_two_dispatchers_claim_a_connector_once(harness: Harness) -> None:
    """Dispatchers at once share the due connectors: each gets one run, its parts once, and one message."""
    for n in range(30):
        await harness.add_connector(f"w{n}", members=1, groups=0, service_accounts=0)
    claimed = await asyncio.gather(*(harness.due(8) for _ in range(5)))
    sent = Counter(s.connector_id for sendings in claimed for s in sendings)
    assert set(sent.values()) == {1}
    runs = await harness.rows("SELECT connector_id FROM rollcall.sync_runs")
    assert len(runs) == len({row["connector_id"] for row in runs}) == 30
    parts = await harness.one(
        "SELECT count(*), count(DISTINCT (connector_id, dataset, window_start)) AS n FROM rollcall.sync_parts"
    )
    assert parts["count"] == parts["n"] == 30 * (4 + 3)
    assert not await harness.due(100)


async def test_a_part_is_claimed_once(harness: Harness) -> None:
    """Of several that claim the same parts at once one gets each; its dataset is nobody else's meanwhile."""
    await harness.add_connector()
    (sending,) = await harness.due(1)
    ids = list(sending.lanes)
    claims = await asyncio.gather(*(harness.runtime.ports.ledger.claim(ids) for _ in range(6)))
    won = Counter(claim.part_id for some in claims for claim in some)
    assert won == dict.fromkeys(ids, 1)
    numbers = {claim.dataset: claim.number for some in claims for claim in some}
    rows = await harness.rows("SELECT dataset, claimed FROM rollcall.connector_access")
    assert {Dataset(row["dataset"]): row["claimed"] for row in rows} == numbers


@pytest.mark.parametrize("other", [RunKind.BACKFILL, RunKind.RECONCILE])
async def test_runs_that_end_at_once_each_count(harness: Harness, other: RunKind) -> None:
    """A poll and another run of one connector that are settled together: neither is taken for not done."""
    await harness.add_connector()
    runs = {kind: uuid4() for kind in (RunKind.POLL, other)}
    for kind, run_id in runs.items():
        await harness.rows(
            "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, parts_total)"
            " SELECT %s, id, tenant_id, %s, 'schedule', 'running', 1 FROM rollcall.connectors",
            [run_id, kind],
        )
        await harness.rows(
            "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, status)"
            " SELECT gen_random_uuid(), %s, id, %s, 'members', 'succeeded' FROM rollcall.connectors",
            [run_id, kind],
        )
    connection = await connect(harness.runtime.settings.require_database(), "writer")
    try:
        async with connection.transaction():
            ids = [row["id"] for row in await harness.rows("SELECT id FROM rollcall.connectors")]
            locked = await lock_connectors(connection, ids)
            await conclude(connection, locked, [], runs=set(runs.values()))
    finally:
        await connection.close()
    row = await harness.one("SELECT backfilled_at, reconciled_at, last_synced_at FROM rollcall.connectors")
    assert row["last_synced_at"] is not None
    assert row["reconciled_at"] is not None
    assert (row["backfilled_at"] is not None) is (other is RunKind.BACKFILL)


async def test_a_part_is_cut_by_whoever_holds_it(harness: Harness) -> None:
    """The days before become a part of their own once, after the provider's wait; a lost claim cuts nothing."""
    await harness.add_connector()
    await harness.tick()
    ledger = harness.runtime.ports.ledger
    claims = await ledger.claim(list(harness.messages.popleft().lanes))
    claim = next(claim for claim in claims if claim.dataset is Dataset.USAGE_PRODUCT)
    assert claim.window is not None
    latest = next(claim.window.backwards(30))
    busy = Verdict(Finding.TRANSIENT, "rate_limited", "slow down", retry_after_s=600.0)
    assert await ledger.narrow(replace(claim, number=claim.number - 1), latest, busy) is None
    assert await ledger.narrow(claim, latest, busy) == replace(claim, window=latest)
    assert await ledger.narrow(claim, latest, busy) is None, "it was cut there already"
    parts = await harness.rows(
        "SELECT *, not_before > now() + interval '5 minutes' AS later FROM rollcall.sync_parts"
        " WHERE dataset = 'usage.product' ORDER BY window_start"
    )
    assert [(p["window_start"], p["window_end"], p["status"], p["later"]) for p in parts] == [
        (claim.window.start, latest.start, "queued", True),
        (latest.start, latest.end, "running", False),
    ]
    (run,) = await harness.rows("SELECT parts_total FROM rollcall.sync_runs")
    assert run["parts_total"] == 4 + 3 + 1


async def test_bulk_runs_leave_room(harness: Harness) -> None:
    """Backfills take at most half the slots, however many are due at once; polls are not counted against them."""
    for n in range(10):
        await harness.add_connector(f"w{n}", members=1, groups=0, service_accounts=0)
    await harness.rows("INSERT INTO rollcall.workers (name, role, slots) VALUES ('w', 'worker', 4)")
    taken = await harness.due(100)
    assert [len(message) for message in messages(taken)] == [BULK_PER_MESSAGE] * 2
    every = {row["id"] for row in await harness.rows("SELECT id FROM rollcall.connectors")}
    assert not await harness.runtime.dispatch.more(every)


async def test_a_backfill_that_ends_makes_room_for_the_next(harness: Harness) -> None:
    """What waits for room is sent when a message has ended, not only at the next look."""
    for n in range(10):
        await harness.add_connector(f"w{n}", members=1, groups=0, service_accounts=0)
    await harness.rows("INSERT INTO rollcall.workers (name, role, slots) VALUES ('w', 'worker', 4)")
    taken = await harness.due(100)
    first, second = messages(taken)
    for sending in first[:-1]:
        await harness.deliver(sending)
    assert not harness.messages, "the message is still under way"
    await harness.deliver(first[-1])
    every = {row["id"] for row in await harness.rows("SELECT id FROM rollcall.connectors")}
    assert {sending.connector_id for sending in harness.messages} == every - {s.connector_id for s in taken}
    harness.messages.extend(second)
    await harness.settle()
    assert harness.lapses == 0


async def test_the_first_that_are_due_leave_before_the_last_are_planned(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connectors are claimed some at a time, and what was claimed is committed before the rest is looked at."""
    monkeypatch.setattr(sending_module, "AT_ONCE", 2)
    for n in range(5):
        await harness.add_connector(f"w{n}", members=1, groups=0, service_accounts=0)
    await harness.rows("INSERT INTO rollcall.workers (name, role, slots) VALUES ('w', 'worker', 64)")
    seen = []
    async for some in harness.runtime.dispatch.due(4):
        (row,) = await harness.rows("SELECT count(*) AS n FROM rollcall.sync_runs")
        seen.append((len(some), row["n"]))
    assert seen == [(2, 2), (2, 4)], "no more than were asked for"
    assert [len(some) async for some in harness.runtime.dispatch.due(4)] == [1]


# Retention.


async def test_nothing_is_kept_longer_than_said(harness: Harness) -> None:
    """Finished runs with their parts, relayed announcements and removed people's names go after their time."""
    acme = await harness.synced(members=40)
    leaver = harness.simulator.truth("acme")["members"][-1]
    harness.simulator.mutate("acme", {"op": "member_leave", "user_id": leaver["user_id"]})
    await harness.poll(acme)
    assert sum((await age_out(harness.runtime.db, run_days=14, people_days=30)).values()) == 0
    await harness.rows("UPDATE rollcall.sync_runs SET finished_at = finished_at - interval '15 days'")
    await harness.rows("UPDATE rollcall.announcements SET published_at = published_at - interval '15 days'")
    await harness.rows("UPDATE rollcall.members SET removed_at = removed_at - interval '31 days'")
    gone = await age_out(harness.runtime.db, run_days=14, people_days=30)
    assert (gone["runs"], gone["people"]) == (2, 1)
    assert gone["announcements"] == 4
    assert not await harness.rows("SELECT 1 FROM rollcall.sync_parts")
    row = await harness.one("SELECT * FROM rollcall.members WHERE user_id = %s", [leaver["user_id"]])
    assert (row["email"], row["first_name"], row["tenant_id"]) == (None, None, "t1")
    await harness.agree(acme)


# Plans.


async def fill(harness: Harness, many: int = MANY) -> list[UUID]:
    """Many connectors with a history, counted by Postgres while nothing is open; return five that are due."""
    await harness.rows(
        """
        INSERT INTO rollcall.connectors (tenant_id, name, base_url, sealed_key, partition, next_sync_at, status,
                                         backfilled_at, reconciled_at, last_polled_at)
        SELECT 't' || n %% 50, 'c' || n, 'http://127.0.0.1', 'sealed', n %% 4,
               now() + (CASE WHEN n <= 5 THEN interval '-1 s' ELSE n * interval '1 s' END), 'connected', now(), now(),
               now() - n * interval '1 s'
        FROM generate_series(1, %s) n
        """,
        [many],
    )
    datasets = [str(d) for d in Dataset]
    await harness.rows(
        "INSERT INTO rollcall.connector_access (connector_id, dataset, version)"
        " SELECT id, d, 1 FROM rollcall.connectors, unnest(%s::text[]) d",
        [datasets],
    )
    await harness.rows(
        "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status, finished_at)"
        " SELECT gen_random_uuid(), id, tenant_id, 'poll', 'schedule', 'succeeded', now()"
        " FROM rollcall.connectors, generate_series(1, 3)"
    )
    await harness.rows(
        "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, status)"
        " SELECT gen_random_uuid(), id, connector_id, kind, d, 'succeeded'"
        " FROM rollcall.sync_runs, unnest(%s::text[]) d",
        [datasets],
    )
    await harness.rows("ANALYZE")
    due = await harness.rows("SELECT id FROM rollcall.connectors WHERE next_sync_at <= now()")
    return [row["id"] for row in due]


@contextmanager
def recorded() -> Iterator[list[tuple[str, Sequence[object]]]]:
    """Take down the statements that run meanwhile, on whatever connection."""
    found: list[tuple[str, Sequence[object]]] = []
    execute = psycopg.AsyncConnection.execute

    async def noting(self: Any, query: Any, params: Any = None, **more: Any) -> Any:
        if isinstance(query, str) and "rollcall." in query:
            found.append((query, params or []))
        return await execute(self, query, params, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.AsyncConnection, "execute", noting)
        yield found


def scanned(plan: dict[str, Any]) -> Iterator[str]:
    """The tables that a plan reads from end to end."""
    if plan["Node Type"] == "Seq Scan" and plan["Relation Name"] in BIG:
        yield plan["Relation Name"]
    for below in plan.get("Plans", ()):
        yield from scanned(below)


async def test_hot_statements_use_indexes(harness: Harness) -> None:
    """What runs on every tick and for every part reads no big table from end to end."""
    await fill(harness)
    runtime = harness.runtime
    with recorded() as statements:
        sendings = await harness.due(500)
        assert len(sendings) == 5
        ids = [part_id for s in sendings for part_id in s.lanes]
        claims = await runtime.ports.ledger.claim(ids)
        assert len(claims) == len(ids)
        await runtime.ports.ledger.published(claims[:3])
        await runtime.ports.ledger.give_back(claims[3], "base_moved", 1.0)
        await runtime.dispatch.more([s.connector_id for s in sendings])
        await runtime.recovery.stalled(100)
        await runtime.recovery.unplanned()
        await runtime.recovery.open_parts()
        await runtime.recovery.give_up(8)
        await runtime.recovery.bury()
        await runtime.recovery.void_unclaimed([RunKind.POLL], waiting=0)
        await runtime.recovery.look_after_published({0: datetime.now(UTC)})
    assert len(statements) >= 12
    looked = await psycopg.AsyncConnection.connect(
        runtime.settings.require_database().get_secret_value(), autocommit=True, row_factory=dict_row
    )
    try:
        for query, params in statements:
            if not query.lstrip().upper().startswith(("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")):
                continue
            rows = await looked.execute("EXPLAIN (FORMAT JSON) " + query, params)
            row = await rows.fetchone()
            assert row is not None
            assert (query, list(scanned(row["QUERY PLAN"][0]["Plan"]))) == (query, [])
    finally:
        await looked.close()


async def test_statistics_of_a_quiet_moment_mislead_nobody(harness: Harness) -> None:
    """A part is closed and its run settled by their own rows, though Postgres has not counted yet how many are open."""
    await fill(harness, 400)
    await harness.rows("UPDATE rollcall.connectors SET next_sync_at = now() - interval '1 s'")
    sending, *_ = await harness.due(500)
    claim, *_ = await harness.runtime.ports.ledger.claim(list(sending.lanes))
    observation = Observation(
        connector_id=sending.connector_id,
        dataset=claim.dataset,
        base=claim.version,
        sequence=claim.number,
        part_id=claim.part_id,
        report=Report(run_id=claim.run_id, records=0, changes=0),
    )
    connection = await connect(harness.runtime.settings.require_database(), "worker")
    try:
        async with connection.transaction():
            await apply(connection, [observation])
            rows = await connection.execute(
                "SELECT idx_tup_fetch + seq_tup_read AS read FROM pg_stat_xact_user_tables WHERE relname = 'sync_parts'"
            )
            (read,) = await rows.fetchall()
    finally:
        await connection.close()
    assert 0 < read["read"] <= 4 * len(Dataset)
