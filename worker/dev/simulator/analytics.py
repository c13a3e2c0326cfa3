"""The two usage queries: by credits (usage-by-product-over-time) and by cost (analytics/usage)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from zlib import crc32

from worker.dev.simulator.buckets import HOUR_S, bucketer, starts
from worker.dev.simulator.errors import bad_parameters, cost_billed, invalid, unprocessable
from worker.dev.simulator.generate import Atom
from worker.dev.simulator.table import Cell, Measure, Sums, Table, write_table
from worker.dev.simulator.usage import (
    COUNT_PER_HUNDREDTH,
    DAY_MS,
    DAY_S,
    MICROS_PER_HUNDREDTH,
    second_of_day,
)
from worker.dev.simulator.validation import LEAST_TIME_MS, FilterArgs, body_reader
from worker.dev.simulator.world import Workspace, World

CREDIT_DIMENSIONS: Final = (
    "product_type",
    "model",
    "voice_id",
    "user_id",
    "fiat_currency",
    "fiat_charge_type",
    "region",
    "reporting_workspace_id",
    "request_source",
    "resource_id",
    "subresource_id",
    "request_queue_type",
    "voice_multiplier",
    "hashed_xi_api_key",
    "billing_group_id",
    "surface",
    "actor",
)
FREE_COST_DIMENSIONS: Final = ("model", "request_source", "fiat_charge_type", "fiat_currency")
SCARCE_COST_DIMENSIONS: Final = (
    "user_id",
    "hashed_xi_api_key",
    "region",
    "reporting_workspace_id",
    "billing_group_id",
    "product_type",
    "surface",
    "actor",
)
MOST_SCARCE: Final = 2
CREDIT_OPERATIONS: Final = ("in", "not_in", "le", "ge", "lt", "gt", "eq", "neq")
COST_OPERATIONS: Final = ("eq", "in", "neq", "not_in")
DEFAULT_INTERVAL_S: Final = 60
UNATTRIBUTED: Final = ("user_id", "hashed_xi_api_key")

MICROS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Query:
    """A validated usage query; both ends are inclusive, in milliseconds."""

    start_ms: int
    end_ms: int
    interval_s: int
    group_by: tuple[str, ...]
    filters: tuple[FilterArgs, ...]
    zone: str = "UTC"


def credits_of(hundredths: int) -> Cell:
    """Write hundredths of a credit as a number, whole ones without a fraction."""
    whole, rest = divmod(hundredths, 100)
    return hundredths / 100 if rest else whole


def cost_of(hundredths: int) -> Cell:
    """Give what hundredths of a credit cost, in the workspace's currency."""
    return hundredths * MICROS_PER_HUNDREDTH / MICROS


def charge_count_of(hundredths: int) -> Cell:
    """Give the billed quantity of hundredths of a credit."""
    return credits_of(hundredths * COUNT_PER_HUNDREDTH)


def _to_end_of_today(start_ms: int, end_ms: int, today: int) -> int:
    """Move an end that lies in today or later to the end of today, so "until now" is one query all day."""
    end_of_today = (today + 1) * DAY_MS - 1
    return end_of_today if end_ms >= today * DAY_MS and start_ms <= end_of_today else end_ms


def read_credit_query(world: World, raw: bytes) -> Query:
    """Read the body of usage-by-product-over-time (official SDK; the default interval: provider docs 2026).

    Raises:
        Problem: 422.
    """
    reader = body_reader(raw)
    start_ms = reader.integer("start_time", least=LEAST_TIME_MS) or 0
    end_ms = reader.integer("end_time", least=LEAST_TIME_MS) or 0
    interval_s = reader.integer("interval_seconds", required=False, least=1)
    group_by = reader.choices("group_by", CREDIT_DIMENSIONS)
    filters = reader.filters(None, CREDIT_OPERATIONS)
    zone = reader.time_zone("time_zone")
    reader.finish()
    end_ms = _to_end_of_today(start_ms, end_ms, world.today())
    return Query(start_ms, end_ms, interval_s or DEFAULT_INTERVAL_S, group_by, filters, zone)


