"""Questions to the provider as generators: they yield requests, are sent answers and return what was learned.

No question waits or connects: `client.Client.converse` drives them over HTTP, `drive` with a function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Final, TypeAlias

import orjson

from schemas.connectors import Dataset
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Finding, Request, Verdict, classify
from worker.elevenlabs.tabular import Table, number_or_none, utc_day
from worker.errors import ContractBroken, TryLater

MOST_DAYS: Final = 30
"""Another client caps a window of daily figures at 31 days (seen in the wild), and no row limit is documented."""
ENOUGH_BYTES: Final = 1_000_000
"""Answers of that size are an observation of their own: all of it is in memory at once, in several forms."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY: Final = timedelta(days=1)
_DAY_S: Final = 86_400

_LISTS: Final[dict[Dataset, str]] = {
    Dataset.WORKSPACE: "/v1/user",
    Dataset.MEMBERS: "/v1/workspace/members",
    Dataset.GROUPS: "/v1/workspace/groups",
    Dataset.SERVICE_ACCOUNTS: "/v1/service-accounts",
}

_GROUPED_BY: Final[dict[Dataset, str]] = {
    Dataset.USAGE_PRODUCT: "product_type",
    Dataset.USAGE_MEMBER: "user_id",
    Dataset.USAGE_API_KEY: "hashed_xi_api_key",
}


class Billing(StrEnum):
    """How the provider bills a workspace: first in credits, from its switch date on in money."""

    CREDITS = "credits"
    COST = "cost"


_USAGE: Final[dict[Billing, str]] = {
    Billing.CREDITS: "/v1/workspace/analytics/query/usage-by-product-over-time",
    Billing.COST: "/v1/workspace/analytics/usage",
}
"""A range that reaches the switch date is an error at the first path (official SDK, which tells no body)."""


@dataclass(frozen=True, slots=True)
class Window:
    """Whole UTC days from `start` to before `end`."""

    start: date
    end: date

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError("a window holds at least one day")

    def split(self, day: date | None) -> tuple[Window | None, Window | None]:
        """Return the days before `day` and those from it on; all of them are before None."""
        if day is None or day >= self.end:
            return self, None
        if day <= self.start:
            return None, self
        return Window(self.start, day), Window(day, self.end)

    def backwards(self, most_days: int) -> Iterator[Window]:
        """Cut into windows of at most so many days, the latest first."""
        end = self.end
        while end > self.start:
            start = max(self.start, end - timedelta(days=most_days))
            yield Window(start, end)
            end = start


@dataclass(frozen=True, slots=True)
class Page:
    """One body as it came. Of a usage table only rows inside `window` count: it may hold earlier ones too."""

    billing: Billing | None
    window: Window | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """What a question brought: pages only when the verdict is ok, and then their windows tile `window`.

    `cost_since` is the earliest day known to be billed in money; None says that this question knows of none.
    `window` is of usage only: the days asked for, or the latest of them, when more would be too much at once or
    were not answered; then `rest` is the verdict on the days before.
    """

    verdict: Verdict
    pages: tuple[Page, ...] = ()
    cost_since: date | None = None
    window: Window | None = None
    rest: Verdict | None = None

    def latest(self, days: int) -> Asked | None:
        """Give what it tells of the latest days only; None when that is all."""
        if self.window is None:
            return None
        window = next(self.window.backwards(days))
        if window == self.window:
            return None
        pages = tuple(page for page in self.pages if page.window and page.window.start >= window.start)
        return replace(self, window=window, pages=pages, rest=None)


def unanswered(trouble: TryLater | ContractBroken) -> Verdict:
    """Give the verdict on a request that brought no answer: network trouble, or a body too large."""
    if isinstance(trouble, TryLater):
        return Verdict(Finding.TRANSIENT, trouble.reason, trouble.message, retry_after_s=trouble.retry_after_s)
    return Verdict(Finding.SCHEMA, trouble.reason, trouble.message)


Asking: TypeAlias = Generator[Request, Answer, Asked]


def probe() -> Asking:
    """Ask whether the key is alive, by the cheapest valid request."""
    return (yield from _list(_LISTS[Dataset.WORKSPACE]))


def ask(
    dataset: Dataset, window: Window | None, *, now: datetime, cost_since: date | None, most_days: int = MOST_DAYS
) -> Asking:
    """Ask for a dataset, for usage in a window of days; at most 8 requests for `most_days`, nearly always 1.

    Args:
        dataset: what to list.
        window: usage only; its end is cut to `now`.
        now: aware time.
        cost_since: the first day billed in money as far as known. Days before it that prove to be billed in
            money too move it back.
        most_days: of usage in one request. More are asked for piece by piece, the latest first, until that is
            enough for one observation, or until a later piece fails: `Asked.window` tells what there is.

    Raises:
        ValueError: usage without a window, or a window that lies in the future.

    """
    if dataset in _LISTS:
        return (yield from _list(_LISTS[dataset], now, cost_since))
    if window is None or _midnight(window.start) > now:
        raise ValueError("usage is asked for a window that has begun")
    asked = Asked(OK_VERDICT, cost_since=cost_since)
    for piece in window.backwards(most_days):
        try:
            found = yield from _piece(_GROUPED_BY[dataset], piece, now, asked.cost_since)
        except (TryLater, ContractBroken) as trouble:
            found = Asked(unanswered(trouble))
        if not found.verdict.ok:
            return replace(asked, rest=found.verdict) if asked.pages else found
        asked = Asked(found.verdict, found.pages + asked.pages, found.cost_since, Window(piece.start, window.end))
        if sum(len(page.body) for page in asked.pages) >= ENOUGH_BYTES:
            break
    return asked


