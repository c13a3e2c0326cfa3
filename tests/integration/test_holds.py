"""No false deletion: large drops are held, broken listings remove nobody, and what is held ends in the open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.connectors import RunKind
from tests.fixtures.harness import Harness, Row, Watched
from worker.errors import Refused
from worker.store import operating
from worker.store.holds import digest_of

CONNECTED = ("connected", None, "none")
HELD = ("degraded", "removals_held", "release_removals")
MEMBERS = {"path_prefix": "/v1/workspace/members"}
GROUPS = {"path_prefix": "/v1/workspace/groups"}
ACCOUNTS = {"path_prefix": "/v1/service-accounts"}
MANY: dict[str, Any] = {
    "members": 40,
    "groups": 12,
    "service_accounts": 6,
    "keys_per_account": 5,
    "usage_rows_per_day": 40,
}


def day(back: int) -> str:
    return (datetime.now(UTC).date() - timedelta(days=back)).isoformat()


def leave(harness: Harness, most: int) -> list[str]:
    """Let the last members of the workspace leave; return their subjects."""
    members = [m["user_id"] for m in harness.simulator.truth("acme")["members"] if not m["is_owner"]]
    leavers = members[-most:]
    harness.simulator.mutate("acme", *({"op": "member_leave", "user_id": user} for user in leavers))
    return [f"member/{user}" for user in leavers]


async def removals(harness: Harness, watched: Watched) -> list[tuple[str, int, int, str | None]]:
    """What was announced of holds: (what, known, missing, reason)."""
    return [
        (a["what"].removeprefix("removals."), a["known"], a["missing"], a["reason"])
        for a in await harness.announced(watched)
        if a["what"].startswith("removals.")
    ]


async def open_holds(harness: Harness, watched: Watched) -> list[Row]:
    return [h for h in await harness.holds(watched) if h["state"] in {"open", "released"}]


async def test_a_small_drop_is_believed(harness: Harness) -> None:
    """Ten missing members, or fewer than a fifth, are removed at once."""
    acme = await harness.synced(**MANY)
    leave(harness, 10)
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    await harness.agree(acme)
    assert not await harness.holds(acme)


async def test_a_large_drop_is_held_for_three_runs(harness: Harness) -> None:
    """Above both thresholds removals wait for three runs in a row, while additions and updates flow on."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 12)
    owner = harness.simulator.truth("acme")["members"][0]["user_id"]
    for count in (1, 2):
        joined = f"joined_{count}"
        harness.simulator.mutate(
            "acme",
            {"op": "member_join", "user_id": joined},
            {"op": "member_update", "user_id": owner, "first_name": f"Name {count}"},
        )
        (run,) = await harness.poll(acme)
        assert run["status"] == "succeeded"
        facts, truth = await harness.facts(acme), await harness.truth(acme)
        assert set(facts.records) - set(truth.records) == set(gone)
        assert {s: r for s, r in facts.records.items() if s not in gone} == truth.records
        assert await harness.folded(acme) == facts
        (hold,) = await harness.holds(acme)
        assert (hold["dataset"], hold["state"], hold["missing"], hold["runs"]) == ("members", "open", 12, count)
        assert hold["missing_digest"] == digest_of(gone)
        assert await harness.health(acme) == HELD
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    await harness.agree(acme)
    (hold,) = await harness.holds(acme)
    assert hold["state"] == "closed"
    assert await removals(harness, acme) == [("held", 40, 12, None), ("released", 42, 12, "removed")]
    moves = [a["what"] for a in await harness.announced(acme) if a["what"].startswith("connector.")]
    assert moves == ["connector.created", "connector.connected", "connector.degraded", "connector.connected"]


async def test_what_comes_back_is_not_removed(harness: Harness) -> None:
    """Members that are listed again before the third run were never gone: the hold is rejected, with no event."""
    acme = await harness.synced(**MANY)
    before = await harness.facts(acme)
    harness.simulator.faults("acme", {"kind": "truncated_list", "fraction": 0.3, "match": MEMBERS})
    for _ in range(2):
        await harness.poll(acme)
        assert await harness.health(acme) == HELD
        assert await harness.facts(acme) == before
    harness.simulator.faults("acme")
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    assert await harness.agree(acme) == before
    assert await removals(harness, acme) == [("held", 40, 28, None), ("rejected", 40, 28, "seen_again")]
    assert not [e for e in await harness.events(acme) if e["data"].get("op") == "d"]


