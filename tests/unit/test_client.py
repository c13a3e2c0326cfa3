"""The client's rules for sending again, with the network replaced."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
import structlog
from aioresponses import aioresponses
from pydantic import SecretStr
from structlog.testing import capture_logs
from yarl import URL

from schemas.connectors import Dataset
from worker.elevenlabs import client as client_module
from worker.elevenlabs.asking import Asked, Window, ask, probe
from worker.elevenlabs.client import Client
from worker.elevenlabs.protocol import Answer, Finding, Request
from worker.errors import ContractBroken, Refused, TryLater

BASE = "https://api.elevenlabs.io"
KEY = SecretStr("sk_" + "c0ffee" * 8)
USER = Request("GET", "/v1/user")
URL_USER = BASE + USER.path
NOW = datetime(2026, 4, 10, 12, tzinfo=UTC)


class Sleeps:
    """Waits nothing and remembers how long it should have waited, in seconds."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.waited_s.append(seconds)


class Response(aiohttp.ClientResponse):
    """A response that aioresponses can make (aioresponses#289: it does not know aiohttp 3.14's new argument)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"stream_writer": Mock(output_size=0)} | kwargs)


class Web(aioresponses):
    """The mocked network, answering with `Response`."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **{"response_class": Response} | kwargs)


@pytest.fixture
def web() -> Iterator[Web]:
    mocked = Web()
    with mocked:
        yield mocked


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
async def client(sleeps: Sleeps) -> AsyncIterator[Client]:
    rng = random.Random(1)  # noqa: S311 - jitter, no secret
    async with Client(sleep=sleeps, rng=rng, clock=lambda: NOW, max_body_bytes=1000) as opened:
        yield opened


async def send(client: Client, request: Request = USER, *, deadline_s: float = 60) -> Answer:
    return await client.send(BASE, KEY, request, deadline_s=deadline_s)


def times_asked(web: Web) -> int:
    return sum(len(calls) for calls in web.requests.values())


async def test_an_answer_is_status_lower_case_headers_and_body(client: Client, web: Web) -> None:
    """A good answer is handed out at once, its header names in lower case."""
    web.get(URL_USER, body=b'{"a": 1}', headers={"X-Trace-Id": "t1"})
    answer = await send(client)
    assert (answer.status, answer.body, answer.headers["x-trace-id"]) == (200, b'{"a": 1}', "t1")
    assert times_asked(web) == 1


async def test_a_query_is_sent_whole_and_follows_no_redirect(client: Client, web: Web) -> None:
    """Body, type, parameters and key go out as given, and a redirect is never followed."""
    request = Request("POST", "/v1/x", (("a", "1"),), b'{"b": 2}')
    web.post(f"{BASE}/v1/x?a=1", body=b"{}")
    await send(client, request)
    (call,) = web.requests["POST", URL(f"{BASE}/v1/x?a=1")]
    assert call.kwargs["data"] == request.body
    assert call.kwargs["headers"]["content-type"] == "application/json"
    assert call.kwargs["headers"]["xi-api-key"] == KEY.get_secret_value()
    assert call.kwargs["allow_redirects"] is False


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422, 501])
async def test_what_time_does_not_heal_is_not_sent_again(client: Client, web: Web, sleeps: Sleeps, status: int) -> None:
    """An answer that is no passing trouble is returned after one attempt."""
    web.get(URL_USER, status=status, payload={"detail": "no"}, repeat=True)
    assert (await send(client)).status == status
    assert (times_asked(web), sleeps.waited_s) == (1, [])


@pytest.mark.parametrize("status", [302, 408, 409, 429, 500, 502, 503])
async def test_passing_trouble_is_sent_again_and_heals(client: Client, web: Web, sleeps: Sleeps, status: int) -> None:
    """Passing trouble is asked again after a jittered wait, one request at a time."""
    web.get(URL_USER, status=status)
    web.get(URL_USER, body=b"{}")
    assert (await send(client)).status == 200
    assert times_asked(web) == 2
    assert [0 <= wait <= 0.5 for wait in sleeps.waited_s] == [True]


