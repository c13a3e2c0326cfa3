"""Reading provider requests the way the provider does: every wrong field at once, as a 422 array.

The wording is that of pydantic 2, which the provider's bodies show (seen in the wild).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final
from zoneinfo import ZoneInfo

import orjson

from worker.dev.simulator.errors import invalid, unprocessable

# 2020-01-01: the least time the analytics endpoints accept (official SDK).
LEAST_TIME_MS: Final = 1_577_836_800_000

TRUE: Final = frozenset({True, "1", "true", "True", "yes", "on", "t", "y"})
FALSE: Final = frozenset({False, "0", "false", "False", "no", "off", "f", "n"})

FilterArgs = tuple[str, str, tuple[Any, ...]]  # column, operation, values


class Reader:
    """Reads named values of one request and collects what is wrong with them."""

    def __init__(self, place: str, values: Mapping[str, Any]) -> None:
        self._place = place
        self._values = values
        self._items: list[dict[str, Any]] = []

    def finish(self) -> None:
        """Raise the 422 `Problem` if anything was wrong."""
        if self._items:
            raise unprocessable(self._items)

    def wrong(self, kind: str, name: str | tuple[str | int, ...], message: str, value: Any, **ctx: Any) -> None:
        """Note one fault of a field, or of a place inside it."""
        path = (name,) if isinstance(name, str) else name
        self._items.append(invalid(kind, (self._place, *path), message, value, **ctx))

    def _missing(self, name: str, *, required: bool) -> bool:
        if self._values.get(name) is not None:
            return False
        if name not in self._values and required:
            whole = None if self._place == "query" else self._values
            self.wrong("missing", name, "Field required", whole)
        elif required:
            self.wrong("int_type", name, "Input should be a valid integer", None)
        return True

    def integer(
        self, name: str, *, required: bool = True, least: int | None = None, most: int | None = None
    ) -> int | None:
        """Read a whole number; digits in a string and whole floats pass, as they do there."""
        if self._missing(name, required=required):
            return None
        value = self._values[name]
        try:
            if isinstance(value, float) and not value.is_integer():
                message = "Input should be a valid integer, got a number with a fractional part"
                self.wrong("int_from_float", name, message, value)
                return None
            number = int(value)
        except TypeError:
            self.wrong("int_type", name, "Input should be a valid integer", value)
            return None
        except ValueError:
            message = "Input should be a valid integer, unable to parse string as an integer"
            self.wrong("int_parsing", name, message, value)
            return None
        if least is not None and number < least:
            message = f"Input should be greater than or equal to {least}"
            self.wrong("greater_than_equal", name, message, value, ge=least)
        elif most is not None and number > most:
            message = f"Input should be less than or equal to {most}"
            self.wrong("less_than_equal", name, message, value, le=most)
        return number

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str | None:
        """Read one of a closed set of names."""
        value = self._values.get(name)
        if value is None:
            return default
        self._check_choice((name,), value, choices)
        return str(value)

    def _check_choice(self, path: tuple[str | int, ...], value: Any, choices: Sequence[str]) -> None:
        if not isinstance(value, str) or value not in choices:
            *rest, last = (f"'{choice}'" for choice in choices)
            expected = f"{', '.join(rest)} or {last}"
            self.wrong("literal_error", path, f"Input should be {expected}", value, expected=expected)

    def choices(self, name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Read a list of names of a closed set; null is an empty list."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.wrong("list_type", name, "Input should be a valid list", value)
            return ()
        for place, item in enumerate(value):
            self._check_choice((name, place), item, allowed)
        return tuple(map(str, value))

    def text(self, name: str, default: str | None = None) -> str | None:
        """Read a string."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong("string_type", name, "Input should be a valid string", value)
        return str(value)

    def flag(self, name: str) -> bool:
        """Read a boolean, in any of the spellings a query may use; absent is false."""
        value = self._values.get(name)
        if value is None or (isinstance(value, str | int) and value in FALSE):
            return False
        if not isinstance(value, str | int) or value not in TRUE:
            message = "Input should be a valid boolean, unable to interpret input"
            self.wrong("bool_parsing", name, message, value)
        return True

    def time_zone(self, name: str) -> str:
        """Read an IANA zone name, UTC when absent."""
        zone = self.text(name, "UTC") or "UTC"
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            self.wrong("value_error", name, "Value error, Invalid time zone", zone)
        return zone

    def filters(self, columns: Sequence[str] | None, operations: Sequence[str]) -> tuple[FilterArgs, ...]:
        """Read `filters`; `columns` None lets any column name through (official SDK)."""
        value = self._values.get("filters")
        if value is None:
            return ()
        if not isinstance(value, list):
            self.wrong("list_type", "filters", "Input should be a valid list", value)
            return ()
        return tuple(self._filter(place, item, columns, operations) for place, item in enumerate(value))

    def _filter(self, place: int, item: Any, columns: Sequence[str] | None, operations: Sequence[str]) -> FilterArgs:
        path = ("filters", place)
        if not isinstance(item, dict):
            message = "Input should be a valid dictionary or object to extract fields from"
            self.wrong("model_attributes_type", path, message, item)
            return "", "", ()
        for name in ("column", "operation", "values"):
            if name not in item:
                self.wrong("missing", (*path, name), "Field required", item)
        column, operation, values = item.get("column", ""), item.get("operation", ""), item.get("values", [])
        if columns is not None and "column" in item:
            self._check_choice((*path, "column"), column, columns)
        if "operation" in item:
            self._check_choice((*path, "operation"), operation, operations)
        if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
            self.wrong("list_type", (*path, "values"), "Input should be a valid list", values)
            values = []
        return str(column), str(operation), tuple(values)


def body_reader(raw: bytes) -> Reader:
    """Open a JSON body.

    Raises:
        Problem: 422, the body is missing, no JSON, or no object.
    """
    if not raw:
        raise unprocessable([invalid("missing", ("body",), "Field required", None)])
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        item = invalid("json_invalid", ("body", error.pos), "JSON decode error", {}, error=error.msg)
        raise unprocessable([item]) from error
    if not isinstance(values, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise unprocessable([invalid("model_attributes_type", ("body",), message, values)])
    return Reader("body", values)


def query_reader(query: Mapping[str, str]) -> Reader:
    """Open a query string."""
    return Reader("query", query)
