"""The audit log: one sign-in a day, and what the control door did to the workspace."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final

from worker.dev.simulator.errors import feature_not_available, problem, rate_limited
from worker.dev.simulator.generate import Record, digest
from worker.dev.simulator.listings import EXTRA
from worker.dev.simulator.validation import query_reader
from worker.dev.simulator.world import Workspace, World

CLASSES: Final[Mapping[str, int]] = {
    "Account Change": 3001,
    "Authentication": 3002,
    "Entity Management": 3004,
    "User Access Management": 3005,
    "Group Management": 3006,
}
# What was done -> activity name, class, activity id (names: official SDK).
ACTIVITIES: Final[Mapping[str, tuple[str, str, int]]] = {
    "member_join": ("Workspace Invitation Accepted", "User Access Management", 1),
    "member_leave": ("Workspace Member Removal", "User Access Management", 2),
    "member_update": ("Workspace Member Update", "User Access Management", 1),
    "group_add": ("Group Creation", "Group Management", 6),
    "group_update": ("Group Update", "Group Management", 99),
    "group_remove": ("Group Deletion", "Group Management", 5),
    "service_account_add": ("Service Account Creation", "Entity Management", 1),
    "service_account_remove": ("Service Account Deletion", "Entity Management", 4),
    "key_add": ("API Key Creation", "Entity Management", 1),
    "key_update": ("API Key Update", "Entity Management", 3),
    "key_remove": ("API Key Deletion", "Entity Management", 4),
}
SIGN_IN: Final = ("Workspace Sign-In", "Authentication", 1)
CATEGORY: Final = ("Identity & Access Management", 3)
DEFAULT_LIMIT: Final = 50
MOST_LIMIT: Final = 100
CALLS_PER_MINUTE: Final = 30
RETENTION_DAYS: Final = 90
MINUTE_S: Final = 60


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """A validated audit query; both times are inclusive, in milliseconds."""

    limit: int
    cursor: str | None
    from_ms: int
    to_ms: int
    actor: str | None
    class_name: str | None
    activity: str | None


def read_audit_query(_: World, query: Mapping[str, str]) -> AuditQuery:
    """Read the query string (official SDK; limits: provider docs 2026).

    Raises:
        Problem: 422.
    """
    reader = query_reader(query)
    limit = reader.integer("limit", required=False, least=1, most=MOST_LIMIT)
    from_ms = reader.integer("time_from_unix_ms", required=False)
    to_ms = reader.integer("time_to_unix_ms", required=False)
    class_name = reader.choice("class_name", tuple(CLASSES))
    reader.finish()
    return AuditQuery(
        limit or DEFAULT_LIMIT,
        query.get("cursor"),
        0 if from_ms is None else from_ms,
        2**62 if to_ms is None else to_ms,
        query.get("actor_uid"),
        class_name,
        query.get("activity_name"),
    )


def admit_audit(workspace: Workspace) -> None:
    """Let at most 30 calls a minute pass, and only the enterprise tier.

    The minute is the real one, since clients really wait for it.

    Raises:
        Problem: 429 (provider docs 2026), or 403 for the plan (official SDK: requires enterprise tier).
    """
    if not workspace.state.tier.startswith("enterprise"):
        raise feature_not_available("Audit logs are only available on the enterprise tier.")
    calls = workspace.audit_calls
    now_s = monotonic()
    calls[:] = [called_s for called_s in calls if called_s > now_s - MINUTE_S]
    if len(calls) >= CALLS_PER_MINUTE:
        raise rate_limited()
    calls.append(now_s)


def _entry(workspace: Workspace, at: datetime, activity: tuple[str, str, int], what: str) -> Record:
    name, class_name, activity_id = activity
    owner = workspace.state.lists.members[workspace.owner_id]
    class_uid = CLASSES[class_name]
    entry: Record = {
        "id": "al_" + digest(workspace.tag, at.isoformat(), what, size=8),
        "time": int(at.timestamp() * 1000),
        "time_dt": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "activity_id": activity_id,
        "activity_name": name,
        "class_name": class_name,
        "class_uid": class_uid,
        "category_name": CATEGORY[0],
        "category_uid": CATEGORY[1],
        "severity_id": 1,
        "status_id": 1,
        "type_uid": class_uid * 100 + activity_id,
        "type_name": f"{class_name}: {name}",
        "message": what,
        "actor": {
            "user": {
                "uid": workspace.owner_id,
                "name": owner["first_name"],
                "type_id": 2,
                "email_addr": owner["email"],
            }
        },
        "device": None,
        "http_request": None,
        "metadata": {},
        "unmapped": {},
    }
    return {**entry, **EXTRA} if workspace.quirks.extra_fields else entry


def _entries(workspace: Workspace, now: datetime) -> list[Record]:
    """List all entries, newest first."""
    found = []
    for serial, done in enumerate(workspace.history):
        activity = ACTIVITIES.get(done["op"])
        if activity is not None:
            at = datetime.fromisoformat(done["at"])
            found.append(_entry(workspace, at, activity, f"{activity[0]} #{serial}"))
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    for days in range(RETENTION_DAYS):
        at = midnight - timedelta(days=days)
        found.append(_entry(workspace, at, SIGN_IN, f"{SIGN_IN[0]} on {at.date()}"))
    return sorted(found, key=lambda entry: (-entry["time"], entry["id"]))


def audit_logs(world: World, workspace: Workspace, asked: AuditQuery) -> dict[str, Any]:
    """Answer one page; the cursor is the id of the last entry seen, so it survives new entries.

    Raises:
        Problem: 400 for an unknown cursor (provider docs 2026).
    """
    wanted = [
        entry
        for entry in _entries(workspace, world.now())
        if asked.from_ms <= entry["time"] <= asked.to_ms
        and asked.actor in (None, entry["actor"]["user"]["uid"])
        and asked.class_name in (None, entry["class_name"])
        and asked.activity in (None, entry["activity_name"])
    ]
    skip = 0
    if asked.cursor is not None:
        ids = [entry["id"] for entry in wanted]
        if asked.cursor not in ids:
            raise problem(400, "invalid_request", "invalid_cursor", "Invalid cursor.", "invalid_cursor")
        skip = ids.index(asked.cursor) + 1
    page = wanted[skip : skip + asked.limit]
    more = skip + asked.limit < len(wanted)
    return {"entries": page, "has_more": more, "next_cursor": page[-1]["id"] if more else None}
