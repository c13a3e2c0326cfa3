"""Questions as generators, and the switch from credits to money."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import Dataset
from worker.elevenlabs import asking
from worker.elevenlabs.asking import Asked, Billing, Page, Window, ask, drive, probe, unanswered
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Finding, Request
from worker.elevenlabs.tabular import Table, utc_day
from worker.errors import ContractBroken, TryLater

CREDITS = "/v1/workspace/analytics/query/usage-by-product-over-time"
COST = "/v1/workspace/analytics/usage"
NOW = datetime(2026, 5, 20, 12, 30, tzinfo=UTC)
START = date(2026, 4, 1)
WINDOW = Window(START, START + timedelta(days=30))
DAY_MS = 86_400_000
REFUSALS = {400: "wrong", 403: "forbidden", 409: "conflict", 422: "wrong"}


def day(number: int) -> date:
    return START + timedelta(days=number)


def body_of(request: Request) -> dict[str, object]:
    document: dict[str, object] = orjson.loads(request.body or b"")
    return document


def error(status: int, word: str) -> Answer:
    return Answer(status, {}, json.dumps({"detail": {"status": word, "message": word}}).encode())


def table(rows: Sequence[tuple[date, float]]) -> bytes:
    return orjson.dumps(
        {
            "columns": ["timestamp", "user_id", "total_cost"],
            "column_types": ["DateTime", "String", "Float"],
            "column_units": [None, None, "usd"],
            "rows": [[f"{when}T00:00:00Z", "7", amount] for when, amount in rows],
        }
    )


class Provider:
    """A workspace that is billed in money from `switch` on; used on the days `used`."""

    def __init__(self, switch: date, used: set[date], *, refusal: int = 400, zero_filled: bool = False) -> None:
        self.switch, self.used, self.refusal, self.zero_filled = switch, used, refusal, zero_filled
        self.asked: list[Request] = []

    def __call__(self, request: Request) -> Answer:
        self.asked.append(request)
        body = body_of(request)
        first, last = (utc_day(body[name]) for name in ("start_time", "end_time"))
        days = [first + timedelta(days=n) for n in range((last - first).days + 1)]
        if request.path == CREDITS:
            if last >= self.switch:
                return error(self.refusal, REFUSALS[self.refusal])
            return Answer(200, {}, table([(d, 1.0) for d in days if d in self.used]))
        spent = [(d, 1.0 if d in self.used and d >= self.switch else 0.0) for d in days]
        return Answer(200, {}, table([row for row in spent if row[1] or self.zero_filled]))


def ask_usage(
    provider: Callable[[Request], Answer], *, window: Window = WINDOW, cost_since: date | None = None
) -> Asked:
    return drive(ask(Dataset.USAGE_MEMBER, window, now=NOW, cost_since=cost_since), provider)


def used_days(asked: Asked) -> set[date]:
    """The days with an amount that the pages hold inside their windows."""
    found = set()
    for page in asked.pages:
        assert page.window is not None
        days = {utc_day(row[0]) for row in Table.parse(page.body).rows if row[2]}
        found |= {d for d in days if page.window.start <= d < page.window.end}
    return found


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        (Dataset.WORKSPACE, "/v1/user"),
        (Dataset.MEMBERS, "/v1/workspace/members"),
        (Dataset.GROUPS, "/v1/workspace/groups"),
        (Dataset.SERVICE_ACCOUNTS, "/v1/service-accounts"),
    ],
)
def test_a_directory_is_one_get_whose_body_comes_verbatim(dataset: Dataset, path: str) -> None:
    """A directory dataset is one GET without parameters; its page is the body, byte for byte."""
    asked = drive(
        ask(dataset, None, now=NOW, cost_since=START),
        lambda request: Answer(200, {}, b' {"x": 1}') if request == Request("GET", path) else error(404, "x"),
    )
    assert asked.pages == (Page(None, None, b' {"x": 1}'),)
    assert asked.cost_since == START


def test_a_probe_asks_for_the_user() -> None:
    """The credential's probe is the identity request; a failure brings its verdict and no page."""
    sent = []

    def answer(request: Request) -> Answer:
        sent.append(request)
        return error(401, "invalid_api_key")

    asked = drive(probe(), answer)
    assert sent == [Request("GET", "/v1/user")]
    assert (asked.verdict.finding, asked.pages) == (Finding.DEAD, ())


