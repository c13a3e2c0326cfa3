"""Connectors on a real Postgres, with a provider that says what the test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import SecretStr

from schemas.connectors import Access, Action, Dataset, RunKind, Status
from worker import connectors
from worker.connectors import Connector, NewConnector, Ports
from worker.elevenlabs.asking import Asked, drive
from worker.elevenlabs.protocol import Answer, Request
from worker.errors import OwnerMustAct, Refused, TryLater
from worker.plan import partition_of
from worker.ports import Target
from worker.store.connectors import PgConnectors
from worker.store.db import Database
from worker.store.runs import SCHEDULER
from worker.vault import Vault

NOW = datetime(2026, 5, 20, 12, tzinfo=UTC)
KEY = SecretStr("sk_" + "a1b2" * 12)
OTHER_KEY = SecretStr("sk_" + "c3d4" * 12)
DEAD = Answer(401, {}, b'{"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}')
NO_SCOPE = Answer(
    401,
    {},
    b'{"detail": {"status": "missing_permissions", "message": "The API key you used is missing the permission'
    b' user_read to execute this operation."}}',
)
FACTS = ("members", "groups", "service_accounts", "api_keys", "credit_usage", "usage_coverage")


def user(workspace_id: str = "ws_1") -> Answer:
    return Answer(
        200, {}, orjson.dumps({"user_id": "u", "workspace_id": workspace_id, "subscription": {"tier": "business"}})
    )


@dataclass
class ScriptedProvider:
    """Answers by path; opens the key as the real one does, so that a wrongly sealed key fails here too."""

    vault: Vault
    answer: Callable[[Request], Answer] = lambda _: user()
    keys: list[str] = field(default_factory=list)

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        key = self.vault.open(target.sealed_key, tenant_id=target.tenant_id, connector_id=target.connector_id)
        self.keys.append(key.get_secret_value())
        return drive(asking, self.answer)


@dataclass
class Forgotten:
    asked: list[tuple[int, UUID]] = field(default_factory=list)

    async def forget(self, partition: int, connector_id: UUID) -> None:
        self.asked.append((partition, connector_id))


@dataclass
class Scene:
    """Everything a test of connectors needs."""

    url: str
    registry: PgConnectors
    provider: ScriptedProvider
    ports: Ports

    async def add(self, name: str = "main", tenant: str = "acme", key: SecretStr = KEY, **more: Any) -> Connector:
        check = more.pop("check", True)
        new = NewConnector(tenant, name, key, **more)
        return await connectors.add(new, self.ports, api_hosts=frozenset(), poll_interval_s=900, check=check)

    async def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        async with await psycopg.AsyncConnection.connect(self.url, row_factory=dict_row, autocommit=True) as connection:
            found = await connection.execute(query, values)
            return await found.fetchall() if found.description else []

    async def one(self, connector_id: UUID) -> dict[str, Any]:
        return (await self.rows("SELECT * FROM rollcall.connectors WHERE id = %s", connector_id))[0]

    async def announced(self, connector_id: UUID) -> list[str]:
        rows = await self.rows(
            "SELECT type FROM rollcall.announcements WHERE connector_id = %s ORDER BY seq", connector_id
        )
        return [row["type"].removeprefix("io.rollcall.elevenlabs.").removesuffix(".v1") for row in rows]

    async def status_of(self, run: Any) -> str:
        return str((await self.rows("SELECT status FROM rollcall.sync_runs WHERE id = %s", run["id"]))[0]["status"])

    async def ask(self, connector_id: UUID, **more: Any) -> Any:
        asked: dict[str, Any] = {"tenant_id": "acme", "kind": RunKind.POLL, "run_id": uuid4(), "actor": "test"} | more
        return await connectors.request_sync(self.registry, connector_id=connector_id, **asked)


@pytest.fixture
async def scene(database_url: str) -> AsyncIterator[Scene]:
    db = Database(SecretStr(database_url), application="test", size=4)
    await db.open()
    vault = Vault(SecretStr(Vault.generate_key("k1")))
    provider, registry = ScriptedProvider(vault), PgConnectors(db)
    yield Scene(database_url, registry, provider, Ports(registry, provider, vault))
    await db.close()


async def test_add_writes_a_connector_that_is_due(scene: Scene) -> None:
    """A new connector is pending, due at once, with a row per dataset, its workspace pinned, and announced."""
    added = await scene.add(external_ref="crm-7", region="eu")
    row = await scene.one(added.id)
    assert (row["status"], row["workspace_id"], row["hint"]) == ("pending", "ws_1", "a1b2")
    assert row["external_ref"] == "crm-7"
    assert row["base_url"] == "https://api.eu.residency.elevenlabs.io"
    assert row["next_sync_at"] <= datetime.now(UTC)
    assert row["partition"] == partition_of(added.id, 4)
    access = await scene.rows("SELECT dataset, state FROM rollcall.connector_access WHERE connector_id = %s", added.id)
    assert {r["dataset"]: r["state"] for r in access} == {str(d): "unknown" for d in Dataset}
    assert await scene.announced(added.id) == ["connector.created"]


async def test_the_key_is_stored_sealed_only(scene: Scene) -> None:
    """No column of the connector holds the key or more of it than its hint."""
    row = await scene.one((await scene.add()).id)
    assert KEY.get_secret_value() not in str(row)
    assert scene.provider.keys == [KEY.get_secret_value()]


async def test_a_dead_key_is_not_added(scene: Scene) -> None:
    """A key the provider calls invalid is the owner's to fix, the message hints at the region, nothing is written."""
    scene.provider.answer = lambda _: DEAD
    with pytest.raises(OwnerMustAct, match="region") as caught:
        await scene.add()
    assert (caught.value.reason, caught.value.action) == ("key_invalid", "reconnect")
    assert await scene.rows("SELECT 1 FROM rollcall.connectors") == []


