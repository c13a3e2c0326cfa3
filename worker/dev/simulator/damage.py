"""Damage to a successful answer's body: what truncated, doubled or broken listings look like."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from worker.dev.simulator.payload import Field, number

# The members of an answer's object that hold a list.
LIST_MEMBERS: Final = ("members", "service-accounts", "api-keys", "rows", "entries")
# The first field of these found in a record, or in the answer itself, is broken.
BREAKABLE: Final = ("user_id", "service_account_user_id", "id", "key_id", "tier", "columns", "time")


def _on_lists(value: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    """Apply a change to the list an answer holds: bare, in a member, or as the entries of a map of groups."""
    if isinstance(value, list):
        return change(value)
    if not isinstance(value, dict):
        return value
    for name in LIST_MEMBERS:
        if isinstance(value.get(name), list):
            return {**value, name: change(value[name])}
    if value and all(isinstance(item, dict) for item in value.values()):
        return dict(change(list(value.items())))
    return value


def _truncated_list(value: Any, params: dict[str, Any]) -> Any:
    return _on_lists(value, lambda items: items[: int(len(items) * params["fraction"])])


def _duplicated_list(value: Any, _: dict[str, Any]) -> Any:
    return _on_lists(value, lambda items: items + items)


def _ownerless(value: Any, _: dict[str, Any]) -> Any:
    return _on_lists(
        value,
        lambda items: [item for item in items if not (isinstance(item, dict) and item.get("is_owner"))],
    )


def _broken_record(record: Any) -> Any:
    if isinstance(record, list):
        # A row of a table: no cell is a list of objects.
        return [[{"unexpected": "shape"}] for _ in record]
    if isinstance(record, tuple):
        return record[0], _broken_record(record[1])
    found = next((name for name in BREAKABLE if name in record), None)
    return {**record, found: {"unexpected": "shape"}} if found is not None else record


def _schema_broken(value: Any, _: dict[str, Any]) -> Any:
    broken = _on_lists(value, lambda items: [*map(_broken_record, items[:1]), *items[1:]])
    return _broken_record(value) if broken == value and isinstance(value, dict) else broken


def _on_value(change: Callable[[Any, dict[str, Any]], Any]) -> Callable[[bytes, dict[str, Any]], bytes]:
    return lambda body, params: orjson.dumps(change(orjson.loads(body), params))


def _truncated_json(body: bytes, params: dict[str, Any]) -> bytes:
    return body[: int(len(body) * params["fraction"])]


_FRACTION: Final = {"fraction": Field(number(0, 1), 0.5)}

DAMAGES: Final[Mapping[str, tuple[Mapping[str, Field], Callable[[bytes, dict[str, Any]], bytes]]]] = {
    "truncated_json": (_FRACTION, _truncated_json),
    "truncated_list": (_FRACTION, _on_value(_truncated_list)),
    "duplicated_list": ({}, _on_value(_duplicated_list)),
    "ownerless": ({}, _on_value(_ownerless)),
    "schema_broken": ({}, _on_value(_schema_broken)),
}
