"""The permission matrix: what an answer says of a key, and what its owner can do about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from schemas.connectors import PERMISSIONS, Access, Action, Dataset, StatusReason
from worker.elevenlabs.protocol import Verdict
from worker.plan import AccessRow
from worker.verdict import DOUBTS, access_after

_LABELS: Final = dict(PERMISSIONS.values())
_REMEDIES: Final[dict[str, tuple[Action, str]]] = {
    StatusReason.SCOPE_MISSING: (Action.ADD_PERMISSION, "Add the permission to the key"),
    StatusReason.PLAN_TOO_LOW: (Action.UPGRADE_PLAN, "The workspace's plan does not include it: upgrade the plan"),
    StatusReason.QUOTA: (Action.UPGRADE_PLAN, "The quota is used up: wait for its renewal, or upgrade the plan"),
    StatusReason.ROLE_OR_IP: (
        Action.CHECK_ROLE_OR_IP,
        "Make the key's owner a workspace admin, and see that the key's IP rules allow this address",
    ),
}


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether the key may read a dataset, and what to do if not.

    `missing` are permissions as (wire name, dashboard label); `action` is what the owner is offered.
    """

    dataset: Dataset
    state: Access
    reason: str | None = None
    missing: tuple[tuple[str, str], ...] = ()
    action: Action = Action.NONE
    advice: str = ""


def judge(dataset: Dataset, verdict: Verdict, *, now: datetime) -> Checked:
    """Tell what an answer to a question for `dataset` says of the key."""
    row = access_after(AccessRow(dataset), verdict, now=now)
    names = (row.missing_permission or "").split(",") if row.missing_permission else []
    missing = tuple((name, _LABELS.get(name, name)) for name in names)
    if row.state is Access.GRANTED:
        return Checked(dataset, row.state)
    if row.state is Access.UNKNOWN:
        if verdict.finding in DOUBTS:
            return Checked(dataset, row.state, verdict.reason, (), Action.RECONNECT, "Reconnect with a valid key")
        return Checked(dataset, row.state, verdict.reason, (), Action.NONE, f"Try again later: {verdict.message}")
    action, advice = _REMEDIES.get(row.reason or "", (Action.NONE, "Nothing to do: the provider does not offer it"))
    if missing:
        advice = "Add to the key: " + ", ".join(f"{label} ({name})" for name, label in missing)
    return Checked(dataset, row.state, row.reason, missing, action, advice)
