"""A real Redis, over a network that fails: what is asked is answered in order, or told as not answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tests.fixtures.proxy import Proxy
from worker.autopipeline import AutoPipeline
from worker.errors import TryLater
from worker.redis import RETRIES, Line, answering, client

BOUND_S = 0.2


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
    """It is asked no more often than is bounded, and what comes late is nobody's answer."""
    line = Line(redis, timeout_s=BOUND_S)
    await line.exchange([("SET", "a", b"1")])
    proxy.hang()
    before = proxy.accepted
    with pytest.raises(RedisError, match="No answer"):
        await line.exchange([("GET", "a")])
    assert proxy.accepted - before == RETRIES
    proxy.heal()
    assert await line.exchange([("GET", "b")]) == [None]
    await line.close()


async def test_a_slow_server_is_waited_for(redis: Redis, proxy: Proxy) -> None:
    """As long as answers come they may take longer, all together, than one may take."""
    line = Line(redis, timeout_s=2)
    waiting = [("BLPOP", "nothing", "0.05")] * 60
    assert await line.exchange(waiting) == [None] * 60
    assert proxy.accepted == 1
    await line.close()


async def test_a_cancelled_exchange_ends_and_leaves_nothing(line: Line) -> None:
    """At whatever moment it is cancelled, the next one gets its own answers."""

    async def asking() -> None:
        while True:
            assert await line.exchange([("ECHO", "a"), ("ECHO", "b")]) == [b"a", b"b"]

    for moment in range(40):
        task = asyncio.create_task(asking())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (moment, task.cancelled()) == (moment, True)
        assert await line.exchange([("ECHO", str(moment))]) == [str(moment).encode()]


@pytest.mark.parametrize(("setting", "value"), [("maxmemory", "1"), ("min-replicas-to-write", "1")])
async def test_a_server_that_takes_no_writes_is_waited_for(redis: Redis, line: Line, setting: str, value: str) -> None:
    """It is full, or its replicas are gone: who writes hears to try later, whichever way it is asked."""
    before = await redis.config_get(setting)
    pipeline = AutoPipeline([line])
    await redis.config_set(setting, value)
    try:
        for write in (lambda: pipeline.send(("SET", "a", b"1")), lambda: _set(redis)):
            with pytest.raises(TryLater, match="refuses to write") as caught:
                await write()
            assert caught.value.reason == "redis_refuses"
    finally:
        await redis.config_set(setting, before[setting])
    assert await pipeline.send(("SET", "a", b"1")) == [b"OK"]


async def _set(redis: Redis) -> None:
    with answering():
        await redis.set("a", b"1")
