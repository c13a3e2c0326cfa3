"""Lines to a real Redis, over a network that fails: what is asked is answered in order, or told as not answered."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tests.fixtures.proxy import Proxy
from worker.redis import Line, client

BOUND_S = 0.2
PATIENCE_S = 10.0


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    port = urlsplit(redis_url).port
    assert port is not None
    with Proxy(port) as made:
        yield made


@pytest.fixture
async def redis(redis_url: str, proxy: Proxy) -> AsyncIterator[Redis]:
    made = client(SecretStr(proxy.through(redis_url)))
    yield made
    await made.aclose()


@pytest.fixture
async def line(redis: Redis) -> AsyncIterator[Line]:
    made = Line(redis)
    yield made
    await made.close()


async def test_answers_stand_in_order_with_what_was_refused_among_them(line: Line) -> None:
    """A command that the server refuses costs no other its answer, in this pipeline and in the next."""
    answers = await line.exchange([("SET", "a", b"1"), ("LPUSH", "a", "x"), ("HMGET", "b", "v"), ("GET", "a")])
    assert isinstance(answers.pop(1), ResponseError)
    assert answers == [b"OK", [None], b"1"]
    assert await line.exchange([("GET", "a")]) == [b"1"]


async def test_a_broken_connection_is_made_anew(line: Line, proxy: Proxy) -> None:
    """Who asks over a connection that the network has ended, in order or not, or within an answer, is answered."""
    large = b"x" * 100_000
    await line.exchange([("SET", "a", large)])
    for harm in (proxy.cut, proxy.reset, lambda: proxy.truncate(50_000)):
        harm()
        assert await line.exchange([("GET", "a"), ("STRLEN", "a")]) == [large, len(large)]


async def test_a_server_that_is_away_is_told(line: Line, proxy: Proxy) -> None:
    """It is an error of the driver's, and when the server is back the same line works."""
    proxy.refuse()
    with pytest.raises(RedisError):
        await line.exchange([("GET", "a")])
    proxy.heal()
    assert await line.exchange([("GET", "a")]) == [None]


async def test_a_silent_server_is_not_waited_for(redis: Redis, proxy: Proxy) -> None:
    """Nobody waits for ever, and what comes late is nobody's answer."""
    line = Line(redis, timeout_s=BOUND_S)
    await line.exchange([("SET", "a", b"1")])
    proxy.hang()
    began = time.monotonic()
    with pytest.raises(RedisError, match="not answered"):
        await line.exchange([("GET", "a")])
    assert time.monotonic() - began < PATIENCE_S
    proxy.heal()
    assert await line.exchange([("GET", "b")]) == [None]
    await line.close()
