"""The main job: whatever the provider tells and however it writes it, Postgres and a subscriber hold the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from psycopg import sql

from schemas.connectors import Dataset, RunKind
from tests.fixtures.harness import Harness, Watched
from tests.fixtures.states import PLACES
from worker.dev.simulator.random_changes import MAKERS
from worker.elevenlabs import asking
from worker.elevenlabs.asking import Asked, Asking
from worker.observe import observe
from worker.ports import Target
from worker.store import staging
from worker.store.db import Connection

KINDS = [kind for kind in MAKERS if kind != "usage_remove_day"]
"""Random changes that no guard holds back; what empties a whole day is tested with the holds."""
SOON_S = 20.0
FACT_TABLES = (*(table for table, _, _ in PLACES.values()), "credit_usage", "usage_coverage")
SPELLINGS: list[dict[str, Any]] = [
    {"credits_column": "total_usage"},
    {"credits_column": "total_charge_count", "units": "null"},
    {"units": ""},
    {"units": None},
    {"string_numbers": True},
    {"time_form": "naive"},
    {"time_form": "epoch_s"},
    {"time_form": "epoch_ms"},
    {"zero_fill": True},
    {"early_bucket": True},
    {"extra_fields": True},
    {"shuffle_columns": True},
    {"gzip": True},
]
"""Quirks that write the same facts in other words."""
OTHER_FACTS: list[dict[str, Any]] = [
    {"label_columns": False},
    {"product_dashes": True},
    {"unknown_enums": True},
    {"old_key_shape": True},
]
"""Quirks that change what the provider tells, so that facts follow."""


def day(back: int) -> str:
    return (datetime.now(UTC).date() - timedelta(days=back)).isoformat()


async def tuples(harness: Harness) -> dict[str, list[tuple[object, ...]]]:
    """Where every fact row lies and which transaction wrote it."""
    found = {}
    for table in FACT_TABLES:
        query = sql.SQL("SELECT xmin::text, ctid::text FROM rollcall.{} ORDER BY 2").format(sql.Identifier(table))
        found[table] = [tuple(row.values()) for row in await harness.rows(query)]
    return found


async def record_events(harness: Harness, watched: Watched) -> list[dict[str, Any]]:
    return [e for e in await harness.events(watched) if e["type"].endswith(".changed.v1")]


@pytest.mark.parametrize("shape", [{}, {"members": 60, "groups": 5, "service_accounts": 6, "usage_rows_per_day": 30}])
async def test_random_changes_arrive(harness: Harness, shape: dict[str, Any]) -> None:
    """After the first sync and after each poll that follows changes, tables, folded events and truth are one."""
    acme = await harness.synced(**shape)
    first = await harness.agree(acme)
    assert len(first.usage) == 3 * 90
    for seed in range(6):
        harness.simulator.mutate("acme", {"op": "random", "n": 8, "seed": seed, "kinds": KINDS})
        (run,) = await harness.poll(acme)
        assert (run["kind"], run["status"]) == ("poll", "succeeded")
        await harness.agree(acme)
    assert harness.lapses == 0, "no lease had to run out"


async def test_large_batches_arrive_alike(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied, straight or through temporary tables a few rows at a time, is what arrays would have written."""
    monkeypatch.setattr(staging, "COPY_FROM_ROWS", 1)
    monkeypatch.setattr(staging, "STAGE_FROM_ROWS", 1)
    monkeypatch.setattr(staging, "BATCH_ROWS", 7)
    acme = await harness.synced(members=40, groups=5, service_accounts=6, usage_rows_per_day=10)
    await harness.agree(acme)
    for seed in range(4):
        harness.simulator.mutate("acme", {"op": "random", "n": 20, "seed": seed, "kinds": KINDS})
        await harness.poll(acme)
        await harness.agree(acme)
    assert harness.lapses == 0, "no lease had to run out"