@pytest.mark.parametrize(
    ("dataset", "column"),
    [
        (Dataset.USAGE_PRODUCT, "product_type"),
        (Dataset.USAGE_MEMBER, "user_id"),
        (Dataset.USAGE_API_KEY, "hashed_xi_api_key"),
    ],
)
def test_usage_is_asked_by_utc_day_and_one_dimension(dataset: Dataset, column: str) -> None:
    """Usage is asked in whole UTC days, interval always given, end inclusive to its last millisecond."""
    provider = Provider(date(2100, 1, 1), set())
    asked = drive(ask(dataset, WINDOW, now=NOW, cost_since=None), provider)
    (request,) = provider.asked
    start_ms = int(datetime(2026, 4, 1, tzinfo=UTC).timestamp()) * 1000
    assert (request.method, request.path) == ("POST", CREDITS)
    assert body_of(request) == {
        "start_time": start_ms,
        "end_time": start_ms + 30 * DAY_MS - 1,
        "interval_seconds": 86_400,
        "group_by": [column],
        "time_zone": "UTC",
    }
    assert [(page.billing, page.window) for page in asked.pages] == [(Billing.CREDITS, WINDOW)]
    assert asked.cost_since is None


QUARTER = Window(START - timedelta(days=60), START + timedelta(days=30))
"""Three questions of 30 days."""


def test_many_days_are_asked_piece_by_piece_the_latest_first() -> None:
    """No request asks for more than 30 days; together they are one answer for all of them."""
    used = {QUARTER.start + timedelta(days=n) for n in range(90)}
    provider = Provider(date(2100, 1, 1), used)
    asked = ask_usage(provider, window=QUARTER)
    starts = [utc_day(body_of(request)["start_time"]) for request in provider.asked]
    assert starts == [START, START - timedelta(days=30), START - timedelta(days=60)]
    assert asked.window == QUARTER
    assert used_days(asked) == used


def test_a_large_answer_is_enough_for_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by what one observation holds: the days before are left for another."""
    monkeypatch.setattr(asking, "ENOUGH_BYTES", 100)
    provider = Provider(date(2100, 1, 1), {START})
    asked = ask_usage(provider, window=QUARTER)
    assert len(provider.asked) == 1
    assert (asked.verdict.ok, asked.window, asked.rest) == (True, WINDOW, None)


def test_the_latest_days_of_an_answer_stand_alone() -> None:
    """What else was answered may be unreadable; of one piece there is nothing to leave out."""
    asked = ask_usage(Provider(START, {START}), window=QUARTER)
    latest = asked.latest(30)
    assert latest is not None
    assert (latest.window, latest.rest, latest.latest(30)) == (WINDOW, None, None)
    assert [page.window for page in latest.pages] == [WINDOW]
    assert Asked(OK_VERDICT, (Page(None, None, b"[]"),)).latest(30) is None


@pytest.mark.parametrize("trouble", [TryLater("network", "gone"), ContractBroken("body_too_large", "too much")])
@pytest.mark.parametrize("answered", [0, 1, 2])
def test_what_was_answered_before_trouble_counts(answered: int, trouble: TryLater | ContractBroken) -> None:
    """Without an answer to a later piece the pieces before it stand; without any there is nothing."""
    question = ask(Dataset.USAGE_MEMBER, QUARTER, now=NOW, cost_since=None)
    provider = Provider(date(2100, 1, 1), {START})
    request = next(question)
    for _ in range(answered):
        request = question.send(provider(request))
    with pytest.raises(StopIteration) as stopped:
        question.throw(trouble)
    asked: Asked = stopped.value.value
    if not answered:
        assert (asked.verdict, asked.pages, asked.window) == (unanswered(trouble), (), None)
        return
    assert (asked.verdict.ok, asked.rest) == (True, unanswered(trouble))
    assert asked.window == Window(QUARTER.end - timedelta(days=30 * answered), QUARTER.end)
    assert sorted(page.window.start for page in asked.pages if page.window) == [
        QUARTER.end - timedelta(days=30 * n) for n in range(answered, 0, -1)
    ]


def test_a_refusal_of_an_early_piece_leaves_the_later_ones() -> None:
    """The refused days are asked again as a part of their own, where the refusal is the part's."""
    provider = Provider(date(2100, 1, 1), {START})

    def refuses_old_days(request: Request) -> Answer:
        return provider(request) if utc_day(body_of(request)["start_time"]) == START else error(500, "internal")

    asked = ask_usage(refuses_old_days, window=QUARTER)
    assert (asked.verdict.ok, asked.window) == (True, WINDOW)
    assert asked.rest is not None
    assert asked.rest.finding is Finding.TRANSIENT
    first = ask_usage(refuses_old_days, window=Window(QUARTER.start, START))
    assert (first.verdict.finding, first.pages) == (Finding.TRANSIENT, ())


