"""The official SDK reads every simulator endpoint in use, into its own types."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from elevenlabs import AsyncElevenLabs, ElevenLabs
from elevenlabs.core.api_error import ApiError
from elevenlabs.core.request_options import RequestOptions
from elevenlabs.errors import UnprocessableEntityError
from elevenlabs.types import (
    Subscription,
    UsageCharactersResponseModel,
    User,
    WorkspaceAnalyticsQueryResponseModel,
    WorkspaceApiKeyResponseModel,
    WorkspaceAuditLogsPageResponse,
    WorkspaceGroupResponseModel,
    WorkspaceMemberResponseModel,
    WorkspaceServiceAccountResponseModel,
)

from tests.fixtures.simulator import Simulator, start_simulator

NOW = "2026-04-20T12:00:00Z"
START_MS, END_MS = 1_776_384_000_000, 1_776_729_599_999  # 2026-04-17 to the end of 2026-04-20
DAY_S = 86_400
DAYS = {"2026-04-17", "2026-04-18", "2026-04-19", "2026-04-20"}
# A retry of the SDK would only hide what it was answered.
ONCE = RequestOptions(max_retries=0)


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with start_simulator(tmp_path_factory.mktemp("sdk"), seed=3) as started:
        started.clock(NOW)
        yield started


@pytest.fixture
def key(sim: Simulator) -> str:
    """The access key of a fresh workspace `sdk`."""
    secret: str = sim.workspace("sdk", tier="enterprise")["api_key"]
    return secret


@pytest.fixture
def client(sim: Simulator, key: str) -> Iterator[ElevenLabs]:
    made = ElevenLabs(api_key=key, base_url=sim.url, timeout=10)
    yield made
    made._client_wrapper.httpx_client.httpx_client.close()


def totals(table: WorkspaceAnalyticsQueryResponseModel, group: str, measure: str) -> dict[str, dict[str, Decimal]]:
    """Sum a table the SDK read: {day: {key: amount}}, its times parsed by the SDK."""
    at, name, amount = (table.columns.index(column) for column in ("timestamp", group, measure))
    found: dict[str, dict[str, Decimal]] = {}
    for row in table.rows:
        time: Any = row[at]
        # The SDK tries str first, so a time stays the text it was.
        found.setdefault(str(time)[:10], {})[str(row[name] or "")] = Decimal(str(row[amount]))
    return found


def true_totals(truth: dict[str, Any], dimension: str, unit: str) -> dict[str, dict[str, Decimal]]:
    """The simulator's own sums in the same form."""
    days = truth["usage"][dimension]
    return {day: {key: Decimal(units[unit]) for key, units in keys.items()} for day, keys in days.items()}


def test_user_and_subscription_are_read(sim: Simulator, client: ElevenLabs) -> None:
    """The user names its workspace; both subscriptions agree and have every required field."""
    user = client.user.get()
    subscription = client.user.subscription.get()
    assert isinstance(user, User)
    assert isinstance(subscription, Subscription)
    assert user.workspace_id == sim.truth("sdk")["workspace"]["workspace_id"]
    assert user.subscription.character_count == subscription.character_count
    for model in (user, user.subscription, subscription):
        assert_complete(model)


def test_members_are_read(sim: Simulator, client: ElevenLabs) -> None:
    """Every member becomes a typed record equal to the truth."""
    members = client.workspace.members.list()
    assert all(isinstance(member, WorkspaceMemberResponseModel) for member in members)
    for member, true in zip(members, sim.truth("sdk")["members"], strict=True):
        assert_complete(member)
        assert member.model_dump() == true


def test_groups_are_read(sim: Simulator, client: ElevenLabs) -> None:
    """Groups come as a map by id, with limits that are a number, a word or nothing."""
    groups = client.workspace.groups.list()
    assert all(isinstance(group, WorkspaceGroupResponseModel) for group in groups.values())
    assert [group.model_dump() for group in groups.values()] == sim.truth("sdk")["groups"]
    assert {group.group_usage_limit for group in groups.values()} == {500_000, "unlimited", None}
    assert set(groups) == {group.id for group in groups.values()}


def test_service_accounts_and_keys_are_read(sim: Simulator, client: ElevenLabs) -> None:
    """The hyphenated names are understood, and one account's keys are those embedded in the list."""
    accounts = client.service_accounts.list().service_accounts
    assert len(accounts) == len(sim.truth("sdk")["service_accounts"]) == 2
    for account in accounts:
        assert isinstance(account, WorkspaceServiceAccountResponseModel)
        alone = client.service_accounts.api_keys.list(account.service_account_user_id).api_keys
        assert alone == account.api_keys
        assert all(isinstance(one, WorkspaceApiKeyResponseModel) for one in alone)
        for one in alone:
            assert_complete(one)
    sharing = accounts[0].default_sharing_groups
    assert sharing is not None
    assert sharing[0].permission_level == "viewer"


def test_credit_usage_is_read(sim: Simulator, client: ElevenLabs) -> None:
    """The three groupings of the credit query equal the truth."""
    truth = sim.truth("sdk", "2026-04-17", "2026-04-20")
    groups = {"product": "product_type", "member": "user_id", "api_key": "hashed_xi_api_key"}
    for dimension, group in groups.items():
        table = client.workspace.usage.get_usage_by_product_over_time(
            start_time=START_MS, end_time=END_MS, interval_seconds=DAY_S, group_by=[group]
        )
        assert isinstance(table, WorkspaceAnalyticsQueryResponseModel)
        found = totals(table, group, "credits_used")
        assert set(found) == DAYS
        assert found == true_totals(truth, dimension, "credits")
        assert "credits" in table.column_units


