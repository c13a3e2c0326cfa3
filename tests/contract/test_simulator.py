"""The simulator keeps to the provider's wire, tells the truth about itself, and fails on demand."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from http.client import HTTPConnection, HTTPException, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.fixtures.simulator import ROOT, ControlError, Simulator, start_simulator

DAY_MS = 86_400_000
NOW = "2026-04-20T12:00:00Z"
TODAY_MS = 1_776_643_200_000
BY_PRODUCT = "/v1/workspace/analytics/query/usage-by-product-over-time"
BY_COST = "/v1/workspace/analytics/usage"
REQUESTS = "/v1/workspace/analytics/requests"
DIMENSIONS = {"product": "product_type", "member": "user_id", "api_key": "hashed_xi_api_key"}
LISTINGS = {
    "/v1/user": "user_read",
    "/v1/user/subscription": "user_read",
    "/v1/workspace/members": "workspace_members_read",
    "/v1/workspace/groups": "workspace_read",
    "/v1/service-accounts": "workspace_read",
}


@dataclass
class Reply:
    """What came back, with header names in lower case."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def detail(self) -> Any:
        return self.json["detail"]


def ask(
    sim: Simulator,
    path: str,
    body: object = None,
    *,
    key: str | None = None,
    method: str | None = None,
    timeout_s: float = 10,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send one request: POST when there is a body."""
    sent = dict(headers or {}) | ({} if key is None else {"xi-api-key": key})
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = HTTPConnection(urlsplit(sim.url).netloc, timeout=timeout_s)
    try:
        connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def window(days: int = 3, **more: object) -> dict[str, object]:
    """The last whole days and today, by the day."""
    start, end = TODAY_MS - days * DAY_MS, TODAY_MS + DAY_MS - 1
    return {"start_time": start, "end_time": end, "interval_seconds": 86_400, **more}


def column(table: dict[str, Any], name: str) -> list[Any]:
    """One column's cells, found by name."""
    place = table["columns"].index(name)
    return [row[place] for row in table["rows"]]


def by_day(table: dict[str, Any], measure: str, dimension: str | None = None) -> dict[str, Any]:
    """Exact sums of a table: {day: total}, or {day: {key: total}} for a dimension; ISO times only."""
    keys = [""] * len(table["rows"]) if dimension is None else column(table, dimension)
    sums: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for at, key, amount in zip(column(table, "timestamp"), keys, column(table, measure), strict=True):
        if Decimal(str(amount)):
            sums[at[:10]][key or ""] += Decimal(str(amount))
    return {day: dict(found) if dimension else found[""] for day, found in sums.items()}


def true_sums(truth: dict[str, Any], dimension: str, unit: str) -> dict[str, Any]:
    """The truth of one dimension and unit in the form of `by_day`."""
    days = truth["usage"][dimension]
    found = {
        day: {key: Decimal(amounts[unit]) for key, amounts in keys.items() if unit in amounts}
        for day, keys in days.items()
    }
    return {day: keys for day, keys in found.items() if keys}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with start_simulator(tmp_path_factory.mktemp("simulator"), seed=7) as started:
        yield started


@pytest.fixture
def sim(running: Simulator) -> Simulator:
    """The module's simulator, its clock pinned and nothing broken."""
    running.clock(NOW)
    running.faults(None)
    running.latency(0)
    running.reset_stats()
    return running


@pytest.fixture
def key(sim: Simulator) -> str:
    """The access key of a fresh workspace `one` with a tier that has everything."""
    secret: str = sim.workspace("one", tier="enterprise")["api_key"]
    return secret


def test_validation_comes_before_authentication_and_names_every_wrong_field(sim: Simulator) -> None:
    """A malformed query is a 422 array without any key."""
    reply = ask(sim, BY_PRODUCT, {"start_time": 1_577_836_799_999, "group_by": ["nonsense"]})
    assert reply.status == 422
    assert [(item["type"], item["loc"]) for item in reply.detail] == [
        ("greater_than_equal", ["body", "start_time"]),
        ("missing", ["body", "end_time"]),
        ("literal_error", ["body", "group_by", 0]),
    ]
    assert ask(sim, BY_PRODUCT, b"{").detail[0]["type"] == "json_invalid"
    assert ask(sim, BY_COST, {"start_time": TODAY_MS, "end_time": TODAY_MS}).status == 422
    assert ask(sim, BY_COST, window(interval_seconds=3_600)).status == 422
    assert ask(sim, REQUESTS, {"start_time": 1, "limit": 1_001}).status == 422
    assert ask(sim, "/v1/usage/character-stats?start_unix=x").status == 422
    assert ask(sim, "/v1/workspace/audit-logs?limit=101").status == 422


def test_a_missing_or_wrongly_sent_key_is_told_apart_from_a_dead_one(sim: Simulator, key: str) -> None:
    """Three 401 bodies: no header, Bearer, unknown key."""
    path = "/v1/workspace/members"
    assert ask(sim, path).detail["status"] == "needs_authorization"
    bearer = ask(sim, path, headers={"Authorization": f"Bearer {key}"})
    assert (bearer.status, bearer.detail["status"]) == (401, "invalid_authorization_header")
    unknown = ask(sim, path, key="sk_unknown")
    assert unknown.status == 401
    expected = {"type": "authentication_error", "code": "unauthorized", "status": "invalid_api_key"}
    trace = unknown.headers["x-trace-id"]
    assert unknown.detail == {**expected, "message": "Invalid API key", "request_id": trace}


@pytest.mark.parametrize("how", ["disabled", "expired", "deleted"])
def test_a_dead_key_looks_the_same_however_it_died(sim: Simulator, key: str, how: str) -> None:
    """Disabled, expired and deleted keys all answer invalid_api_key, other keys of the workspace live on."""
    other = sim.mint("one")
    sim.kill("one", key, how)
    dead = ask(sim, "/v1/user", key=key)
    assert (dead.status, dead.detail["status"]) == (401, "invalid_api_key")
    assert ask(sim, "/v1/user", key=other["api_key"]).status == 200
    sim.revive("one", key)
    assert ask(sim, "/v1/user", key=key).status == 200
    sim.delete("one")
    assert ask(sim, "/v1/user", key=other["api_key"]).status == 401


def test_a_missing_scope_names_the_permission_and_leaves_other_datasets_alone(sim: Simulator) -> None:
    """Each endpoint asks for its own scope, in the 401 form or by quirk in the 403 form."""
    made = sim.workspace("narrow", scopes=["text_to_speech"], tier="enterprise")
    key = made["api_key"]
    needed: list[tuple[str, object, str]] = [(path, None, scope) for path, scope in LISTINGS.items()]
    needed.append((BY_PRODUCT, window(), "workspace_analytics_full_read"))
    needed.append(("/v1/workspace/audit-logs", None, "audit_log_read"))
    for path, body, scope in needed:
        reply = ask(sim, path, body, key=key)
        assert reply.status == 401
        assert reply.detail["status"] == "missing_permissions"
        message = f"The API key you used is missing the permission {scope} to execute this operation."
        assert reply.detail["message"] == message
    sim.quirks("narrow", scope_form=403)
    newer = ask(sim, "/v1/user", key=key)
    assert (newer.status, newer.detail["code"]) == (403, "insufficient_permissions")
    sim.scopes("narrow", made["key_id"], ["user_read"])
    assert ask(sim, "/v1/user", key=key).status == 200
    assert ask(sim, "/v1/workspace/groups", key=key).status == 403


def test_every_answer_carries_the_providers_headers(sim: Simulator, key: str) -> None:
    """Trace id, region, server and via are there on success, error and unrouted paths."""
    replies = [ask(sim, "/v1/user", key=key), ask(sim, "/v1/user"), ask(sim, "/v1/nowhere")]
    for reply in replies:
        assert reply.headers["server"] == "uvicorn"
        assert reply.headers["via"] == "1.1 google"
        assert reply.headers["x-region"]
    assert len({reply.headers["x-trace-id"] for reply in replies}) == 3
    assert replies[1].detail["request_id"] == replies[1].headers["x-trace-id"]
    assert (replies[2].status, replies[2].json) == (404, {"detail": "Not Found"})
    assert ask(sim, "/v1/user", {}).status == 405


def test_listings_have_the_documented_shapes(sim: Simulator, key: str) -> None:
    """Members are a bare array with one owner, groups a map by id, service accounts carry their keys."""
    user = ask(sim, "/v1/user", key=key).json
    members = ask(sim, "/v1/workspace/members", key=key).json
    groups = ask(sim, "/v1/workspace/groups", key=key).json
    accounts = ask(sim, "/v1/service-accounts", key=key).json["service-accounts"]
    assert [member["user_id"] for member in members if member["is_owner"]] == [user["user_id"]]
    assert len(members) == 20
    assert set(groups) == {group["id"] for group in groups.values()}
    assert {name for group in groups.values() for name in group["members"]} <= {m["user_id"] for m in members}
    assert [len(account["api-keys"]) for account in accounts] == [3, 3]
    for account in accounts:
        name = account["service_account_user_id"]
        alone = ask(sim, f"/v1/service-accounts/{name}/api-keys", key=key).json
        assert alone == {"api-keys": account["api-keys"]}
    missing = ask(sim, "/v1/service-accounts/sa_nobody/api-keys", key=key)
    assert missing.status == 404
    truth = sim.truth("one")
    assert truth["members"] == members
    assert truth["groups"] == list(groups.values())
    assert truth["service_accounts"] == accounts
    assert truth["workspace"] == {"workspace_id": user["workspace_id"], "tier": "enterprise"}


def test_service_accounts_use_credits_without_being_members(sim: Simulator, key: str) -> None:
    """Analytics name service accounts as users, and leave some usage without user and some without key."""
    members = {member["user_id"] for member in ask(sim, "/v1/workspace/members", key=key).json}
    accounts = ask(sim, "/v1/service-accounts", key=key).json["service-accounts"]
    listed = {one["hashed_xi_api_key"] for account in accounts for one in account["api-keys"]}
    users = set(column(ask(sim, BY_PRODUCT, window(30, group_by=["user_id"]), key=key).json, "user_id"))
    hashes = column(ask(sim, BY_PRODUCT, window(30, group_by=["hashed_xi_api_key"]), key=key).json, "hashed_xi_api_key")
    assert {account["service_account_user_id"] for account in accounts} <= users - members
    assert None in users
    assert None in hashes
    assert set(hashes) - listed - {None}, "a personal key is in no listing"


@pytest.mark.parametrize("seed", range(4))
def test_all_groupings_are_projections_of_the_same_usage(sim: Simulator, key: str, seed: int) -> None:
    """After any changes product, user, key and no grouping sum to the same day totals, those of the truth."""
    sim.mutate("one", {"op": "random", "n": 40, "seed": seed, "usage_days": 30})
    truth = sim.truth("one", "2026-03-21", "2026-04-20")
    ungrouped = by_day(ask(sim, BY_PRODUCT, window(30), key=key).json, "credits_used")
    assert len(ungrouped) > 20
    for dimension, name in DIMENSIONS.items():
        table = ask(sim, BY_PRODUCT, window(30, group_by=[name]), key=key).json
        found = by_day(table, "credits_used", name)
        assert found == true_sums(truth, dimension, "credits")
        assert {day: sum(keys.values()) for day, keys in found.items()} == ungrouped
    pairs = ask(sim, BY_PRODUCT, window(30, group_by=list(DIMENSIONS.values())), key=key).json
    assert by_day(pairs, "credits_used") == ungrouped


def test_days_are_utc_ends_are_inclusive_and_the_default_bucket_is_a_minute(sim: Simulator, key: str) -> None:
    """An end on midnight reaches into the next day's bucket; without an interval there are many buckets."""
    midnight = TODAY_MS - 2 * DAY_MS
    inclusive = ask(sim, BY_PRODUCT, window(4) | {"end_time": midnight}, key=key).json
    assert "2026-04-18T00:00:00Z" in column(inclusive, "timestamp")
    exact = ask(sim, BY_PRODUCT, window(4) | {"end_time": midnight - 1}, key=key).json
    assert set(column(exact, "timestamp")) == {"2026-04-16T00:00:00Z", "2026-04-17T00:00:00Z"}
    by_minute = window(4)
    del by_minute["interval_seconds"]
    fine = ask(sim, BY_PRODUCT, by_minute, key=key).json
    assert len(set(column(fine, "timestamp"))) > 8
    assert by_day(fine, "credits_used") == by_day(ask(sim, BY_PRODUCT, window(4), key=key).json, "credits_used")
    weeks = column(ask(sim, BY_PRODUCT, window(30, interval_seconds=604_800), key=key).json, "timestamp")
    assert {date.fromisoformat(week[:10]).weekday() for week in weeks} == {0}
    reversed_range = window() | {"start_time": TODAY_MS, "end_time": TODAY_MS - 1}
    assert ask(sim, BY_PRODUCT, reversed_range, key=key).status == 400


def test_a_zone_moves_whole_day_buckets_to_local_midnight(sim: Simulator, key: str) -> None:
    """Whole days align to the zone's midnight; totals over the window stay."""
    local = ask(sim, BY_PRODUCT, window(5, time_zone="Asia/Kolkata"), key=key).json
    assert {at[11:] for at in column(local, "timestamp")} == {"18:30:00Z"}
    plain = ask(sim, BY_PRODUCT, window(5), key=key).json
    assert sum(map(float, column(local, "credits_used"))) == pytest.approx(sum(column(plain, "credits_used")))
    assert ask(sim, BY_PRODUCT, window(time_zone="Mars/Olympus"), key=key).status == 422


def test_filters_narrow_what_is_counted(sim: Simulator, key: str) -> None:
    """Filters work on grouped and other columns, in both spellings of a product, with null."""
    whole = by_day(
        ask(sim, BY_PRODUCT, window(group_by=["product_type"]), key=key).json, "credits_used", "product_type"
    )
    for spelling in ("text_to_speech", "text-to-speech"):
        only = [{"column": "product_type", "operation": "eq", "values": [spelling]}]
        found = by_day(ask(sim, BY_PRODUCT, window(filters=only), key=key).json, "credits_used")
        assert found == {day: keys["text_to_speech"] for day, keys in whole.items() if "text_to_speech" in keys}
    web = [{"column": "hashed_xi_api_key", "operation": "in", "values": [None]}]
    table = ask(sim, BY_PRODUCT, window(filters=web, group_by=["hashed_xi_api_key"]), key=key).json
    assert set(column(table, "hashed_xi_api_key")) == {None}
    odd = [{"column": "colour", "operation": "eq", "values": ["red"]}]
    assert ask(sim, BY_PRODUCT, window(filters=odd), key=key).status == 400


def test_a_workspace_that_moved_to_cost_billing_splits_its_history(sim: Simulator) -> None:
    """Before the switch only the credit query answers, from then on only the cost query has rows."""
    key = sim.workspace("moved", mode="cost", cost_since="2026-04-10")["api_key"]
    switch_ms = TODAY_MS - 10 * DAY_MS
    before = window(30) | {"end_time": switch_ms - 1}
    assert ask(sim, BY_PRODUCT, before, key=key).status == 200
    assert ask(sim, BY_PRODUCT, before | {"end_time": switch_ms}, key=key).detail["code"] == "invalid_parameters"
    for status in (403, 409, 422, 400):
        sim.quirks("moved", cost_refusal_status=status)
        assert ask(sim, BY_PRODUCT, window(30), key=key).status == status
    truth = sim.truth("moved")
    for dimension, name in DIMENSIONS.items():
        table = ask(sim, BY_COST, window(30, group_by=[name]), key=key).json
        assert min(column(table, "timestamp")) == "2026-04-10T00:00:00Z"
        assert by_day(table, "total_cost", name) == true_sums(truth, dimension, "usd")
        assert by_day(table, "total_charge_count", name) == true_sums(truth, dimension, "charge_count")
    assert max(true_sums(truth, "product", "credits")) == "2026-04-09"
    plain = sim.workspace("plain")["api_key"]
    assert ask(sim, BY_COST, window(30), key=plain).json["rows"] == []


def test_the_cost_query_limits_how_dimensions_combine(sim: Simulator) -> None:
    """At most two scarce dimensions, two only with a filter on one, the free ones always."""
    key = sim.workspace("costly", mode="cost")["api_key"]
    pair = ["user_id", "product_type"]
    assert ask(sim, BY_COST, window(group_by=pair), key=key).status == 400
    chosen = [{"column": "product_type", "operation": "eq", "values": ["text_to_speech"]}]
    assert ask(sim, BY_COST, window(group_by=pair, filters=chosen), key=key).status == 200
    assert ask(sim, BY_COST, window(group_by=[*pair, "region"], filters=chosen), key=key).status == 400
    assert ask(sim, BY_COST, window(group_by=["user_id", "model", "request_source"]), key=key).status == 200
    ordered = [{"column": "product_type", "operation": "ge", "values": ["a"]}]
    assert ask(sim, BY_COST, window(filters=ordered), key=key).status == 422
    assert ask(sim, BY_PRODUCT, window(), key=key).status == 400


def test_the_same_seed_and_name_give_the_same_world(sim: Simulator, tmp_path: Any) -> None:
    """A second process with the seed tells the same truth, another seed another one."""
    spec: dict[str, Any] = {"members": 5, "history_days": 10}
    sim.workspace("twin", **spec)
    with start_simulator(tmp_path / "same", seed=7) as same:
        same.clock(NOW)
        made = same.workspace("twin", **spec)
        assert same.truth("twin") == sim.truth("twin")
        assert ask(sim, "/v1/user", key=made["api_key"]).json["workspace_id"] == made["workspace_id"]
    with start_simulator(tmp_path / "other", seed=8) as other:
        other.clock(NOW)
        other.workspace("twin", **spec)
        assert other.truth("twin")["members"] != sim.truth("twin")["members"]


def test_the_clock_moves_today_and_leaves_the_past_alone(sim: Simulator, key: str) -> None:
    """Today is half used up; a day later it is whole, the days before are as they were."""
    then = sim.truth("one")["usage"]["product"]
    sim.clock("2026-04-21T00:30:00Z")
    now = sim.truth("one")["usage"]["product"]
    assert max(now) == "2026-04-21"
    assert {day: keys for day, keys in now.items() if day < "2026-04-20"} == {
        day: keys for day, keys in then.items() if day < "2026-04-20"
    }
    half = sum(Decimal(amounts["credits"]) for amounts in then["2026-04-20"].values())
    whole = sum(Decimal(amounts["credits"]) for amounts in now["2026-04-20"].values())
    assert half == pytest.approx(whole / 2, rel=Decimal("0.001"))
    assert key


QUIRKS: list[tuple[dict[str, Any], Any]] = [
    ({"credits_column": "total_usage"}, lambda t: "total_usage" in t["columns"]),
    ({"credits_column": "total_charge_count"}, lambda t: "total_charge_count" in t["columns"]),
    ({"units": ""}, lambda t: t["column_units"] == ["", "", "", ""]),
    ({"units": "null"}, lambda t: set(t["column_units"]) == {"null"}),
    ({"units": None}, lambda t: set(t["column_units"]) == {None}),
    ({"string_numbers": True}, lambda t: all(isinstance(x, str) for x in column(t, "credits_used"))),
    ({"time_form": "naive"}, lambda t: "2026-04-18 00:00:00" in column(t, "timestamp")),
    ({"time_form": "epoch_s"}, lambda t: TODAY_MS // 1000 in column(t, "timestamp") and "s" in t["column_units"]),
    ({"time_form": "epoch_ms"}, lambda t: TODAY_MS in column(t, "timestamp") and "ms" in t["column_units"]),
    ({"label_columns": False}, lambda t: t["columns"] == ["user_id", "timestamp", "credits_used"]),
    ({"label_columns": True}, lambda t: t["columns"][-1] == "user_label"),
    ({"zero_fill": True}, lambda t: 0 in column(t, "credits_used")),
    ({"null_groups": False}, lambda t: None not in column(t, "user_id")),
    ({"early_bucket": True}, lambda t: "2026-04-07T00:00:00Z" in column(t, "timestamp")),
    ({"extra_fields": True}, lambda t: "x_future_column" in t["columns"] and "x_future_field" in t),
    ({"extra_measures": True}, lambda t: {"usd", "min"} <= set(t["column_units"])),
    ({"unknown_enums": True}, lambda t: "Enum8" in t["column_types"]),
    ({"shuffle_columns": True}, lambda t: t["columns"] != ["user_id", "timestamp", "credits_used", "user_label"]),
    ({"paginated": True}, lambda t: t["has_more"] is True and t["next_cursor"]),
]


@pytest.mark.parametrize(("switch", "shows"), QUIRKS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_each_quirk_changes_the_table_as_told(sim: Simulator, key: str, switch: dict[str, Any], shows: Any) -> None:
    """A quirk shows in the table at once, although the same query was cached before."""
    asked = window(12, group_by=["user_id"])
    plain = ask(sim, BY_PRODUCT, asked, key=key).json
    sim.quirks("one", **switch)
    table = ask(sim, BY_PRODUCT, asked, key=key).json
    assert shows(table)
    assert switch == {"label_columns": True} or table != plain


def test_quirks_of_the_listings_show_too(sim: Simulator, key: str) -> None:
    """Old key shape, extra fields, unknown enums, dashes, a missing workspace id and pages."""
    assert "workspace_id" in ask(sim, "/v1/user", key=key).json
    sim.quirks("one", omit_user_workspace_id=True, old_key_shape=True, extra_fields=True, unknown_enums=True)
    assert "workspace_id" not in ask(sim, "/v1/user", key=key).json
    members = ask(sim, "/v1/workspace/members", key=key).json
    assert "workspace_guest_member" in {member["seat_type"] for member in members}
    assert all("x_future_field" in member for member in members)
    one = ask(sim, "/v1/service-accounts", key=key).json["service-accounts"][0]["api-keys"][1]
    assert "hashed_xi_api_key" not in one
    assert "teleportation" in one["permissions"]
    sim.quirks("one", paginated=True, product_dashes=True)
    page = ask(sim, "/v1/workspace/members", key=key).json
    assert (len(page["members"]), page["has_more"]) == (10, True)
    assert ask(sim, "/v1/workspace/groups", key=key).json["has_more"] is True
    assert ask(sim, "/v1/service-accounts", key=key).json["next_cursor"]
    dashed = ask(sim, BY_PRODUCT, window(group_by=["product_type"]), key=key).json
    assert "text-to-speech" in column(dashed, "product_type")


def test_big_bodies_are_zipped_when_asked_for(sim: Simulator, key: str) -> None:
    """Gzip needs the client's wish; a quirk forces or forbids it."""
    path, wish = "/v1/workspace/members", {"Accept-Encoding": "gzip"}
    plain = ask(sim, path, key=key)
    assert "content-encoding" not in plain.headers
    assert "content-encoding" not in ask(sim, path, key=key, headers=wish).headers
    sim.quirks("one", gzip=True)
    zipped = ask(sim, path, key=key, headers=wish)
    assert gzip.decompress(zipped.raw) == plain.raw
    sim.workspace("big", members=100)
    big = sim.mint("big")["api_key"]
    assert ask(sim, path, key=big, headers=wish).headers["content-encoding"] == "gzip"
    sim.quirks("big", gzip=False)
    assert "content-encoding" not in ask(sim, path, key=big, headers=wish).headers


FAULTS: list[tuple[dict[str, Any], int, str]] = [
    ({"kind": "missing_scope", "permission": "workspace_read"}, 401, "missing_permissions"),
    ({"kind": "missing_scope", "permission": "workspace_read", "form": 403}, 403, "insufficient_permissions"),
    ({"kind": "plan"}, 402, "paid_plan_required"),
    ({"kind": "plan", "form": 403}, 403, "subscription_required"),
    ({"kind": "feature"}, 403, "feature_not_available"),
    ({"kind": "legacy_plan"}, 403, "only_for_creator+"),
    ({"kind": "forbidden"}, 403, "forbidden"),
    ({"kind": "ip"}, 403, "forbidden"),
    ({"kind": "workspace_denied"}, 403, "workspace_access_denied"),
    ({"kind": "html403"}, 403, "Just a moment..."),
    ({"kind": "unusual_activity"}, 401, "detected_unusual_activity"),
    ({"kind": "quota"}, 401, "quota_exceeded"),
    ({"kind": "quota402"}, 402, "insufficient_credits"),
    ({"kind": "other401"}, 401, "something_new"),
    ({"kind": "invalid_api_key"}, 401, "invalid_api_key"),
    ({"kind": "rate429"}, 429, "rate_limit_exceeded"),
    ({"kind": "concurrency429"}, 429, "too_many_concurrent_requests"),
    ({"kind": "busy429"}, 429, "system_busy"),
    ({"kind": "s500_text"}, 500, "internal_server_error"),
    ({"kind": "s500_json"}, 500, "internal_error"),
    ({"kind": "s503"}, 503, "service_unavailable"),
    ({"kind": "s502_html"}, 502, "<html>"),
    ({"kind": "s504_empty"}, 504, ""),
    ({"kind": "timeout408"}, 408, ""),
    ({"kind": "conflict409"}, 409, "concurrent_modification"),
    ({"kind": "empty"}, 200, ""),
    ({"kind": "not_found"}, 404, '{"detail":"Not Found"}'),
    ({"kind": "legacy_envelope"}, 401, '{"detail":{"status":"missing_permissions","message":'),
    ({"kind": "bad_request400"}, 400, "bad_request"),
    ({"kind": "redirect", "to": "http://127.0.0.1:9/"}, 307, ""),
]


@pytest.mark.parametrize(("rule", "status", "holds"), FAULTS, ids=str)
def test_each_fault_answers_as_told(sim: Simulator, key: str, rule: dict[str, Any], status: int, holds: str) -> None:
    """A fault replaces the true answer until its times are used up."""
    sim.faults("one", {**rule, "times": 1})
    reply = ask(sim, "/v1/workspace/members", key=key)
    assert reply.status == status
    assert holds in reply.raw.decode()
    assert ("retry-after" in reply.headers) is False
    if rule["kind"] in {"empty", "s504_empty", "timeout408"}:
        assert reply.raw == b""
    assert isinstance(ask(sim, "/v1/workspace/members", key=key).json, list)


def test_fault_rules_match_count_and_stack(sim: Simulator, key: str) -> None:
    """Rules choose by path and method, wait, stop, carry Retry-After, and stand for all workspaces if global."""
    other = sim.workspace("two")["api_key"]
    sim.faults(
        "one",
        {"kind": "rate429", "retry_after": 7, "after": 1, "times": 2, "match": {"path_prefix": "/v1/user"}},
        {"kind": "s503", "match": {"method": "POST"}},
    )
    statuses = [ask(sim, "/v1/user", key=key) for _ in range(4)]
    assert [reply.status for reply in statuses] == [200, 429, 429, 200]
    assert statuses[1].headers["retry-after"] == "7"
    assert ask(sim, BY_PRODUCT, window(), key=key).status == 503
    assert ask(sim, BY_PRODUCT, window(), key=other).status == 200
    sim.faults(None, {"kind": "html403", "probability": 1.0})
    assert ask(sim, "/v1/user", key=other).status == 403
    assert ask(sim, BY_PRODUCT, {}, key=other).status == 422
    sim.faults(None, {"kind": "html403", "probability": 0.5})
    mixed = {ask(sim, "/v1/user", key=other).status for _ in range(40)}
    assert mixed == {200, 403}


def test_damaged_listings(sim: Simulator, key: str) -> None:
    """Truncated, doubled, ownerless and broken answers are valid HTTP; cut JSON does not parse."""
    path = "/v1/workspace/members"
    whole = ask(sim, path, key=key).json
    sim.faults("one", {"kind": "truncated_list", "fraction": 0.25})
    assert ask(sim, path, key=key).json == whole[:5]
    assert len(ask(sim, "/v1/service-accounts", key=key).json["service-accounts"]) == 0
    sim.faults("one", {"kind": "truncated_list"})
    assert len(ask(sim, "/v1/workspace/groups", key=key).json) == 1
    sim.faults("one", {"kind": "duplicated_list"})
    assert ask(sim, path, key=key).json == whole + whole
    sim.faults("one", {"kind": "ownerless"})
    assert not any(member["is_owner"] for member in ask(sim, path, key=key).json)
    sim.faults("one", {"kind": "schema_broken"})
    assert isinstance(ask(sim, path, key=key).json[0]["user_id"], dict)
    groups = ask(sim, "/v1/workspace/groups", key=key).json
    assert isinstance(next(iter(groups.values()))["id"], dict)
    assert isinstance(ask(sim, "/v1/user/subscription", key=key).json["tier"], dict)
    assert isinstance(ask(sim, BY_PRODUCT, window(), key=key).json["rows"][0][0], list)
    sim.faults("one", {"kind": "truncated_json"})
    with pytest.raises(json.JSONDecodeError):
        _ = ask(sim, path, key=key).json


def test_faults_of_the_connection(sim: Simulator, key: str) -> None:
    """A connection is cut midway, reset, hung or slowed; the server lives on."""
    sim.faults("one", {"kind": "truncated"})
    with pytest.raises(IncompleteRead):
        ask(sim, "/v1/workspace/members", key=key)
    sim.faults("one", {"kind": "reset"})
    with pytest.raises((ConnectionResetError, HTTPException)):
        ask(sim, "/v1/user", key=key)
    sim.faults("one", {"kind": "hang"})
    with pytest.raises(TimeoutError):
        ask(sim, "/v1/user", key=key, timeout_s=0.2)
    sim.faults("one", {"kind": "slow", "seconds": 0.4})
    with pytest.raises(TimeoutError):
        ask(sim, "/v1/user", key=key, timeout_s=0.2)
    sim.faults("one", {"kind": "slow", "seconds": 0.01}, {"kind": "s503"})
    assert ask(sim, "/v1/user", key=key).status == 503
    sim.faults("one")
    assert ask(sim, "/v1/user", key=key).status == 200


def test_changes_show_at_once_and_are_remembered(sim: Simulator, key: str) -> None:
    """Members, groups, accounts, keys and usage change by name; ids come back; the history tells."""
    account = sim.truth("one")["service_accounts"][0]
    one = account["api-keys"][0]
    done = sim.mutate(
        "one",
        {"op": "member_join", "email": "new@example.com", "seat_type": "workspace_lite_member"},
        {"op": "group_add", "name": "Night shift"},
        {"op": "service_account_add", "name": "robot", "keys": 2},
        {"op": "key_update", "key_id": one["key_id"], "is_disabled": True, "disable_reason": "exposed_publicly"},
        {"op": "usage_set", "day": "2026-04-19", "product": "music", "amount": "12.34"},
        {"op": "plan", "tier": "pro"},
    )
    truth = sim.truth("one")
    assert truth["members"][-1]["user_id"] == done[0]["user_id"]
    assert truth["groups"][-1]["name"] == "Night shift"
    assert len(truth["service_accounts"][-1]["api-keys"]) == 2
    assert truth["service_accounts"][0]["api-keys"][0]["disable_reason"] == "exposed_publicly"
    assert truth["usage"]["product"]["2026-04-19"]["music"] == {"credits": "12.34"}
    assert truth["workspace"]["tier"] == "pro"
    listed = ask(sim, "/v1/workspace/members", key=key).json
    sim.mutate("one", {"op": "member_leave", "user_id": done[0]["user_id"]})
    assert ask(sim, "/v1/workspace/members", key=key).json == listed[:-1]
    assert [item["op"] for item in sim.history("one")][-1] == "member_leave"
    assert sim.history("one")[0]["at"].startswith("2026-04-20")


def test_a_list_of_changes_is_applied_whole_or_not_at_all(sim: Simulator, key: str) -> None:
    """One impossible operation leaves everything as it was and says what is wrong."""
    before = sim.truth("one")
    owner = ask(sim, "/v1/user", key=key).json["user_id"]
    good = {"op": "usage_scale", "day": "2026-04-19", "factor": 2}
    with pytest.raises(ControlError, match="the owner cannot leave"):
        sim.mutate("one", good, {"op": "member_join"}, {"op": "member_leave", "user_id": owner})
    with pytest.raises(ControlError, match="unknown field usr"):
        sim.mutate("one", good, {"op": "member_leave", "usr": owner})
    with pytest.raises(ControlError, match="at most two decimals"):
        sim.mutate("one", {"op": "usage_add", "day": "2026-04-19", "product": "music", "amount": 0.001})
    assert sim.truth("one") == before
    assert sim.history("one") == []
    for refused in ({"memberz": 1}, {"members": 0}, {"cost_since": "2026-04-01"}):
        with pytest.raises(ControlError):
            sim.workspace("bad", **refused)


def test_random_changes_are_repeatable_and_keep_the_owner(sim: Simulator) -> None:
    """The same seed does the same to equal workspaces; a long walk leaves a valid workspace."""
    walks = []
    for _ in range(2):
        key = sim.workspace("walk")["api_key"]
        walks.append((sim.mutate("walk", {"op": "random", "n": 300, "seed": 5}), sim.truth("walk")))
    assert walks[0] == walks[1]
    truth = walks[0][1]
    assert [member["is_owner"] for member in truth["members"]].count(True) == 1
    assert ask(sim, "/v1/service-accounts", key=key).json["service-accounts"] == truth["service_accounts"]
    assert len({operation["op"] for operation in walks[0][0]}) == 17
    done = sim.mutate("walk", {"op": "random", "n": 5, "seed": 1, "kinds": ["member_join"]})
    assert {operation["op"] for operation in done} == {"member_join"}


def test_volatile_counters_follow_usage_and_change_nothing_else(sim: Simulator, key: str) -> None:
    """A tick or new usage moves the counters of subscription, keys and groups."""
    account = sim.truth("one")["service_accounts"][0]
    one = account["api-keys"][0]
    before = ask(sim, "/v1/user/subscription", key=key).json["character_count"]
    use = {"op": "usage_add", "day": "2026-04-19", "product": "music", "amount": 500}
    sim.mutate("one", use | {"user_id": account["service_account_user_id"], "key_hash": one["hashed_xi_api_key"]})
    assert ask(sim, "/v1/user/subscription", key=key).json["character_count"] == before + 500
    after = sim.truth("one")["service_accounts"][0]["api-keys"][0]
    assert after == one | {"character_count": one["character_count"] + 500}
    groups = sim.truth("one")["groups"]
    sim.mutate("one", {"op": "volatile_tick", "by": 3})
    for old, new in zip(groups, sim.truth("one")["groups"], strict=True):
        assert new == old | {"character_count": old["character_count"] + 3}


def test_stats_count_requests_statuses_and_concurrency(sim: Simulator, key: str) -> None:
    """What was asked is told by workspace and path, also for a dead key, until reset."""
    for _ in range(3):
        ask(sim, "/v1/user", key=key)
    sim.kill("one", key)
    ask(sim, "/v1/user", key=key)
    ask(sim, "/v1/user", key="sk_unknown")
    stats = sim.stats()
    assert stats["requests"]["one"] == {"/v1/user": 4}
    assert stats["requests"][""] == {"/v1/user": 1}
    assert stats["statuses"] == {"200": 3, "401": 2}
    assert stats["max_concurrent"]["one"] == 1
    assert stats["total"] == 5
    sim.reset_stats()
    assert sim.stats()["total"] == 0


def test_what_is_being_answered_at_a_reset_counts_no_more(sim: Simulator, key: str) -> None:
    """Who gave up waiting belongs to what was before."""
    sim.faults("one", {"kind": "slow", "seconds": 0.2})
    with pytest.raises(TimeoutError):
        ask(sim, "/v1/user", key=key, timeout_s=0.05)
    sim.reset_stats()
    assert ask(sim, "/v1/user", key=key).status == 200  # by now the first one has its answer, too
    stats = sim.stats()
    assert (stats["total"], stats["statuses"]) == (1, {"200": 1})


def test_audit_logs_page_backwards_and_refuse_the_31st_call_of_a_minute(sim: Simulator, key: str) -> None:
    """Newest first, cursors lead through all entries once, the plan and the rate are enforced."""
    sim.mutate("one", {"op": "member_join"})
    seen: list[dict[str, Any]] = []
    cursor, calls = "", 0
    while True:
        page = ask(sim, f"/v1/workspace/audit-logs?limit=40{cursor}", key=key).json
        calls += 1
        seen += page["entries"]
        if not page["has_more"]:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert (len(seen), calls, page["next_cursor"]) == (91, 3, None)
    assert len({entry["id"] for entry in seen}) == 91
    assert [entry["time"] for entry in seen] == sorted((entry["time"] for entry in seen), reverse=True)
    assert seen[0]["activity_name"] == "Workspace Invitation Accepted"
    bad = ask(sim, "/v1/workspace/audit-logs?cursor=nonsense", key=key)
    assert (bad.status, bad.detail["code"]) == (400, "invalid_cursor")
    statuses = [ask(sim, "/v1/workspace/audit-logs?limit=1", key=key).status for _ in range(27)]
    assert (set(statuses[:26]), statuses[26]) == ({200}, 429)
    low = sim.workspace("low")["api_key"]
    assert ask(sim, "/v1/workspace/audit-logs", key=low).detail["code"] == "feature_not_available"


def test_character_stats_sum_to_the_same_usage(sim: Simulator, key: str) -> None:
    """Times are milliseconds, every series has one number per time, the sums are those of the truth."""
    bounds = f"start_unix={TODAY_MS - 3 * DAY_MS}&end_unix={TODAY_MS + DAY_MS - 1}"
    path = f"/v1/usage/character-stats?{bounds}&include_workspace_metrics=true&breakdown_type="
    total = ask(sim, path + "none", key=key).json
    assert total["time"] == [TODAY_MS - days * DAY_MS for days in (3, 2, 1, 0)]
    products = ask(sim, path + "product_type", key=key).json["usage"]
    truth = true_sums(sim.truth("one", "2026-04-17", "2026-04-20"), "product", "credits")
    assert total["usage"]["All"] == pytest.approx([float(sum(day.values())) for day in truth.values()])
    assert [sum(day) for day in zip(*products.values(), strict=True)] == pytest.approx(total["usage"]["All"])
    own = ask(sim, f"/v1/usage/character-stats?{bounds}", key=key).json["usage"]["All"]
    assert sum(own) < sum(total["usage"]["All"])
    assert ask(sim, f"/v1/usage/character-stats?{bounds}&breakdown_type=user", key=key).status == 400


def test_requests_page_by_moving_the_start(sim: Simulator, key: str) -> None:
    """Ascending pages from the last timestamp on, de-duplicated by id, give every request of the window."""
    bounds = {"start_time": TODAY_MS - 5 * DAY_MS, "end_time": TODAY_MS - 1, "sort": "asc"}
    whole = column(ask(sim, REQUESTS, {**bounds, "limit": 1_000}, key=key).json, "request_id")
    found: dict[str, str] = {}
    start = bounds["start_time"]
    while True:
        page = ask(sim, REQUESTS, {**bounds, "start_time": start, "limit": 10}, key=key).json
        fresh = [row for row in page["rows"] if row[0] not in found]
        if not fresh:
            break
        found |= {row[0]: row[1] for row in fresh}
        sim.quirks("one", time_form="epoch_ms")
        start = max(column(ask(sim, REQUESTS, {**bounds, "start_time": start, "limit": 10}, key=key).json, "timestamp"))
        sim.quirks("one", time_form="iso")
    assert set(found) == set(whole)
    assert len(whole) > 20
    assert ask(sim, REQUESTS, {}, key=key).status == 400
    newest = column(ask(sim, REQUESTS, {"end_time": TODAY_MS}, key=key).json, "timestamp")
    assert newest == sorted(newest, reverse=True)


def test_many_workspaces_are_cheap_and_their_own(sim: Simulator) -> None:
    """A thousand workspaces are made in one call; their ids and figures differ."""
    made = sim.workspaces([{"name": f"many-{number}", "members": 3} for number in range(1_000)])
    assert len({one["workspace_id"] for one in made}) == 1_000
    tables = [ask(sim, BY_PRODUCT, window(1), key=one["api_key"]).raw for one in made[:50]]
    assert len(set(tables)) == 50
    for one in made:
        sim.delete(one["name"])


def test_a_large_workspace_answers_whole(sim: Simulator) -> None:
    """Ninety days of two hundred keys and five products come in one table."""
    spec = {"members": 3_000, "service_accounts": 20, "keys_per_account": 10, "products": 5}
    key = sim.workspace("large", **spec, usage_rows_per_day=1_400)["api_key"]
    assert len(ask(sim, "/v1/workspace/members", key=key).json) == 3_000
    asked = window(89, group_by=["hashed_xi_api_key", "product_type"])
    table = ask(sim, BY_PRODUCT, asked, key=key).json
    groups = {(row[0], row[1]) for row in table["rows"] if row[0] is not None}
    assert len(groups) == 200 * 5 + 1
    assert len(table["rows"]) > 80_000
    sim.delete("large")


def test_the_process_tells_where_it_listens_and_ends_on_sigterm() -> None:
    """One JSON line on stdout, a clean end."""
    argv = [sys.executable, "-m", "worker.dev.simulator", "--port", "0"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["url"].startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, b"", b"")


def test_the_simulator_imports_nothing_of_ours() -> None:
    """It loads only the standard library, aiohttp, orjson and itself."""
    code = (
        "import sys, worker.dev.simulator.app; "
        "ours = [m for m in sys.modules if m.split('.')[0] in ('worker', 'tasks', 'schemas')]; "
        "print([m for m in ours if not m.startswith('worker.dev.simulator')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=30, check=True)
    assert done.stdout.decode().strip() == "['worker', 'worker.dev']"