async def test_a_first_sync_goes_straight_into_its_tables(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows need no temporary table, and arrive as they are, whatever COPY makes of their letters; later ones do."""
    copied: list[str] = []
    copy = staging.Stage._copy

    async def noting(self: staging.Stage, connection: Connection, into: bytes, rows: Any) -> None:
        copied.append(into.decode())
        await copy(self, connection, into, rows)

    monkeypatch.setattr(staging.Stage, "_copy", noting)
    monkeypatch.setattr(staging, "COPY_FROM_ROWS", 1)
    monkeypatch.setattr(staging, "STAGE_FROM_ROWS", 1)
    monkeypatch.setattr(staging, "BATCH_ROWS", 7)
    acme = await harness.add_connector(members=10)
    names = [r"\N", r"back\slash \t", "tab\tline\nreturn\r", "\\.", "'\"{}"]
    members = harness.simulator.truth("acme")["members"]
    for member, name in zip(members, names, strict=False):
        harness.simulator.mutate("acme", {"op": "member_update", "user_id": member["user_id"], "first_name": name})
    await harness.poll(acme)
    straight = {into.split()[1] for into in copied if '"rollcall"' in into}
    assert straight == {'"rollcall"."members"', '"rollcall"."service_accounts"', '"rollcall"."credit_usage"'}
    await harness.agree(acme)
    copied.clear()
    harness.simulator.mutate("acme", {"op": "random", "n": 20, "seed": 1, "kinds": KINDS})
    await harness.poll(acme)
    assert copied
    assert not [into for into in copied if '"rollcall"' in into]
    await harness.agree(acme)


async def test_who_comes_back_finds_the_old_row(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a dataset's first observation goes straight into its table: who was removed has a row there still."""
    monkeypatch.setattr(staging, "COPY_FROM_ROWS", 1)
    acme = await harness.synced(members=5)
    query = "SELECT user_id, first_seen_at, removed_at FROM rollcall.members ORDER BY first_seen_at, user_id"
    before = await harness.rows(query)
    gone = before[-1]["user_id"]
    harness.simulator.mutate("acme", {"op": "member_leave", "user_id": gone})
    await harness.poll(acme)
    assert [row["user_id"] for row in await harness.rows(query) if row["removed_at"]] == [gone]
    harness.simulator.mutate("acme", {"op": "member_join", "user_id": gone})
    await harness.poll(acme)
    assert await harness.rows(query) == before
    await harness.agree(acme)


async def test_days_too_large_for_one_observation_are_parts_of_their_own(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one answer makes large enough is published alone; the days before it follow, and the run counts them."""
    monkeypatch.setattr(asking, "ENOUGH_BYTES", 1)
    acme = await harness.add_connector()
    (run,) = await harness.poll(acme)
    assert (run["status"], run["parts_total"], run["parts_done"]) == ("succeeded", 4 + 3 * 3, 4 + 3 * 3)
    parts = await harness.rows("SELECT * FROM rollcall.sync_parts WHERE dataset = 'usage.product'")
    windows = sorted((part["window_start"], part["window_end"]) for part in parts)
    assert [(end - start).days for start, end in windows] == [30, 30, 30]
    assert all(before[1] == after[0] for before, after in pairwise(windows))
    await harness.agree(acme)
    assert harness.lapses == 0, "no lease had to run out"


@pytest.mark.parametrize("kind", ["s500_json", "reset"])
async def test_days_answered_before_an_outage_are_kept(harness: Harness, kind: str) -> None:
    """When the provider fails in the middle of a part, what it told before is published; the rest is asked later."""
    acme = await harness.add_connector()
    outage = {"kind": kind, "match": {"path_prefix": "/v1/workspace/analytics"}, "after": 1, "times": 6}
    harness.simulator.faults("acme", outage)
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    assert run["parts_total"] > 4 + 3
    await harness.agree(acme)


async def test_days_that_cannot_be_read_cost_no_others(harness: Harness) -> None:
    """Of all usage only the latest days are told in a known shape: these are known, and each of the others is tried."""
    acme = await harness.add_connector()
    usage = {"path_prefix": "/v1/workspace/analytics"}
    harness.simulator.faults("acme", {"kind": "schema_broken", "match": usage, "after": 1})
    (run,) = await harness.poll(acme)
    assert (run["status"], run["parts_total"], run["parts_failed"]) == ("partial", 4 + 3 * 3, 3 * 3 - 1)
    failed = await harness.rows("SELECT * FROM rollcall.sync_parts WHERE status = 'failed'")
    assert {part["error_class"] for part in failed} == {"ContractBroken"}
    assert {(part["window_end"] - part["window_start"]).days for part in failed} == {30}
    assert (await harness.one("SELECT count(*) AS days FROM rollcall.usage_coverage"))["days"] == 30
    harness.simulator.faults("acme")
    await harness.poll(acme)
    await harness.agree(acme)


@pytest.mark.parametrize("broken", [1, 2])
async def test_one_unreadable_answer_is_asked_for_again(harness: Harness, broken: int) -> None:
    """The days before those that could be read are a part of their own: a passing fault costs nothing."""
    acme = await harness.add_connector()
    usage = {"path_prefix": "/v1/workspace/analytics"}
    harness.simulator.faults("acme", {"kind": "schema_broken", "match": usage, "after": broken, "times": 1})
    (run,) = await harness.poll(acme)
    assert (run["status"], run["parts_failed"]) == ("succeeded", 0)
    await harness.agree(acme)


async def test_a_refusal_met_on_the_way_is_the_earlier_days_own(harness: Harness) -> None:
    """A scope taken away in the middle of a part leaves what was told, and is named by the part that follows."""
    acme = await harness.add_connector()
    usage = {"path_prefix": "/v1/workspace/analytics"}
    refusal = {"kind": "missing_scope", "permission": "workspace_read", "match": usage, "after": 1}
    harness.simulator.faults("acme", refusal)
    (run,) = await harness.poll(acme)
    assert run["status"] == "partial"
    covered = await harness.rows("SELECT dimension, count(*) AS days FROM rollcall.usage_coverage GROUP BY 1")
    assert [row["days"] for row in covered] == [30]
    denied = await harness.rows("SELECT dataset FROM rollcall.connector_access WHERE state = 'denied'")
    assert {row["dataset"] for row in denied} == {"usage.product", "usage.member", "usage.api_key"}
    harness.simulator.faults("acme")
    await harness.poll(acme)
    await harness.poll(acme)
    await harness.agree(acme)


async def test_many_changes_travel_in_many_entries(harness: Harness) -> None:
    """An observation of more than 500 events is split into adjacent entries and still applied whole."""
    acme = await harness.synced(members=1_201)
    members = [fields for _, fields in await harness.entries(acme) if fields.get(b"dataset") == b"members"]
    assert [b"part" in fields for fields in members] == [False, False, True]
    await harness.agree(acme)


async def test_two_tenants_of_one_workspace_keep_apart(harness: Harness) -> None:
    """The same workspace under two tenants gives each its own rows and events, of its own tenant only."""
    mine = await harness.synced()
    key = harness.simulator.mint("acme")["api_key"]
    yours = await harness.add_connector("globex", tenant="t2")
    await harness.reconnect(yours, key)
    await harness.poll(yours)
    twin = Watched(yours.id, "t2", "acme", key, yours.partition)
    await harness.agree(mine)
    await harness.agree(twin)
    assert {e["tenantid"] for e in await harness.events(twin)} == {"t2"}


async def test_event_ids_are_unique_and_follow_the_contract(harness: Harness) -> None:
    """An event's id is its subject and sequence, never the same for two changes, and its source its connector."""
    acme = await harness.synced()
    for seed in range(3):
        harness.simulator.mutate("acme", {"op": "random", "n": 8, "seed": seed, "kinds": KINDS})
        await harness.poll(acme)
    events = await record_events(harness, acme)
    assert Counter(e["id"] for e in events).most_common(1)[0][1] == 1
    for event in events:
        assert event["id"] == f"{event['subject']}@{event['sequence']}"
        assert event["source"] == f"/tenants/t1/connectors/{acme.id}"
        assert event["partitionkey"] == event["connectorid"] == str(acme.id)


@pytest.mark.parametrize("change", [None, {"op": "volatile_tick", "by": 17}])
async def test_a_quiet_poll_writes_nothing(harness: Harness, change: dict[str, Any] | None) -> None:
    """Nothing new, or only counters that move: no entry in the stream, no fact row touched, no part kept."""
    acme = await harness.synced()
    before, length = await tuples(harness), await harness.redis.xlen(acme.stream)
    if change:
        harness.simulator.mutate("acme", change)
    harness.simulator.reset_stats()
    (run,) = await harness.poll(acme)
    assert (run["status"], run["parts_done"]) == ("succeeded", len(Dataset))
    assert await tuples(harness) == before
    assert await harness.redis.xlen(acme.stream) == length
    assert not await harness.parts(run)
    assert harness.simulator.stats()["total"] == len(Dataset)


async def test_a_volatile_counter_is_parsed_once_only(harness: Harness) -> None:
    """After counters moved, the digest of the new answer is kept, so that the next poll parses nothing."""
    acme = await harness.synced()
    harness.simulator.mutate("acme", {"op": "volatile_tick", "by": 1})
    digest = await harness.redis.hget(acme.snapshot(Dataset.GROUPS), "d")
    await harness.poll(acme)
    assert await harness.redis.hget(acme.snapshot(Dataset.GROUPS), "d") not in {digest, b""}


async def test_reconcile_mends_postgres(harness: Harness) -> None:
    """A fact that was damaged in Postgres stays unseen by polls, and the reconcile puts it right, with an event."""
    acme = await harness.synced()
    await harness.rows("UPDATE rollcall.members SET email = 'damaged' WHERE is_owner")
    await harness.rows("DELETE FROM rollcall.credit_usage WHERE bucket_start = %s", [day(20)])
    await harness.poll(acme)
    assert (await harness.facts(acme)).records != (await harness.truth(acme)).records
    (run,) = await harness.poll(acme, kind=RunKind.RECONCILE)
    assert (run["kind"], run["status"]) == ("reconcile", "succeeded")
    await harness.agree(acme)


async def test_a_quiet_reconcile_touches_no_fact(harness: Harness) -> None:
    """A reconcile that finds everything in place moves the chain on and nothing else, without any record event."""
    acme = await harness.synced()
    before, events = await tuples(harness), await record_events(harness, acme)
    await harness.poll(acme, kind=RunKind.RECONCILE)
    assert await record_events(harness, acme) == events
    assert await tuples(harness) == before
    await harness.agree(acme)


async def test_every_spelling_is_read_alike(harness: Harness) -> None:
    """Whichever form the first answers take, they fold to what is true, and every run succeeds without warning."""
    added = []
    for number, quirk in enumerate(SPELLINGS):
        added.append(await harness.add_connector(f"w{number}", history_days=20, keys_per_account=1))
        harness.simulator.quirks(added[-1].workspace, **quirk)
    for run in await harness.poll():
        assert (run["status"], run["warnings"]) == ("succeeded", [])
    for watched in added:
        await harness.agree(watched)


async def test_another_spelling_is_no_change(harness: Harness) -> None:
    """When the provider takes to writing the same facts in another form, no event is published."""
    acme = await harness.synced()
    events = await record_events(harness, acme)
    plain = harness.simulator.quirks("acme")
    for quirk in SPELLINGS:
        harness.simulator.quirks("acme", **quirk)
        (run,) = await harness.poll(acme, kind=RunKind.RECONCILE)
        assert (quirk, run["status"], run["warnings"]) == (quirk, "succeeded", [])
        assert (quirk, len(await record_events(harness, acme))) == (quirk, len(events))
        harness.simulator.quirks("acme", **{name: plain[name] for name in quirk})
    await harness.agree(acme)


async def test_a_further_measure_is_a_further_unit(harness: Harness) -> None:
    """Money told beside the credits is kept in its own unit, never summed with them; other numbers are not usage."""
    acme = await harness.synced()
    harness.simulator.quirks("acme", extra_measures=True)
    await harness.poll(acme)
    facts, truth = await harness.facts(acme), await harness.truth(acme)
    amounts = facts.usage[f"usage/product/{day(1)}"]
    in_credits = truth.usage[f"usage/product/{day(1)}"]
    assert {slot: n for slot, n in amounts.items() if slot[1] == "credits"} == in_credits
    assert {slot: n for slot, n in amounts.items() if slot[1] != "credits"} == {
        (key, "usd"): n * Decimal("0.0002") for (key, _), n in in_credits.items()
    }
    assert await harness.folded(acme) == facts


@pytest.mark.parametrize("quirk", OTHER_FACTS, ids=str)
async def test_what_the_provider_newly_leaves_out_or_adds_is_followed(harness: Harness, quirk: dict[str, Any]) -> None:
    """Unknown enums, older shapes and missing labels are no error: facts follow what is told, there and back."""
    acme = await harness.synced()
    plain = await harness.agree(acme)
    for values in (quirk, {name: not value for name, value in quirk.items()}):
        harness.simulator.quirks("acme", **values)
        await harness.poll(acme)
        (run,) = await harness.poll(acme, kind=RunKind.RECONCILE)
        assert run["status"] == "succeeded"
        await harness.agree(acme)
    assert (await harness.facts(acme)).records == plain.records


async def test_labels_name_members_and_keys(harness: Harness) -> None:
    """A usage row's label is the provider's name for its key; a product's raw spelling when it differs."""
    acme = await harness.synced()
    harness.simulator.quirks("acme", product_dashes=True)
    await harness.poll(acme)
    facts = await harness.facts(acme)
    emails = {r["user_id"]: r["email"] for s, r in facts.records.items() if s.startswith("member/")}
    _, by_member = facts.details[f"usage/member/{day(1)}"]
    assert {key: label for key, label in by_member.items() if key in emails}.items() <= emails.items()
    _, by_product = facts.details[f"usage/product/{day(1)}"]
    assert by_product["text_to_speech"] == "text-to-speech"


async def test_late_usage_arrives(harness: Harness) -> None:
    """Usage told late is taken up by the next poll within the look-back, and beyond it by the reconcile."""
    acme = await harness.synced()
    late = {"op": "usage_add", "product": "music", "amount": "12.5"}
    harness.simulator.mutate("acme", {**late, "day": day(3)}, {**late, "day": day(10)})
    await harness.poll(acme)
    product = f"usage/product/{day(3)}", f"usage/product/{day(10)}"
    facts, truth = await harness.facts(acme), await harness.truth(acme)
    assert facts.usage[product[0]] == truth.usage[product[0]]
    assert facts.usage[product[1]] != truth.usage[product[1]]
    await harness.poll(acme, kind=RunKind.RECONCILE)
    facts = await harness.agree(acme)
    assert [facts.details[subject][0] for subject in product] == [False, True], "settled: past the look-back"


@pytest.mark.parametrize("since", [None, 200, 45, 30, 2, 1, 0, -1])
async def test_cost_billing_is_folded(harness: Harness, since: int | None) -> None:
    """Usage is whole in both billing modes, wherever in or around the windows the switch lies."""
    acme = await harness.synced(mode="cost", cost_since=None if since is None else day(since))
    facts = await harness.agree(acme)
    units = {unit for amounts in facts.usage.values() for _, unit in amounts}
    assert ("credits" in units) == (since is not None and since < 90)
    assert ("usd" in units) == ("charge_count" in units) == (since is None or since >= 0)
    (run,) = await harness.poll(acme)
    assert (run["status"], run["warnings"]) == ("succeeded", [])
    await harness.agree(acme)


@pytest.mark.parametrize("status", [400, 403, 409, 422])
async def test_a_switch_of_billing_is_found(harness: Harness, status: int) -> None:
    """A workspace that moves to cost billing is followed from the switch day on, and asked rightly from then on."""
    acme = await harness.synced()
    harness.simulator.quirks("acme", cost_refusal_status=status)
    harness.simulator.mutate("acme", {"op": "billing", "mode": "cost", "cost_since": day(1)})
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    await harness.agree(acme)
    assert (await harness.connector(acme))["cost_since"] == date.fromisoformat(day(1))
    harness.simulator.reset_stats()
    await harness.poll(acme)
    assert harness.simulator.stats()["total"] == 4 + 3 * 2, "both sides of the switch, once each"
    assert (await harness.health(acme))[0] == "connected"


@pytest.mark.parametrize("kind", ["forbidden", "conflict409", "bad_request400"])
async def test_one_refused_usage_query_is_no_switch_of_billing(harness: Harness, kind: str) -> None:
    """A refusal that passes by does not make a workspace cost-billed, which would hide all its later usage."""
    acme = await harness.synced()
    credits_path = {"path_prefix": "/v1/workspace/analytics/query"}
    harness.simulator.mutate("acme", {"op": "usage_add", "day": day(0), "product": "music", "amount": "5"})
    harness.simulator.faults("acme", {"kind": kind, "match": credits_path, "times": 1})
    await harness.poll(acme)
    assert (await harness.connector(acme))["cost_since"] is None
    await harness.poll(acme)
    await harness.agree(acme)


async def test_a_dimension_without_a_row_counts_as_zero(harness: Harness) -> None:
    """Of a covered day whose usage one dimension lacks entirely, the totals differ as well."""
    acme = await harness.synced()
    await harness.rows(
        "DELETE FROM rollcall.credit_usage WHERE dimension = 'member' AND bucket_start = %s",
        [date.fromisoformat(day(1))],
    )
    harness.simulator.mutate("acme", {"op": "usage_add", "day": day(0), "product": "music", "amount": "5"})
    (run,) = await harness.poll(acme)
    (warning,) = run["warnings"]
    assert (warning["day"], warning["totals"]["member"]) == (day(1), "0")


async def test_totals_that_do_not_reconcile_are_a_warning(harness: Harness) -> None:
    """Where dimensions of a day do not add up to one total, the run succeeds and its row says so."""
    acme = await harness.add_connector()
    harness.simulator.quirks("acme", null_groups=False)
    (run,) = await harness.poll(acme)
    assert run["status"] == "succeeded"
    truth = harness.simulator.truth("acme")["usage"]["product"]
    warned = {w["day"]: w for w in run["warnings"]}
    assert {w["kind"] for w in run["warnings"]} == {"totals_differ"}
    assert len(warned) > 60
    some_day = max(warned)
    total = sum(Decimal(units["credits"]) for units in truth[some_day].values())
    totals = {dimension: Decimal(amount) for dimension, amount in warned[some_day]["totals"].items()}
    assert totals["product"] == total
    assert min(totals["member"], totals["api_key"]) < total


async def test_seat_counts(harness: Harness) -> None:
    """The view counts living members by seat type, and how many of them are locked."""
    acme = await harness.synced(members=40)
    leaver = harness.simulator.truth("acme")["members"][-1]
    harness.simulator.mutate("acme", {"op": "member_leave", "user_id": leaver["user_id"]})
    await harness.poll(acme)
    members = harness.simulator.truth("acme")["members"]
    expected = Counter(m["seat_type"] for m in members)
    locked = Counter(m["seat_type"] for m in members if m["is_locked"])
    found = await harness.rows("SELECT * FROM rollcall.seat_counts WHERE connector_id = %s", [acme.id])
    assert {row["seat_type"]: row["members"] for row in found} == expected
    assert {row["seat_type"]: row["locked"] for row in found if row["locked"]} == locked


async def test_api_key_use(harness: Harness) -> None:
    """The view tells each key's last day of use and its credits of 30 days, from usage by its hash."""
    acme = await harness.synced(service_accounts=2, keys_per_account=3)
    told = harness.simulator.truth("acme")
    unused = told["service_accounts"][1]["api-keys"][2]
    made = harness.simulator.mutate(
        "acme", {"op": "key_add", "service_account_user_id": told["service_accounts"][0]["service_account_user_id"]}
    )[0]
    await harness.poll(acme)
    usage = told["usage"]["api_key"]
    month = {(datetime.now(UTC).date() - timedelta(days=back)).isoformat() for back in range(30)}
    window = {(datetime.now(UTC).date() - timedelta(days=back)).isoformat() for back in range(90)}
    found = {row["key_id"]: row for row in await harness.rows("SELECT * FROM rollcall.api_key_use")}
    for account in told["service_accounts"]:
        for key in account["api-keys"]:
            used = {d: Decimal(k[key["hashed_xi_api_key"]]["credits"]) for d, k in usage.items()
                    if key["hashed_xi_api_key"] in k}  # fmt: skip
            row = found[key["key_id"]]
            assert row["last_used_on"] == max((date.fromisoformat(d) for d in used if d in window), default=None)
            assert row["credits_30d"] == sum(amount for d, amount in used.items() if d in month)
    assert found.keys() >= {unused["key_id"], made["key_id"]}
    assert (found[made["key_id"]]["last_used_on"], found[made["key_id"]]["credits_30d"]) == (None, 0)


@dataclass
class Slow:
    """The provider, but who asks for this connector waits until `go`."""

    inner: Any
    connector: UUID
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def converse(self, target: Target, asking: Asking) -> Asked:
        if target.connector_id == self.connector:
            await self.go.wait()
        asked: Asked = await self.inner.converse(target, asking)
        return asked


async def test_connectors_of_one_message_do_not_wait_for_each_other(harness: Harness) -> None:
    """A connector whose provider hangs holds nobody up: the others are settled, and the rest when it answers."""
    acme, busy = await harness.synced(), await harness.synced("busy", tenant="other")
    await harness.make_due(acme)
    await harness.make_due(busy)
    await harness.tick()
    parts = [part_id for message in harness.messages for part_id in message.lanes]
    harness.messages.clear()
    slow = Slow(harness.runtime.ports.provider, busy.id)
    observing = asyncio.create_task(observe(parts, replace(harness.runtime.ports, provider=slow)))
    async with asyncio.timeout(SOON_S):
        while (await harness.runs(acme))[-1]["status"] != "succeeded":  # noqa: ASYNC110 - Postgres rings no bell
            await asyncio.sleep(0.01)
    assert (await harness.runs(busy))[-1]["status"] == "running"
    slow.go.set()
    assert len(await observing) == len(parts)
    assert (await harness.runs(busy))[-1]["status"] == "succeeded"


@dataclass
class Buggy:
    """The provider, but asking for this connector fails as nobody foresaw."""

    inner: Any
    connector: UUID

    async def converse(self, target: Target, asking: Asking) -> Asked:
        if target.connector_id == self.connector:
            asking.close()
            raise RuntimeError("a bug")
        asked: Asked = await self.inner.converse(target, asking)
        return asked


async def test_a_bug_with_one_connector_costs_no_other(harness: Harness) -> None:
    """It is loud, and everybody else in the message is done."""
    acme, odd = await harness.synced(), await harness.synced("odd", tenant="other")
    await harness.make_due(acme)
    await harness.make_due(odd)
    await harness.tick()
    parts = [part_id for message in harness.messages for part_id in message.lanes]
    harness.messages.clear()
    buggy = Buggy(harness.runtime.ports.provider, odd.id)
    with pytest.raises(RuntimeError, match="a bug"):
        await observe(parts, replace(harness.runtime.ports, provider=buggy))
    assert (await harness.runs(acme))[-1]["status"] == "succeeded"
    assert (await harness.runs(odd))[-1]["status"] == "running"
