"""The provider's answers as they stand on the wire: only the fields we read.

What we do not read (counters, secrets, new fields) is skipped unseen, so it can neither break nor leak. Every
enum is an open string: the provider adds values weekly. Optional is what older answers lack or the official
SDK (2.78) calls optional. `*_unix` fields are whole seconds since 1970.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

BigInt = Annotated[int, Field(ge=-(2**63), le=2**63 - 1, description="what a Postgres bigint holds")]
UnixSeconds = Annotated[int, Field(ge=0, le=253_402_300_799, description="up to the year 9999")]


# A validation error must not quote the answer: it holds names and e-mail addresses.
_CONFIG: Final = ConfigDict(extra="ignore", hide_input_in_errors=True)


class _Wire(BaseModel):
    model_config = _CONFIG


class Subscription(_Wire):
    """The part of a subscription that we read, in `/v1/user` and in `/v1/user/subscription`."""

    tier: str


class User(_Wire):
    """`GET /v1/user`. `workspace_id` came in 2026; the 2025 shape also carried the key itself."""

    user_id: str
    workspace_id: str | None = None
    subscription: Subscription


@with_config(_CONFIG)
class Member(TypedDict):
    """One of the bare array of `GET /v1/workspace/members`; its fields and their order are the record's.

    A dictionary, since there are many: to make an object of each takes as long as to validate them.
    """

    user_id: str
    email: str
    first_name: Annotated[str | None, Field(default=None)]
    seat_type: Annotated[str | None, Field(default=None)]
    is_owner: bool
    is_locked: bool


class Group(_Wire):
    """A value of the map of `GET /v1/workspace/groups`. Null limit: none; null permissions: unrestricted."""

    id: str
    name: str
    members: list[str]
    permissions: list[str] | None = None
    group_usage_limit: BigInt | Literal["unlimited"] | None = None


class Limit(_Wire):
    """One platform limit; a null limit is unlimited."""

    limit: BigInt | None = None


class PlatformLimits(_Wire):
    """Limits of a key on Enterprise plans; what is null is not limited for this key."""

    credits: Limit | None = None
    pvc: Limit | None = None
    concurrency: Limit | None = None
    dubbing_concurrency: Limit | None = None
    music_concurrency: Limit | None = None


@with_config(_CONFIG)
class ApiKey(TypedDict):
    """A key of a service account, a dictionary as `Member` is.

    Keys of 2025 lacked the hash and all that follows `permissions`.
    """

    key_id: str
    service_account_user_id: str
    name: str
    hint: str
    hashed_xi_api_key: Annotated[str | None, Field(default=None)]
    created_at_unix: Annotated[UnixSeconds | None, Field(default=None)]
    is_disabled: Annotated[bool | None, Field(default=None)]
    permissions: Annotated[list[str] | None, Field(default=None)]
    disable_reason: Annotated[str | None, Field(default=None)]
    character_limit: Annotated[BigInt | None, Field(default=None)]
    allowed_ips: Annotated[list[str] | None, Field(default=None)]
    third_party_disable_allowed: Annotated[bool | None, Field(default=None)]
    platform_limits: Annotated[PlatformLimits | None, Field(default=None)]
    expires_at_unix: Annotated[UnixSeconds | None, Field(default=None)]


class GroupRef(_Wire):
    """The group of a sharing; the wire embeds it whole, we need to know which."""

    id: str


class Sharing(_Wire):
    """A group that a service account's resources are shared with by default."""

    group: GroupRef
    permission_level: str


class ServiceAccount(_Wire):
    """One of `service-accounts` of `GET /v1/service-accounts`, its keys embedded."""

    service_account_user_id: str
    name: str
    created_at_unix: UnixSeconds | None = None
    api_keys: Annotated[list[ApiKey], Field(validation_alias="api-keys")]
    default_sharing_groups: list[Sharing] | None = None


class Tabular(_Wire):
    """The tabular answer of all analytics queries: columns by position, a cell is any JSON."""

    columns: list[str]
    column_types: list[str]
    column_units: list[str | None]
    rows: list[list[Any]]


USER: Final = TypeAdapter(User)
MEMBERS: Final = TypeAdapter(list[Member], config=ConfigDict(hide_input_in_errors=True))
GROUPS: Final = TypeAdapter(list[Group], config=ConfigDict(hide_input_in_errors=True))
SERVICE_ACCOUNTS: Final = TypeAdapter(list[ServiceAccount], config=ConfigDict(hide_input_in_errors=True))
TABULAR: Final = TypeAdapter(Tabular)

_SUSPECT: Final = (b"\\u0000", b"\\ud", b"\\uD")
_ESCAPE: Final = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<bad>u0000|u[dD][89a-fA-F]..)|.)", re.DOTALL)


def clean(body: bytes) -> bytes:
    r"""Replace what a JSON string may escape but Postgres cannot store: `\u0000` and half surrogate pairs.

    Each becomes U+FFFD, the replacement character. Only escapes can carry them: raw ones are no JSON.
    """
    if b"\\" not in body or not any(escape in body for escape in _SUSPECT):
        return body
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found["bad"] else found[0], body)
