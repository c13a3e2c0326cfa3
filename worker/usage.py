"""From tabular usage answers to usage days: every day of a window whole, by one dimension.

The provider promises no column names, order or number format, so columns are found by name, type and unit,
and what cannot be told apart breaks the contract: a wrong figure is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Context, Decimal, InvalidOperation, localcontext
from functools import lru_cache, reduce
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import orjson

from schemas.connectors import Dataset
from schemas.records import Listing, Record
from worker.elevenlabs.asking import Billing, Page, Window
from worker.elevenlabs.tabular import Table, utc_day
from worker.errors import ContractBroken

DAY_S: Final = 86_400

_PRODUCT: Final = "product_type"
_GROUP_COLUMNS: Final = {
    Dataset.USAGE_PRODUCT: (_PRODUCT, None),
    Dataset.USAGE_MEMBER: ("user_id", "user_label"),
    Dataset.USAGE_API_KEY: ("hashed_xi_api_key", "api_key_name"),
}
"""The column of each dimension's key and the one that labels it (official SDK; `api_key_name` seen in the
wild: dested/destedtui)."""

_CREDITS: Final = ("credits_used", "total_usage", "total_charge_count")
"""Names the credits column has had (provider docs 2026; seen in the wild: dested/destedtui,
tryAGI/ElevenLabs)."""

_CURRENCIES: Final = frozenset({"usd", "eur", "inr", "pln", "gbp"})
_COST: Final = "total_cost"
_CHARGES: Final = "total_charge_count"
"""The billed quantity of a cost-billed workspace (official SDK); it has no unit of its own."""

_NOT_NUMERIC: Final = frozenset({"DateTime", "Bool", "JSON", "Map", "Array"})
"""Not String: numbers have come as strings (provider docs 2026)."""

_NULL: Final = type(None)
_TIMES: Final[frozenset[type]] = frozenset({str, int, float})
_TEXTS: Final[frozenset[type]] = frozenset({str, _NULL})
_NUMBERS: Final[frozenset[type]] = frozenset({str, int, float, _NULL})
_DIGITS: Final = 64
"""Orders of magnitude an amount may lie from 1; what is beyond is no amount."""
_MAGNITUDES: Final = frozenset(range(1 - _DIGITS, _DIGITS))
_ZERO: Final = Decimal(0)
_CENT: Final = Decimal("0.01")
_SHARE: Final = Decimal("0.001")
_EXACT: Final = Context(prec=4 * _DIGITS)
"""Sums here do not round, so the order of rows does not matter."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a page's columns stand; `amounts` are pairs of position and unit."""

    day: int
    key: int
    label: int | None
    amounts: tuple[tuple[int, str], ...]