async def test_an_absent_provider_is_no_verdict(scene: Scene) -> None:
    """When the provider does not answer, adding may work later; without the check it works now."""
    scene.provider.answer = lambda _: Answer(503, {}, b"")
    with pytest.raises(TryLater) as caught:
        await scene.add()
    assert caught.value.reason == "provider_unreachable"
    assert (await scene.add(check=False)).workspace_id is None


async def test_a_key_without_user_read_is_added(scene: Scene) -> None:
    """A key that may not see its user is alive; its workspace is just not known."""
    scene.provider.answer = lambda _: NO_SCOPE
    assert (await scene.add()).workspace_id is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tenant": ""}, "tenant_invalid"),
        ({"tenant": "a\x00b"}, "tenant_invalid"),
        ({"name": "two\nlines"}, "name_invalid"),
        ({"name": " "}, "name_invalid"),
        ({"key": SecretStr("")}, "key_malformed"),
        ({"key": SecretStr("sk_c4n4ry\nx")}, "key_malformed"),
        ({"region": "mars"}, "region_unknown"),
        ({"base_url": "https://example.com"}, "host_not_allowed"),
    ],
)
async def test_wrong_arguments_are_refused(scene: Scene, change: dict[str, Any], reason: str) -> None:
    """Each wrong argument is refused with its own reason before the provider is asked, and no key is echoed."""
    with pytest.raises(Refused) as caught:
        await scene.add(**change)
    assert caught.value.reason == reason
    assert "c4n4ry" not in str(caught.value)
    assert scene.provider.keys == []


async def test_what_is_taken_is_named(scene: Scene) -> None:
    """A key, a workspace or a name that another living connector of the tenant has is refused by its name."""
    await scene.add("first")
    with pytest.raises(Refused, match="'first'") as caught:
        await scene.add("second")
    assert caught.value.reason == "key_in_use"
    with pytest.raises(Refused, match="'first'") as caught:
        await scene.add("second", key=OTHER_KEY)
    assert caught.value.reason == "workspace_taken"
    scene.provider.answer = lambda _: user("ws_2")
    with pytest.raises(Refused, match="'first'") as caught:
        await scene.add("first", key=OTHER_KEY)
    assert caught.value.reason == "name_taken"
    assert (await scene.add("first", tenant="globex")).name == "first"