async def test_runs_must_be_in_a_row(harness: Harness) -> None:
    """A record that shows up once starts its count anew; the others go on with theirs."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 15)
    back = gone[0].removeprefix("member/")
    for _ in range(2):
        await harness.poll(acme)
    harness.simulator.mutate("acme", {"op": "member_join", "user_id": back})
    await harness.poll(acme)
    await harness.agree(acme)
    assert not await open_holds(harness, acme)


async def test_a_repeat_within_a_run_counts_once(harness: Harness) -> None:
    """A part that is asked again in its run, however often, is one missing run."""
    acme = await harness.synced(**MANY)
    leave(harness, 15)
    await harness.make_due(acme)
    await harness.tick()
    for _ in range(3):
        await harness.deliver(harness.messages.popleft())
        await harness.redis.flushall()
        await harness.tick()
    await harness.settle()
    (hold,) = await harness.holds(acme)
    assert (hold["state"], hold["runs"]) == ("open", 1)
    await harness.poll(acme)
    (hold,) = await harness.holds(acme)
    assert hold["runs"] == 2


BROKEN_MEMBERS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "truncated_list", "fraction": 0}, "incomplete_no_owner"),
    ({"kind": "ownerless"}, "incomplete_no_owner"),
    ({"kind": "duplicated_list"}, "incomplete_duplicated"),
    ({"kind": "schema_broken"}, "schema"),
    ({"kind": "truncated_json"}, "unparseable"),
    ({"kind": "truncated"}, "network"),
    ({"kind": "empty"}, "unparseable"),
]


@pytest.mark.parametrize(("fault", "reason"), BROKEN_MEMBERS, ids=str)
async def test_a_broken_listing_never_removes(harness: Harness, fault: dict[str, Any], reason: str) -> None:
    """Whatever a listing lacks that is not whole, nobody is removed, however often it comes; the run is partial."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 3)
    harness.simulator.faults("acme", {**fault, "match": MEMBERS})
    for _ in range(4):
        (run,) = await harness.poll(acme)
        assert run["status"] == "partial"
        assert f"members: {reason}" in run["error_reason"]
        assert set(gone) <= set((await harness.facts(acme)).records)
    assert not await harness.holds(acme)
    assert await harness.health(acme) == CONNECTED
    harness.simulator.faults("acme")
    await harness.poll(acme)
    await harness.agree(acme)


async def test_an_incomplete_listing_still_adds_and_updates(harness: Harness) -> None:
    """What an incomplete listing does show is taken up."""
    acme = await harness.synced(**MANY)
    harness.simulator.mutate("acme", {"op": "member_join", "user_id": "newcomer"})
    harness.simulator.faults("acme", {"kind": "ownerless", "match": MEMBERS})
    await harness.poll(acme)
    facts, truth = await harness.facts(acme), await harness.truth(acme)
    assert facts.records == truth.records
    assert await harness.folded(acme) == facts


async def test_a_paged_listing_never_removes(harness: Harness) -> None:
    """If lists ever come in pages, page one is not the whole: nothing is removed, of people, keys or usage."""
    acme = await harness.synced(**MANY)
    before = await harness.facts(acme)
    harness.simulator.quirks("acme", paginated=True)
    for _ in range(4):
        (run,) = await harness.poll(acme)
        assert run["status"] == "partial"
        for dataset in ("members", "groups", "service_accounts"):
            assert f"{dataset}: incomplete_paginated" in run["error_reason"]
        assert "usage.product: table_paged" in run["error_reason"]
    assert await harness.facts(acme) == before
    assert not await harness.holds(acme)
    harness.simulator.quirks("acme", paginated=False)
    await harness.poll(acme)
    assert await harness.agree(acme) == before


