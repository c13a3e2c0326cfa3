"""Writing sums as the provider's positional tables, with the variations seen in the wild."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from zlib import crc32

from worker.dev.simulator.generate import personal_key_hash
from worker.dev.simulator.listings import EXTRA, first_half
from worker.dev.simulator.quirks import Quirks
from worker.dev.simulator.world import Workspace

Cell = str | int | float | bool | None
# bucket start in Unix seconds -> group values -> hundredths of a credit
Sums = dict[int, dict[tuple[Cell, ...], int]]
Table = dict[str, Any]

LABELS: Final = {"user_id": "user_label", "hashed_xi_api_key": "api_key_name", "voice_id": "voice_name"}


@dataclass(frozen=True, slots=True)
class Measure:
    """A numeric column: its name, type, unit, and how hundredths of a credit are written in it."""

    name: str
    kind: str
    unit: str | None
    write: Callable[[int], Cell]


@dataclass(frozen=True, slots=True)
class Column:
    """One column with its cells."""

    name: str
    kind: str
    unit: str | None
    cells: Sequence[Cell]


@lru_cache(maxsize=4096)
def time_cell(unix_s: int, form: str) -> Cell:
    """Write a time in one of the forms seen: ISO with Z, without zone, epoch in s or ms."""
    if form == "epoch_s":
        return unix_s
    if form == "epoch_ms":
        return unix_s * 1000
    at = datetime.fromtimestamp(unix_s, UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ" if form == "iso" else "%Y-%m-%d %H:%M:%S")


def _labels(workspace: Workspace, column: str, ids: Sequence[Cell]) -> list[Cell]:
    """Name ids as the provider does; what is gone from the listings has no name."""
    lists = workspace.state.lists
    names: dict[Cell, Cell]
    if column == "user_id":
        users = {str(user) for user in ids}
        names = {user: lists.members[user]["email"] for user in users & lists.members.keys()}
        names |= {account: lists.accounts[account]["name"] for account in users & lists.accounts.keys()}
    elif column == "hashed_xi_api_key":
        names = {record["hashed_xi_api_key"]: record["name"] for record in lists.keys.values()}
        names[personal_key_hash(workspace.tag)] = "personal"
    else:
        names = {voice: f"Voice {voice}" for voice in set(ids) - {None}}
    return [names.get(found) for found in ids]


def time_column(starts: Sequence[int], quirks: Quirks) -> Column:
    """Write the `timestamp` column; the unit of epochs says which they are (provider docs 2026)."""
    form = quirks.time_form
    unit = {"epoch_s": "s", "epoch_ms": "ms"}.get(form)
    return Column("timestamp", "DateTime", unit, [time_cell(start, form) for start in starts])


def write_table(
    workspace: Workspace,
    sums: Sums,
    group_by: tuple[str, ...],
    measures: Sequence[Measure],
    *,
    seed: str,
    time_first: bool,
) -> Table:
    """Write sums as a table, one row per bucket and group; label columns come after all others."""
    quirks = workspace.quirks
    flat = [(start, values, sums[start][values]) for start in sorted(sums) for values in sums[start]]
    times = time_column([start for start, _, _ in flat], quirks)
    groups: list[Column] = []
    labels: list[Column] = []
    for place, name in enumerate(group_by):
        cells: list[Cell] = [values[place] for _, values, _ in flat]
        if quirks.label_columns and name in LABELS:
            kind = "Enum8" if quirks.unknown_enums else "String"
            labels.append(Column(LABELS[name], kind, None, _labels(workspace, name, cells)))
        if name == "product_type" and quirks.product_dashes:
            cells = [str(cell).replace("_", "-") for cell in cells]
        groups.append(Column(name, "Float" if name == "voice_multiplier" else "String", None, cells))
    numbers = [
        Column(measure.name, measure.kind, measure.unit, [measure.write(amount) for _, _, amount in flat])
        for measure in measures
    ]
    if quirks.string_numbers:
        numbers = [Column(n.name, n.kind, n.unit, [str(cell) for cell in n.cells]) for n in numbers]
    columns = [times, *groups, *numbers, *labels] if time_first else [*groups, times, *numbers, *labels]
    return finish_table(workspace, columns, seed)


def finish_table(workspace: Workspace, columns: list[Column], seed: str) -> Table:
    """Put columns together; `seed` decides their order where the quirk shuffles them."""
    quirks = workspace.quirks
    if quirks.extra_fields:
        columns = [*columns, Column("x_future_column", "String", None, ["?"] * len(columns[0].cells))]
    if quirks.shuffle_columns:
        # Never the plain order, or a test of the shuffle would prove nothing.
        ordered, columns = columns, list(columns)
        shuffler = random.Random(crc32(seed.encode()))  # noqa: S311 - repeatable, no secret
        while columns == ordered and len(ordered) > 1:
            shuffler.shuffle(columns)
    rows: list[tuple[Cell, ...]] = list(zip(*(column.cells for column in columns), strict=True))
    table: Table = {
        "columns": [column.name for column in columns],
        "column_types": [column.kind for column in columns],
        "column_units": [_unit(column.unit, quirks.units) for column in columns],
        "rows": rows,
    }
    if quirks.paginated:
        table |= {"rows": rows[: first_half(len(rows))], "has_more": True, "next_cursor": "page2"}
    return {**table, **EXTRA} if quirks.extra_fields else table


def _unit(unit: str | None, form: str | None) -> str | None:
    """Write a unit: as it is, or with "", "null" or null where the unit is credits or there is none."""
    if unit not in (None, "credits") or form == "credits":
        return unit
    return form
