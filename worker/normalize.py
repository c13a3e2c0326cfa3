"""From the provider's directory answers to records.

A listing is complete or it says why not: removals are drawn from complete listings only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from schemas import provider
from schemas.connectors import Dataset
from schemas.events import timestamp
from schemas.records import Listing, Record
from worker.errors import ContractBroken

_T = TypeVar("_T")
_Pair = tuple[str, Record]

_PAGING: Final = frozenset({"has_more", "next_cursor", "next_page_token"})
"""Marks of a paged answer in the official SDK. No directory listing has them today; if one appears, what we
hold may be page one."""

_PIECE: Final = 1_000

_WRAPPERS: Final = {
    Dataset.MEMBERS: "members",
    Dataset.GROUPS: "groups",
    Dataset.SERVICE_ACCOUNTS: "service-accounts",
}


@dataclass(frozen=True, slots=True)
class Listed:
    """A dataset's records as one answer listed them.

    `incomplete` is None when the answer is the whole listing, else the reason it may not be: `paginated`,
    `duplicated` (a subject is listed twice: the list moved while it was read), `no_owner` (a workspace always
    has one among its members, so somebody is missing).
    """

    records: Listing
    incomplete: str | None


def directory(dataset: Dataset, body: bytes) -> Listed:
    """Turn the 2xx body of a directory request into records by subject.

    Of copies of a subject the last one counts.

    Raises:
        ContractBroken: `schema`, when the body is no JSON or not of the known shape; the message names the
            first bad field and quotes nothing of the body.

    """
    found = _json(dataset, body)
    if dataset is Dataset.WORKSPACE:
        user = _valid(dataset, provider.USER, found)
        record = {"workspace_id": user.workspace_id, "plan": user.subscription.tier}
        return Listed({"workspace": record}, None)
    items, paginated = _items(dataset, found)
    del found
    records: dict[str, Record] = {}
    listed = 0
    for subject, record in _pairs(dataset, items):
        records[subject] = record
        listed += 1
    incomplete = None
    if paginated:
        incomplete = "paginated"
    elif len(records) != listed:
        incomplete = "duplicated"
    elif dataset is Dataset.MEMBERS and not any(record["is_owner"] for record in records.values()):
        incomplete = "no_owner"
    return Listed(records, incomplete)


def _pairs(dataset: Dataset, items: list[Any]) -> Iterable[_Pair]:
    if dataset is Dataset.MEMBERS:
        return _members(items)
    if dataset is Dataset.GROUPS:
        groups = _valid(dataset, provider.GROUPS, items)
        return map(_group, groups)
    accounts = _valid(dataset, provider.SERVICE_ACCOUNTS, items)
    return _service_accounts(accounts)


def _members(items: list[Any]) -> Iterator[_Pair]:
    """Take the items away piece by piece: a workspace has many members, and each form of them is large."""
    first = 0
    while items:
        some = items[:_PIECE]
        del items[:_PIECE]
        members: list[Any] = _valid(Dataset.MEMBERS, provider.MEMBERS, some, first=first)
        for member in members:
            yield f"member/{member['user_id']}", member
        first += len(some)


def _group(group: provider.Group) -> _Pair:
    limit = group.group_usage_limit
    return f"group/{group.id}", {
        "group_id": group.id,
        "name": group.name,
        "member_ids": _as_set(group.members),
        "permissions": _as_set(group.permissions),
        "usage_limit": None if limit is None else str(limit),
    }


def _service_accounts(accounts: Iterable[provider.ServiceAccount]) -> Iterator[_Pair]:
    for account in accounts:
        yield _service_account(account)
        yield from map(_api_key, account.api_keys)


def _service_account(account: provider.ServiceAccount) -> _Pair:
    sharing = {(one.group.id, one.permission_level) for one in account.default_sharing_groups or ()}
    return f"service_account/{account.service_account_user_id}", {
        "service_account_id": account.service_account_user_id,
        "name": account.name,
        "created_at": _time(account.created_at_unix),
        "sharing": [{"group_id": group, "permission_level": level} for group, level in sorted(sharing)],
    }


def _api_key(key: provider.ApiKey) -> _Pair:
    return f"api_key/{key['key_id']}", {
        "key_id": key["key_id"],
        "service_account_id": key["service_account_user_id"],
        "name": key["name"],
        "hint": key["hint"],
        "key_hash": key["hashed_xi_api_key"],
        "permissions": _as_set(key["permissions"]),
        "created_at": _time(key["created_at_unix"]),
        "expires_at": _time(key["expires_at_unix"]),
        "is_disabled": bool(key["is_disabled"]),
        "disable_reason": key["disable_reason"],
        "character_limit": key["character_limit"],
        "allowed_ips": _as_set(key["allowed_ips"]),
        "third_party_disable_allowed": key["third_party_disable_allowed"],
        "platform_limits": _limits(key["platform_limits"]),
    }


def _limits(limits: provider.PlatformLimits | None) -> dict[str, int | None] | None:
    if limits is None:
        return None
    return {name: one.limit for name, one in vars(limits).items() if one is not None}


def _as_set(names: list[str] | None) -> list[str] | None:
    """Sort and deduplicate: the wire promises no order, and an order that moves is no change."""
    return None if names is None else sorted(set(names))


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else timestamp(datetime.fromtimestamp(seconds, UTC))


def _items(dataset: Dataset, found: Any) -> tuple[list[Any], bool]:
    """Find the listed objects in an answer, and tell whether it looks like a page of a longer list."""
    wrapper = _WRAPPERS[dataset]
    if isinstance(found, list) and dataset is not Dataset.SERVICE_ACCOUNTS:
        return found, False
    if isinstance(found, dict):
        paginated = not _PAGING.isdisjoint(found)
        values = [value for name, value in found.items() if name not in _PAGING]
        if dataset is Dataset.GROUPS and all(isinstance(value, dict) for value in values):
            return values, paginated
        if isinstance(found.get(wrapper), list):
            return found[wrapper], paginated or dataset is not Dataset.SERVICE_ACCOUNTS
        arrays = [value for value in values if isinstance(value, list)]
        if len(arrays) == 1:
            return arrays[0], True
    raise _broken(dataset, "a listing was expected at the top")


def _json(dataset: Dataset, body: bytes) -> Any:
    try:
        return orjson.loads(provider.clean(body))
    except orjson.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at byte {error.pos}"
    # Raised out here, for the decoder's error holds the whole body.
    raise _broken(dataset, problem)


def _valid(dataset: Dataset, adapter: TypeAdapter[_T], found: Any, *, first: int = 0) -> _T:
    """Validate what was found; `first` is the place of its first item in the whole listing."""
    try:
        return adapter.validate_python(found)
    except ValidationError as error:
        worst = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [step + first if n == 0 and isinstance(step, int) else step for n, step in enumerate(worst["loc"])]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    # Raised out here, for pydantic's error holds the whole body.
    raise _broken(dataset, f"{path.removeprefix('.') or 'top'}: {worst['msg']}")


def _broken(dataset: Dataset, problem: str) -> ContractBroken:
    return ContractBroken(
        "schema",
        f"{dataset.value}: unknown shape, {problem}. The answer was set aside; compare it with the provider's"
        " current API.",
    )
