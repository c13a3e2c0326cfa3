"""Made-up rows and events of realistic size, the same for the product and for the floors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid5

from schemas.records import Listing

EVENTS_PER_ENTRY = 500
DIMENSIONS = ("product", "member", "api_key")
_SPACE = UUID("6f9bd2a6-6f0c-4a5e-9d6a-0d5f2e6d3b11")
_PRODUCTS = ("text_to_speech", "speech_to_text", "dubbing", "sound_effects", "music")

MEMBER_FIELDS = ("user_id", "email", "first_name", "seat_type", "is_owner", "is_locked")

UsageRow = tuple[str, UUID, str, date, str, str, str | None, Decimal, int]
MemberRow = tuple[str, UUID, str, str, str, str, bool, bool, int]


@dataclass(frozen=True, slots=True)
class Size:
    """How much: connectors, each with `days` of usage in three dimensions of `keys` keys, and `members`."""

    connectors: int
    days: int = 30
    keys: int = 20
    members: int = 200

    @property
    def usage_rows(self) -> int:
        """The number of usage rows."""
        return self.connectors * len(DIMENSIONS) * self.days * self.keys

    @property
    def member_rows(self) -> int:
        """The number of members."""
        return self.connectors * self.members


def connector_id(number: int) -> UUID:
    """Give the connector's id, always the same."""
    return uuid5(_SPACE, str(number))


def days(size: Size) -> list[date]:
    """List the days, the oldest first."""
    today = datetime.now(UTC).date()
    return [today - timedelta(days=n) for n in reversed(range(size.days))]


def key_name(dimension: str, connector: int, number: int) -> str:
    """Name what used something."""
    if dimension == "product":
        return f"{_PRODUCTS[number % len(_PRODUCTS)]}_{number}"
    if dimension == "member":
        return f"usr_{connector:06x}{number:05x}"
    return uuid5(_SPACE, f"{connector}/{number}").hex * 2


def amount(number: int, day: int, version: int) -> Decimal:
    """Give an amount that differs from version to version."""
    return Decimal((number + 1) * 1237 + day * 311 + version * 17) / 100


def usage_rows(size: Size, version: int) -> Iterator[UsageRow]:
    """Give usage rows as the table has them; each dimension of a day sums up to the same."""
    for connector in range(size.connectors):
        found = connector_id(connector)
        for dimension in DIMENSIONS:
            names = [key_name(dimension, connector, number) for number in range(size.keys)]
            for at, day in enumerate(days(size)):
                for number, name in enumerate(names):
                    used = amount(number, at, version)
                    yield f"tenant-{connector}", found, dimension, day, name, "credits", None, used, version


def member_rows(size: Size, version: int) -> Iterator[MemberRow]:
    """Give members as the table has them."""
    for connector in range(size.connectors):
        found = connector_id(connector)
        for number in range(size.members):
            name = f"usr_{connector:06x}{number:05x}"
            email = f"person.{number}.v{version}@{connector:06x}.example"
            yield (
                f"tenant-{connector}", found, name, email, "Priya", "workspace_member", number == 0, number % 12 == 5,
                version,
            )  # fmt: skip


def listings(size: Size, version: int) -> dict[tuple[UUID, str], Listing]:
    """Give the members as records, by connector and tenant."""
    found: dict[tuple[UUID, str], Listing] = {}
    for tenant, connector, *values, _ in member_rows(size, version):
        found.setdefault((connector, tenant), {})[f"member/{values[0]}"] = dict(zip(MEMBER_FIELDS, values, strict=True))
    return found


def event(number: int) -> dict[str, Any]:
    """Give an event of a changed member as it stands in the stream."""
    after = {
        "user_id": f"usr_{number:011x}",
        "email": f"person.{number}@example.example",
        "first_name": "Priya",
        "seat_type": "workspace_member",
        "is_owner": False,
        "is_locked": False,
    }
    connector = str(connector_id(0))
    return {
        "specversion": "1.0",
        "source": f"/tenants/tenant-0/connectors/{connector}",
        "time": "2026-04-01T00:00:00.123456Z",
        "datacontenttype": "application/json",
        "tenantid": "tenant-0",
        "connectorid": connector,
        "partitionkey": connector,
        "sequence": f"{1_780_000_000_000_000 + number:020d}",
        "correlationid": connector,
        "id": f"member/{after['user_id']}@{number:020d}",
        "type": "io.rollcall.elevenlabs.member.changed.v1",
        "subject": f"member/{after['user_id']}",
        "data": {"op": "c", "before": None, "after": after, "changed": []},
    }