async def test_attempts_are_bounded_and_the_last_answer_returned(client: Client, web: Web, sleeps: Sleeps) -> None:
    """After three attempts the last answer is handed out, whatever it says."""
    web.get(URL_USER, status=503, repeat=True)
    assert (await send(client)).status == 503
    assert (times_asked(web), len(sleeps.waited_s)) == (3, 2)


@pytest.mark.parametrize("body", [b"", b"[{", b"<html>"])
async def test_an_unreadable_success_is_sent_again(client: Client, web: Web, body: bytes) -> None:
    """A success without complete JSON is passing trouble."""
    web.get(URL_USER, body=body)
    web.get(URL_USER, body=b"{}")
    assert (await send(client)).body == b"{}"


async def test_a_wait_that_was_asked_for_is_kept(client: Client, web: Web, sleeps: Sleeps) -> None:
    """The provider's wait, here an HTTP date, is the least the client waits."""
    web.get(URL_USER, status=429, headers={"Retry-After": "Fri, 10 Apr 2026 12:00:07 GMT"})
    web.get(URL_USER, body=b"{}")
    await send(client)
    assert [7 <= wait <= 7.5 for wait in sleeps.waited_s] == [True]


async def test_a_wait_beyond_the_deadline_is_not_begun(client: Client, web: Web, sleeps: Sleeps) -> None:
    """When the wait would outlast the deadline, the answer is returned now, its wait left to the caller."""
    web.get(URL_USER, status=429, headers={"Retry-After": "30"}, repeat=True)
    assert (await send(client, deadline_s=20)).status == 429
    assert (times_asked(web), sleeps.waited_s) == (1, [])


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (aiohttp.ClientConnectionError("connect"), "network"),
        (aiohttp.ClientPayloadError("truncated"), "network"),
        (aiohttp.ServerDisconnectedError(), "network"),
        (ConnectionResetError("reset"), "network"),
        (TimeoutError(), "timeout"),
        (aiohttp.ServerTimeoutError(), "timeout"),
    ],
)
async def test_no_answer_at_all_is_to_try_later(client: Client, web: Web, trouble: Exception, reason: str) -> None:
    """Network trouble at every attempt raises TryLater with its reason."""
    web.get(URL_USER, exception=trouble, repeat=True)
    with pytest.raises(TryLater) as later:
        await send(client)
    assert later.value.reason == reason
    assert times_asked(web) == 3


async def test_the_last_attempt_counts(client: Client, web: Web) -> None:
    """An answer after network trouble is returned, network trouble after an answer raises."""
    web.get(URL_USER, exception=aiohttp.ClientConnectionError())
    web.get(URL_USER, status=503)
    web.get(URL_USER, status=500)
    assert (await send(client)).status == 500
    web.get(URL_USER, status=503, repeat=2)
    web.get(URL_USER, exception=aiohttp.ClientConnectionError())
    with pytest.raises(TryLater):
        await send(client)


async def test_no_error_shows_the_key(client: Client, web: Web) -> None:
    """An error that leaves the client drags no other error along and shows the key nowhere."""
    trouble = aiohttp.ClientConnectionError(f"xi-api-key: {KEY.get_secret_value()}")
    web.get(URL_USER, exception=trouble, repeat=True)
    with pytest.raises(TryLater) as later:
        await send(client)
    error = later.value
    assert (error.__cause__, error.__context__) == (None, None)
    frames = traceback.TracebackException.from_exception(error, capture_locals=True).stack
    told = [str(frame.locals) for frame in frames if frame.filename != __file__]
    assert told
    assert KEY.get_secret_value() not in "".join(told)


async def test_an_error_body_never_repeats_the_key(client: Client, web: Web) -> None:
    """The very key is struck from an error body, whatever shape it has; good bodies stay as they came."""
    odd = SecretStr("canary.key.without.shape")
    body = json.dumps({"detail": f"Key {odd.get_secret_value()} is wrong"}).encode()
    web.get(URL_USER, status=403, body=body)
    answer = await client.send(BASE, odd, USER, deadline_s=5)
    assert odd.get_secret_value().encode() not in answer.body
    web.get(URL_USER, body=body)
    assert (await client.send(BASE, odd, USER, deadline_s=5)).body == body