async def test_a_key_sealed_under_an_older_master_key_is_still_known(scene: Scene) -> None:
    """After a new master key came first, a key stored before is recognised as in use."""
    old = Vault.generate_key("old")
    scene.ports = Ports(scene.registry, ScriptedProvider(Vault(SecretStr(old))), Vault(SecretStr(old)))
    await scene.add("first")
    ring = Vault(SecretStr(f"{Vault.generate_key('new')},{old}"))
    scene.ports = Ports(scene.registry, ScriptedProvider(ring), ring)
    with pytest.raises(Refused) as caught:
        await scene.add("second")
    assert caught.value.reason == "key_in_use"


async def test_find_by_id_and_by_name(scene: Scene) -> None:
    """A connector is found by id, by name where it is the only one, else by tenant and name."""
    first, other = await scene.add("same"), await scene.add("same", tenant="globex")
    assert (await scene.registry.find(str(first.id))).id == first.id
    assert (await scene.registry.find("same", tenant_id="globex")).id == other.id
    for wanted, tenant, reason in (
        ("same", None, "ambiguous_name"),
        ("none", None, "unknown_connector"),
        (str(first.id), "globex", "unknown_connector"),
    ):
        with pytest.raises(Refused) as caught:
            await scene.registry.find(wanted, tenant_id=tenant)
        assert caught.value.reason == reason


async def test_check_gives_the_matrix(scene: Scene) -> None:
    """Each dataset is asked once; a refused one names the permission as the wire and the dashboard have it."""
    added = await scene.add()
    answers = {"/v1/workspace/members": NO_SCOPE, "/v1/workspace/groups": Answer(404, {}, b'{"detail": "Not Found"}')}
    scene.provider.answer = lambda request: answers.get(request.path, Answer(200, {}, b"{}"))
    found = {row.dataset: row for row in await connectors.check(added, scene.provider, now=NOW)}
    assert set(found) == set(Dataset)
    members = found[Dataset.MEMBERS]
    assert (members.state, members.reason, members.action) == (Access.DENIED, "scope_missing", Action.ADD_PERMISSION)
    assert members.missing == (("user_read", "User: Read"),)
    assert "User: Read (user_read)" in members.advice
    assert found[Dataset.GROUPS].state is Access.UNAVAILABLE
    assert found[Dataset.USAGE_MEMBER].state is Access.GRANTED


async def test_check_stops_asking_with_a_dead_key(scene: Scene) -> None:
    """A dead key is used once; every dataset then says so."""
    added = await scene.add()
    scene.provider.keys.clear()
    scene.provider.answer = lambda _: DEAD
    found = await connectors.check(added, scene.provider, now=NOW)
    assert len(scene.provider.keys) == 1
    assert {(row.reason, row.action) for row in found} == {("key_invalid", Action.RECONNECT)}


async def disconnect(scene: Scene, connector: Connector) -> None:
    await scene.rows(
        "UPDATE rollcall.connectors SET status = 'disconnected', status_reason = 'key_invalid', action = 'reconnect',"
        " strikes = 3, probes = 4, suspect_since = now(), next_sync_at = now() + interval '1 hour' WHERE id = %s",
        connector.id,
    )


async def test_reconnect_revives(scene: Scene) -> None:
    """A new key makes a disconnected connector live and due, under a new version, and is announced once."""
    added = await scene.add()
    await disconnect(scene, added)
    before = await scene.one(added.id)
    again = await connectors.reconnect(await scene.registry.find(str(added.id)), OTHER_KEY, scene.ports)
    row = await scene.one(added.id)
    assert again.status is Status.CONNECTED
    assert (row["status"], row["status_reason"], row["action"]) == ("connected", None, "none")
    assert (row["strikes"], row["probes"], row["suspect_since"]) == (0, 0, None)
    assert row["next_sync_at"] <= datetime.now(UTC)
    assert row["version"] > before["version"]
    assert row["sealed_key"] != before["sealed_key"]
    assert await scene.announced(added.id) == ["connector.created", "connector.connected"]


async def test_reconnect_goes_where_access_says(scene: Scene) -> None:
    """A reconnected connector with a refused dataset is degraded, not connected."""
    added = await scene.add()
    await disconnect(scene, added)
    await scene.rows(
        "UPDATE rollcall.connector_access SET state = 'denied', reason = 'scope_missing' WHERE connector_id = %s"
        " AND dataset = 'members'",
        added.id,
    )
    again = await connectors.reconnect(await scene.registry.find(str(added.id)), OTHER_KEY, scene.ports)
    assert again.status is Status.DEGRADED
    assert (await scene.announced(added.id))[-1] == "connector.degraded"


