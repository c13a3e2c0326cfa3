"""What the official SDK's models accept, ours accept, and both read the same."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import pytest
from elevenlabs.types import (
    ComputedUsagePlatformLimit,
    DefaultSharingGroupResponseModel,
    PlatformLimits,
    StoredUsagePlatformLimit,
    SubscriptionResponse,
    WorkspaceAnalyticsQueryResponseModel,
    WorkspaceApiKeyResponseModel,
    WorkspaceGroupResponseModel,
    WorkspaceMemberResponseModel,
    WorkspaceServiceAccountListResponseModel,
    WorkspaceServiceAccountResponseModel,
)
from elevenlabs.types import User as SdkUser
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from schemas import provider

PAIRS: list[tuple[type[Any], type[BaseModel]]] = [
    (provider.User, SdkUser),
    (provider.Subscription, SubscriptionResponse),
    (provider.Member, WorkspaceMemberResponseModel),
    (provider.Group, WorkspaceGroupResponseModel),
    (provider.GroupRef, WorkspaceGroupResponseModel),
    (provider.ServiceAccount, WorkspaceServiceAccountResponseModel),
    (provider.Sharing, DefaultSharingGroupResponseModel),
    (provider.ApiKey, WorkspaceApiKeyResponseModel),
    (provider.PlatformLimits, PlatformLimits),
    (provider.Limit, StoredUsagePlatformLimit),
    (provider.Limit, ComputedUsagePlatformLimit),
    (provider.Tabular, WorkspaceAnalyticsQueryResponseModel),
]


def fields(ours: type[Any]) -> dict[str, FieldInfo]:
    """Give the fields of a model, or of a typed dictionary."""
    if issubclass(ours, BaseModel):
        return ours.model_fields
    return {name: FieldInfo.from_annotation(hint) for name, hint in get_type_hints(ours, include_extras=True).items()}


def wire_name(name: str, field: FieldInfo) -> str:
    return str(field.validation_alias or field.alias or name)


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare by the fields we read, down to the leaves."""
    if isinstance(ours, BaseModel):
        for name in type(ours).model_fields:
            assert_same(getattr(ours, name), getattr(theirs, name))
    elif isinstance(ours, dict):
        for name, our in ours.items():
            assert_same(our, getattr(theirs, name))
    elif isinstance(ours, list):
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    else:
        assert ours == theirs


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


TEXT = st.text(max_size=5)
TEXTS = st.lists(TEXT, max_size=3)
COUNT = st.integers(0, 2**63 - 1)
SECONDS = st.integers(0, 253_402_300_799)
LIMIT = COUNT | st.just("unlimited")