_Entry = tuple[str, str, str, str | None, Decimal]
"""An amount of a table: day, key, unit, label, amount."""
_slot: Final[Callable[[_Entry], tuple[str, str, str]]] = itemgetter(0, 1, 2)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A day whose totals in one unit differ between dimensions; `totals` is by dimension."""

    day: str
    unit: str
    totals: dict[str, Decimal]


def usage_days(dataset: Dataset, pages: Sequence[Page], *, window: Window, settled_before: date) -> Listing:
    """Turn the pages of one usage window into its days, by subject `usage/<dimension>/<day>`, in order.

    Every UTC day of `window` is there, an empty one without rows. Rows outside their page's window are
    dropped (buckets before the requested start were seen in the wild), once their columns were understood.
    Rows of one (day, key, unit) are summed; a null group is key ''; a null amount is nothing used; zeros are
    no rows. A day is the same in whatever window and order it was read.

    Args:
        dataset: one of the usage datasets.
        pages: answers whose windows cover `window` without gap or overlap.
        window: the days asked for.
        settled_before: days before this one are settled.

    Raises:
        ContractBroken: `usage_schema`, when a column is missing or ambiguous or a cell is not what its column
            says; or what reading the table raises.
        ValueError: when the pages leave a day out, give one twice or have no window: a day would become zero,
            or double.

    """
    if not _tile(pages, window):
        raise ValueError(f"the pages do not cover {window.start} to {window.end} day by day")
    entries: list[_Entry] = []
    with localcontext(_EXACT):
        for page in pages:
            table = Table.parse(page.body)
            if table.rows:
                entries += _entries(table, _resolve(table, dataset, page.billing), page.window)
        return _by_day(dataset.dimension or "", entries, window, settled_before)


def _tile(pages: Sequence[Page], window: Window) -> bool:
    day = window.start
    for piece in sorted((page.window for page in pages if page.window), key=lambda piece: piece.start):
        if piece.start != day:
            return False
        day = piece.end
    return day == window.end and all(page.window for page in pages)


def usage_day(dimension: str, day: str, rows: list[Record], *, settled: bool) -> Record:
    """Make the record of a day (`YYYY-MM-DD`) from its rows, given by (key, unit); totals are theirs."""
    amounts: dict[str, list[str]] = {}
    for row in rows:
        amounts.setdefault(row["unit"], []).append(row["amount"])
    totals = {unit: _plain(reduce(_EXACT.add, map(Decimal, amounts[unit]))) for unit in sorted(amounts)}
    return _record(dimension, day, rows, totals, settled=settled)


def _by_day(dimension: str, entries: list[_Entry], window: Window, settled_before: date) -> Listing:
    """Make the days of a window from what lies in them; sums follow the context."""
    entries = sorted(entries, key=_slot)
    if len(set(map(_slot, entries))) < len(entries):
        entries = [reduce(_added, same) for _, same in groupby(entries, _slot)]
    rows: dict[str, list[Record]] = {name: [] for _, name in _days_of(window)}
    sums: dict[str, dict[str, Decimal]] = {name: {} for name in rows}
    for day, key, unit, label, amount in entries:
        if amount:
            rows[day].append({"key": key, "label": label or None, "unit": unit, "amount": _plain(amount)})
            of_day = sums[day]
            of_day[unit] = of_day[unit] + amount if unit in of_day else amount
    return {
        f"usage/{dimension}/{name}": _record(
            dimension,
            name,
            rows[name],
            {unit: _plain(total) for unit, total in sorted(sums[name].items())},
            settled=day < settled_before,
        )
        for day, name in _days_of(window)
    }


def _added(one: _Entry, other: _Entry) -> _Entry:
    return (*one[:4], one[4] + other[4])


def _record(dimension: str, day: str, rows: list[Record], totals: dict[str, str], *, settled: bool) -> Record:
    return {
        "dimension": dimension,
        "bucket_start": day,
        "interval_s": DAY_S,
        "settled": settled,
        "rows": rows,
        "totals": totals,
    }


def day_digest(record: Record) -> str:
    """Give 32 hex digits that are the same for equal days, in whatever order their fields stand."""
    return blake2b(orjson.dumps(record, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def row_count(record: Record) -> int:
    """Count the rows of a usage day."""
    return len(record["rows"])


def reconcile_totals(by_dimension: Mapping[str, Mapping[tuple[str, str], Decimal]]) -> list[Mismatch]:
    """Compare the totals of dimensions, each by (day, unit); they split the same usage, so they must agree.

    A total that a dimension lacks is zero there: give only days that all of them cover. Dimensions may differ
    by what rounding their rows makes of them: 0.1 % of the largest total, but never less than 0.01. (Rows
    rounded to hundredths are off by 0.005 each, which is within 0.1 % for rows of 5 and more; a lost group or
    a key that sees only its own usage shows as far more.)
    """
    found = []
    for day, unit in sorted({slot for totals in by_dimension.values() for slot in totals}):
        totals = {name: given.get((day, unit), _ZERO) for name, given in by_dimension.items()}
        least, most = min(totals.values()), max(totals.values())
        if most - least > max(_CENT, _SHARE * max(abs(least), abs(most))):
            found.append(Mismatch(day, unit, totals))
    return found


def _resolve(table: Table, dataset: Dataset, billing: Billing | None) -> _Columns:
    where = {name: at for at, name in enumerate(table.columns)}
    key, label = _GROUP_COLUMNS[dataset]
    if key not in where:
        raise _broken(f"there is no column {key}")
    numeric = {
        name: unit.lower() if unit else None
        for name, kind, unit in zip(table.columns, table.types, table.units, strict=True)
        if kind not in _NOT_NUMERIC
    }
    amounts = _money(numeric)
    if billing is Billing.CREDITS:
        amounts[_credits(numeric)] = "credits"
    elif not amounts:
        raise _broken("no column has a currency")
    elif _CHARGES not in numeric:
        raise _broken(f"there is no numeric column {_CHARGES}")
    else:
        amounts[_CHARGES] = "charge_count"
    return _Columns(
        day=table.time_index(),
        key=where[key],
        label=where.get(label) if label else None,
        amounts=tuple((where[name], unit) for name, unit in amounts.items()),
    )


def _credits(numeric: Mapping[str, str | None]) -> str:
    stated = [name for name, unit in numeric.items() if unit == "credits"]
    if len(stated) == 1:
        return stated[0]
    among = stated or [name for name, unit in numeric.items() if unit is None]
    for name in _CREDITS:
        if name in among:
            return name
    raise _broken(f"{len(stated)} columns have the unit credits, none of a known name")


def _money(numeric: Mapping[str, str | None]) -> dict[str, str]:
    """Give the unit of each money column by its name: one per currency, where several `total_cost`."""
    found: dict[str, str] = {}
    for currency in sorted(_CURRENCIES.intersection(filter(None, numeric.values()))):
        names = [name for name, unit in numeric.items() if unit == currency]
        if len(names) > 1 and _COST not in names:
            raise _broken(f"{len(names)} columns are in {currency}, none of a known name")
        found[_COST if _COST in names else names[0]] = currency
    return found


_Cells = Sequence[Sequence[Any]]
"""A table by columns."""


def _cells(table: Table, columns: _Columns) -> _Cells:
    """Turn a table's rows into columns, and check those that are read."""
    cells = list(zip(*table.rows, strict=True))
    kinds: dict[int, frozenset[type]] = {columns.day: _TIMES, columns.key: _TEXTS}
    if columns.label is not None:
        kinds[columns.label] = _TEXTS
    for at, known in (*kinds.items(), *((at, _NUMBERS) for at, _ in columns.amounts)):
        if strange := set(map(type, cells[at])) - known:
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise _broken(f"column {table.columns[at]} holds {names}")
    return cells