def _piece(column: str, window: Window, now: datetime, cost_since: date | None) -> Asking:
    known = cost_since if cost_since is not None and cost_since <= now.astimezone(UTC).date() else None
    before, after = window.split(known)
    asked = Asked(OK_VERDICT)
    if before:
        asked = yield from _maybe_switched(column, before, now)
    if after and asked.verdict.ok:
        rest = yield from _usage(Billing.COST, column, after, now)
        asked = Asked(rest.verdict, asked.pages + rest.pages if rest.verdict.ok else (), asked.cost_since)
    if asked.cost_since is None and cost_since is not None:
        return replace(asked, cost_since=cost_since)
    return asked


def _list(path: str, now: datetime | None = None, cost_since: date | None = None) -> Asking:
    answer = yield Request("GET", path)
    verdict = classify(answer, now)
    return Asked(verdict, (Page(None, None, answer.body),) if verdict.ok else (), cost_since)


def _usage(billing: Billing, column: str, window: Window, now: datetime) -> Asking:
    question: dict[str, object] = {
        "start_time": _ms(_midnight(window.start)),
        "end_time": min(_ms(_midnight(window.end)) - 1, _ms(now)),
        "interval_seconds": _DAY_S,
        "group_by": [column],
    }
    if billing is Billing.CREDITS:
        question["time_zone"] = "UTC"
    answer = yield Request("POST", _USAGE[billing], body=orjson.dumps(question))
    verdict = classify(answer, now)
    return Asked(verdict, (Page(billing, window, answer.body),) if verdict.ok else ())


def _maybe_switched(column: str, window: Window, now: datetime) -> Asking:
    """Ask in credits; when that is refused as it would be past a switch to money, ask in money too."""
    first = yield from _usage(Billing.CREDITS, column, window, now)
    if not _may_be_switch(first.verdict):
        return first
    money = yield from _usage(Billing.COST, column, window, now)
    if not money.verdict.ok:
        # An outage at the second request proves nothing about the first: it has to be asked again.
        return money if money.verdict.finding in (Finding.TRANSIENT, Finding.EDGE) else first
    body = money.pages[0].body
    try:
        spent = _first_day_spent(body, window)
    except ContractBroken as broken:
        return Asked(Verdict(Finding.SCHEMA, broken.reason, broken.message))
    if spent == window.end:
        # Nothing was billed in money: only the refusal speaks for a switch, and it may have been a passing one.
        again = yield from _usage(Billing.CREDITS, column, window, now)
        if not _may_be_switch(again.verdict):
            return again
    credit = yield from _longest_credit_prefix(column, window, spent, now)
    if not credit.verdict.ok:
        return credit
    _, after = window.split(credit.cost_since)
    return replace(credit, pages=(*credit.pages, Page(Billing.COST, after, body)))


def _may_be_switch(verdict: Verdict) -> bool:
    return verdict.finding in (Finding.BUG, Finding.FORBIDDEN) or verdict.reason == "conflict"


def _first_day_spent(body: bytes, window: Window) -> date:
    """Return the first day of the window with an amount (days without may be zero-filled), else its end."""
    table = Table.parse(body)
    if not table.rows:
        return window.end
    at = table.time_index()
    amounts = [position for position, kind in enumerate(table.types) if kind in ("Float", "Int")]
    days = (
        utc_day(row[at], table.units[at])
        for row in table.rows
        if not amounts or any(number_or_none(row[position]) for position in amounts)
    )
    return min((day for day in days if window.start <= day < window.end), default=window.end)


def _longest_credit_prefix(column: str, window: Window, spent: date, now: datetime) -> Asking:
    """Find the days before the switch, given that the whole window is refused in credits.

    The switch is at `spent` or earlier, where only idle days lie between: `spent` is tried first, then the
    days before it are bisected. There is no page when not even the first day is billed in credits.
    """
    accepted, refused, middle = window.start, min(window.end, spent + _DAY), spent
    found = Asked(OK_VERDICT)
    while refused - accepted > _DAY:
        if not accepted < middle < refused:
            middle = accepted + (refused - accepted) // 2
        tried = yield from _usage(Billing.CREDITS, column, Window(window.start, middle), now)
        if tried.verdict.ok:
            accepted, found = middle, tried
        elif _may_be_switch(tried.verdict):
            refused = middle
        else:
            return tried
    return replace(found, cost_since=accepted)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _ms(when: datetime) -> int:
    return (when - _EPOCH) // timedelta(milliseconds=1)


def drive(asking: Asking, answer: Callable[[Request], Answer]) -> Asked:
    """Put a question to a function instead of the network."""
    try:
        request = next(asking)
        while True:
            request = asking.send(answer(request))
    except StopIteration as stop:
        asked: Asked = stop.value
        return asked
