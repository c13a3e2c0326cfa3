"""The client against a real HTTP server on loopback: what only a socket can show."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from pydantic import SecretStr

from worker.elevenlabs.asking import probe
from worker.elevenlabs.client import Client
from worker.elevenlabs.protocol import Finding, Request
from worker.errors import ContractBroken, TryLater

KEY = SecretStr("sk_" + "c0ffee" * 8)
USER = Request("GET", "/v1/user")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Answer every request by `handler`; yields the base URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def saying(raw: bytes) -> AsyncIterator[str]:
    """Answer every connection by the same raw bytes, then hang up; yields the base URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def no_sleep(_: float) -> None:
    """Wait nothing between attempts."""


async def test_a_request_carries_key_and_name_over_the_wire() -> None:
    """The server sees the key, our name, the parameters, and the body byte for byte."""
    seen: dict[str, object] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update({name.lower(): value for name, value in request.headers.items()})
        seen.update(query=dict(request.query), body=await request.read())
        return web.json_response({"ok": True})

    request = Request("POST", "/v1/x", (("name", "a b&c"),), b'{"start_time":1}')
    async with serving(handler) as base, Client() as client:
        answer = await client.send(base, KEY, request, deadline_s=5)
    assert answer.body == b'{"ok": true}'
    assert seen["xi-api-key"] == KEY.get_secret_value()
    assert str(seen["user-agent"]).startswith("rollcall/")
    assert (seen["query"], seen["body"]) == ({"name": "a b&c"}, request.body)
    assert seen["content-type"] == "application/json"


async def test_a_compressed_body_arrives_decompressed() -> None:
    """Gzip is undone before the body is judged."""

    async def handler(_: web.Request) -> web.Response:
        packed = gzip.compress(b'{"a": 1}')
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    async with serving(handler) as base, Client() as client:
        assert (await client.send(base, KEY, USER, deadline_s=5)).body == b'{"a": 1}'


async def test_the_limit_counts_decompressed_bytes() -> None:
    """A small body that unpacks to a huge one is cut off at the limit."""

    async def handler(_: web.Request) -> web.Response:
        packed = gzip.compress(b" " * 20_000_000)
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    async with serving(handler) as base, Client(max_body_bytes=100_000) as client:
        with pytest.raises(ContractBroken):
            await client.send(base, KEY, USER, deadline_s=10)


async def test_the_key_does_not_follow_a_redirect() -> None:
    """A redirect to another host is not followed: that host is never asked."""
    asked: list[str] = []

    async def other(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({})

    async with serving(other) as elsewhere:

        async def handler(_: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": elsewhere + "/v1/user"})

        async with serving(handler) as base, Client(sleep=no_sleep) as client:
            asked_ = await client.converse(base, KEY, probe(), deadline_s=5)
    assert (asked_.verdict.finding, asked_.verdict.reason) == (Finding.TRANSIENT, "redirected")
    assert asked == []


async def test_attempts_are_one_after_another() -> None:
    """However often it is sent again, one call never has two requests at the server."""
    now = most = total = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal now, most, total
        now, total = now + 1, total + 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return web.Response(status=503)

    async with serving(handler) as base, Client(attempts=5, sleep=no_sleep) as client:
        await client.send(base, KEY, USER, deadline_s=5)
    assert (total, most) == (5, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n[{"user_id"',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[1,2,\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 7\r\n\r\nnotgzip",
        b"HTTP/1.1 200 OK\r\nx" + b"y" * 20_000,
        b"",
        b"SSH-2.0-nonsense\r\n\r\n",
    ],
)
async def test_a_truncated_or_broken_answer_is_to_try_later(raw: bytes) -> None:
    """An answer cut off, mangled or missing is network trouble, never a short listing."""
    async with saying(raw) as base, Client(attempts=2, sleep=no_sleep) as client:
        with pytest.raises(TryLater) as later:
            await client.send(base, KEY, USER, deadline_s=5)
        assert later.value.reason == "network"
        assert later.value.__context__ is None


async def test_a_closed_port_is_to_try_later() -> None:
    """A server that is not there is network trouble."""
    async with saying(b"") as base:
        pass
    async with Client(attempts=1) as client:
        with pytest.raises(TryLater, match="could not be reached"):
            await client.send(base, KEY, USER, deadline_s=5)


@pytest.mark.parametrize("head", [False, True])
async def test_a_slow_answer_meets_its_timeout(head: bool) -> None:
    """A server that stalls before or within its answer is given up in time, and asked no more than bounded."""
    asked = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        response = web.StreamResponse()
        if head:
            await response.prepare(request)
            await response.write(b"[")
        await asyncio.sleep(30)
        return response

    began = asyncio.get_running_loop().time()
    async with serving(handler) as base, Client(timeout_s=0.1, attempts=2, sleep=no_sleep) as client:
        verdict = (await client.converse(base, KEY, probe(), deadline_s=5)).verdict
    assert (verdict.finding, verdict.reason, asked) == (Finding.TRANSIENT, "timeout", 2)
    assert asyncio.get_running_loop().time() - began < 3


async def test_the_deadline_bounds_everything() -> None:
    """A conversation ends at its deadline even if attempts and timeouts would allow more."""

    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    began = asyncio.get_running_loop().time()
    async with serving(handler) as base, Client(timeout_s=30, attempts=9, sleep=no_sleep) as client:
        verdict = (await client.converse(base, KEY, probe(), deadline_s=0.2)).verdict
    assert verdict.reason == "timeout"
    assert asyncio.get_running_loop().time() - began < 3


async def test_cancelling_is_not_swallowed() -> None:
    """A cancelled call ends as cancelled: it is no trouble of the network."""
    begun = asyncio.Event()

    async def handler(_: web.Request) -> web.Response:
        begun.set()
        await asyncio.sleep(30)
        return web.Response()

    async with serving(handler) as base, Client() as client:
        task = asyncio.create_task(client.send(base, KEY, USER, deadline_s=30))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
