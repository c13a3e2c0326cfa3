"""Directory answers become records; what cannot be trusted to be whole says so."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schemas import records
from schemas.connectors import Dataset
from schemas.provider import clean
from worker.errors import ContractBroken
from worker.normalize import directory

ANA: dict[str, Any] = {
    "user_id": "usr_1",
    "email": "ana@example.com",
    "first_name": "Ana",
    "seat_type": "workspace_admin",
    "is_owner": True,
    "is_locked": False,
}
BO: dict[str, Any] = {**ANA, "user_id": "usr_2", "email": "bo@example.com", "first_name": None, "is_owner": False}
GROUP: dict[str, Any] = {
    "id": "grp_1",
    "name": "Research",
    "members": ["usr_2", "usr_1", "usr_2"],
    "permissions": ["text_to_speech", "dubbing"],
    "group_usage_limit": 500_000,
    "group_concurrency_limit": "unlimited",
    "character_count": 12_345,
    "scim_group": None,
}
KEY: dict[str, Any] = {
    "name": "ci-prod",
    "hint": "9f3c",
    "key_id": "key_1",
    "service_account_user_id": "sa_1",
    "created_at_unix": 1_760_000_100,
    "is_disabled": True,
    "permissions": ["voices_read", "dubbing_read", "voices_read"],
    "disable_reason": "exposed_publicly",
    "character_limit": 100_000,
    "character_count": 4_211,
    "hashed_xi_api_key": "5b0e",
    "allowed_ips": ["203.0.113.0/24", "198.51.100.7/32"],
    "third_party_disable_allowed": True,
    "platform_limits": {"credits": {"limit": 5, "usage": 4}, "pvc": {"limit": None}, "concurrency": None},
    "expires_at_unix": 1_767_000_000,
}
OLD_KEY: dict[str, Any] = {
    "name": "old",
    "hint": "0000",
    "key_id": "key_0",
    "service_account_user_id": "sa_1",
    "created_at_unix": None,
    "permissions": None,
    "character_limit": None,
}
ACCOUNT: dict[str, Any] = {
    "service_account_user_id": "sa_1",
    "name": "narrator",
    "created_at_unix": 1_760_000_000,
    "api-keys": [KEY, OLD_KEY],
    "default_sharing_groups": [
        {"group": {"id": "grp_2", "name": "B", "members": []}, "permission_level": "viewer"},
        {"group": {"id": "grp_1", "name": "A", "members": []}, "permission_level": "admin"},
    ],
}


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def listed(dataset: Dataset, value: Any) -> records.Listing:
    found = directory(dataset, body(value))
    assert found.incomplete is None
    return found.records


def test_workspace_takes_id_and_plan() -> None:
    """A user answer gives the workspace's id and plan and nothing else of it."""
    user = {
        "user_id": "u",
        "workspace_id": "ws_1",
        "subscription": {"tier": "pro"},
        "xi_api_key": "sk_canary",
    }
    assert listed(Dataset.WORKSPACE, user) == {"workspace": {"workspace_id": "ws_1", "plan": "pro"}}


def test_workspace_of_2025_has_no_id() -> None:
    """A user answer of 2025 lacks the workspace's id."""
    user = {"user_id": "u", "subscription": {"tier": "free"}}
    assert listed(Dataset.WORKSPACE, user) == {"workspace": {"workspace_id": None, "plan": "free"}}


def test_members_become_records() -> None:
    """A member's record has its wire fields, whatever else is sent with it."""
    found = listed(Dataset.MEMBERS, [{**ANA, "last_active": 5}, BO])
    assert found == {"member/usr_1": ANA, "member/usr_2": BO}


def test_member_may_lack_what_is_optional() -> None:
    """A member without name and seat has nulls, and an unknown seat is kept."""
    bare = {name: value for name, value in ANA.items() if name not in ("first_name", "seat_type")}
    found = listed(Dataset.MEMBERS, [bare, {**BO, "seat_type": "workspace_robot"}])
    assert found["member/usr_1"] == {**ANA, "first_name": None, "seat_type": None}
    assert found["member/usr_2"]["seat_type"] == "workspace_robot"