def test_cost_usage_is_read(sim: Simulator) -> None:
    """The cost query of a workspace billed by cost equals the truth; the credit query refuses."""
    key = sim.workspace("sdk-cost", mode="cost")["api_key"]
    client = ElevenLabs(api_key=key, base_url=sim.url, timeout=10)
    table = client.workspace.usage.get_usage(
        start_time=START_MS, end_time=END_MS, interval_seconds=DAY_S, group_by=["product_type"]
    )
    truth = sim.truth("sdk-cost", "2026-04-17", "2026-04-20")
    assert totals(table, "product_type", "total_cost") == true_totals(truth, "product", "usd")
    assert totals(table, "product_type", "total_charge_count") == true_totals(truth, "product", "charge_count")
    with pytest.raises(ApiError) as refused:
        client.workspace.usage.get_usage_by_product_over_time(start_time=START_MS, end_time=END_MS)
    assert refused.value.status_code == 400
    client._client_wrapper.httpx_client.httpx_client.close()


def test_requests_audit_logs_and_character_stats_are_read(client: ElevenLabs) -> None:
    """The optional endpoints are typed too."""
    requests = client.workspace.analytics.requests.get(start_time=START_MS, end_time=END_MS, limit=5)
    assert isinstance(requests, WorkspaceAnalyticsQueryResponseModel)
    assert len(requests.rows) == 5
    page = client.workspace.audit_logs.list(limit=3, class_name="Authentication")
    assert isinstance(page, WorkspaceAuditLogsPageResponse)
    assert page.has_more
    older = client.workspace.audit_logs.list(limit=3, cursor=page.next_cursor, class_name="Authentication")
    assert {entry.id for entry in older.entries}.isdisjoint(entry.id for entry in page.entries)
    assert page.entries[0].actor.user is not None
    stats = client.usage.get(
        start_unix=START_MS, end_unix=END_MS, include_workspace_metrics=True, breakdown_type="product_type"
    )
    assert isinstance(stats, UsageCharactersResponseModel)
    assert {len(series) for series in stats.usage.values()} == {len(stats.time)} == {4}


def test_errors_reach_the_sdk_as_its_own(sim: Simulator, client: ElevenLabs, key: str) -> None:
    """422, a missing scope and a dead key become the SDK's errors with the body kept."""
    with pytest.raises(UnprocessableEntityError) as invalid:
        client.workspace.usage.get_usage_by_product_over_time(start_time=1, end_time=1)
    assert invalid.value.body["detail"][0]["loc"] == ["body", "start_time"]
    sim.scopes("sdk", key, ["user_read"])
    with pytest.raises(ApiError) as narrow:
        client.workspace.members.list()
    assert "workspace_members_read" in narrow.value.body["detail"]["message"]
    sim.kill("sdk", key)
    with pytest.raises(ApiError) as dead:
        client.user.get()
    assert (dead.value.status_code, dead.value.body["detail"]["status"]) == (401, "invalid_api_key")
    assert dead.value.headers is not None
    assert dead.value.headers["x-trace-id"] == dead.value.body["detail"]["request_id"]


def test_the_sdk_retries_a_429_of_the_simulator(sim: Simulator, client: ElevenLabs) -> None:
    """Retry-After is understood: one refusal, one repeat, one answer."""
    sim.faults("sdk", {"kind": "rate429", "times": 1, "retry_after": 0.01})
    sim.reset_stats()
    assert client.workspace.members.list()
    assert sim.stats()["statuses"] == {"200": 1, "429": 1}
    sim.faults("sdk", {"kind": "s503", "times": 1})
    with pytest.raises(ApiError):
        client.workspace.members.list(request_options=ONCE)


def test_the_sdk_reads_every_quirk_it_claims_to_accept(sim: Simulator, client: ElevenLabs) -> None:
    """Unknown enums and fields, string numbers and epoch times pass the SDK's open models."""
    sim.quirks("sdk", extra_fields=True, unknown_enums=True, string_numbers=True, time_form="epoch_ms", gzip=True)
    assert "workspace_guest_member" in {member.seat_type for member in client.workspace.members.list()}
    assert client.service_accounts.list().service_accounts
    table = client.workspace.usage.get_usage_by_product_over_time(
        start_time=START_MS, end_time=END_MS, interval_seconds=DAY_S
    )
    assert "x_future_column" in table.columns


async def test_the_asynchronous_client_reads_the_same(sim: Simulator, client: ElevenLabs, key: str) -> None:
    """Both clients of the SDK agree."""
    other = AsyncElevenLabs(api_key=key, base_url=sim.url, timeout=10)
    assert await other.user.get() == client.user.get()
    assert await other.workspace.members.list() == client.workspace.members.list()
    await other._client_wrapper.httpx_client.httpx_client.aclose()


def assert_complete(model: Any) -> None:
    """The SDK does not validate: a required field the wire left out is simply None, and must not be."""
    required = {name for name, field in type(model).model_fields.items() if field.is_required()}
    assert required <= model.model_fields_set
    assert not model.model_extra
