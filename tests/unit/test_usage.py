"""Usage tables become whole days; what cannot be read for sure is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal
from functools import reduce
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.connectors import Dataset
from schemas.records import Listing, Record, UsageDay
from worker.elevenlabs.asking import Billing, Page, Window
from worker.errors import ContractBroken
from worker.usage import Mismatch, day_digest, reconcile_totals, row_count, usage_days

MONDAY, TUESDAY, WEDNESDAY = (date(2026, 3, 30) + timedelta(days=n) for n in range(3))
WINDOW = Window(MONDAY, WEDNESDAY)
AT = "2026-03-30T00:00:00Z"
LATER = "2026-03-31T00:00:00Z"

GROUP_COLUMN = {
    Dataset.USAGE_PRODUCT: "product_type",
    Dataset.USAGE_MEMBER: "user_id",
    Dataset.USAGE_API_KEY: "hashed_xi_api_key",
}


def page(
    columns: Sequence[tuple[str, str, str | None]],
    rows: Sequence[Sequence[Any]],
    *,
    billing: Billing = Billing.CREDITS,
    window: Window = WINDOW,
) -> Page:
    names, types, units = (list(part) for part in zip(*columns, strict=True)) if columns else ([], [], [])
    table = {"columns": names, "column_types": types, "column_units": units, "rows": rows}
    return Page(billing, window, orjson.dumps(table))


def days(pages: Sequence[Page], dataset: Dataset = Dataset.USAGE_MEMBER, window: Window = WINDOW) -> Listing:
    return usage_days(dataset, pages, window=window, settled_before=TUESDAY)


def credit_days(
    rows: Sequence[Sequence[Any]],
    *,
    dataset: Dataset = Dataset.USAGE_MEMBER,
    name: str = "total_usage",
    kind: str = "Float",
    unit: str | None = "credits",
    time_unit: str | None = None,
) -> Listing:
    """Read rows of (time, group, credits)."""
    columns = [
        ("timestamp", "DateTime", time_unit),
        (GROUP_COLUMN[dataset], "String", None),
        (name, kind, unit),
    ]
    return days([page(columns, rows)], dataset)


def amounts(record: Record) -> dict[tuple[str, str], str]:
    return {(row["key"], row["unit"]): row["amount"] for row in record["rows"]}


def test_day_is_whole_and_published_shape() -> None:
    """A day has the published fields in order, rows by key and unit, and their totals."""
    record = credit_days([[AT, "usr_2", 40], [AT, "usr_1", 125.5]])["usage/member/2026-03-30"]
    assert record == {
        "dimension": "member",
        "bucket_start": "2026-03-30",
        "interval_s": 86_400,
        "settled": True,
        "rows": [
            {"key": "usr_1", "label": None, "unit": "credits", "amount": "125.5"},
            {"key": "usr_2", "label": None, "unit": "credits", "amount": "40"},
        ],
        "totals": {"credits": "165.5"},
    }
    assert list(record) == list(UsageDay.model_fields)
    assert UsageDay.model_validate(record).model_dump() == record


def test_every_day_of_the_window_is_there() -> None:
    """A day without usage is a day without rows, and only days before the look-back are settled."""
    found = credit_days([])
    assert list(found) == ["usage/member/2026-03-30", "usage/member/2026-03-31"]
    assert [(row_count(day), day["totals"], day["settled"]) for day in found.values()] == [
        (0, {}, True),
        (0, {}, False),
    ]


def test_answer_without_columns_is_an_empty_window() -> None:
    """No columns and no rows is a window in which nothing was used."""
    assert days([page([], [])]) == credit_days([])


def test_rows_outside_their_page_are_dropped() -> None:
    """A bucket counts only for the page whose window holds its day."""
    columns = [("timestamp", "DateTime", None), ("user_id", "String", None), ("credits_used", "Int", "credits")]
    rows = [["2026-03-29T00:00:00Z", "u", 1], [AT, "u", 2], [LATER, "u", 3], ["2026-04-01T00:00:00Z", "u", 4]]
    halves = [
        page(columns, rows, window=Window(TUESDAY, WEDNESDAY)),
        page(columns, rows, window=Window(MONDAY, TUESDAY)),
    ]
    found = days(halves)
    assert [day["totals"]["credits"] for day in found.values()] == ["2", "3"]
    assert found == days([page(columns, rows)])


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [Window(MONDAY, TUESDAY)],
        [WINDOW, Window(MONDAY, TUESDAY)],
        [WINDOW, WINDOW],
        [Window(MONDAY, WEDNESDAY + timedelta(days=1))],
        [None],
    ],
)
def test_pages_must_tile_the_window(windows: list[Any]) -> None:
    """A day left out would read as zero and a day given twice would count double: both are our bug."""
    with pytest.raises(ValueError, match="day by day"):
        days([page([], [], window=window) for window in windows])


@pytest.mark.parametrize(
    ("cell", "unit"),
    [
        (AT, None),
        ("2026-03-30 00:00:00", "null"),
        ("2026-03-30T02:00:00+02:00", ""),
        (1_774_828_800, "s"),
        (1_774_828_800_000, "ms"),
        ("1774828800", None),
        ("2026-03-30T17:45:00Z", None),
    ],
)
def test_time_comes_in_many_forms(cell: object, unit: str | None) -> None:
    """Every form of time that was seen lands on its UTC day."""
    found = credit_days([[cell, "u", 1]], time_unit=unit)
    assert [row_count(day) for day in found.values()] == [1, 0]


@pytest.mark.parametrize(
    ("cell", "amount"),
    [
        (125.5, "125.5"),
        ("125.50", "125.5"),
        (1e21, "1" + 21 * "0"),
        (1e-7, "0.0000001"),
        (0.1, "0.1"),
        (100, "100"),
        ("1e3", "1000"),
        (-2.50, "-2.5"),
        (2**63, "9223372036854775808"),
    ],
)
def test_amounts_are_plain_decimals(cell: object, amount: str) -> None:
    """An amount keeps its exact value, without exponent and without trailing zeros."""
    record = credit_days([[AT, "u", cell]])["usage/member/2026-03-30"]
    assert amounts(record) == {("u", "credits"): amount}
    assert record["totals"] == {"credits": amount}


@pytest.mark.parametrize("cell", ["NaN", "Infinity", "-inf", True, "", "much", "1,5", [1], {"a": 1}, "1e400", "1e-400"])
def test_nonsense_amounts_break_the_contract(cell: object) -> None:
    """An amount that is no plausible number is refused, and not quoted."""
    with pytest.raises(ContractBroken) as caught:
        credit_days([[AT, "u", cell]])
    assert caught.value.reason == "usage_schema"
    assert "much" not in caught.value.message


def test_nonsense_outside_the_window_breaks_it_too() -> None:
    """A column is what it says in all its rows, or the table is not understood: those that are dropped count."""
    with pytest.raises(ContractBroken):
        credit_days([["2026-01-01T00:00:00Z", "u", "1e400"], [AT, "u", 1]])


def test_zeros_and_nulls_are_no_rows() -> None:
    """Zero-filled buckets, null amounts and amounts that cancel out leave no row."""
    rows: list[list[Any]] = [
        [AT, "a", 0],
        [AT, "b", 0.0],
        [AT, "c", None],
        [AT, "d", "0.00"],
        [AT, "d", "0e-400"],
        [AT, "e", 2.5],
        [AT, "e", -2.5],
    ]
    assert credit_days(rows) == credit_days([])


def test_rows_of_one_group_are_summed_exactly() -> None:
    """Rows of the same day, key and unit become one, with no binary rounding."""
    record = credit_days([[AT, "u", 0.1], ["2026-03-30T12:00:00Z", "u", 0.2], [AT, "v", 0.7]])
    assert amounts(record["usage/member/2026-03-30"]) == {("u", "credits"): "0.3", ("v", "credits"): "0.7"}
    assert record["usage/member/2026-03-30"]["totals"] == {"credits": "1"}


@pytest.mark.parametrize("dataset", GROUP_COLUMN)
def test_null_group_is_unattributed(dataset: Dataset) -> None:
    """Usage that nobody is named for stands under the empty key."""
    record = credit_days([[AT, None, 5], [AT, "x", 2]], dataset=dataset)[f"usage/{dataset.dimension}/2026-03-30"]
    assert amounts(record) == {("", "credits"): "5", ("x", "credits"): "2"}


def test_product_spellings_are_one_key() -> None:
    """A product is one key in both spellings; the raw one is kept as label when it differs."""
    record = credit_days(
        [[AT, "text_to_speech", 1], [AT, "text-to-speech", 2], [AT, "music", 3]], dataset=Dataset.USAGE_PRODUCT
    )["usage/product/2026-03-30"]
    assert [(row["key"], row["label"], row["amount"]) for row in record["rows"]] == [
        ("music", None, "3"),
        ("text_to_speech", "text-to-speech", "3"),
    ]


def test_keys_of_people_are_not_respelled() -> None:
    """A hyphen in a user id or key hash stays."""
    record = credit_days([[AT, "usr-1", 1]])["usage/member/2026-03-30"]
    assert amounts(record) == {("usr-1", "credits"): "1"}


@pytest.mark.parametrize(
    ("dataset", "column"), [(Dataset.USAGE_MEMBER, "user_label"), (Dataset.USAGE_API_KEY, "api_key_name")]
)
def test_label_column_labels_rows(dataset: Dataset, column: str) -> None:
    """An appended label column names its key; of several names the first in the alphabet is taken."""
    columns = [
        (GROUP_COLUMN[dataset], "String", None),
        ("timestamp", "DateTime", None),
        ("total_usage", "Float", "credits"),
        (column, "String", None),
    ]
    rows: list[list[Any]] = [
        ["a", AT, 1, "Zoe"],
        ["a", AT, 1, "Ana"],
        ["a", AT, 1, None],
        [None, AT, 1, None],
        ["b", AT, 1, ""],
    ]
    record = days([page(columns, rows)], dataset)[f"usage/{dataset.dimension}/2026-03-30"]
    assert [(row["key"], row["label"]) for row in record["rows"]] == [("", None), ("a", "Ana"), ("b", None)]


def test_label_is_that_of_its_day() -> None:
    """Who is renamed has the new name from that day on, whatever else the window holds."""
    columns = [
        ("timestamp", "DateTime", None),
        ("user_id", "String", None),
        ("total_usage", "Float", "credits"),
        ("user_label", "String", None),
    ]
    rows = [[AT, "a", 1, None], [AT, "a", 0, "Zoe"], ["2026-03-31T00:00:00Z", "a", 1, "Ana"], [AT, "b", 1, "Bo"]]
    found = days([page(columns, rows)])
    labels = {subject: [row["label"] for row in day["rows"]] for subject, day in found.items() if day["rows"]}
    assert labels == {"usage/member/2026-03-30": ["Zoe", "Bo"], "usage/member/2026-03-31": ["Ana"]}


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ([("total_usage", "Float", "credits"), ("credits_used", "Float", None)], 0),
        ([("anything", "Int", "credits")], 0),
        ([("anything", "Int", "Credits")], 0),
        ([("other", "Float", "credits"), ("total_usage", "Float", "credits")], 1),
        ([("total_charge_count", "Float", None), ("total_usage", "Float", None)], 1),
        ([("total_usage", "Float", None), ("credits_used", "Float", "")], 1),
        ([("total_charge_count", "Float", "null"), ("usage_count", "Int", None)], 0),
        ([("credits_used", "String", None)], 0),
        ([("credits_used", "Float", "min"), ("total_usage", "Float", None)], 1),
        ([("credits_used", "Array", "credits"), ("total_usage", "Float", None)], 1),
    ],
)
def test_credits_column_is_resolved(columns: list[tuple[str, str, str | None]], chosen: int) -> None:
    """The credits are the numeric column in credits, else the first known name without another unit."""
    head = [("timestamp", "DateTime", None), ("user_id", "String", None)]
    row = [AT, "u", *(10 + at for at in range(len(columns)))]
    record = days([page([*head, *columns], [row])])["usage/member/2026-03-30"]
    assert amounts(record) == {("u", "credits"): str(10 + chosen)}


@pytest.mark.parametrize(
    "columns",
    [
        [],
        [("usage_count", "Int", None)],
        [("total_minutes", "Float", "min")],
        [("credits_used", "Float", "usd")],
        [("credits_used", "JSON", None)],
        [("one", "Float", "credits"), ("two", "Float", "credits")],
        [("total_usage", "Float", "credits"), ("one", "Float", "usd"), ("two", "Float", "usd")],
    ],
)
def test_no_clear_column_breaks_the_contract(columns: list[tuple[str, str, str | None]]) -> None:
    """Without a column that is surely the credits there is an error, never a zero."""
    head = [("timestamp", "DateTime", None), ("user_id", "String", None)]
    with pytest.raises(ContractBroken) as caught:
        days([page([*head, *columns], [[AT, "u", *(1 for _ in columns)]])])
    assert caught.value.reason == "usage_schema"


def test_rows_need_time_and_group() -> None:
    """Rows without a time or without the asked grouping are refused."""
    with pytest.raises(ContractBroken):
        days([page([("user_id", "String", None), ("total_usage", "Float", "credits")], [["u", 1]])])
    with pytest.raises(ContractBroken, match="user_id"):
        days([page([("timestamp", "DateTime", None), ("total_usage", "Float", "credits")], [[AT, 1]])])


def test_time_column_may_have_another_name() -> None:
    """The only DateTime column is the time."""
    columns = [("bucket", "DateTime", None), ("user_id", "String", None), ("total_usage", "Float", "credits")]
    assert days([page(columns, [[AT, "u", 1]])]) == credit_days([[AT, "u", 1]])


@pytest.mark.parametrize("row", [[["x"], "u", 1], [AT, 7, 1], [AT, ["u"], 1], [None, "u", 1], [True, "u", 1]])
def test_cells_of_a_strange_type_break_the_contract(row: list[Any]) -> None:
    """A time or group that is no such thing is refused."""
    with pytest.raises(ContractBroken):
        credit_days([[AT, "u", 1], row])


def test_credit_answers_carry_money_too() -> None:
    """In credit mode a column in a currency gives rows of that unit; a total cost without unit gives none."""
    columns = [
        ("timestamp", "DateTime", None),
        ("user_id", "String", None),
        ("total_usage", "Float", "credits"),
        ("total_cost", "Float", "usd"),
        ("list_price", "Float", "usd"),
        ("fee", "Float", "eur"),
        ("total_minutes", "Float", "min"),
    ]
    record = days([page(columns, [[AT, "u", 100, 0.03, 0.05, 1, 9]])])["usage/member/2026-03-30"]
    assert amounts(record) == {("u", "credits"): "100", ("u", "eur"): "1", ("u", "usd"): "0.03"}
    assert record["totals"] == {"credits": "100", "eur": "1", "usd": "0.03"}
    columns[3:] = [("total_cost", "Float", None)]
    record = days([page(columns, [[AT, "u", 100, 0.03]])])["usage/member/2026-03-30"]
    assert amounts(record) == {("u", "credits"): "100"}


COST_COLUMNS = [
    ("timestamp", "DateTime", None),
    ("user_id", "String", None),
    ("total_cost", "Float", "usd"),
    ("total_charge_count", "Float", None),
    ("user_label", "String", None),
]


def test_cost_answers_give_money_and_charges() -> None:
    """A cost-billed day has the cost in its currency and the billed quantity."""
    rows = [[AT, "u", 1.82, 9100, "ana"]]
    record = days([page(COST_COLUMNS, rows, billing=Billing.COST)])["usage/member/2026-03-30"]
    assert [(row["label"], row["unit"], row["amount"]) for row in record["rows"]] == [
        ("ana", "charge_count", "9100"),
        ("ana", "usd", "1.82"),
    ]


@pytest.mark.parametrize("missing", [("total_cost", "Float", None), ("total_charge_count", "JSON", None)])
def test_cost_answers_need_both_columns(missing: tuple[str, str, str | None]) -> None:
    """A cost without a currency, or no billed quantity, is refused."""
    columns = [missing if column[0] == missing[0] else column for column in COST_COLUMNS]
    with pytest.raises(ContractBroken) as caught:
        days([page(columns, [[AT, "u", 1.82, 9100, None]], billing=Billing.COST)])
    assert caught.value.reason == "usage_schema"


def test_billing_may_switch_within_a_window() -> None:
    """Credits up to the switch and money from it on are days of one listing."""
    credit = [("timestamp", "DateTime", None), ("user_id", "String", None), ("total_usage", "Int", "credits")]
    pages = [
        page(credit, [[AT, "u", 7]], window=Window(MONDAY, TUESDAY)),
        page(
            COST_COLUMNS,
            [[AT, "u", 9, 9, None], [LATER, "u", 1, 2, None]],
            billing=Billing.COST,
            window=Window(TUESDAY, WEDNESDAY),
        ),
    ]
    assert [day["totals"] for day in days(pages).values()] == [{"credits": "7"}, {"charge_count": "2", "usd": "1"}]


def test_text_that_postgres_refuses_is_replaced() -> None:
    """A NUL in a key or label does not reach a record."""
    record = credit_days([[AT, "a\0b", 1]])["usage/member/2026-03-30"]
    assert amounts(record) == {("a\ufffdb", "credits"): "1"}


ROWS = st.lists(
    st.tuples(
        st.integers(-2, 4).map(lambda n: MONDAY + timedelta(days=n)),
        st.none() | st.sampled_from(["text-to-speech", "text_to_speech", "music"]),
        st.integers(-(10**9), 10**9)
        | st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9)
        | st.decimals(-1000, 1000, places=3).map(str),
    ),
    max_size=30,
)


def as_cells(rows: Sequence[tuple[date, str | None, Any]]) -> list[list[Any]]:
    return [[f"{day}T00:00:00Z", key, amount] for day, key, amount in rows]


def exact_sum(amounts: Iterable[Decimal]) -> Decimal:
    """Add without rounding to the 28 digits that decimals have by default."""
    return reduce(Context(prec=400).add, amounts, Decimal(0))


@given(ROWS)
@example([(MONDAY, "u", 1e8), (MONDAY, "u", 2.2250738585072014e-05)])
def test_totals_are_those_of_the_wire(rows: list[tuple[date, str | None, Any]]) -> None:
    """Each day's total is the exact sum of its rows on the wire, and of its own rows."""
    for subject, day in credit_days(as_cells(rows), dataset=Dataset.USAGE_PRODUCT).items():
        wire = exact_sum(Decimal(str(amount)) for when, _, amount in rows if subject.endswith(str(when)))
        assert Decimal(day["totals"].get("credits", 0)) == wire
        assert exact_sum(Decimal(row["amount"]) for row in day["rows"]) == wire
        assert all(Decimal(row["amount"]) != 0 for row in day["rows"])
        assert day["rows"] == sorted(day["rows"], key=lambda row: (row["key"], row["unit"]))
        assert UsageDay.model_validate(day).model_dump() == day


