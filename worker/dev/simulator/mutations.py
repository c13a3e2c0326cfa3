"""Changes of one workspace, as a customer makes them: a list of operations, all of them or none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from worker.dev.simulator.generate import Atom, Record, account, group, key, user_id
from worker.dev.simulator.payload import (
    REQUIRED,
    BadPayload,
    Field,
    day,
    flag,
    hundredths,
    integer,
    list_of,
    number,
    one_of,
    optional,
    read,
    text,
)
from worker.dev.simulator.world import State

Apply = Callable[[State, dict[str, Any], int], Record]

_ID: Final = Field(text, REQUIRED)
_TEXT: Final = Field(text)
_TEXTS: Final = Field(list_of(text))
_FLAG: Final = Field(flag)
_LIMIT: Final = Field(optional(integer(0)))

_KEY_FIELDS: Final = {
    "name": _TEXT,
    "is_disabled": _FLAG,
    "disable_reason": Field(optional(text)),
    "permissions": Field(optional(list_of(text))),
    "character_limit": _LIMIT,
    "allowed_ips": Field(optional(list_of(text))),
    "third_party_disable_allowed": Field(optional(flag)),
    "platform_limits": Field(lambda value: value),
    "expires_at_unix": _LIMIT,
}
_GROUP_FIELDS: Final = {
    "name": _TEXT,
    "members": _TEXTS,
    "permissions": Field(optional(list_of(text))),
    "group_usage_limit": Field(
        lambda value: value if value == "unlimited" else optional(integer(0))(value),
    ),
}
_MEMBER_FIELDS: Final = {
    "email": _TEXT,
    "first_name": Field(optional(text)),
    "seat_type": Field(optional(text)),
    "is_locked": _FLAG,
}
_ATOM_FIELDS: Final = {
    "day": Field(day, REQUIRED),
    "product": Field(text, REQUIRED),
    "user_id": Field(optional(text), None),
    "key_hash": Field(optional(text), None),
    "amount": Field(hundredths, REQUIRED),
}


def _find(records: dict[str, Record], key_id: str, what: str) -> Record:
    record = records.get(key_id)
    if record is None:
        raise BadPayload(f"there is no {what} {key_id!r}")
    return record


def _new(records: dict[str, Record], key_id: str, what: str) -> str:
    if key_id in records:
        raise BadPayload(f"{what} {key_id!r} is there already")
    return key_id


def _serial(state: State) -> int:
    """Number what is added from far above what is generated, so that ids never meet."""
    state.made += 1
    return 0x1000000 + state.made


def _member_join(state: State, args: dict[str, Any], _: int) -> Record:
    tag, number_ = state.usage.tag, _serial(state)
    members = state.writable().members
    user = _new(members, args.get("user_id") or user_id(tag, number_), "member")
    members[user] = {
        "user_id": user,
        "email": f"joined.{number_}@{tag}.example",
        "first_name": f"Joined {number_}",
        "seat_type": "workspace_member",
        "is_owner": False,
        "is_locked": False,
        **args,
    }
    return {"user_id": user}


def _member_leave(state: State, args: dict[str, Any], _: int) -> Record:
    lists = state.writable()
    if _find(lists.members, args["user_id"], "member")["is_owner"]:
        raise BadPayload("the owner cannot leave")
    del lists.members[args["user_id"]]
    for name, record in lists.groups.items():
        if args["user_id"] in record["members"]:
            kept = [member for member in record["members"] if member != args["user_id"]]
            lists.groups[name] = {**record, "members": kept}
    return {"user_id": args["user_id"]}


def _updater(table: str, id_field: str, what: str) -> Apply:
    def update(state: State, args: dict[str, Any], _: int) -> Record:
        records: dict[str, Record] = getattr(state.writable(), table)
        records[args[id_field]] = {**_find(records, args[id_field], what), **args}
        return {id_field: args[id_field]}

    return update


def _group_add(state: State, args: dict[str, Any], _: int) -> Record:
    serial = _serial(state)
    groups = state.writable().groups
    made = {**group(state.usage.tag, serial, []), **args}
    groups[_new(groups, made["id"], "group")] = made
    return {"id": made["id"]}


def _group_remove(state: State, args: dict[str, Any], _: int) -> Record:
    groups = state.writable().groups
    _find(groups, args["id"], "group")
    del groups[args["id"]]
    return {"id": args["id"]}


def _service_account_add(state: State, args: dict[str, Any], _: int) -> Record:
    lists = state.writable()
    made = account(state.usage.tag, _serial(state), [])
    keys = args.pop("keys", 1)
    made |= args
    name = made["service_account_user_id"]
    lists.accounts[_new(lists.accounts, name, "service account")] = made
    added = [_key_add(state, {"service_account_user_id": name}, 0) for _ in range(keys)]
    return {"service_account_user_id": name, "added_keys": added}


def _service_account_remove(state: State, args: dict[str, Any], _: int) -> Record:
    lists = state.writable()
    name = args["service_account_user_id"]
    _find(lists.accounts, name, "service account")
    del lists.accounts[name]
    gone = [found for found, record in lists.keys.items() if record["service_account_user_id"] == name]
    for found in gone:
        del lists.keys[found]
    return {"service_account_user_id": name, "key_ids": gone}


def _key_add(state: State, args: dict[str, Any], _: int) -> Record:
    lists = state.writable()
    _find(lists.accounts, args["service_account_user_id"], "service account")
    serial = _serial(state)
    plain = {"is_disabled": False, "disable_reason": None, "expires_at_unix": None}
    made = {**key(state.usage.tag, serial, args["service_account_user_id"]), **plain, **args}
    lists.keys[_new(lists.keys, made["key_id"], "key")] = made
    return {"key_id": made["key_id"], "hashed_xi_api_key": made["hashed_xi_api_key"]}


def _key_remove(state: State, args: dict[str, Any], _: int) -> Record:
    keys = state.writable().keys
    _find(keys, args["key_id"], "key")
    del keys[args["key_id"]]
    return {"key_id": args["key_id"]}


def _write_usage(state: State, args: dict[str, Any], today: int, *, onto: bool) -> Record:
    amounts = state.usage.edit(args["day"], today)
    atom: Atom = (args["product"], args["user_id"], args["key_hash"])
    amount = args["amount"] + (amounts.get(atom, 0) if onto else 0)
    amounts[atom] = amount
    if not amount:
        del amounts[atom]
    return {}


def _usage_add(state: State, args: dict[str, Any], today: int) -> Record:
    return _write_usage(state, args, today, onto=True)


def _usage_set(state: State, args: dict[str, Any], today: int) -> Record:
    return _write_usage(state, args, today, onto=False)


def _usage_remove_day(state: State, args: dict[str, Any], _: int) -> Record:
    state.usage.edits[args["day"]] = {}
    return {}


def _usage_scale(state: State, args: dict[str, Any], today: int) -> Record:
    amounts = state.usage.edit(args["day"], today)
    scaled = {atom: round(amount * args["factor"]) for atom, amount in amounts.items()}
    state.usage.edits[args["day"]] = {atom: amount for atom, amount in scaled.items() if amount}
    return {}


def _volatile_tick(state: State, args: dict[str, Any], _: int) -> Record:
    state.ticks += args["by"]
    return {}


def _billing(state: State, args: dict[str, Any], _: int) -> Record:
    state.mode, state.cost_since = args["mode"], args["cost_since"]
    return {}


def _plan(state: State, args: dict[str, Any], _: int) -> Record:
    state.tier = args["tier"]
    return {}


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of change: the fields it takes and what it does to a draft of the state."""

    fields: Mapping[str, Field]
    apply: Apply


