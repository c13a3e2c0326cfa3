"""From tabular usage answers to usage days: every day of a window whole, by one dimension.

The provider promises no column names, order or number format, so columns are found by name, type and unit,
and what cannot be told apart breaks the contract: a wrong figure is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Context, Decimal, InvalidOperation, localcontext
from functools import lru_cache, reduce
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Final

import orjson

from schemas.connectors import Dataset
from schemas.provider import clean
from schemas.records import Listing, Record
from worker.elevenlabs.asking import Billing, Page, Window
from worker.elevenlabs.tabular import Table, utc_day
from worker.errors import ContractBroken

DAY_S: Final = 86_400

_Slot = tuple[str, str]
"""The (key, unit) of an amount."""

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
_DIGITS: Final = 64
"""Orders of magnitude an amount may lie from 1; what is beyond is no amount."""
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


@dataclass(slots=True)
class _Day:
    """What a day has gathered: amounts by (key, unit), labels by key."""

    sums: dict[_Slot, Decimal] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A day whose totals in one unit differ between dimensions; `totals` is by dimension."""

    day: str
    unit: str
    totals: dict[str, Decimal]


def usage_days(dataset: Dataset, pages: Sequence[Page], *, window: Window, settled_before: date) -> Listing:
    """Turn the pages of one usage window into its days, by subject `usage/<dimension>/<day>`, in order.

    Every UTC day of `window` is there, an empty one without rows. Rows outside their page's window are
    dropped (buckets before the requested start were seen in the wild). Rows of one (day, key, unit) are
    summed; a null group is key ''; a null amount is nothing used; zeros are no rows. A day is the same in
    whatever window and order it was read.

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
    asked = list(_days_of(window))
    if sorted(day for page in pages for day in _days_of(page.window)) != asked:
        raise ValueError(f"the pages do not cover {window.start} to {window.end} day by day")
    days = {day: _Day() for day in asked}
    with localcontext(_EXACT):
        for page in pages:
            table = Table.parse(clean(page.body))
            if table.rows:
                columns = _resolve(table, dataset, page.billing)
                _check_cells(table, columns)
                _gather(table, columns, {day: days[day] for day in _days_of(page.window)})
    dimension = dataset.dimension
    return {
        f"usage/{dimension}/{day}": usage_day(dimension, day.isoformat(), _rows(found), settled=day < settled_before)
        for day, found in days.items()
    }


def usage_day(dimension: str, day: str, rows: list[Record], *, settled: bool) -> Record:
    """Make the record of a day (`YYYY-MM-DD`) from its rows, given by (key, unit); totals are theirs."""
    amounts: dict[str, list[str]] = {}
    for row in rows:
        amounts.setdefault(row["unit"], []).append(row["amount"])
    return {
        "dimension": dimension,
        "bucket_start": day,
        "interval_s": DAY_S,
        "settled": settled,
        "rows": rows,
        "totals": {unit: _plain(reduce(_EXACT.add, map(Decimal, amounts[unit]))) for unit in sorted(amounts)},
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


def _check_cells(table: Table, columns: _Columns) -> None:
    _check_column(table, columns.day, {str, int, float})
    _check_column(table, columns.key, {str, _NULL})
    if columns.label is not None:
        _check_column(table, columns.label, {str, _NULL})
    for at, _ in columns.amounts:
        _check_column(table, at, {str, int, float, _NULL})


def _check_column(table: Table, at: int, kinds: set[type]) -> None:
    strange = set(map(type, map(itemgetter(at), table.rows))) - kinds
    if strange:
        names = ", ".join(sorted(kind.__name__ for kind in strange))
        raise _broken(f"column {table.columns[at]} holds {names}")


def _gather(table: Table, columns: _Columns, days: Mapping[date, _Day]) -> None:
    """Add a table's rows to the days they belong to; what many rows repeat is worked out once."""
    day_at, day_unit = columns.day, table.units[columns.day]
    key_at, label_at = columns.key, columns.label
    is_product = table.columns[key_at] == _PRODUCT
    found_days: dict[Any, _Day | None] = {}
    found_keys: dict[str | None, tuple[str, str | None, list[tuple[int, _Slot]]]] = {}
    for row in table.rows:
        cell = row[day_at]
        if cell not in found_days:
            found_days[cell] = days.get(_utc_day(cell, day_unit))
        day = found_days[cell]
        if day is None:
            continue
        group = row[key_at]
        if group not in found_keys:
            key, label = _product(group) if is_product else (group or "", None)
            found_keys[group] = key, label, [(at, (key, unit)) for at, unit in columns.amounts]
        key, label, slots = found_keys[group]
        if label_at is not None:
            label = row[label_at]
        if label and (key not in day.labels or label < day.labels[key]):
            day.labels[key] = label
        sums = day.sums
        for at, slot in slots:
            cell = row[at]
            if cell is not None:
                amount = _amount(cell)
                sums[slot] = sums[slot] + amount if slot in sums else amount


_utc_day = lru_cache(maxsize=4096)(utc_day)
"""Tenants write the same days; the cells of a checked column can be looked up."""


def _product(name: str | None) -> tuple[str, str | None]:
    """Give a product's key, and as its label the raw spelling if it differs (provider docs 2026 use both)."""
    key = (name or "").replace("-", "_")
    return key, name if name and name != key else None


def _amount(cell: str | float) -> Decimal:
    try:
        amount = Decimal(repr(cell) if isinstance(cell, float) else cell)
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite() or not -_DIGITS < amount.adjusted() < _DIGITS:
        raise _broken("an amount is not a plausible number")
    return amount


def _rows(day: _Day) -> list[Record]:
    return [
        {"key": key, "label": day.labels.get(key), "unit": unit, "amount": _plain(amount)}
        for (key, unit), amount in sorted(day.sums.items())
        if amount
    ]


def _plain(amount: Decimal) -> str:
    text = str(amount)
    if "E" in text:
        text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _days_of(window: Window | None) -> Iterator[date]:
    if window is not None:
        yield from (window.start + timedelta(days=n) for n in range((window.end - window.start).days))


def _broken(problem: str) -> ContractBroken:
    return ContractBroken("usage_schema", f"The usage table is not as known: {problem}")