MEMBER = st.fixed_dictionaries(
    {"user_id": TEXT, "email": TEXT, "is_owner": st.booleans(), "is_locked": st.booleans()},
    optional={"first_name": optional(TEXT), "seat_type": optional(TEXT), "new_field": COUNT},
)
GROUP = st.fixed_dictionaries(
    {"id": TEXT, "name": TEXT, "members": TEXTS},
    optional={
        "permissions": optional(TEXTS),
        "group_usage_limit": optional(LIMIT),
        "group_concurrency_limit": optional(LIMIT),
        "character_count": optional(COUNT),
        "scim_group": st.none() | st.fixed_dictionaries({"display_name": TEXT}),
        "scim_frozen": optional(st.booleans()),
    },
)
ONE_LIMIT = st.fixed_dictionaries({}, optional={"limit": optional(COUNT), "usage": optional(COUNT)})
KEY = st.fixed_dictionaries(
    {"name": TEXT, "hint": TEXT, "key_id": TEXT, "service_account_user_id": TEXT, "hashed_xi_api_key": TEXT},
    optional={
        "created_at_unix": optional(SECONDS),
        "is_disabled": optional(st.booleans()),
        "permissions": optional(TEXTS),
        "disable_reason": optional(TEXT),
        "character_limit": optional(COUNT),
        "character_count": optional(COUNT),
        "allowed_ips": optional(TEXTS),
        "third_party_disable_allowed": optional(st.booleans()),
        "platform_limits": optional(
            st.fixed_dictionaries({}, optional=dict.fromkeys(PlatformLimits.model_fields, optional(ONE_LIMIT)))
        ),
        "expires_at_unix": optional(SECONDS),
    },
)
ACCOUNTS = st.fixed_dictionaries(
    {
        "service-accounts": st.lists(
            st.fixed_dictionaries(
                {"service_account_user_id": TEXT, "name": TEXT, "api-keys": st.lists(KEY, max_size=2)},
                optional={
                    "created_at_unix": optional(SECONDS),
                    "default_sharing_groups": optional(
                        st.lists(st.fixed_dictionaries({"group": GROUP, "permission_level": TEXT}), max_size=2)
                    ),
                },
            ),
            max_size=2,
        )
    }
)
CELL = st.none() | TEXT | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
TABLE = st.fixed_dictionaries(
    {
        "columns": TEXTS,
        "column_types": st.lists(st.sampled_from(["String", "Float", "DateTime", "Decimal"]), max_size=3),
        "column_units": st.lists(st.sampled_from([None, "credits", "usd", "chf", ""]), max_size=3),
        "rows": st.lists(st.lists(CELL, max_size=3), max_size=3),
    }
)
USER: dict[str, Any] = {
    "user_id": "sa_31d0",
    "workspace_id": "ws_55",
    "subscription": {
        "tier": "growing_business",
        "character_count": 120_000,
        "character_limit": 2_000_000,
        "max_credit_limit_extension": "unlimited",
        "can_extend_character_limit": True,
        "allowed_to_extend_character_limit": True,
        "voice_slots_used": 1,
        "professional_voice_slots_used": 0,
        "professional_voice_slots_used_in_workspace": 0,
        "voice_limit": 10,
        "voice_add_edit_counter": 0,
        "professional_voice_limit": 1,
        "can_extend_voice_limit": False,
        "can_use_instant_voice_cloning": True,
        "can_use_professional_voice_cloning": True,
        "current_overage": {"amount": "0", "currency": "usd"},
        "status": "active",
        "has_used_starter_coupon_on_account": False,
        "has_used_creator_coupon_on_account": False,
    },
    "is_new_user": False,
    "can_use_delayed_payment_methods": False,
    "is_onboarding_completed": True,
    "is_onboarding_checklist_completed": True,
    "created_at": 1_760_000_000,
    "seat_type": "workspace_admin",
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_we_demand_no_more_than_the_sdk(ours: type[Any], theirs: type[BaseModel]) -> None:
    """Each field we read has a namesake in the SDK, and is required or refuses null only where it does there."""
    known = {wire_name(name, field): field for name, field in theirs.model_fields.items()}
    for name, field in fields(ours).items():
        namesake = known[wire_name(name, field)]
        assert namesake.is_required() or not field.is_required(), name
        if type(None) in get_args(namesake.annotation):
            assert type(None) in get_args(field.annotation), name


def test_user_is_read_as_by_the_sdk() -> None:
    """The user of 2026 is read alike, and the secret that the user of 2025 carried is not read at all."""
    body = json.dumps({**USER, "xi_api_key": "sk_canary"}).encode()
    user = provider.USER.validate_json(body)
    assert_same(user, SdkUser.model_validate_json(body))
    assert "sk_canary" not in repr(user)


@given(st.lists(MEMBER, max_size=3))
def test_members_are_read_as_by_the_sdk(members: list[Any]) -> None:
    """A list of members is read alike."""
    theirs = [WorkspaceMemberResponseModel.model_validate(member) for member in members]
    assert_same(provider.MEMBERS.validate_json(json.dumps(members)), theirs)


@given(st.lists(GROUP, max_size=3))
def test_groups_are_read_as_by_the_sdk(groups: list[Any]) -> None:
    """The values of the map of groups are read alike."""
    theirs = [WorkspaceGroupResponseModel.model_validate(group) for group in groups]
    assert_same(provider.GROUPS.validate_json(json.dumps(groups)), theirs)


@given(ACCOUNTS)
def test_service_accounts_are_read_as_by_the_sdk(answer: dict[str, Any]) -> None:
    """Service accounts with their keys are read alike."""
    theirs = WorkspaceServiceAccountListResponseModel.model_validate(answer).service_accounts
    assert_same(provider.SERVICE_ACCOUNTS.validate_json(json.dumps(answer["service-accounts"])), theirs)


@given(TABLE)
def test_tables_are_read_as_by_the_sdk(table: dict[str, Any]) -> None:
    """A tabular answer is read alike, but for times: the SDK parses them, we keep what was sent."""
    theirs = WorkspaceAnalyticsQueryResponseModel.model_validate(table)
    ours = provider.TABULAR.validate_json(json.dumps(table))
    assert (ours.columns, ours.column_types, ours.column_units) == (
        theirs.columns,
        theirs.column_types,
        theirs.column_units,
    )
    assert ours.rows == table["rows"]


@pytest.mark.parametrize(
    ("adapter", "body"),
    [
        (provider.USER, {"user_id": "u", "subscription": "sk_canary"}),
        (provider.MEMBERS, [{"user_id": "u", "email": ["sk_canary"]}]),
        (provider.GROUPS, [{"id": ["sk_canary"]}]),
        (provider.SERVICE_ACCOUNTS, [{"api-keys": [{"hint": ["sk_canary"]}]}]),
        (provider.TABULAR, {"columns": "sk_canary"}),
    ],
)
def test_validation_errors_quote_nothing(adapter: TypeAdapter[Any], body: Any) -> None:
    """An answer of a wrong shape is refused without a word of it in the error."""
    with pytest.raises(ValidationError) as caught:
        adapter.validate_json(json.dumps(body))
    assert "sk_canary" not in str(caught.value)
