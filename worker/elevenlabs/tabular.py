"""The provider's table: columns by name, cells by row, times in any of the forms it has been seen in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final, Self

import orjson

from schemas.provider import clean
from worker.errors import ContractBroken

_NO_UNIT: Final = frozenset({"", "null"})
_TIME_UNITS: Final = frozenset({None, "s", "ms"})
_FIRST: Final = datetime(2000, 1, 1, tzinfo=UTC)
_LAST: Final = datetime(2200, 1, 1, tzinfo=UTC)
_LEAST_MS: Final = 1e11
"""Epochs from here on are milliseconds: as seconds they would lie past the year 5000."""


@dataclass(frozen=True, slots=True)
class Table:
    """An analytics answer. `types` and `units` stand beside `columns`; every row has a cell for each column.

    Column names, their order and the order of rows are not promised by the provider (official SDK).
    """

    columns: tuple[str, ...]
    types: tuple[str | None, ...]
    units: tuple[str | None, ...]
    rows: tuple[Sequence[Any], ...]

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a table from JSON bytes.

        Raises:
            ContractBroken: no JSON, not the shape of a table, or only one page of it (`has_more`).

        """
        try:
            document = orjson.loads(clean(body))
        except orjson.JSONDecodeError:
            raise ContractBroken("unparseable", "The table is no complete JSON") from None
        if not isinstance(document, dict):
            raise ContractBroken("table_shape", "The answer is no table: not a JSON object")
        if document.get("has_more") or document.get("next_cursor"):
            raise ContractBroken("table_paged", "The table has further pages, which it never had")
        columns: Any = document.get("columns")
        rows: Any = document.get("rows")
        if not _is_texts(columns) or len(set(columns)) != len(columns):
            raise ContractBroken("table_columns", "The table's columns are no list of distinct names")
        if not isinstance(rows, list) or not _all_have_width(rows, len(columns)):
            raise ContractBroken("table_rows", "The table's rows do not fit its columns")
        return cls(
            tuple(columns),
            _beside(columns, document.get("column_types")),
            _beside(columns, document.get("column_units")),
            tuple(rows),
        )

    def index(self, name: str) -> int | None:
        """Return the position of a column, None when there is no such column."""
        return self.columns.index(name) if name in self.columns else None

    def time_index(self) -> int:
        """Return the position of the time column: `timestamp`, else the only one of type DateTime.

        Raises:
            ContractBroken: there is none, or one cannot tell which.

        """
        named = self.index("timestamp")
        if named is not None:
            return named
        typed = [position for position, kind in enumerate(self.types) if kind == "DateTime"]
        if len(typed) != 1:
            raise ContractBroken("table_time", "The table has no time column, or several")
        return typed[0]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _all_have_width(rows: list[Any], width: int) -> bool:
    return {list}.issuperset(map(type, rows)) and {width}.issuperset(map(len, rows))


def _beside(columns: Sequence[str], values: Any) -> tuple[str | None, ...]:
    if values is None:
        return (None,) * len(columns)
    if not isinstance(values, list) or len(values) != len(columns):
        raise ContractBroken("table_columns", "The table's types or units do not fit its columns")
    texts = (value if isinstance(value, str) else None for value in values)
    return tuple(None if text in _NO_UNIT else text for text in texts)


def parse_time(value: object, unit: str | None = None) -> datetime:
    """Read a cell of a time column as an aware UTC datetime.

    Forms seen in the wild and in provider docs (2026): ISO 8601 with `Z` or an offset, `YYYY-MM-DD HH:MM:SS`
    without a zone (UTC), epoch seconds or milliseconds, each also as a string. The `unit` of an epoch is told
    by its magnitude, since the column's claim (`s`, `ms`) has been seen wrong.

    Raises:
        ContractBroken: another form, a unit that is no time, or a time outside 2000 to 2199.

    """
    if unit in _NO_UNIT:
        unit = None
    if unit not in _TIME_UNITS:
        raise ContractBroken("table_time", "The time column has a unit that is no time")
    try:
        when = _moment(value)
    except (ValueError, OverflowError, OSError):
        raise ContractBroken("table_time", "A cell of the time column is no time we know") from None
    if not _FIRST <= when < _LAST:
        raise ContractBroken("table_time", "A cell of the time column lies outside 2000 to 2199")
    return when


def _moment(value: object) -> datetime:
    number = number_or_none(value)
    if number is not None:
        return datetime.fromtimestamp(number / 1000 if abs(number) >= _LEAST_MS else number, UTC)
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 - a cell of a wrong type is a wrong cell
    when = datetime.fromisoformat(value.strip())
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def utc_day(value: object, unit: str | None = None) -> date:
    """Return the UTC day of a cell of a time column; see `parse_time`."""
    return parse_time(value, unit).date()


def number_or_none(value: object) -> float | None:
    """Read a cell as a number (numbers may come as strings); None when it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
