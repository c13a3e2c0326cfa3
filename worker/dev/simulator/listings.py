"""The directory on the wire: user, subscription, members, groups, service accounts and their keys."""

from datetime import UTC, datetime
from typing import Any, Final

from worker.dev.simulator.errors import Problem
from worker.dev.simulator.generate import CREATED_UNIX, Record
from worker.dev.simulator.payload import day_text
from worker.dev.simulator.world import Workspace, World

CHARACTER_LIMIT: Final = 2_000_000
# Fields a key gained after 2025 (provider docs of August 2025 lack them).
NEW_KEY_FIELDS: Final = frozenset(
    {
        "hashed_xi_api_key",
        "disable_reason",
        "allowed_ips",
        "third_party_disable_allowed",
        "platform_limits",
        "expires_at_unix",
    }
)
EXTRA: Final = {"x_future_field": {"kind": "unknown", "values": [1, None, "two"]}}


def first_half(size: int) -> int:
    """Tell how many items the first page of a quirkily paginated list holds."""
    return (size + 1) // 2


def _dressed(workspace: Workspace, record: Record) -> Record:
    return {**record, **EXTRA} if workspace.quirks.extra_fields else record


def _next_reset_unix(today: int) -> int:
    year, month, _ = map(int, day_text(today).split("-"))
    return int(datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp())


def _plan(world: World, workspace: Workspace) -> Record:
    today = world.today()
    unknown = workspace.quirks.unknown_enums
    return {
        "tier": workspace.state.tier,
        "character_count": workspace.totals(today).total // 100 + workspace.state.ticks,
        "character_limit": CHARACTER_LIMIT,
        "max_character_limit_extension": None,
        "max_credit_limit_extension": "unlimited",
        "can_extend_character_limit": True,
        "allowed_to_extend_character_limit": True,
        "next_character_count_reset_unix": _next_reset_unix(today),
        "voice_slots_used": 12,
        "professional_voice_slots_used": 1,
        "professional_voice_slots_used_in_workspace": 1,
        "voice_limit": 660,
        "max_voice_add_edits": None,
        "voice_add_edit_counter": 7,
        "professional_voice_limit": 3,
        "can_extend_voice_limit": True,
        "can_use_instant_voice_cloning": True,
        "can_use_professional_voice_cloning": True,
        "currency": "usd",
        "current_overage": {"amount": "0", "currency": "usd"},
        "status": "hibernating" if unknown else "active",
        "billing_period": "lunar_period" if unknown else "monthly_period",
        "character_refresh_period": "monthly_period",
    }


def subscription(world: World, workspace: Workspace) -> Record:
    """Answer `GET /v1/user/subscription` (official SDK); its counter follows this calendar month's usage."""
    invoice = {
        "amount_due_cents": 33_000,
        "subtotal_cents": 33_000,
        "tax_cents": 0,
        "discounts": [],
        "next_payment_attempt_unix": _next_reset_unix(world.today()),
        "payment_intent_statusses": [],
    }
    return _dressed(
        workspace,
        {
            **_plan(world, workspace),
            "next_invoice": invoice,
            "open_invoices": [],
            "has_open_invoices": False,
            "pending_change": None,
        },
    )


def user(world: World, workspace: Workspace) -> Record:
    """Answer `GET /v1/user`: the owner, since access keys are the owner's personal keys (official SDK)."""
    owner = workspace.state.lists.members[workspace.owner_id]
    answer: Record = {
        "user_id": workspace.owner_id,
        "workspace_id": workspace.workspace_id,
        "subscription": _dressed(workspace, _plan(world, workspace)),
        "is_new_user": False,
        "can_use_delayed_payment_methods": False,
        "is_onboarding_completed": True,
        "is_onboarding_checklist_completed": True,
        "show_compliance_terms": False,
        "first_name": owner["first_name"],
        "is_api_key_hashed": True,
        "xi_api_key_preview": None,
        "referral_link_code": None,
        "partnerstack_partner_default_link": None,
        "created_at": CREATED_UNIX,
        "seat_type": owner["seat_type"],
    }
    if workspace.quirks.omit_user_workspace_id:
        del answer["workspace_id"]
    return _dressed(workspace, answer)