@pytest.mark.parametrize("switched", [5, 30, 45, 75])
def test_a_switch_to_money_is_found_in_whatever_piece_it_lies(switched: int) -> None:
    """Pieces asked later know what earlier ones learned, and days billed in money are asked in money only."""
    switch = QUARTER.start + timedelta(days=switched)
    used = {QUARTER.start + timedelta(days=n) for n in range(90)}
    asked = ask_usage(Provider(switch, used), window=QUARTER)
    assert (asked.window, asked.cost_since) == (QUARTER, switch)
    assert used_days(asked) == used
    tiles = sorted((page.window.start, page.window.end) for page in asked.pages if page.window)
    assert tiles[0][0] == QUARTER.start
    assert tiles[-1][1] == QUARTER.end
    assert all(before[1] == after[0] for before, after in itertools.pairwise(tiles))


def test_the_end_is_cut_to_now() -> None:
    """A window that is not over is asked up to now; its page still covers the whole window."""
    provider = Provider(date(2100, 1, 1), set())
    window = Window(date(2026, 5, 18), date(2026, 5, 21))
    asked = ask_usage(provider, window=window)
    assert body_of(provider.asked[0])["end_time"] == int(NOW.timestamp() * 1000)
    assert asked.pages[0].window == window


@pytest.mark.parametrize("window", [None, Window(date(2026, 5, 21), date(2026, 5, 22))])
def test_usage_needs_a_window_that_has_begun(window: Window | None) -> None:
    """Usage without a window, or of the future, is our bug and fails loudly."""
    with pytest.raises(ValueError, match="has begun"):
        next(ask(Dataset.USAGE_PRODUCT, window, now=NOW, cost_since=None))


def test_a_window_holds_a_day() -> None:
    """A window of no days cannot be made."""
    with pytest.raises(ValueError, match="at least one day"):
        Window(START, START)


def test_a_known_switch_splits_the_window_into_two_pages() -> None:
    """Days before a known switch are asked in credits, days from it on in money, without trying."""
    provider = Provider(day(10), {day(n) for n in range(30)})
    asked = ask_usage(provider, cost_since=day(10))
    assert [request.path for request in provider.asked] == [CREDITS, COST]
    assert "time_zone" not in body_of(provider.asked[1])
    assert [(page.billing, page.window) for page in asked.pages] == [
        (Billing.CREDITS, Window(day(0), day(10))),
        (Billing.COST, Window(day(10), day(30))),
    ]
    assert asked.cost_since == day(10)


@pytest.mark.parametrize(("cost_since", "path"), [(day(-5), COST), (day(0), COST), (day(30), CREDITS)])
def test_a_window_on_one_side_of_the_switch_is_one_request(cost_since: date, path: str) -> None:
    """A window that does not cross the known switch is one request, to the side it lies on."""
    provider = Provider(cost_since, set())
    asked = ask_usage(provider, cost_since=cost_since)
    assert [request.path for request in provider.asked] == [path]
    assert asked.cost_since == cost_since


def test_a_switch_that_is_still_to_come_is_not_asked_in_money() -> None:
    """Until the switch day has come the window is asked in credits alone."""
    provider = Provider(date(2026, 5, 22), set())
    window = Window(date(2026, 5, 18), date(2026, 5, 25))
    asked = ask_usage(provider, window=window, cost_since=date(2026, 5, 22))
    assert [page.window for page in asked.pages] == [window]
    assert asked.cost_since == date(2026, 5, 22)