def test_group_becomes_record() -> None:
    """A group is known by the id inside it; its sets are sorted, its counter is left out."""
    assert listed(Dataset.GROUPS, {"any": GROUP}) == {
        "group/grp_1": {
            "group_id": "grp_1",
            "name": "Research",
            "member_ids": ["usr_1", "usr_2"],
            "permissions": ["dubbing", "text_to_speech"],
            "usage_limit": "500000",
        }
    }


def test_groups_may_be_array_or_empty() -> None:
    """Groups as an array are the same groups, and no group at all is a whole listing."""
    assert listed(Dataset.GROUPS, [GROUP]) == listed(Dataset.GROUPS, {"grp_1": GROUP})
    assert listed(Dataset.GROUPS, {}) == {}


@pytest.mark.parametrize(("wire", "record"), [(0, "0"), ("unlimited", "unlimited"), (None, None), ("700", "700")])
def test_group_limit_is_text(wire: object, record: str | None) -> None:
    """A group's limit is digits, `unlimited` or null."""
    found = listed(Dataset.GROUPS, {"g": {**GROUP, "group_usage_limit": wire}})
    assert found["group/grp_1"]["usage_limit"] == record


def test_null_permissions_are_not_an_empty_list() -> None:
    """Null permissions mean unrestricted and stay null; an empty list stays empty."""
    found = listed(Dataset.GROUPS, [{**GROUP, "permissions": None}, {**GROUP, "id": "grp_2", "permissions": []}])
    assert [record["permissions"] for record in found.values()] == [None, []]


def test_service_account_and_its_keys_become_records() -> None:
    """An account and its keys are records of their own, without counters."""
    assert listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [ACCOUNT]}) == {
        "service_account/sa_1": {
            "service_account_id": "sa_1",
            "name": "narrator",
            "created_at": "2025-10-09T08:53:20Z",
            "sharing": [
                {"group_id": "grp_1", "permission_level": "admin"},
                {"group_id": "grp_2", "permission_level": "viewer"},
            ],
        },
        "api_key/key_1": {
            "key_id": "key_1",
            "service_account_id": "sa_1",
            "name": "ci-prod",
            "hint": "9f3c",
            "key_hash": "5b0e",
            "permissions": ["dubbing_read", "voices_read"],
            "created_at": "2025-10-09T08:55:00Z",
            "expires_at": "2025-12-29T09:20:00Z",
            "is_disabled": True,
            "disable_reason": "exposed_publicly",
            "character_limit": 100_000,
            "allowed_ips": ["198.51.100.7/32", "203.0.113.0/24"],
            "third_party_disable_allowed": True,
            "platform_limits": {"credits": 5, "pvc": None},
        },
        "api_key/key_0": {
            "key_id": "key_0",
            "service_account_id": "sa_1",
            "name": "old",
            "hint": "0000",
            "key_hash": None,
            "permissions": None,
            "created_at": None,
            "expires_at": None,
            "is_disabled": False,
            "disable_reason": None,
            "character_limit": None,
            "allowed_ips": None,
            "third_party_disable_allowed": None,
            "platform_limits": None,
        },
    }


def test_sharing_is_sorted_by_group() -> None:
    """The groups an account shares with stand in order, each once."""
    groups = [{"group": {"id": f"grp_{n}"}, "permission_level": "viewer"} for n in (7, 3, 9, 1, 8, 3, 5)]
    found = listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [{**ACCOUNT, "default_sharing_groups": groups}]})
    sharing = found["service_account/sa_1"]["sharing"]
    assert [one["group_id"] for one in sharing] == ["grp_1", "grp_3", "grp_5", "grp_7", "grp_8", "grp_9"]


def test_counters_are_no_part_of_records() -> None:
    """Usage so far moves with every call and changes no record."""
    used = {
        **KEY,
        "character_count": 9_999,
        "platform_limits": {"credits": {"limit": 5, "usage": 5}, "pvc": {"limit": None}},
    }
    before = listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [ACCOUNT]})
    after = listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [{**ACCOUNT, "api-keys": [used, OLD_KEY]}]})
    assert before == after


