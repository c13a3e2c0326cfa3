"""What an answer of the provider makes of a connector: end to end, from the wire to the announcement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.connectors import Dataset
from tests.fixtures.harness import Harness, Watched, opened
from tests.fixtures.simulator import Simulator
from worker.elevenlabs.asking import Asked
from worker.elevenlabs.protocol import Answer, Request
from worker.observe import observe
from worker.ports import Provider, Target
from worker.store.ledger import POLL_ATTEMPTS

MEMBERS = {"path_prefix": "/v1/workspace/members"}
ANALYTICS = {"path_prefix": "/v1/workspace/analytics"}
CONNECTED = ("connected", None, "none")
SCOPE = ("degraded", "scope_missing", "add_permission")
PLAN = ("degraded", "plan_too_low", "upgrade_plan")
ROLE = ("degraded", "role_or_ip", "check_role_or_ip")
QUOTA = ("degraded", "quota", "upgrade_plan")
KEY_INVALID = ("disconnected", "key_invalid", "reconnect")
BLOCKED = ("disconnected", "account_blocked", "reconnect")
TINY: dict[str, Any] = {"members": 2, "groups": 0, "service_accounts": 0, "history_days": 2, "usage_rows_per_day": 2}

Expected = tuple[tuple[str, str | None, str], str | None, tuple[str, str | None, str]]
"""Health, reason of the denied dataset, and of its part status, error class and reason."""

OWNER = "OwnerMustAct"
REFUSALS: list[tuple[dict[str, Any], Expected]] = [
    ({"kind": "missing_scope", "permission": "p_read"}, (SCOPE, "scope_missing", ("failed", OWNER, "scope_missing"))),
    (
        {"kind": "missing_scope", "permission": "p_read", "form": 403},
        (SCOPE, "scope_missing", ("failed", OWNER, "scope_missing")),
    ),
    (
        {"kind": "legacy_envelope", "message": "... is missing the permission p_read to execute this operation."},
        (SCOPE, "scope_missing", ("failed", OWNER, "scope_missing")),
    ),
    ({"kind": "quota"}, (QUOTA, "quota", ("failed", OWNER, "quota"))),
    ({"kind": "quota402"}, (QUOTA, "quota", ("failed", OWNER, "quota"))),
    ({"kind": "plan"}, (PLAN, "plan_too_low", ("failed", OWNER, "plan_too_low"))),
    ({"kind": "plan", "form": 403}, (PLAN, "plan_too_low", ("failed", OWNER, "plan_too_low"))),
    ({"kind": "feature"}, (PLAN, "plan_too_low", ("failed", OWNER, "plan_too_low"))),
    ({"kind": "legacy_plan"}, (PLAN, "plan_too_low", ("failed", OWNER, "plan_too_low"))),
    ({"kind": "forbidden"}, (ROLE, "role_or_ip", ("failed", OWNER, "role_or_ip"))),
    ({"kind": "ip"}, (ROLE, "role_or_ip", ("failed", OWNER, "role_or_ip"))),
    ({"kind": "workspace_denied"}, (ROLE, "role_or_ip", ("failed", OWNER, "role_or_ip"))),
    ({"kind": "not_found"}, (CONNECTED, "not_found", ("skipped", None, "not_found"))),
]
BROKEN = "ContractBroken"
FAILURES: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    *(
        ({"kind": kind}, ("failed", "TryLater", reason))
        for kind, reason in {
            "html403": "edge",
            "rate429": "rate_limited",
            "concurrency429": "concurrency_limited",
            "busy429": "system_busy",
            "s500_text": "server_error",
            "s500_json": "server_error",
            "s503": "unavailable",
            "s502_html": "server_error",
            "s504_empty": "server_error",
            "timeout408": "timeout",
            "conflict409": "conflict",
            "reset": "network",
            "truncated": "network",
            "invalid_api_key": "unconfirmed",
            "unusual_activity": "unconfirmed",
        }.items()
    ),
    ({"kind": "redirect", "to": "http://127.0.0.1:9/"}, ("failed", "TryLater", "redirected")),
    ({"kind": "empty"}, ("failed", BROKEN, "unparseable")),
    ({"kind": "truncated_json"}, ("failed", BROKEN, "unparseable")),
    ({"kind": "schema_broken"}, ("failed", BROKEN, "schema")),
    ({"kind": "bad_request400"}, ("failed", BROKEN, "bad_request")),
    ({"kind": "legacy_envelope", "http": 422, "status": "x"}, ("failed", BROKEN, "validation")),
    ({"kind": "legacy_envelope", "status": "needs_authorization", "message": "No."},
     ("failed", BROKEN, "authorization_header")),
    ({"kind": "legacy_envelope", "status": "max_character_limit_exceeded", "message": "Too long."},
     ("failed", BROKEN, "bad_request")),
    ({"kind": "other401"}, ("failed", OWNER, "unauthorized")),
]  # fmt: skip


async def moves(harness: Harness, watched: Watched) -> list[tuple[str, str | None, str | None]]:
    """What was announced of the connector's state: (what, reason, previous status)."""
    return [
        (a["what"], a["reason"], a["previous_status"])
        for a in await harness.announced(watched)
        if a["what"].startswith("connector.")
    ]


