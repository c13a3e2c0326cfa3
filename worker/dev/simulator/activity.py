"""The remaining usage endpoints: the deprecated character statistics and the list of API requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from worker.dev.simulator.analytics import CREDIT_OPERATIONS, Query, cost_of, credits_of, sum_up
from worker.dev.simulator.buckets import bucketer, starts
from worker.dev.simulator.errors import bad_parameters, problem
from worker.dev.simulator.generate import Atom, digest
from worker.dev.simulator.table import Cell, Column, Sums, Table, finish_table, time_cell
from worker.dev.simulator.usage import DAY_MS, DAY_S, second_of_day
from worker.dev.simulator.validation import FilterArgs, body_reader, query_reader
from worker.dev.simulator.world import Workspace, World

BREAKDOWNS: Final[Mapping[str, str | None]] = {
    "none": None,
    "voice": "voice_id",
    "voice_multiplier": "voice_multiplier",
    "user": "user_id",
    "groups": "billing_group_id",
    "api_keys": "hashed_xi_api_key",
    "all_api_keys": "hashed_xi_api_key",
    "product_type": "product_type",
    "model": "model",
    "resource": "resource_id",
    "request_queue": "request_queue_type",
    "region": "region",
    "subresource_id": "subresource_id",
    "reporting_workspace_id": "reporting_workspace_id",
    "has_api_key": "surface",
    "request_source": "request_source",
}
INTERVALS_S: Final[Mapping[str, int]] = {
    "hour": 3_600,
    "day": DAY_S,
    "week": 7 * DAY_S,
    "month": 30 * DAY_S,
    "cumulative": 36_500 * DAY_S,
}
METRICS: Final = (
    "credits",
    "tts_characters",
    "minutes_used",
    "request_count",
    "ttfb_avg",
    "ttfb_p95",
    "fiat_units_spent",
    "concurrency",
    "concurrency_average",
)
DEFAULT_LIMIT: Final = 100
MOST_LIMIT: Final = 1_000
REQUEST_COLUMNS: Final = ("request_id", "timestamp", "endpoint", "response_time_ms", "success")


@dataclass(frozen=True, slots=True)
class StatsQuery:
    """A validated query of character statistics."""

    query: Query
    breakdown: str
    metric: str
    whole_workspace: bool


@dataclass(frozen=True, slots=True)
class RequestsQuery:
    """A validated query of API requests."""

    start_ms: int | None
    end_ms: int | None
    limit: int
    sort: str
    filters: tuple[FilterArgs, ...]
    search: str | None


def read_stats_query(_: World, query: Mapping[str, str]) -> StatsQuery:
    """Read the query string of character-stats; its `_unix` times are milliseconds (official SDK).

    Raises:
        Problem: 422.
    """
    reader = query_reader(query)
    start_ms = reader.integer("start_unix", least=0) or 0
    end_ms = reader.integer("end_unix", least=0) or 0
    whole_workspace = reader.flag("include_workspace_metrics")
    breakdown = reader.choice("breakdown_type", tuple(BREAKDOWNS), "none") or "none"
    interval = reader.choice("aggregation_interval", tuple(INTERVALS_S), "day") or "day"
    size_s = reader.integer("aggregation_bucket_size", required=False, least=1)
    metric = reader.choice("metric", METRICS, "credits") or "credits"
    reader.finish()
    column = BREAKDOWNS[breakdown]
    group_by = () if column is None else (column,)
    asked = Query(start_ms, end_ms, size_s or INTERVALS_S[interval], group_by, ())
    return StatsQuery(asked, breakdown, metric, whole_workspace)


def character_stats(world: World, workspace: Workspace, asked: StatsQuery) -> dict[str, object]:
    """Answer character-stats: a time axis in ms and one number per entry for each series.

    Without `include_workspace_metrics` only the caller's own usage counts.

    Raises:
        Problem: 400, no range, or a breakdown by user without the whole workspace.
    """
    query = asked.query
    if query.start_ms > query.end_ms:
        raise bad_parameters("start_unix must not be after end_unix.", "start_unix")
    if asked.breakdown == "user" and not asked.whole_workspace:
        raise bad_parameters("Breakdown by user needs include_workspace_metrics.", "breakdown_type")
    own: tuple[FilterArgs, ...] = () if asked.whole_workspace else (("user_id", "eq", (workspace.owner_id,)),)
    narrowed = Query(query.start_ms, query.end_ms, query.interval_s, query.group_by, own)
    sums: Sums = sum_up(workspace, narrowed, world.today())
    least_ms = workspace.state.usage.first_day(world.today()) * DAY_MS
    end_ms = min(query.end_ms, (world.today() + 1) * DAY_MS - 1)
    start_of = bucketer(query.interval_s, "UTC")
    axis = starts(max(query.start_ms, least_ms) // 1000, end_ms // 1000, query.interval_s, start_of)
    series = {values for amounts in sums.values() for values in amounts}
    if not query.group_by:
        series.add(())
    usage = {
        str(values[0]) if values else "All": [_metric(asked.metric, sums.get(at, {}).get(values, 0)) for at in axis]
        for values in sorted(series, key=repr)
    }
    return {"time": [at * 1000 for at in axis], "usage": usage}


def _metric(metric: str, hundredths: int) -> Cell:
    if metric in {"credits", "tts_characters"}:
        return credits_of(hundredths)
    if metric == "fiat_units_spent":
        return cost_of(hundredths)
    return int(hundredths > 0)


def read_requests_query(_: World, raw: bytes) -> RequestsQuery:
    """Read the body of analytics/requests (official SDK; limits: provider docs 2026).

    Raises:
        Problem: 422.
    """
    reader = body_reader(raw)
    start_ms = reader.integer("start_time", required=False)
    end_ms = reader.integer("end_time", required=False)
    limit = reader.integer("limit", required=False, least=1, most=MOST_LIMIT)
    sort = reader.choice("sort", ("asc", "desc")) or ("asc" if end_ms is None else "desc")
    filters = reader.filters(None, CREDIT_OPERATIONS)
    search = reader.text("search")
    reader.finish()
    return RequestsQuery(start_ms, end_ms, limit or DEFAULT_LIMIT, sort, filters, search)


def api_requests(world: World, workspace: Workspace, asked: RequestsQuery) -> Table:
    """Answer analytics/requests: one request for every atom of usage, paged by moving the start.

    Raises:
        Problem: 400, neither start nor end.
    """
    if asked.start_ms is None and asked.end_ms is None:
        message = "At least one of start_time or end_time must be provided."
        raise problem(400, "invalid_request", "missing_required_field", message, "missing_required_field")
    today = world.today()
    usage = workspace.state.usage
    least_ms = max(asked.start_ms or 0, usage.first_day(today) * DAY_MS)
    most_ms = min((today + 1) * DAY_MS - 1, asked.end_ms if asked.end_ms is not None else 2**62)
    days = list(usage.days(least_ms // DAY_MS, most_ms // DAY_MS, today))
    newest_first = asked.sort == "desc"
    found: list[tuple[Cell, ...]] = []
    for day in reversed(days) if newest_first else days:
        if len(found) >= asked.limit:
            break
        rows = [_request(workspace, day, today, atom) for atom, amount in usage.of_day(day, today) if amount]
        rows = [row for row in rows if least_ms <= row[0] * 1000 <= most_ms and _wanted(row[1], asked)]
        rows.sort(key=lambda row: (row[0], repr(row[1])), reverse=newest_first)
        found += [row[1] for row in rows]
    kept = found[: asked.limit]
    form = workspace.quirks.time_form
    kinds = ("String", "DateTime", "String", "Int", "Bool")
    units = (None, {"epoch_s": "s", "epoch_ms": "ms"}.get(form), None, "ms", None)
    columns = [
        Column(name, kind, unit, [row[place] for row in kept])
        for place, (name, kind, unit) in enumerate(zip(REQUEST_COLUMNS, kinds, units, strict=True))
    ]
    times = [time_cell(int(cell), form) for cell in columns[1].cells if isinstance(cell, int)]
    columns[1] = Column("timestamp", "DateTime", units[1], times)
    return finish_table(workspace, columns, repr(asked))


def _request(workspace: Workspace, day: int, today: int, atom: Atom) -> tuple[int, tuple[Cell, ...]]:
    at = day * DAY_S + (0 if day == today else second_of_day(atom))
    request_id = digest(workspace.tag, day, repr(atom), size=6)
    endpoint = "/v1/" + atom[0].replace("_", "-")
    return at, (request_id, at, endpoint, 50 + int(request_id[:3], 16), not request_id.startswith("0"))


def _wanted(row: tuple[Cell, ...], asked: RequestsQuery) -> bool:
    named = dict(zip(REQUEST_COLUMNS, row, strict=True))
    if asked.search is not None and asked.search not in f"{named['request_id']} {named['endpoint']}":
        return False
    for column, operation, values in asked.filters:
        if column not in named:
            raise bad_parameters(f"Unknown filter column {column}.", "filters")
        if (named[column] in values) != (operation in {"eq", "in"}):
            return False
    return True