async def test_reconnect_cancels_the_probe(scene: Scene) -> None:
    """The open probe of a disconnected connector ends, so that a whole sync can start at once."""
    added = await scene.add()
    run = await scene.ask(added.id)
    await disconnect(scene, added)
    await connectors.reconnect(await scene.registry.find(str(added.id)), OTHER_KEY, scene.ports)
    assert await scene.status_of(run) == "cancelled"


async def test_reconnect_refuses_wrong_keys(scene: Scene) -> None:
    """A dead key, another workspace's or another connector's changes nothing."""
    first = await scene.add("first")
    scene.provider.answer = lambda _: user("ws_2")
    await scene.add("second", key=OTHER_KEY)
    with pytest.raises(Refused, match="'second'") as refused:
        await connectors.reconnect(first, OTHER_KEY, scene.ports)
    assert refused.value.reason == "key_in_use"
    third = SecretStr("sk_" + "e5f6" * 12)
    with pytest.raises(Refused) as refused:
        await connectors.reconnect(first, third, scene.ports)
    assert refused.value.reason == "other_workspace"
    scene.provider.answer = lambda _: DEAD
    with pytest.raises(OwnerMustAct, match="region"):
        await connectors.reconnect(first, third, scene.ports)
    assert (await scene.one(first.id))["sealed_key"] == first.sealed_key


async def test_pause_and_resume(scene: Scene) -> None:
    """Pausing cancels what runs and takes the connector off the schedule; resuming puts it back; again is harmless."""
    added = await scene.add()
    run = await scene.ask(added.id)
    for _ in range(2):
        paused = await scene.registry.pause(added.id)
    row = await scene.one(added.id)
    assert (paused.status, row["status_reason"], row["next_sync_at"]) == (Status.PAUSED, "paused_by_user", None)
    assert await scene.status_of(run) == "cancelled"
    for _ in range(2):
        resumed = await scene.registry.resume(added.id)
    assert resumed.status is Status.PENDING
    assert (await scene.one(added.id))["next_sync_at"] is not None
    announced = await scene.announced(added.id)
    assert announced == ["connector.created", "sync.started", "sync.failed", "connector.paused", "connector.resumed"]


async def test_a_disconnected_connector_is_not_resumed(scene: Scene) -> None:
    """Resuming does not stand in for a valid key."""
    added = await scene.add()
    await disconnect(scene, added)
    with pytest.raises(Refused, match="reconnect") as caught:
        await scene.registry.resume(added.id)
    assert caught.value.reason == "not_paused"


async def test_reconnecting_a_paused_connector_leaves_it_paused(scene: Scene) -> None:
    """A new key does not undo a pause."""
    added = await scene.add()
    await scene.registry.pause(added.id)
    again = await connectors.reconnect(added, OTHER_KEY, scene.ports)
    assert again.status is Status.PAUSED
    assert (await scene.one(added.id))["next_sync_at"] is None


async def test_delete_leaves_nothing_but_a_name(scene: Scene) -> None:
    """Deleting takes key, facts, access, holds, runs, parts; row and announcement stay; again is harmless."""
    added = await scene.add()
    other = await scene.add("other", tenant="globex")
    for connector in (added, other):
        await scene.ask(connector.id, tenant_id=connector.tenant_id)
        await fill(scene, connector)
    traces = [Forgotten(), Forgotten()]
    for _ in range(2):
        await connectors.delete(added, scene.registry, traces)
    row = await scene.one(added.id)
    assert (row["status"], row["name"], row["sealed_key"], row["key_fingerprint"]) == ("deleted", "main", None, None)
    assert row["deleted_at"] is not None
    assert (row["workspace_id"], row["plan"], row["hint"]) == (None, None, None)
    for table in (*FACTS, "connector_access", "deletion_holds", "sync_runs", "sync_parts"):
        left = await scene.rows(f"SELECT connector_id FROM rollcall.{table}")  # noqa: S608 - constant table name
        assert {r["connector_id"] for r in left} == {other.id}, table
    assert (await scene.announced(added.id))[-1] == "connector.deleted"
    assert traces[0].asked == traces[1].asked == [(added.partition, added.id)] * 2
    assert (await scene.add()).id != added.id