def member_records(workspace: Workspace) -> list[Record]:
    """List members as written on the wire, locked ones too, service accounts not (official SDK)."""
    members = list(workspace.state.lists.members.values())
    if workspace.quirks.unknown_enums:
        members = [
            {**record, "seat_type": "workspace_guest_member"} if place % 5 == 1 else record
            for place, record in enumerate(members)
        ]
    return [_dressed(workspace, record) for record in members] if workspace.quirks.extra_fields else members


def members(_: World, workspace: Workspace) -> Any:
    """Answer `GET /v1/workspace/members`, a bare array."""
    records = member_records(workspace)
    if workspace.quirks.paginated:
        page = records[: first_half(len(records))]
        return {"members": page, "has_more": True, "next_cursor": "page2"}
    return records


def group_records(world: World, workspace: Workspace) -> list[Record]:
    """List groups as written on the wire; a group's counter is what its members used this month."""
    by_user = workspace.totals(world.today()).by_user
    permissions = ["teleportation"] if workspace.quirks.unknown_enums else []
    written = []
    for record in workspace.state.lists.groups.values():
        used = sum(by_user[user] for user in record["members"]) if by_user else 0
        wire = {**record, "character_count": used // 100 + workspace.state.ticks}
        if permissions and record["permissions"] is not None:
            wire["permissions"] = record["permissions"] + permissions
        written.append(_dressed(workspace, wire))
    return written


def groups(world: World, workspace: Workspace) -> Any:
    """Answer `GET /v1/workspace/groups`, a map by id (official SDK)."""
    records = group_records(world, workspace)
    if workspace.quirks.paginated:
        page = {record["id"]: record for record in records[: first_half(len(records))]}
        return {**page, "has_more": True, "next_cursor": "page2"}
    return {record["id"]: record for record in records}


def _key(world: World, workspace: Workspace, record: Record) -> Record:
    used = workspace.totals(world.today()).by_key[record["hashed_xi_api_key"]]
    wire = {**record, "character_count": used // 100 + workspace.state.ticks}
    if workspace.quirks.unknown_enums:
        if record["permissions"] is not None:
            wire["permissions"] = [*record["permissions"], "teleportation"]
        if record["disable_reason"] is not None:
            wire["disable_reason"] = "cosmic_rays"
    if workspace.quirks.old_key_shape:
        wire = {name: value for name, value in wire.items() if name not in NEW_KEY_FIELDS}
    return _dressed(workspace, wire)


def account_records(world: World, workspace: Workspace) -> list[Record]:
    """List service accounts as written on the wire, their keys embedded (official SDK)."""
    lists = workspace.state.lists
    keys: dict[str, list[Record]] = {account: [] for account in lists.accounts}
    for record in lists.keys.values():
        keys[record["service_account_user_id"]].append(_key(world, workspace, record))
    written = []
    for account, record in lists.accounts.items():
        shared = [(lists.groups.get(group), level) for group, level in record["sharing"]]
        wire = {
            "service_account_user_id": account,
            "name": record["name"],
            "created_at_unix": record["created_at_unix"],
            "api-keys": keys[account],
            "default_sharing_groups": [
                {
                    "group": {"id": group["id"], "name": group["name"], "members": []},
                    "permission_level": level,
                }
                for group, level in shared
                if group is not None
            ],
        }
        written.append(_dressed(workspace, wire))
    return written


def accounts(world: World, workspace: Workspace) -> Any:
    """Answer `GET /v1/service-accounts` (official SDK)."""
    records = account_records(world, workspace)
    if workspace.quirks.paginated:
        page = records[: first_half(len(records))]
        return {"service-accounts": page, "has_more": True, "next_cursor": "page2"}
    return {"service-accounts": records}


def account_keys(world: World, workspace: Workspace, account: str) -> Any:
    """Answer `GET /v1/service-accounts/{id}/api-keys` (official SDK).

    Raises:
        Problem: 404, there is no such service account.
    """
    lists = workspace.state.lists
    if account not in lists.accounts:
        detail = {
            "type": "not_found",
            "code": "service_account_not_found",
            "message": "Service account not found.",
            "status": "service_account_not_found",
        }
        raise Problem(404, detail)
    keys = [
        _key(world, workspace, record) for record in lists.keys.values() if record["service_account_user_id"] == account
    ]
    if workspace.quirks.paginated:
        return {"api-keys": keys[: first_half(len(keys))], "has_more": True, "next_cursor": "page2"}
    return {"api-keys": keys}
