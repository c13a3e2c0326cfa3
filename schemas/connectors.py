"""Connectors, runs and parts: their words and the table of legal moves."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """State of a connector, as screens show it."""

    PENDING = "pending"
    CONNECTED = "connected"
    DEGRADED = "degraded"
    DISCONNECTED = "disconnected"
    PAUSED = "paused"
    DELETED = "deleted"


class StatusReason(StrEnum):
    """Why a connector is not simply connected."""

    KEY_INVALID = "key_invalid"
    ACCOUNT_BLOCKED = "account_blocked"
    SCOPE_MISSING = "scope_missing"
    PLAN_TOO_LOW = "plan_too_low"
    ROLE_OR_IP = "role_or_ip"
    QUOTA = "quota"
    REMOVALS_HELD = "removals_held"
    PAUSED_BY_USER = "paused_by_user"


class Action(StrEnum):
    """What a screen offers the connector's owner."""

    NONE = "none"
    RECONNECT = "reconnect"
    ADD_PERMISSION = "add_permission"
    UPGRADE_PLAN = "upgrade_plan"
    CHECK_ROLE_OR_IP = "check_role_or_ip"
    RELEASE_REMOVALS = "release_removals"


ACTIONS: Final[dict[StatusReason, Action]] = {
    StatusReason.KEY_INVALID: Action.RECONNECT,
    StatusReason.ACCOUNT_BLOCKED: Action.RECONNECT,
    StatusReason.SCOPE_MISSING: Action.ADD_PERMISSION,
    StatusReason.PLAN_TOO_LOW: Action.UPGRADE_PLAN,
    StatusReason.ROLE_OR_IP: Action.CHECK_ROLE_OR_IP,
    StatusReason.QUOTA: Action.UPGRADE_PLAN,
    StatusReason.REMOVALS_HELD: Action.RELEASE_REMOVALS,
    StatusReason.PAUSED_BY_USER: Action.NONE,
}

LIVE: Final = frozenset({Status.PENDING, Status.CONNECTED, Status.DEGRADED})
"""States in which a connector is polled."""

MOVES: Final[dict[Status, frozenset[Status]]] = {
    Status.PENDING: frozenset({Status.CONNECTED, Status.DEGRADED, Status.DISCONNECTED, Status.PAUSED, Status.DELETED}),
    Status.CONNECTED: frozenset({Status.DEGRADED, Status.DISCONNECTED, Status.PAUSED, Status.DELETED}),
    Status.DEGRADED: frozenset({Status.CONNECTED, Status.DISCONNECTED, Status.PAUSED, Status.DELETED}),
    Status.DISCONNECTED: frozenset({Status.CONNECTED, Status.DEGRADED, Status.PAUSED, Status.DELETED}),
    Status.PAUSED: frozenset({Status.PENDING, Status.CONNECTED, Status.DEGRADED, Status.DISCONNECTED, Status.DELETED}),
    Status.DELETED: frozenset(),
}
"""From a status to those it may become. A recovered or resumed connector goes to what its access rows say."""


def may_move(old: Status, new: Status) -> bool:
    """Tell whether `old` may become `new`; staying is no move and always legal."""
    return new is old or new in MOVES[old]


class Dataset(StrEnum):
    """What one kind of request lists; each has its own chain of versions."""

    WORKSPACE = "workspace"
    MEMBERS = "members"
    GROUPS = "groups"
    SERVICE_ACCOUNTS = "service_accounts"
    USAGE_PRODUCT = "usage.product"
    USAGE_MEMBER = "usage.member"
    USAGE_API_KEY = "usage.api_key"

    @property
    def dimension(self) -> str:
        """The usage dimension (`product`, `member`, `api_key`), or an empty string for a directory."""
        return self.value.partition(".")[2]


DIRECTORY: Final = (Dataset.WORKSPACE, Dataset.MEMBERS, Dataset.GROUPS, Dataset.SERVICE_ACCOUNTS)
USAGE: Final = (Dataset.USAGE_PRODUCT, Dataset.USAGE_MEMBER, Dataset.USAGE_API_KEY)


class Access(StrEnum):
    """Whether the key may read a dataset."""

    GRANTED = "granted"
    DENIED = "denied"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"


class RunKind(StrEnum):
    """Kinds of a sync: the first with 90 days, the frequent one, the nightly one diffed against Postgres."""

    BACKFILL = "backfill"
    POLL = "poll"
    RECONCILE = "reconcile"


class RunStatus(StrEnum):
    """State of a run; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    PARTIAL = "partial"
    FAILED = "failed"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class PartStatus(StrEnum):
    """State of a part; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"


REGIONS: Final[dict[str, str]] = {
    "global": "https://api.elevenlabs.io",
    "us": "https://api.us.elevenlabs.io",
    "eu": "https://api.eu.residency.elevenlabs.io",
    "in": "https://api.in.residency.elevenlabs.io",
    "sg": "https://api.sg.residency.elevenlabs.io",
}
"""Base URLs by region (official SDK). Residency regions are isolated: own accounts and keys."""

PERMISSIONS: Final[dict[Dataset, tuple[str, str]]] = {
    Dataset.WORKSPACE: ("user_read", "User: Read"),
    Dataset.MEMBERS: ("workspace_members_read", "Workspace members: Read"),
    Dataset.GROUPS: ("workspace_read", "Workspace: Read"),
    Dataset.SERVICE_ACCOUNTS: ("workspace_read", "Workspace: Read"),
    Dataset.USAGE_PRODUCT: ("workspace_analytics_full_read", "Workspace analytics: Full read"),
    Dataset.USAGE_MEMBER: ("workspace_analytics_full_read", "Workspace analytics: Full read"),
    Dataset.USAGE_API_KEY: ("workspace_analytics_full_read", "Workspace analytics: Full read"),
}
"""The permission a dataset needs, as (wire name, dashboard label). Labels follow the wire names: the provider
publishes none for the two analytics and workspace scopes."""
