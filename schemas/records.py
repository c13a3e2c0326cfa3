"""Records: normalized entities as they stand in events (`before`, `after`) and, by column, in Postgres.

A record's fields are its identity for change detection; volatile counters (credits used so far) are left out.
Inside Rollcall a record is a plain JSON object of this shape (`Record`), keyed in a listing by its event
subject; these models define and publish the shape.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Record: TypeAlias = dict[str, Any]
"""One record as a JSON object of one of the shapes below."""

Listing: TypeAlias = dict[str, Record]
"""A dataset's records by subject (`member/usr_1`, `usage/product/2026-04-01`)."""

Timestamp = Annotated[str, Field(description="RFC 3339, UTC, whole seconds: 2026-04-01T00:00:00Z")]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="a UTC day")]
Amount = Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?$", description="a decimal number as a string")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Workspace(_Record):
    """Subject `workspace`."""

    workspace_id: str | None
    plan: str | None


class Member(_Record):
    """Subject `member/<user_id>`."""

    user_id: str
    email: str | None
    first_name: str | None
    seat_type: str | None
    is_owner: bool
    is_locked: bool


class Group(_Record):
    """Subject `group/<group_id>`. `member_ids` and `permissions` are sorted; null: unrestricted."""

    group_id: str
    name: str
    member_ids: list[str]
    permissions: list[str] | None
    usage_limit: Annotated[str | None, Field(description="monthly credits as digits, `unlimited`, or null")]


class ServiceAccount(_Record):
    """Subject `service_account/<service_account_id>`. `sharing` is sorted by group."""

    service_account_id: str
    name: str
    created_at: Timestamp | None
    sharing: Annotated[list[dict[str, str]], Field(description="[{group_id, permission_level}]")]


class ApiKey(_Record):
    """Subject `api_key/<key_id>`. Null `permissions`: unrestricted. `platform_limits` holds limits only."""

    key_id: str
    service_account_id: str
    name: str
    hint: str | None
    key_hash: str | None
    permissions: list[str] | None
    created_at: Timestamp | None
    expires_at: Timestamp | None
    is_disabled: bool
    disable_reason: str | None
    character_limit: int | None
    allowed_ips: list[str] | None
    third_party_disable_allowed: bool | None
    platform_limits: dict[str, int | None] | None


class UsageRow(_Record):
    """One bucket of a usage day; `key` '' is usage that nobody is named for."""

    key: str
    label: str | None
    unit: str
    amount: Amount


class UsageDay(_Record):
    """Subject `usage/<dimension>/<day>`: the whole day each time, rows sorted by (key, unit), no zeros."""

    dimension: str
    bucket_start: Day
    interval_s: int
    settled: Annotated[bool, Field(description="the day has left the look-back and is no longer polled")]
    rows: list[UsageRow]
    totals: dict[str, Amount]
