"""Change events: CloudEvents 1.0 in JSON batches on `rollcall:events:{n}`."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from schemas.records import ApiKey, Group, Member, ServiceAccount, UsageDay, Workspace

PREFIX: Final = "io.rollcall.elevenlabs."
MAX_BATCH: Final = 500
"""Most events in one stream entry."""
SEQUENCE_DIGITS: Final = 20


def event_type(what: str) -> str:
    """Give the full type of `member.changed`, `connector.degraded`, ..."""
    return f"{PREFIX}{what}.v1"


SUBJECT_TYPES: Final[dict[str, str]] = {
    kind: event_type(f"{kind if kind != 'usage' else 'usage_day'}.changed")
    for kind in ("workspace", "member", "group", "service_account", "api_key", "usage")
}
"""From the first piece of a record's subject to its event type."""


class Op(StrEnum):
    """What happened to a record: created, updated, deleted, or its state replayed."""

    CREATED = "c"
    UPDATED = "u"
    DELETED = "d"
    REPLAYED = "r"


class _Open(BaseModel):
    """Readers ignore what they do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class RecordChange(_Open):
    """`data` of a record's event."""

    op: Op
    before: Workspace | Member | Group | ServiceAccount | ApiKey | None
    after: Workspace | Member | Group | ServiceAccount | ApiKey | None
    changed: Annotated[list[str], Field(description="names of the fields that differ")]


class UsageDayChange(UsageDay):
    """`data` of `usage_day.changed`: the whole day each time; `op` is c, u, or r in a replay."""

    op: Op = Op.UPDATED


class DatasetAccess(_Open):
    """Access to one dataset, inside a connector announcement."""

    dataset: str
    state: str
    reason: str | None = None
    missing_permission: str | None = None


class ConnectorAnnouncement(_Open):
    """`data` of `connector.*`."""

    status: str
    previous_status: str | None = None
    reason: str | None = None
    action: str = "none"
    access: list[DatasetAccess] = []


class SyncAnnouncement(_Open):
    """`data` of `sync.*`; subject `run/<id>`."""

    run_id: str
    kind: str
    status: str
    parts_total: int = 0
    parts_done: int = 0
    parts_failed: int = 0
    reason: str | None = None


class RemovalsAnnouncement(_Open):
    """`data` of `removals.*`; subject `removals/<hold id>`."""

    hold_id: str
    dataset: str
    known: int
    missing: int
    reason: str | None = None


class ReplayAnnouncement(_Open):
    """`data` of `replay.completed`; subject `replay/<dataset>`. `version` is the one to go on from."""

    dataset: str
    version: int
    records: int


class CloudEvent(_Open):
    """One event. `id` is `<subject>@<sequence>` (an announcement's: its row id), stable over repeats."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: Annotated[str, Field(description="/tenants/<tenant>/connectors/<connector>")]
    type: str
    subject: str
    time: AwareDatetime
    datacontenttype: Literal["application/json"] = "application/json"
    tenantid: str
    connectorid: str
    partitionkey: str
    sequence: Annotated[str, Field(description="zero-padded: compares as text")]
    correlationid: str | None = None
    data: dict[str, Any]


def padded(sequence: int) -> str:
    """Write a sequence so that text order is number order."""
    return f"{sequence:0{SEQUENCE_DIGITS}d}"


def timestamp(at: datetime) -> str:
    """Write an aware UTC datetime as RFC 3339 with a `Z`."""
    return at.isoformat().replace("+00:00", "Z")


def source_of(tenant_id: str, connector_id: str) -> str:
    """Give the CloudEvents source of a connector."""
    return f"/tenants/{tenant_id}/connectors/{connector_id}"