_ACCOUNT: Final = "service_account_user_id"
OPERATIONS: Final[Mapping[str, Operation]] = {
    "member_join": Operation({"user_id": _TEXT, **_MEMBER_FIELDS}, _member_join),
    "member_leave": Operation({"user_id": _ID}, _member_leave),
    "member_update": Operation({"user_id": _ID, **_MEMBER_FIELDS}, _updater("members", "user_id", "member")),
    "group_add": Operation({"id": _TEXT, **_GROUP_FIELDS}, _group_add),
    "group_update": Operation({"id": _ID, **_GROUP_FIELDS}, _updater("groups", "id", "group")),
    "group_remove": Operation({"id": _ID}, _group_remove),
    "service_account_add": Operation(
        {_ACCOUNT: _TEXT, "name": _TEXT, "keys": Field(integer(0, 1_000))}, _service_account_add
    ),
    "service_account_update": Operation(
        {_ACCOUNT: _ID, "name": _TEXT}, _updater("accounts", _ACCOUNT, "service account")
    ),
    "service_account_remove": Operation({_ACCOUNT: _ID}, _service_account_remove),
    "key_add": Operation({_ACCOUNT: _ID, "key_id": _TEXT, **_KEY_FIELDS}, _key_add),
    "key_update": Operation({"key_id": _ID, **_KEY_FIELDS}, _updater("keys", "key_id", "key")),
    "key_remove": Operation({"key_id": _ID}, _key_remove),
    "usage_add": Operation(_ATOM_FIELDS, _usage_add),
    "usage_set": Operation(_ATOM_FIELDS, _usage_set),
    "usage_remove_day": Operation({"day": Field(day, REQUIRED)}, _usage_remove_day),
    "usage_scale": Operation({"day": Field(day, REQUIRED), "factor": Field(number(0, 1_000), REQUIRED)}, _usage_scale),
    "volatile_tick": Operation({"by": Field(integer(1), 1)}, _volatile_tick),
    "billing": Operation(
        {"mode": Field(one_of("credits", "cost"), REQUIRED), "cost_since": Field(optional(day), None)},
        _billing,
    ),
    "plan": Operation({"tier": Field(text, REQUIRED)}, _plan),
}


def apply(state: State, asked: Any, today: int) -> Record:
    """Apply one operation `{"op": ..., ...}` to a draft; returns it as asked, with the ids it made.

    Raises:
        BadPayload: no such operation, wrong fields, or not possible in this state.
    """
    name = asked.get("op") if isinstance(asked, dict) else None
    operation = OPERATIONS.get(name) if isinstance(name, str) else None
    if operation is None:
        known = ", ".join(sorted(OPERATIONS))
        raise BadPayload(f"expected an object whose op is random or one of {known}")
    args = {field: value for field, value in asked.items() if field != "op"}
    done = operation.apply(state, read(args, operation.fields, str(name)), today)
    return {**asked, **done}