@pytest.mark.parametrize("switch", range(30))
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("zero_filled", [False, True])
def test_every_switch_day_of_a_window_is_found(switch: int, refusal: int, zero_filled: bool) -> None:
    """The switch is found whichever day it is, with three more requests at most when every day was used."""
    provider = Provider(day(switch), {day(n) for n in range(30)}, refusal=refusal, zero_filled=zero_filled)
    asked = ask_usage(provider)
    assert asked.verdict.ok
    assert asked.cost_since == day(switch)
    assert used_days(asked) == provider.used
    assert len(provider.asked) <= 3


@given(
    switch=st.integers(-3, 33),
    used=st.sets(st.integers(0, 29)),
    length=st.integers(1, 30),
    known=st.none() | st.integers(0, 40),
    zero_filled=st.booleans(),
)
def test_no_used_day_is_lost_at_the_switch(
    switch: int, used: set[int], length: int, known: int | None, zero_filled: bool
) -> None:
    """Whatever days were idle and whatever was known, pages tile the window, hold all usage, cost little."""
    window = Window(day(0), day(length))
    provider = Provider(day(switch), {day(n) for n in used if n < length}, zero_filled=zero_filled)
    known_day = None if known is None else day(max(known, switch))
    asked = ask_usage(provider, window=window, cost_since=known_day)
    assert asked.verdict.ok
    covered = [page.window for page in asked.pages if page.window]
    assert [covered[0].start, *(w.end for w in covered)] == [*(w.start for w in covered), window.end]
    assert used_days(asked) == provider.used
    assert len(provider.asked) <= 9
    if switch < length:
        assert asked.cost_since == day(max(switch, 0)) or asked.cost_since == known_day == day(switch)
    else:
        assert asked.cost_since == known_day


@pytest.mark.parametrize(
    "first",
    [
        error(401, "missing_permissions"),
        error(401, "invalid_api_key"),
        error(401, "unheard_of"),
        error(402, "payment_required"),
        error(404, "not_found"),
        error(429, "system_busy"),
        error(500, "internal_error"),
        Answer(403, {}, b"<html>"),
    ],
)
def test_an_error_that_is_no_switch_is_reported_at_once(first: Answer) -> None:
    """Money is not tried for a missing scope, a dead key, a plan, an outage."""
    sent = []

    def answer(request: Request) -> Answer:
        sent.append(request)
        return first

    asked = ask_usage(answer, cost_since=None)
    assert len(sent) == 1
    assert not asked.verdict.ok
    assert asked.pages == ()


def test_when_money_fails_too_the_first_error_counts() -> None:
    """A refusal of both requests is the refusal of the first, and what was known stays known."""
    asked = ask_usage(
        lambda request: error(422, "wrong") if request.path == CREDITS else error(403, "forbidden"),
        cost_since=day(40),
    )
    assert (asked.verdict.finding, asked.verdict.reason) == (Finding.BUG, "validation")
    assert (asked.pages, asked.cost_since) == ((), day(40))


def test_an_outage_at_the_second_request_is_an_outage() -> None:
    """If money cannot be tried for now, the refusal in credits proves nothing yet."""
    asked = ask_usage(lambda request: error(403 if request.path == CREDITS else 503, "forbidden"))
    assert asked.verdict.finding is Finding.TRANSIENT


def test_an_outage_in_the_search_ends_it_without_pages() -> None:
    """If the search for the switch breaks off, nothing is learned and nothing is claimed."""
    provider = Provider(day(9), {day(20)})

    def answer(request: Request) -> Answer:
        return error(500, "internal_error") if len(provider.asked) == 4 else provider(request)

    asked = ask_usage(answer)
    assert (asked.verdict.finding, asked.pages, asked.cost_since) == (Finding.TRANSIENT, (), None)


def test_a_failure_after_the_switch_leaves_no_half_answer() -> None:
    """When the second page fails the first is not handed out: an observation is whole."""
    asked = ask_usage(
        lambda request: Answer(200, {}, table([])) if request.path == CREDITS else error(500, "x"),
        cost_since=day(10),
    )
    assert (asked.verdict.finding, asked.pages, asked.cost_since) == (Finding.TRANSIENT, (), day(10))


def test_a_strange_table_at_the_switch_breaks_the_contract() -> None:
    """If the answer in money is no table we know, the verdict says so."""
    asked = ask_usage(lambda request: error(400, "wrong") if request.path == CREDITS else Answer(200, {}, b"[]"))
    assert (asked.verdict.finding, asked.verdict.reason) == (Finding.SCHEMA, "table_shape")