def read_cost_query(world: World, raw: bytes) -> Query:
    """Read the body of analytics/usage (official SDK).

    Raises:
        Problem: 422.
    """
    reader = body_reader(raw)
    start_ms = reader.integer("start_time", least=LEAST_TIME_MS) or 0
    end_ms = reader.integer("end_time", least=LEAST_TIME_MS) or 0
    interval_s = reader.integer("interval_seconds", least=1) or 0
    dimensions = FREE_COST_DIMENSIONS + SCARCE_COST_DIMENSIONS
    group_by = reader.choices("group_by", dimensions)
    filters = reader.filters(dimensions, COST_OPERATIONS)
    reader.finish()
    if interval_s % DAY_S:
        message = "Value error, interval_seconds must be a whole number of UTC days"
        raise unprocessable([invalid("value_error", ("body", "interval_seconds"), message, interval_s)])
    end_ms = _to_end_of_today(start_ms, end_ms, world.today())
    return Query(start_ms, end_ms, interval_s, group_by, filters)


def _dimension(workspace: Workspace, atom: Atom, column: str) -> Cell:
    product, user, key = atom
    mark = crc32(repr(atom).encode())
    values: Mapping[str, Cell] = {
        "product_type": product,
        "user_id": user,
        "hashed_xi_api_key": key,
        "actor": user,
        "model": f"eleven_{product}_v{1 + mark % 2}",
        "voice_id": f"voice_{mark % 3}" if product == "text_to_speech" else None,
        "fiat_currency": "usd",
        "fiat_charge_type": "usage",
        "region": "us-central1",
        "reporting_workspace_id": workspace.workspace_id,
        "request_source": "web" if key is None else "api",
        "surface": "web" if key is None else "api",
        "request_queue_type": "default",
        "voice_multiplier": 1.0,
    }
    return values.get(column)


def _passes(workspace: Workspace, atom: Atom, filters: tuple[FilterArgs, ...]) -> bool:
    return all(
        _matches(_dimension(workspace, atom, column), operation, values) for column, operation, values in filters
    )


def _matches(value: Cell, operation: str, values: tuple[Cell, ...]) -> bool:
    spelled = {item.replace("-", "_") if isinstance(item, str) else item for item in values}
    # An id with a dash is its own spelling too.
    listed = value in spelled or value in values
    if operation in {"eq", "in"}:
        return listed
    if operation in {"neq", "not_in"}:
        return not listed
    if not values or type(value) is not type(values[0]) or not isinstance(value, str | float):
        return False
    other = str(values[0]) if isinstance(value, str) else values[0]
    order = (value > other) - (value < other)  # type: ignore[operator] # the types were compared above
    return {"le": order <= 0, "lt": order < 0, "ge": order >= 0, "gt": order > 0}[operation]