@pytest.mark.parametrize(
    ("dataset", "value", "models"),
    [
        (
            Dataset.WORKSPACE,
            {"user_id": "u", "subscription": {"tier": "pro"}},
            {"workspace": records.Workspace},
        ),
        (Dataset.MEMBERS, [dict(reversed(ANA.items()))], {"member": records.Member}),
        (Dataset.GROUPS, {"grp_1": GROUP}, {"group": records.Group}),
        (
            Dataset.SERVICE_ACCOUNTS,
            {"service-accounts": [ACCOUNT]},
            {"service_account": records.ServiceAccount, "api_key": records.ApiKey},
        ),
    ],
)
def test_records_have_their_published_fields(
    dataset: Dataset, value: Any, models: dict[str, type[records._Record]]
) -> None:
    """A record has exactly the fields of its published shape, in that order, whatever the wire's order."""
    for subject, record in listed(dataset, value).items():
        model = models[subject.partition("/")[0]]
        assert list(record) == list(model.model_fields)
        assert model.model_validate(record).model_dump() == record


@pytest.mark.parametrize("members", [[], [BO]])
def test_members_without_owner_are_incomplete(members: list[Any]) -> None:
    """A workspace has an owner, so a list without one is not the whole list."""
    found = directory(Dataset.MEMBERS, body(members))
    assert (len(found.records), found.incomplete) == (len(members), "no_owner")


def test_subject_listed_twice_is_incomplete() -> None:
    """A list that names somebody twice moved while it was read; the last copy counts."""
    twice = directory(Dataset.MEMBERS, body([ANA, BO, ANA]))
    assert (twice.records, twice.incomplete) == ({"member/usr_1": ANA, "member/usr_2": BO}, "duplicated")
    moved = directory(Dataset.MEMBERS, body([ANA, BO, {**BO, "is_locked": True}]))
    assert (moved.records["member/usr_2"]["is_locked"], moved.incomplete) == (True, "duplicated")


@pytest.mark.parametrize(
    ("dataset", "value", "count"),
    [
        (Dataset.MEMBERS, {"members": [ANA, BO], "has_more": True}, 2),
        (Dataset.MEMBERS, {"members": [ANA, BO]}, 2),
        (Dataset.MEMBERS, {"items": [ANA], "next_cursor": None}, 1),
        (Dataset.MEMBERS, {"members": [ANA], "errors": [], "has_more": False}, 1),
        (Dataset.GROUPS, {"grp_1": GROUP, "has_more": False}, 1),
        (Dataset.GROUPS, {"groups": [GROUP]}, 1),
        (Dataset.GROUPS, {"groups": [GROUP], "next_cursor": "c", "total": 9}, 1),
        (Dataset.SERVICE_ACCOUNTS, {"service-accounts": [ACCOUNT], "next_page_token": "c"}, 3),
        (Dataset.SERVICE_ACCOUNTS, {"accounts": [ACCOUNT], "has_more": True}, 3),
    ],
)
def test_paged_answers_are_incomplete(dataset: Dataset, value: Any, count: int) -> None:
    """A listing that shows marks of paging may be page one: its records count, its gaps do not."""
    found = directory(dataset, body(value))
    assert (len(found.records), found.incomplete) == (count, "paginated")