def requests(harness: Harness, workspace: str = "acme") -> int:
    """How many requests the provider got with a key of the workspace, or with an unknown one."""
    told = harness.simulator.stats()["requests"]
    return sum(n for name in (workspace, "") for n in told.get(name, {}).values())


@pytest.mark.parametrize(("fault", "expected"), REFUSALS, ids=str)
async def test_a_refused_dataset_degrades_itself_only(
    harness: Harness, fault: dict[str, Any], expected: Expected
) -> None:
    """A refusal degrades one dataset, says once why and what to do, keeps its facts, and passes with its cause."""
    health, reason, part = expected
    acme = await harness.synced()
    kept = (await harness.facts(acme)).records
    harness.simulator.faults("acme", {**fault, "match": MEMBERS})
    harness.simulator.mutate("acme", {"op": "member_join"}, {"op": "group_add", "name": "New"})

    (run,) = await harness.poll(acme)
    assert await harness.health(acme) == health
    row = (await harness.access(acme))["members"]
    assert (row["state"], row["reason"]) == ("unavailable" if health == CONNECTED else "denied", reason)
    assert row["missing_permission"] == ("p_read" if health == SCOPE else None)
    found = (await harness.parts(run))["members"]
    assert (found["status"], found["error_class"], found["error_reason"]) == part
    assert found["attempts"] == 1, "asking again would not help"
    assert run["status"] == ("succeeded" if health == CONNECTED else "partial")
    facts, truth = (await harness.facts(acme)).records, (await harness.truth(acme)).records
    for kind in ("member", "group", "service_account", "api_key"):
        source = kept if kind == "member" else truth
        assert {s for s in facts if s.startswith(f"{kind}/")} == {s for s in source if s.startswith(f"{kind}/")}

    await harness.poll(acme)
    announced: list[tuple[str, str | None, str | None]] = [
        ("connector.created", None, None),
        ("connector.connected", None, "pending"),
    ]
    if health != CONNECTED:
        announced.append((f"connector.{health[0]}", health[1], "connected"))
    assert await moves(harness, acme) == announced, "told once, however often it is met"

    harness.simulator.faults("acme")
    await harness.rows("UPDATE rollcall.connector_access SET checked_at = now() - interval '2 days'")
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    if health != CONNECTED:
        announced.append(("connector.connected", None, "degraded"))
    assert await moves(harness, acme) == announced
    assert (await harness.access(acme))["members"]["missing_permission"] is None
    await harness.agree(acme)