async def fill(scene: Scene, connector: Connector) -> None:
    """Give a connector one row of everything."""
    ids = (connector.tenant_id, connector.id)
    for table, columns, values in (
        ("members", "user_id, is_owner, is_locked, version", "'u', true, false, 1"),
        ("groups", "group_id, name, member_ids, version", "'g', 'g', '{}', 1"),
        ("service_accounts", "service_account_id, name, sharing, version", "'s', 's', '[]', 1"),
        ("api_keys", "key_id, service_account_id, name, is_disabled, version", "'k', 's', 'k', false, 1"),
        (
            "credit_usage",
            "dimension, bucket_start, bucket_key, unit, amount, version",
            "'member', now(), 'u', 'c', 1, 1",
        ),
        ("usage_coverage", "dimension, day, state, observed_at, version", "'member', now(), 'complete', now(), 1"),
        (
            "deletion_holds",
            "dataset, known, missing, missing_digest, runs, state, records",
            "'members', 1, 1, 'x', 1, 'open', '{}'",
        ),
    ):
        await scene.rows(
            f"INSERT INTO rollcall.{table} (tenant_id, connector_id, {columns}) VALUES (%s, %s, {values})",  # noqa: S608 - constants
            *ids,
        )
    await scene.rows(
        "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset)"
        " SELECT gen_random_uuid(), id, connector_id, kind, 'members' FROM rollcall.sync_runs WHERE connector_id = %s",
        connector.id,
    )


async def test_a_request_is_written_once(scene: Scene) -> None:
    """The same run_id gives the same row, and a start is announced once."""
    added = await scene.add()
    run_id = uuid4()
    first = await scene.ask(added.id, run_id=run_id)
    assert (first["status"], first["requested_by"], first["kind"]) == ("queued", "test", "poll")
    assert await scene.ask(added.id, run_id=run_id) == first
    assert await scene.announced(added.id) == ["connector.created", "sync.started"]


async def test_a_run_of_the_same_kind_is_not_doubled(scene: Scene) -> None:
    """While a poll is active another poll is refused in a row; a reconcile is not."""
    added = await scene.add()
    await scene.ask(added.id)
    refused = await scene.ask(added.id)
    assert (refused["status"], refused["error_reason"]) == ("refused", "already_running")
    assert refused["finished_at"] is not None
    assert (await scene.ask(added.id, kind=RunKind.RECONCILE))["status"] == "queued"


async def test_refusals_are_rows(scene: Scene) -> None:
    """An unknown, foreign, paused, disconnected or deleted connector gives a refused row with the reason."""
    added = await scene.add()
    stranger = uuid4()
    assert (await scene.ask(stranger))["error_reason"] == "unknown_connector"
    foreign = await scene.ask(added.id, tenant_id="globex")
    assert (foreign["error_reason"], foreign["tenant_id"]) == ("unknown_connector", "globex")
    await scene.registry.pause(added.id)
    assert (await scene.ask(added.id))["error_reason"] == "paused"
    await scene.registry.resume(added.id)
    await disconnect(scene, added)
    assert (await scene.ask(added.id))["error_reason"] == "disconnected"
    await scene.registry.delete(added.id)
    refused = await scene.ask(added.id)
    assert (refused["status"], refused["error_reason"]) == ("refused", "deleted")


async def test_a_run_id_serves_one_request(scene: Scene) -> None:
    """A run_id of another tenant's request is refused and tells nothing of that request."""
    added = await scene.add()
    run_id = uuid4()
    await scene.ask(added.id, run_id=run_id)
    with pytest.raises(Refused) as caught:
        await scene.ask(added.id, run_id=run_id, tenant_id="globex")
    assert caught.value.reason == "run_id_taken"
    assert "acme" not in str(caught.value)


async def test_asked_for_runs_do_not_pass_for_scheduled_ones(scene: Scene) -> None:
    """An actor may not call itself the scheduler, whose polls are silent."""
    added = await scene.add()
    with pytest.raises(Refused):
        await scene.ask(added.id, actor=SCHEDULER)