def _entries(table: Table, columns: _Columns, window: Window | None) -> list[_Entry]:
    """Read what a table tells of the days of its window; what many rows repeat is worked out once."""
    cells, inside = _cells(table, columns), dict(_days_of(window))
    times, groups = cells[columns.day], cells[columns.key]
    day_of = {cell: inside.get(_utc_day(cell, table.units[columns.day])) for cell in set(times)}
    is_product = table.columns[columns.key] == _PRODUCT
    known = {group: _product(group) if is_product else (group or "", None) for group in set(groups)}
    days, keys = [day_of[cell] for cell in times], [known[group][0] for group in groups]
    spoken = [known[group][1] for group in groups] if columns.label is None else cells[columns.label]
    labels = _labels(days, keys, spoken)
    return [
        (day, key, unit, label, amount)
        for at, unit in columns.amounts
        for day, key, label, amount in zip(days, keys, labels, _amounts(cells[at]), strict=True)
        if day and amount
    ]


def _labels(days: Sequence[str | None], keys: Sequence[str], spoken: Sequence[str | None]) -> Sequence[str | None]:
    """Give each row the least of the labels that rows of its day and key have."""
    if len(set(zip(keys, spoken, strict=True))) == len(set(keys)):
        return spoken
    least: dict[tuple[str | None, str], str] = {}
    for day, key, label in zip(days, keys, spoken, strict=True):
        if label and ((day, key) not in least or label < least[day, key]):
            least[day, key] = label
    return [least.get(slot) for slot in zip(days, keys, strict=True)]


_utc_day = lru_cache(maxsize=4096)(utc_day)
"""Tenants write the same days; the cells of a checked column can be looked up."""


def _product(name: str | None) -> tuple[str, str | None]:
    """Give a product's key, and as its label the raw spelling if it differs (provider docs 2026 use both)."""
    key = (name or "").replace("-", "_")
    return key, name if name and name != key else None


def _amounts(cells: Sequence[Any]) -> Sequence[Decimal | None]:
    """Read a column of amounts as exact numbers; of floats, which it nearly always holds, without a step for each."""
    numbers: list[Decimal | None]
    try:
        if set(map(type, cells)) == {float}:
            numbers = list(map(Decimal, map(repr, cells)))
        else:
            numbers = [None if cell is None else Decimal(str(cell)) for cell in cells]
    except InvalidOperation:
        raise _broken("an amount is no number") from None
    some = list(filter(None, numbers))
    if not all(map(Decimal.is_finite, some)) or not _MAGNITUDES.issuperset(map(Decimal.adjusted, some)):
        raise _broken("an amount is not a plausible number")
    return numbers


def _plain(amount: Decimal) -> str:
    text = str(amount)
    if "E" in text:
        text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=256)
def _days_of(window: Window | None) -> tuple[tuple[date, str], ...]:
    """Give the days of a window, and how each is written; tenants ask for the same windows."""
    if window is None:
        return ()
    days = (window.start + timedelta(days=n) for n in range((window.end - window.start).days))
    return tuple((day, day.isoformat()) for day in days)


def _broken(problem: str) -> ContractBroken:
    return ContractBroken("usage_schema", f"The usage table is not as known: {problem}")