async def test_logs_hold_path_status_and_time_only(client: Client, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt is one debug line without host, key, parameters or body."""
    structlog.reset_defaults()  # an earlier test may have set up logging for good
    monkeypatch.setattr(client_module, "_log", structlog.get_logger())
    web.get(URL_USER, exception=aiohttp.ClientConnectionError())
    web.get(URL_USER, body=b"{}")
    with capture_logs() as lines:
        await send(client)
    assert [line["status"] for line in lines] == [None, 200]
    assert {*lines[0]} == {"event", "log_level", "path", "status", "duration_ms"}
    assert {line["log_level"] for line in lines} == {"debug"}


async def test_a_body_beyond_the_limit_breaks_the_contract(client: Client, web: Web) -> None:
    """A body larger than the limit is not read to its end and not asked again."""
    web.get(URL_USER, body=b"[" + b" " * 1000 + b"]", repeat=True)
    with pytest.raises(ContractBroken) as broken:
        await send(client)
    assert broken.value.reason == "body_too_large"
    assert times_asked(web) == 1


async def test_a_client_must_be_open() -> None:
    """Using a client before `open` or after `close` fails loudly; closing twice does not."""
    client = Client()
    with pytest.raises(RuntimeError, match="open"):
        await send(client)
    await client.open()
    await client.open()
    await client.close()
    await client.close()
    with pytest.raises(RuntimeError, match="open"):
        await send(client)


async def test_no_cookie_is_kept(client: Client) -> None:
    """A cookie set for one request never goes out with the next, which may be another tenant's."""
    assert client._session is not None
    jar = client._session.cookie_jar
    jar.update_cookies({"session": "tenant-a"}, URL(BASE))
    assert not jar.filter_cookies(URL(BASE))


async def converse(client: Client) -> Asked:
    return await client.converse(BASE, KEY, probe(), deadline_s=60)


async def test_a_conversation_goes_to_its_end(client: Client, web: Web) -> None:
    """Every request of a question is sent in turn, and its result returned."""
    window = Window(date(2026, 4, 1), date(2026, 4, 3))
    table = b'{"columns": [], "rows": []}'
    web.post(BASE + "/v1/workspace/analytics/query/usage-by-product-over-time", body=table)
    web.post(BASE + "/v1/workspace/analytics/usage", body=table)
    asking = ask(Dataset.USAGE_PRODUCT, window, now=NOW, cost_since=date(2026, 4, 2))
    asked = await client.converse(BASE, KEY, asking, deadline_s=60)
    assert asked.verdict.ok
    assert [page.body for page in asked.pages] == [table, table]
    assert times_asked(web) == 2


async def test_network_trouble_is_a_verdict_of_a_conversation(client: Client, web: Web) -> None:
    """A conversation without an answer ends with a transient verdict and learns nothing."""
    web.get(URL_USER, exception=aiohttp.ClientConnectionError(), repeat=True)
    asked = await converse(client)
    assert (asked.verdict.finding, asked.verdict.reason) == (Finding.TRANSIENT, "network")
    assert (asked.pages, asked.cost_since) == ((), None)


async def test_an_oversized_body_is_a_verdict_of_a_conversation(client: Client, web: Web) -> None:
    """A conversation with an oversized body ends with a schema verdict."""
    web.get(URL_USER, body=b" " * 2000)
    assert (await converse(client)).verdict.finding is Finding.SCHEMA


async def test_a_question_is_closed_whatever_happens(client: Client) -> None:
    """A question is closed even if the key cannot be sent."""
    asking = probe()
    with pytest.raises(Refused):
        await client.converse(BASE, SecretStr(""), asking, deadline_s=60)
    assert asking.gi_frame is None  # type: ignore[attr-defined] # a generator has it, its abstract type not
