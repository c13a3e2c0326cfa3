"""The provider's tables and the forms its times and numbers come in."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.elevenlabs.tabular import Table, number_or_none, parse_time, utc_day
from worker.errors import ContractBroken


@pytest.mark.parametrize(
    "cell",
    [
        "2026-04-01T05:06:07Z",
        "2026-04-01T07:06:07+02:00",
        "2026-04-01 05:06:07",
        " 2026-04-01T05:06:07.000Z ",
        1775019967,
        1775019967000.0,
        "1775019967",
        "1775019967000",
    ],
)
@pytest.mark.parametrize("unit", [None, "", "null", "s", "ms"])
def test_every_seen_form_of_time_is_read(cell: object, unit: str | None) -> None:
    """ISO with zone, zone-less UTC, epoch seconds and milliseconds, also as strings, are one moment."""
    assert parse_time(cell, unit) == datetime(2026, 4, 1, 5, 6, 7, tzinfo=UTC)
    assert utc_day(cell, unit) == date(2026, 4, 1)


@pytest.mark.parametrize(
    "cell", [None, True, "", "yesterday", [], {}, 0, -1, 1e300, "nan", "20260401", "1999-12-31", "9999-12-31"]
)
def test_what_is_no_time_breaks_the_contract(cell: object) -> None:
    """A cell that is no plausible time is never guessed."""
    with pytest.raises(ContractBroken):
        utc_day(cell)
    with pytest.raises(ContractBroken):
        utc_day("2026-04-01", "credits")


@given(st.datetimes(datetime(2000, 1, 1), datetime(2199, 12, 31)))  # noqa: DTZ001 - hypothesis wants naive bounds
def test_seconds_and_milliseconds_are_told_apart(naive: datetime) -> None:
    """The magnitude alone tells an epoch's unit, over two centuries."""
    when = naive.replace(tzinfo=UTC, microsecond=0)
    seconds = int(when.timestamp())
    assert parse_time(seconds, "ms") == parse_time(seconds * 1000, "s") == when


def test_a_table_is_columns_types_units_and_rows() -> None:
    """Types and units stand beside the columns; absent and empty ones are None."""
    parsed = Table.parse(b'{"columns":["a","timestamp"],"column_units":["","s"],"rows":[[1,2]],"new":1}')
    assert (parsed.types, parsed.units, parsed.rows) == ((None, None), (None, "s"), ([1, 2],))
    assert (parsed.index("a"), parsed.index("b"), parsed.time_index()) == (0, None, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"columns":["a","a"],"rows":[]}',
        b'{"columns":["a"],"rows":[[1,2]]}',
        b'{"columns":["a"],"rows":{}}',
        b'{"columns":["a"],"rows":["x"]}',
        b'{"columns":["a"],"rows":[1]}',
        b'{"columns":["a"],"column_types":[],"rows":[]}',
        b'{"columns":["a"],"rows":[],"has_more":true}',
        b'{"columns":["a"],"rows":[],"next_cursor":"x"}',
    ],
)
def test_what_is_no_whole_table_breaks_the_contract(body: bytes) -> None:
    """A body that is not one whole table is never read as one, a first page least of all."""
    with pytest.raises(ContractBroken):
        Table.parse(body)


def test_the_time_column_is_named_or_alone_of_its_type() -> None:
    """The time column is `timestamp`, else the only DateTime; anything else breaks the contract."""
    one = b'{"columns":["x","t"],"column_types":["Int","DateTime"],"rows":[]}'
    two = b'{"columns":["s","t"],"column_types":["DateTime","DateTime"],"rows":[]}'
    assert Table.parse(one).time_index() == 1
    with pytest.raises(ContractBroken):
        Table.parse(two).time_index()


@pytest.mark.parametrize(("cell", "number"), [(1, 1.0), ("125.5", 125.5), (True, None), ("x", None), (None, None)])
def test_numbers_may_be_strings(cell: object, number: float | None) -> None:
    """A number or a numeric string is a number; a bool, another text, null or an infinity is none."""
    assert number_or_none(cell) == number
    assert number_or_none("inf") is None
    assert number_or_none(10**400) is None


CELLS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
DOCUMENTS = st.recursive(
    CELLS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["columns", "column_types", "column_units", "rows", "has_more"]), inner)
    ),
)


@given(st.binary() | DOCUMENTS.map(lambda document: json.dumps(document).encode()))
def test_a_table_parses_or_breaks_the_contract(body: bytes) -> None:
    """Any body is a table whose rows fit its columns, or a broken contract; nothing else is raised."""
    try:
        parsed = Table.parse(body)
    except ContractBroken:
        return
    assert len(parsed.types) == len(parsed.units) == len(parsed.columns)
    assert all(len(row) == len(parsed.columns) for row in parsed.rows)