@pytest.mark.parametrize("fault", [{"kind": "plan"}, {"kind": "not_found"}], ids=str)
async def test_what_the_plan_lacks_is_asked_daily(harness: Harness, fault: dict[str, Any]) -> None:
    """A dataset outside the customer's plan, or that is not there, is asked again after a day, not at each poll."""
    acme = await harness.synced()
    harness.simulator.faults("acme", {**fault, "match": MEMBERS})
    await harness.poll(acme)
    (run,) = await harness.poll(acme)
    assert (run["parts_total"], run["status"]) == (len(Dataset) - 1, "succeeded")
    await harness.rows("UPDATE rollcall.connector_access SET checked_at = now() - interval '25 hours'")
    (run,) = await harness.poll(acme)
    assert run["parts_total"] == len(Dataset)


@pytest.mark.parametrize(("fault", "expected"), FAILURES, ids=str)
async def test_a_failure_says_nothing_of_the_credential(
    harness: Harness, fault: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    """An outage, an unknown shape or our own bug fails the part: access, status and facts stay, nothing is told."""
    acme = await harness.synced()
    before, access = await harness.facts(acme), await harness.access(acme)
    told = await moves(harness, acme)
    harness.simulator.faults("acme", {**fault, "match": MEMBERS})
    (run,) = await harness.poll(acme)
    found = (await harness.parts(run))["members"]
    assert (found["status"], found["error_class"], found["error_reason"]) == expected
    most = {"TryLater": POLL_ATTEMPTS, "unparseable": 2}
    assert found["attempts"] == most.get(expected[1], most.get(expected[2], 1))
    assert (run["status"], run["parts_done"], run["parts_failed"]) == ("partial", len(Dataset) - 1, 1)
    assert expected[2] in run["error_reason"]
    assert await harness.health(acme) == CONNECTED
    now = (await harness.access(acme))["members"]
    assert {n: now[n] for n in ("state", "reason", "checked_at", "version")} == {
        n: access["members"][n] for n in ("state", "reason", "checked_at", "version")
    }
    assert await moves(harness, acme) == told
    assert await harness.facts(acme) == before
    harness.simulator.faults("acme")
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    await harness.agree(acme)


async def test_a_passing_failure_is_waited_for_in_the_ledger(harness: Harness) -> None:
    """A part that met an outage waits with a reason, at least as long as the provider asks, and then succeeds."""
    acme = await harness.synced()
    harness.simulator.mutate("acme", {"op": "member_join"})
    harness.simulator.faults("acme", {"kind": "s503", "match": MEMBERS, "times": 3, "retry_after": 40})
    await harness.make_due(acme)
    await harness.tick()
    while harness.messages:
        await harness.deliver(harness.messages.popleft())
    (run,) = [r for r in await harness.runs() if r["status"] == "running"]
    part = (await harness.parts(run))["members"]
    assert (part["status"], part["error_class"], part["lane"]) == ("waiting", "TryLater", None)
    assert part["not_before"] - datetime.now(UTC) > timedelta(seconds=35)
    assert not await harness.runtime.recovery.stalled(10)
    await harness.settle()
    assert [r["status"] for r in await harness.runs()] == ["succeeded", "succeeded"]
    await harness.agree(acme)


async def test_an_outage_shows_as_staleness(harness: Harness) -> None:
    """While the provider is wholly away the run fails, the status stays, and `last_synced_at` stands still."""
    acme = await harness.synced()
    synced = (await harness.connector(acme))["last_synced_at"]
    harness.simulator.faults("acme", {"kind": "s503"})
    (run,) = await harness.poll(acme)
    assert (run["status"], run["parts_failed"]) == ("failed", len(Dataset))
    assert await harness.health(acme) == CONNECTED
    assert (await harness.connector(acme))["last_synced_at"] == synced
    assert (await harness.connector(acme))["next_sync_at"] > datetime.now(UTC)


async def test_a_connector_that_never_got_an_answer_stays_pending(harness: Harness) -> None:
    """An outage at the first sync is neither connected nor disconnected; the next answer decides."""
    acme = await harness.add_connector()
    harness.simulator.faults("acme", {"kind": "s503"})
    await harness.poll(acme)
    assert await harness.health(acme) == ("pending", None, "none")
    harness.simulator.faults("acme")
    (run,) = await harness.poll(acme)
    assert (run["kind"], run["status"]) == ("backfill", "succeeded")
    assert await harness.health(acme) == CONNECTED
    await harness.agree(acme)


async def test_a_degraded_connector_with_an_unanswered_dataset_does_not_flap(harness: Harness) -> None:
    """While one dataset is denied and another never answered, the connector is degraded, and told so once."""
    acme = await harness.add_connector()
    groups = {"path_prefix": "/v1/workspace/groups"}
    harness.simulator.faults(
        "acme",
        {"kind": "missing_scope", "permission": "workspace_read", "match": groups},
        {"kind": "s503", "match": ANALYTICS},
    )
    for _ in range(3):
        await harness.poll(acme)
        assert await harness.health(acme) == SCOPE
    assert await moves(harness, acme) == [
        ("connector.created", None, None),
        ("connector.degraded", "scope_missing", "pending"),
    ]


async def test_only_states_of_the_contract_are_announced(harness: Harness) -> None:
    """A doubt that passes within the first sync announces nothing that no reader knows."""
    acme = await harness.add_connector()
    harness.simulator.faults("acme", {"kind": "other401", "times": 1, "match": {"path_prefix": "/v1/user"}})
    await harness.poll(acme)
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    assert [what for what, _, _ in await moves(harness, acme)] == ["connector.created", "connector.connected"]


async def test_a_connector_outside_every_plan_is_asked_again(harness: Harness) -> None:
    """When nothing is worth asking today the run ends at once, and tomorrow's asks everything."""
    acme = await harness.add_connector(**TINY)
    harness.simulator.faults("acme", {"kind": "plan"})
    (run,) = await harness.poll(acme)
    assert run["status"] == "failed"
    assert await harness.health(acme) == PLAN
    await harness.poll(acme)
    assert not await harness.rows("SELECT 1 FROM rollcall.sync_runs WHERE status IN ('queued', 'running')")
    harness.simulator.faults("acme")
    await harness.rows("UPDATE rollcall.connector_access SET checked_at = now() - interval '25 hours'")
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    await harness.agree(acme)


# A dead key.


@pytest.mark.parametrize("how", ["disabled", "expired", "deleted"])
async def test_a_dead_key_is_flagged_within_one_poll(harness: Harness, how: str) -> None:
    """A confirmed dead key disconnects at once, is told once with its reason, and is left alone after that."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.kill("acme", acme.key, how)
    (run,) = await harness.poll(acme)
    assert await harness.health(acme) == KEY_INVALID
    assert (run["status"], run["error_reason"]) == ("failed", "key_invalid")
    assert not await harness.rows("SELECT 1 FROM rollcall.sync_parts WHERE open")
    assert (await moves(harness, acme))[2:] == [("connector.disconnected", "key_invalid", "connected")]

    harness.simulator.reset_stats()
    for _ in range(3):
        await harness.tick()
        await harness.settle()
    assert requests(harness) == 0
    wait = (await harness.connector(acme))["next_sync_at"] - datetime.now(UTC)
    assert timedelta(minutes=50) < wait < timedelta(minutes=70), "the slow re-probe"
    assert await harness.facts(acme) == before, "what was known stays readable"
    assert len(await moves(harness, acme)) == 3


async def test_queued_work_of_a_dead_key_is_dropped(database_url: str, redis_url: str, simulator: Simulator) -> None:
    """Parts that were planned, sent or waiting when the key died are never asked; late messages do nothing."""
    async with opened(database_url, redis_url, simulator, part_days=30) as harness:
        acme = await harness.add_connector()
        await harness.tick()
        first = harness.messages.popleft()
        await harness.deliver(first)
        await harness.write()
        late = list(harness.messages)
        assert late, "a backfill has more to ask"
        harness.simulator.kill("acme", acme.key)
        harness.simulator.reset_stats()
        await harness.settle()
        asked = requests(harness)
        assert asked <= 4, "one request of each lane, and its confirmation"
        for message in (first, *late):
            await harness.deliver(message)
        await harness.settle()
        assert requests(harness) == asked
        assert await harness.health(acme) == KEY_INVALID
        (run,) = await harness.runs(acme)
        assert run["status"] == "failed"
        assert [a["what"] for a in await harness.announced(acme)] == [
            "connector.created",
            "sync.started",
            "connector.connected",
            "sync.failed",
            "connector.disconnected",
        ]


async def test_an_unconfirmed_dead_answer_disconnects_nobody(harness: Harness) -> None:
    """One `invalid API key` that the second probe does not confirm is a passing fault: the part asks again."""
    acme = await harness.synced()
    harness.simulator.mutate("acme", {"op": "member_join"})
    harness.simulator.faults("acme", {"kind": "invalid_api_key", "times": 1})
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    assert await harness.health(acme) == CONNECTED
    assert len(await moves(harness, acme)) == 2
    await harness.agree(acme)


async def test_a_blocked_account_disconnects(harness: Harness) -> None:
    """An account blocked for unusual activity is disconnected with that reason."""
    acme = await harness.synced()
    harness.simulator.faults("acme", {"kind": "unusual_activity"})
    await harness.poll(acme)
    assert await harness.health(acme) == BLOCKED
    assert (await moves(harness, acme))[2:] == [("connector.disconnected", "account_blocked", "connected")]


async def test_an_unexplained_401_disconnects_after_three_runs(harness: Harness) -> None:
    """A 401 of unknown meaning counts once a run, is forgotten after any success, and disconnects at the third."""
    acme = await harness.synced()
    refuse = {"kind": "other401"}
    for times in (2, 3):
        harness.simulator.faults("acme", refuse)
        for _ in range(times):
            assert await harness.health(acme) == CONNECTED
            (run,) = await harness.poll(acme)
            assert run["status"] == "failed"
        harness.simulator.faults("acme")
        if times < 3:
            await harness.poll(acme)
    assert await harness.health(acme) == KEY_INVALID
    assert (await moves(harness, acme))[2:] == [("connector.disconnected", "key_invalid", "connected")]


async def test_an_unexplained_401_of_one_dataset_never_disconnects(harness: Harness) -> None:
    """While other datasets are answered the key evidently lives."""
    acme = await harness.synced()
    harness.simulator.faults("acme", {"kind": "other401", "match": MEMBERS})
    for _ in range(5):
        await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED


async def test_a_key_that_lives_again_is_found_by_the_probe(harness: Harness) -> None:
    """A disconnected key is asked one cheap question now and then; alive again, it is told once and synced."""
    acme = await harness.synced()
    harness.simulator.kill("acme", acme.key)
    await harness.poll(acme)
    waits = []
    for _ in range(3):
        harness.simulator.reset_stats()
        (run,) = await harness.poll(acme)
        assert (run["parts_total"], run["status"]) == (1, "failed")
        assert requests(harness) == 2, "the probe and its confirmation"
        waits.append((await harness.connector(acme))["next_sync_at"] - datetime.now(UTC))
    assert waits[0] < waits[1] < waits[2], "slower each time"
    assert len(await moves(harness, acme)) == 3

    harness.simulator.revive("acme", acme.key)
    harness.simulator.mutate("acme", {"op": "member_join"})
    harness.simulator.reset_stats()
    (probe,) = await harness.poll(acme)
    assert (probe["parts_total"], probe["status"]) == (1, "succeeded")
    assert await harness.health(acme) == CONNECTED
    assert (await moves(harness, acme))[3:] == [("connector.connected", None, "disconnected")]
    await harness.tick()
    await harness.settle()
    assert len(await moves(harness, acme)) == 4
    await harness.agree(acme)


async def test_a_new_key_reconnects(harness: Harness) -> None:
    """Given a living key of the same workspace, the connector is connected and synced whole."""
    acme = await harness.synced()
    harness.simulator.kill("acme", acme.key)
    await harness.poll(acme)
    harness.simulator.mutate("acme", {"op": "member_join"})
    await harness.reconnect(acme, harness.simulator.mint("acme")["api_key"])
    await harness.tick()
    await harness.settle()
    assert await harness.health(acme) == CONNECTED
    assert (await moves(harness, acme))[3:] == [("connector.connected", None, "disconnected")]
    await harness.agree(acme)


@dataclass
class Interrupted:
    """A provider whose answers arrive late: something happens between the answer and its settlement."""

    inner: Provider
    meanwhile: Callable[[], Awaitable[None]] | None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        asked = await self.inner.converse(target, asking)
        async with self.lock:
            if self.meanwhile:
                await self.meanwhile()
                self.meanwhile = None
        return asked


async def test_late_answers_to_an_old_key_count_for_nothing(harness: Harness) -> None:
    """A dead answer to the old key, settled after the new one was given, disconnects nobody."""
    acme = await harness.synced()
    new_key = harness.simulator.mint("acme")["api_key"]
    await harness.make_due(acme)
    await harness.tick()
    message = harness.messages.popleft()
    harness.simulator.kill("acme", acme.key)

    async def reconnect() -> None:
        await harness.reconnect(acme, new_key)

    late = Interrupted(harness.runtime.ports.provider, reconnect)
    await observe(list(message.lanes), replace(harness.runtime.ports, provider=late))
    await harness.settle()
    assert await harness.health(acme) == CONNECTED
    assert all(row["state"] == "granted" for row in (await harness.access(acme)).values())
    assert [what for what, _, _ in await moves(harness, acme)].count("connector.disconnected") == 0
    await harness.poll(acme)
    await harness.agree(acme)


async def test_late_refusals_of_an_old_key_degrade_nothing(harness: Harness) -> None:
    """A scope that the old key lacked, settled after the new one was given, is not held against the new one."""
    acme = await harness.synced()
    new_key = harness.simulator.mint("acme")["api_key"]
    harness.simulator.scopes("acme", acme.key, ["user_read"])
    await harness.make_due(acme)
    await harness.tick()
    message = harness.messages.popleft()

    async def reconnect() -> None:
        await harness.reconnect(acme, new_key)

    late = Interrupted(harness.runtime.ports.provider, reconnect)
    await observe(list(message.lanes), replace(harness.runtime.ports, provider=late))
    assert await harness.health(acme) == CONNECTED
    assert all(row["state"] == "granted" for row in (await harness.access(acme)).values())


async def dying(harness: Harness, alive: int, dead: int) -> list[Watched]:
    """Connectors that were all polled well, of which the last `dead` have dead keys now."""
    found = [await harness.add_connector(f"w{n}", **TINY) for n in range(alive + dead)]
    await harness.poll()
    for watched in found[alive:]:
        harness.simulator.kill(watched.workspace, watched.key)
    return found


async def statuses(harness: Harness) -> dict[str, int]:
    rows = await harness.rows("SELECT status, count(*) AS n FROM rollcall.connectors GROUP BY 1")
    return {row["status"]: row["n"] for row in rows}


@pytest.mark.parametrize("since", ["1 second", "16 minutes"])
async def test_too_many_deaths_at_once_wait(harness: Harness, since: str) -> None:
    """More than 5 and more than 20 % seeming dead at once looks like the provider's fault: verdicts wait, untold.

    However long ago the last polls were, since it is these deaths that are at once.
    """
    found = await dying(harness, 2, 10)
    await harness.rows("UPDATE rollcall.connectors SET last_polled_at = now() - %s::interval", [since])
    for _ in range(2):
        await harness.poll()
        assert (await statuses(harness))["disconnected"] == 5
        suspects = await harness.rows("SELECT id FROM rollcall.connectors WHERE suspect_since IS NOT NULL")
        assert len(suspects) == 5
    told = [w for w in found if any(what == "connector.disconnected" for what, _, _ in await moves(harness, w))]
    assert len(told) == 5
    for watched in found[2:]:
        harness.simulator.revive(watched.workspace, watched.key)
    await harness.poll()
    assert await statuses(harness) == {"connected": 12}
    assert not await harness.rows("SELECT id FROM rollcall.connectors WHERE suspect_since IS NOT NULL")


async def test_few_deaths_among_many_do_not_wait(harness: Harness) -> None:
    """Six dead keys are more than five, but of forty connectors no sign of an outage: all are flagged."""
    await dying(harness, 34, 6)
    await harness.poll()
    assert await statuses(harness) == {"connected": 34, "disconnected": 6}


async def test_a_scope_granted_later_is_used_at_once(harness: Harness) -> None:
    """Once the missing scope is there the connector is connected, told once, and its usage is backfilled."""
    scopes = ["user_read", "workspace_members_read", "workspace_read"]
    acme = await harness.synced(scopes=scopes)
    assert await harness.health(acme) == SCOPE
    for dataset, row in (await harness.access(acme)).items():
        missing = "workspace_analytics_full_read" if dataset.startswith("usage") else None
        assert row["missing_permission"] == missing
    (degraded,) = [a for a in await harness.announced(acme) if a["what"] == "connector.degraded"]
    named = {a["dataset"]: a["missing_permission"] for a in degraded["access"]}
    assert named["usage.member"] == "workspace_analytics_full_read"
    assert not (await harness.facts(acme)).usage

    harness.simulator.scopes("acme", acme.key, None)
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    (run,) = await harness.poll(acme)
    assert (run["kind"], run["status"]) == ("backfill", "succeeded")
    assert len((await harness.agree(acme)).usage) == 3 * 90
    assert [what for what, _, _ in await moves(harness, acme)] == [
        "connector.created",
        "connector.degraded",
        "connector.connected",
    ]


async def test_a_partly_granted_scope_is_told(harness: Harness) -> None:
    """A degraded connector whose access changes without becoming whole is announced again, with what is left."""
    acme = await harness.synced(scopes=["user_read", "workspace_members_read"])
    harness.simulator.scopes("acme", acme.key, ["user_read", "workspace_members_read", "workspace_read"])
    await harness.poll(acme)
    told = [a for a in await harness.announced(acme) if a["what"] == "connector.degraded"]
    denied = [{a["dataset"] for a in one["access"] if a["state"] == "denied"} for one in told]
    usage = {"usage.product", "usage.member", "usage.api_key"}
    assert denied[0] == usage | {"groups", "service_accounts"}
    assert denied[-1] == usage
    assert await harness.health(acme) == SCOPE


async def test_a_window_that_was_refused_once_is_backfilled_again(
    database_url: str, redis_url: str, simulator: Simulator
) -> None:
    """A dataset that was refused for one window, and granted before the backfill ended, is not left with a hole."""
    async with opened(database_url, redis_url, simulator, part_days=30) as harness:
        acme = await harness.add_connector()
        usage = {"method": "POST", "path_prefix": "/v1/workspace/analytics"}
        refusal = {"kind": "missing_scope", "permission": "workspace_read", "times": 1, "match": usage}
        harness.simulator.faults("acme", refusal)
        (run,) = await harness.poll(acme)
        assert (run["kind"], run["status"], run["parts_failed"]) == ("backfill", "partial", 1)
        (again,) = await harness.poll(acme)
        assert (again["kind"], again["status"]) == ("backfill", "succeeded")
        await harness.agree(acme)
        (poll,) = await harness.poll(acme)
        assert poll["kind"] == "poll"