@given(ROWS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))), st.data())
def test_day_depends_on_neither_order_nor_window(
    orders: tuple[list[tuple[date, str | None, Any]], list[tuple[date, str | None, Any]]], data: st.DataObject
) -> None:
    """The same usage gives the same day, in whatever order and window it was read."""
    columns = [("timestamp", "DateTime", None), ("product_type", "String", None), ("total_usage", "Float", "credits")]
    rows, shuffled = orders
    whole = days([page(columns, as_cells(rows))], Dataset.USAGE_PRODUCT)
    wide = Window(MONDAY - timedelta(days=data.draw(st.integers(0, 3))), WEDNESDAY)
    again = days([page(columns, as_cells(shuffled), window=wide)], Dataset.USAGE_PRODUCT, wide)
    assert {subject: day_digest(day) for subject, day in whole.items()}.items() <= {
        subject: day_digest(day) for subject, day in again.items()
    }.items()


def test_digest_follows_content_only() -> None:
    """Equal days have equal digests whatever their fields' order; another amount or settling is another digest."""
    record = credit_days([[AT, "u", 1]])["usage/member/2026-03-30"]
    assert day_digest(record) == day_digest(dict(reversed(record.items())))
    assert len(day_digest(record)) == 32
    others = [
        credit_days([[AT, "u", 2]])["usage/member/2026-03-30"],
        {**record, "settled": False},
    ]
    assert day_digest(record) not in [day_digest(other) for other in others]