@pytest.mark.parametrize("path", [GROUPS, ACCOUNTS], ids=["groups", "service_accounts"])
async def test_an_emptied_directory_is_held(harness: Harness, path: dict[str, str]) -> None:
    """A listing that lost all its records is a large drop however few they were; listed again, nothing happened."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.faults("acme", {"kind": "truncated_list", "fraction": 0, "match": path})
    for _ in range(2):
        await harness.poll(acme)
        assert await harness.facts(acme) == before
        assert await harness.health(acme) == HELD
    harness.simulator.faults("acme")
    await harness.poll(acme)
    assert await harness.agree(acme) == before
    assert [what for what, *_ in await removals(harness, acme)] == ["held", "rejected"]


async def test_accounts_are_held_with_their_keys(harness: Harness) -> None:
    """Service accounts and their keys are one listing: both are held and both are removed after the third run."""
    acme = await harness.synced(**MANY)
    accounts = [a["service_account_user_id"] for a in harness.simulator.truth("acme")["service_accounts"]]
    harness.simulator.mutate(
        "acme", *({"op": "service_account_remove", "service_account_user_id": a} for a in accounts[:3])
    )
    await harness.poll(acme)
    (hold,) = await harness.holds(acme)
    assert (hold["dataset"], hold["missing"], hold["known"]) == ("service_accounts", 18, 36)
    for _ in range(2):
        await harness.poll(acme)
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED


async def test_two_datasets_are_held_apart(harness: Harness) -> None:
    """The connector stays degraded until the last of its holds is over."""
    acme = await harness.synced(**MANY)
    leave(harness, 15)
    await harness.poll(acme)
    harness.simulator.faults("acme", {"kind": "truncated_list", "fraction": 0, "match": GROUPS})
    for _ in range(2):
        await harness.poll(acme)
    assert [h["dataset"] for h in await open_holds(harness, acme)] == ["groups"]
    assert await harness.health(acme) == HELD
    harness.simulator.faults("acme")
    await harness.poll(acme)
    assert await harness.health(acme) == CONNECTED
    await harness.agree(acme)


async def test_a_reconcile_respects_holds(harness: Harness) -> None:
    """A comparison with Postgres is guarded like any other: it counts as a run and removes nothing too early."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 15)
    await harness.poll(acme)
    await harness.poll(acme, kind=RunKind.RECONCILE)
    (hold,) = await harness.holds(acme)
    assert (hold["state"], hold["runs"]) == ("open", 2)
    assert set(gone) <= set((await harness.facts(acme)).records)
    await harness.poll(acme, kind=RunKind.RECONCILE)
    await harness.agree(acme)


async def test_holds_survive_a_lost_redis(harness: Harness) -> None:
    """Counts stand in Postgres: a flushed Redis neither forgets a hold nor speeds it up."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 15)
    for count in (1, 2):
        await harness.poll(acme)
        (hold,) = await harness.holds(acme)
        assert (hold["state"], hold["runs"]) == ("open", count)
        assert set(gone) <= set((await harness.facts(acme)).records)
        await harness.redis.flushall()
    await harness.poll(acme)
    assert (await harness.facts(acme)).records == (await harness.truth(acme)).records


async def release(harness: Harness, watched: Watched, valid: timedelta = timedelta(hours=1)) -> None:
    """Let go, as an operator, what is held now."""
    (hold,) = await open_holds(harness, watched)
    await operating.release(harness.runtime.db, hold["id"], digest=hold["missing_digest"], actor="ops", valid=valid)


async def test_a_release_lets_go_at_once(harness: Harness) -> None:
    """What an operator released is removed by the sync that is due then, and told as released."""
    acme = await harness.synced(**MANY)
    leave(harness, 12)
    await harness.poll(acme)
    await release(harness, acme)
    await harness.tick()
    await harness.settle()
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED
    assert await removals(harness, acme) == [("held", 40, 12, None), ("released", 40, 12, "removed")]


async def test_a_release_is_bound_to_its_records(harness: Harness) -> None:
    """What went missing since a release waits on; a release of what is not held any more is refused."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 12)
    await harness.poll(acme)
    (seen,) = await open_holds(harness, acme)
    await release(harness, acme)
    more = leave(harness, 12)
    await harness.poll(acme)
    facts = await harness.facts(acme)
    assert not set(gone) & set(facts.records)
    assert set(more) <= set(facts.records)
    assert await harness.health(acme) == HELD
    with pytest.raises(Refused) as refused:
        await operating.release(
            harness.runtime.db, seen["id"], digest=seen["missing_digest"], actor="ops", valid=timedelta(hours=1)
        )
    assert refused.value.reason == "hold_changed"
    for _ in range(2):
        await harness.poll(acme)
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED


async def test_a_release_expires(harness: Harness) -> None:
    """A release that is too old lets nobody go: the hold counts on."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 12)
    await harness.poll(acme)
    await release(harness, acme, timedelta(seconds=-1))
    await harness.poll(acme)
    assert set(gone) <= set((await harness.facts(acme)).records)


async def test_a_rejected_hold_begins_anew(harness: Harness) -> None:
    """When an operator rejects a hold nobody is removed; what stays missing is held and counted from one."""
    acme = await harness.synced(**MANY)
    gone = leave(harness, 12)
    for _ in range(2):
        await harness.poll(acme)
    (hold,) = await open_holds(harness, acme)
    await operating.reject(harness.runtime.db, hold["id"], actor="ops")
    await harness.poll(acme)
    assert set(gone) <= set((await harness.facts(acme)).records)
    (hold,) = await open_holds(harness, acme)
    assert (hold["runs"], hold["missing"]) == (1, 12)
    assert await harness.health(acme) == HELD
    told = await removals(harness, acme)
    assert [(what, reason) for what, _, _, reason in told] == [
        ("held", None),
        ("rejected", "operator"),
        ("held", None),
    ]


# Usage days.


async def test_an_emptied_usage_day_is_held(harness: Harness) -> None:
    """A day that lost all its rows keeps them for three runs in a row, then it is empty."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.mutate("acme", {"op": "usage_remove_day", "day": day(1)})
    for count in (1, 2):
        await harness.poll(acme)
        assert (await harness.facts(acme)).usage == before.usage
        assert await harness.folded(acme) == await harness.facts(acme)
        holds = await open_holds(harness, acme)
        assert {h["dataset"]: h["runs"] for h in holds} == {
            f"usage.{dimension}": count for dimension in ("product", "member", "api_key")
        }
        assert await harness.health(acme) == HELD
    await harness.poll(acme)
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED
    told = await removals(harness, acme)
    assert sorted((what, reason) for what, _, _, reason in told) == [
        *[("held", None)] * 3,
        *[("released", "removed")] * 3,
    ]


async def test_a_large_drop_of_rows_is_held(harness: Harness) -> None:
    """A day that lost many rows keeps them, while its other rows and other days are taken up."""
    acme = await harness.synced(**MANY)
    before = await harness.facts(acme)
    # Of the four days that a poll asks for, the first stays whole and the second keeps a few rows.
    harness.simulator.faults("acme", {"kind": "truncated_list", "fraction": 0.3, "match": {"method": "POST"}})
    harness.simulator.mutate(
        "acme", {"op": "usage_add", "day": day(3), "product": "text_to_speech", "amount": "1000000"}
    )
    await harness.poll(acme)
    facts = await harness.facts(acme)
    (hold,) = [h for h in await harness.holds(acme) if h["dataset"] == "usage.api_key"]
    assert {subject.split("/")[2].partition("#")[0] for subject in hold["records"]} == {day(2), day(1), day(0)}
    for subject, amounts in before.usage.items():
        if subject.startswith("usage/api_key/"):
            assert set(amounts) <= set(facts.usage[subject])
    assert facts.usage[f"usage/product/{day(3)}"] == (await harness.truth(acme)).usage[f"usage/product/{day(3)}"]
    harness.simulator.faults("acme")
    await harness.poll(acme)
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED


async def test_usage_that_comes_back_is_told_so(harness: Harness) -> None:
    """Rows of a day that are listed again were never gone: the hold is rejected, not released."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.faults("acme", {"kind": "truncated_list", "fraction": 0, "match": {"method": "POST"}})
    await harness.poll(acme)
    harness.simulator.faults("acme")
    await harness.poll(acme)
    assert await harness.agree(acme) == before
    told = await removals(harness, acme)
    assert sorted((what, reason) for what, _, _, reason in told) == [
        *[("held", None)] * 3,
        *[("rejected", "seen_again")] * 3,
    ]


async def test_a_held_day_outside_the_look_back_waits_for_the_reconcile(harness: Harness) -> None:
    """Polls that do not ask for a day say nothing of it: neither do they count, nor do they end its hold."""
    acme = await harness.synced()
    before = await harness.facts(acme)
    harness.simulator.mutate("acme", {"op": "usage_remove_day", "day": day(10)})
    await harness.poll(acme, kind=RunKind.RECONCILE)
    for _ in range(3):
        await harness.poll(acme)
    assert (await harness.facts(acme)).usage == before.usage
    assert {h["runs"] for h in await open_holds(harness, acme)} == {1}
    for _ in range(2):
        await harness.poll(acme, kind=RunKind.RECONCILE)
    await harness.agree(acme)
    assert await harness.health(acme) == CONNECTED