@pytest.mark.parametrize(
    ("dataset", "value", "path"),
    [
        (Dataset.WORKSPACE, [], "top: "),
        (Dataset.WORKSPACE, {"user_id": "u"}, "subscription: Field required"),
        (Dataset.WORKSPACE, {"user_id": "u", "subscription": {"tier": 5}}, "subscription.tier"),
        (Dataset.MEMBERS, {"has_more": True}, "listing"),
        (Dataset.MEMBERS, {"a": [ANA], "b": [BO], "has_more": True}, "listing"),
        (Dataset.MEMBERS, "nobody", "listing"),
        (Dataset.MEMBERS, None, "listing"),
        (Dataset.MEMBERS, [ANA, {**BO, "email": 7}], "[1].email"),
        (Dataset.MEMBERS, [ANA, "bo@example.com"], "[1]"),
        (Dataset.GROUPS, {"ana@example.com": {**GROUP, "members": ["usr_1", 2]}}, "[0].members[1]"),
        (Dataset.GROUPS, {"grp_1": {**GROUP, "group_usage_limit": "plenty"}}, "[0].group_usage_limit"),
        (Dataset.GROUPS, {"grp_1": {**GROUP, "group_usage_limit": 2**63}}, "[0].group_usage_limit"),
        (Dataset.SERVICE_ACCOUNTS, [ACCOUNT], "listing"),
        (Dataset.SERVICE_ACCOUNTS, {"service-accounts": [{**ACCOUNT, "api-keys": None}]}, "[0].api-keys"),
        (
            Dataset.SERVICE_ACCOUNTS,
            {"service-accounts": [{**ACCOUNT, "api-keys": [{**KEY, "character_limit": 2**63}]}]},
            "[0].api-keys[0].character_limit",
        ),
        (
            Dataset.SERVICE_ACCOUNTS,
            {"service-accounts": [{**ACCOUNT, "api-keys": [{**KEY, "character_limit": 10**30}]}]},
            "[0].api-keys[0].character_limit",
        ),
        (
            Dataset.SERVICE_ACCOUNTS,
            {"service-accounts": [{**ACCOUNT, "created_at_unix": 1_760_000_000_000}]},
            "[0].created_at_unix",
        ),
    ],
)
def test_unknown_shape_breaks_the_contract(dataset: Dataset, value: Any, path: str) -> None:
    """An unknown shape is refused whole, and the message names the first bad field."""
    with pytest.raises(ContractBroken) as caught:
        directory(dataset, body(value))
    assert caught.value.reason == "schema"
    assert path in caught.value.message
    assert dataset.value in caught.value.message


@pytest.mark.parametrize("broken", [b"", b"[{", b"<html>ana@example.com</html>", b'["\xff"]', b"[" * 5000])
def test_no_json_breaks_the_contract(broken: bytes) -> None:
    """A body that is no JSON is refused."""
    with pytest.raises(ContractBroken, match="not JSON"):
        directory(Dataset.MEMBERS, broken)


@pytest.mark.parametrize(
    "broken",
    [
        body([{**ANA, "is_owner": "ana@example.com"}]),
        body({"ana@example.com": ["ana@example.com"], "b": ["ana@example.com"]}),
        b'[{"email": "ana@example.com", ',
    ],
)
def test_errors_quote_nobody(broken: bytes) -> None:
    """Neither an error's message nor its traceback nor what it hangs on quotes the body."""
    with pytest.raises(ContractBroken) as caught:
        directory(Dataset.MEMBERS, broken)
    assert "ana@" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_text_that_postgres_refuses_is_replaced() -> None:
    """NUL and half surrogate pairs become U+FFFD; whole pairs and escaped backslashes stay."""
    text = rb'"a\u0000b \ud83d\ude00 \uD83D \udc00\u0041 \\u0000 \\\u0000 \n"'
    assert json.loads(clean(text)) == "a\ufffdb \N{GRINNING FACE} \ufffd \ufffdA \\u0000 \\\ufffd \n"
    found = directory(Dataset.MEMBERS, body([{**ANA, "first_name": "A\0na \ud800"}]))
    assert found.records["member/usr_1"]["first_name"] == "A\ufffdna \ufffd"


@given(st.text(st.characters()))
def test_cleaning_replaces_nothing_else(text: str) -> None:
    """Cleaning changes just the characters that cannot be stored, one by one."""
    stored = "".join("\ufffd" if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in text)
    escaped = json.dumps(text).encode()
    assume(json.loads(escaped) == text)  # two halves side by side are one character to JSON
    assert json.loads(clean(escaped)) == stored


@given(st.permutations(ACCOUNT["api-keys"]), st.permutations(GROUP["members"]))
def test_order_on_the_wire_is_no_change(keys: list[Any], members: list[str]) -> None:
    """The same listing in another order gives equal records."""
    accounts = listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [{**ACCOUNT, "api-keys": keys}]})
    assert accounts == listed(Dataset.SERVICE_ACCOUNTS, {"service-accounts": [ACCOUNT]})
    groups = listed(Dataset.GROUPS, [{**GROUP, "members": members}])
    assert groups == listed(Dataset.GROUPS, [GROUP])