def test_totals_that_agree_are_no_mismatch() -> None:
    """Dimensions may differ by rounding, by a hundredth or by 0.1 %."""
    assert reconcile_totals({}) == []
    assert (
        reconcile_totals(
            {
                "product": {("2026-03-30", "credits"): Decimal(100_000), ("2026-03-31", "usd"): Decimal("1.01")},
                "member": {("2026-03-30", "credits"): Decimal(99_900), ("2026-03-31", "usd"): Decimal("1.00")},
            }
        )
        == []
    )


def test_totals_that_differ_are_listed() -> None:
    """A dimension that shows less than another, or nothing, is a mismatch of that day and unit."""
    slot, other = ("2026-03-30", "credits"), ("2026-03-29", "usd")
    found = reconcile_totals(
        {
            "product": {slot: Decimal(100_000), other: Decimal("0.02")},
            "member": {slot: Decimal(99_899)},
            "api_key": {slot: Decimal(100_000), other: Decimal("0.02")},
        }
    )
    assert found == [
        Mismatch(
            "2026-03-29",
            "usd",
            {"product": Decimal("0.02"), "member": Decimal(0), "api_key": Decimal("0.02")},
        ),
        Mismatch(
            "2026-03-30",
            "credits",
            {"product": Decimal(100_000), "member": Decimal(99_899), "api_key": Decimal(100_000)},
        ),
    ]


def test_epochs_are_those_of_the_day() -> None:
    """The epoch used above is the Monday's midnight."""
    assert datetime.fromtimestamp(1_774_828_800, UTC).date() == MONDAY