def sum_up(workspace: Workspace, query: Query, today: int) -> Sums:
    """Add up hundredths of a credit per bucket start (Unix seconds) and group values."""
    usage = workspace.state.usage
    start_of = bucketer(query.interval_s, query.zone)
    daily = query.interval_s % DAY_S == 0 and query.zone == "UTC"
    keep_null = workspace.quirks.null_groups
    groups: dict[Atom, tuple[Cell, ...] | None] = {}
    sums: Sums = {}

    def group_of(atom: Atom) -> tuple[Cell, ...] | None:
        values = tuple(_dimension(workspace, atom, column) for column in query.group_by)
        named = zip(query.group_by, values, strict=True)
        hidden = not keep_null and any(value is None and name in UNATTRIBUTED for name, value in named)
        return None if hidden or not _passes(workspace, atom, query.filters) else values

    for day in usage.days(query.start_ms // DAY_MS, query.end_ms // DAY_MS, today):
        whole = daily and query.start_ms <= day * DAY_MS and query.end_ms >= (day + 1) * DAY_MS - 1
        bucket = start_of(day * DAY_S)
        for atom, amount in usage.of_day(day, today):
            if not amount:
                continue
            if atom not in groups:
                groups[atom] = group_of(atom)
            values = groups[atom]
            if values is None:
                continue
            if not whole:
                at = day * DAY_S + (0 if day == today else second_of_day(atom))
                if not query.start_ms <= at * 1000 <= query.end_ms:
                    continue
                bucket = start_of(at)
            amounts = sums.setdefault(bucket, {})
            amounts[values] = amounts.get(values, 0) + amount
    if workspace.quirks.zero_fill and query.interval_s >= HOUR_S:
        _fill(sums, query, today)
    return sums


def _fill(sums: Sums, query: Query, today: int) -> None:
    seen = {values: 0 for amounts in sums.values() for values in amounts}
    if not query.group_by:
        seen[()] = 0
    first_s, last_s = query.start_ms // 1000, min(query.end_ms // 1000, (today + 1) * DAY_S - 1)
    for at in starts(first_s, last_s, query.interval_s, bucketer(query.interval_s, query.zone)):
        sums[at] = {**seen, **sums.get(at, {})}


def _ordered(query: Query) -> Query:
    if query.start_ms > query.end_ms:
        raise bad_parameters("start_time must not be after end_time.", "start_time")
    return query


def _with_early_bucket(workspace: Workspace, query: Query) -> Query:
    if workspace.quirks.early_bucket:
        return replace(query, start_ms=query.start_ms - query.interval_s * 1000)
    return query


def credit_usage(world: World, workspace: Workspace, query: Query) -> Table:
    """Answer usage-by-product-over-time.

    Raises:
        Problem: the range reaches the day the workspace moved to cost billing (official SDK), or is no range.
    """
    _ordered(query)
    switch = workspace.state.switch_day
    if switch is not None and query.end_ms >= switch * DAY_MS:
        raise cost_billed(workspace.quirks.cost_refusal_status)
    for column, _, _ in query.filters:
        if column not in CREDIT_DIMENSIONS:
            raise bad_parameters(f"Unknown filter column {column}.", "filters")
    quirks = workspace.quirks
    query = _with_early_bucket(workspace, query)
    measures = [Measure(quirks.credits_column, "Float", "credits", credits_of)]
    if quirks.extra_measures:
        measures += [
            Measure("total_cost", "Float", "usd", cost_of),
            Measure("total_minutes", "Float", "min", lambda hundredths: hundredths / 60_000),
            Measure("usage_count", "Int", None, lambda hundredths: hundredths // 1_000),
        ]
    sums = sum_up(workspace, query, world.today())
    return write_table(workspace, sums, query.group_by, measures, seed=repr(query), time_first=False)


def cost_usage(world: World, workspace: Workspace, query: Query) -> Table:
    """Answer analytics/usage: rows from the day the workspace moved to cost billing on (official SDK).

    Raises:
        Problem: 400, more dimensions than allowed, or no range.
    """
    _ordered(query)
    grouped = [name for name in query.group_by if name in SCARCE_COST_DIMENSIONS]
    filtered = [name for name, _, _ in query.filters if name in SCARCE_COST_DIMENSIONS]
    if len({*grouped, *filtered}) > MOST_SCARCE:
        raise bad_parameters(f"At most two of {', '.join(SCARCE_COST_DIMENSIONS)} can be combined.")
    chosen = {name for name, operation, _ in query.filters if operation in {"eq", "in"}}
    if len(set(grouped)) == MOST_SCARCE and not chosen & set(grouped):
        raise bad_parameters("Grouping by two of these requires an eq or in filter on one of them.")
    query = _with_early_bucket(workspace, query)
    switch = workspace.state.switch_day
    sums: Sums = {}
    if switch is not None and query.end_ms >= switch * DAY_MS:
        billed = replace(query, start_ms=max(query.start_ms, switch * DAY_MS))
        sums = sum_up(workspace, billed, world.today())
    measures = [
        Measure("total_cost", "Float", "usd", cost_of),
        Measure("total_charge_count", "Float", None, charge_count_of),
    ]
    return write_table(workspace, sums, query.group_by, measures, seed=repr(query), time_first=True)
