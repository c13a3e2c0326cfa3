"""The server: routes, the order of checks, and the headers every answer carries."""

import asyncio
import gzip
import secrets
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import chain, count
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Final

import orjson
from aiohttp import web

from worker.dev.simulator.control import add_control
from worker.dev.simulator.damage import DAMAGES
from worker.dev.simulator.endpoints import ENDPOINTS, Asked, Endpoint
from worker.dev.simulator.errors import (
    Answer,
    Problem,
    bearer_refused,
    invalid_key,
    missing_key,
    missing_scope,
)
from worker.dev.simulator.faults import ANSWERS, Fault
from worker.dev.simulator.world import AccessKey, Workspace, World

# Seen in the wild on every answer (OWASP/Nest#3861, home-assistant/core#160414).
HEADERS: Final = {
    "server": "uvicorn",
    "x-region": "us-central1",
    "via": "1.1 google",
    "strict-transport-security": "max-age=31536000; includeSubDomains",
    "access-control-allow-origin": "*",
}
GZIP_FROM_BYTES: Final = 4_096
MOST_BODY_BYTES: Final = 1 << 28
# What nginx logs for a connection closed without an answer; never sent.
NO_ANSWER: Final = 499
# Linger zero seconds: closing then sends a reset.
RESET: Final = struct.pack("ii", 1, 0)
LOOK_S: Final = 0.05

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(world: World) -> web.Application:
    """Build the application that serves a world: the provider's endpoints and the control door."""
    app = web.Application(client_max_size=MOST_BODY_BYTES)
    provider = Provider(world)
    for endpoint in ENDPOINTS:
        app.router.add_route("*", endpoint.path, provider.handler(endpoint))
    add_control(app, world)
    app.router.add_route("*", "/{tail:.*}", provider.unrouted)
    return app


class Provider:
    """Answers provider requests from a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._run = secrets.token_hex(8)
        self._serials = count(1)

    def _trace_id(self) -> str:
        return f"{self._run}{next(self._serials):016x}"

    async def unrouted(self, request: web.Request) -> web.StreamResponse:
        """Answer a path nobody serves (seen in the wild)."""
        self._world.requests["", "unrouted"] += 1
        trace_id = self._trace_id()
        return await self._send(request, Problem(404, "Not Found").answer(trace_id), trace_id, None)

    def handler(self, endpoint: Endpoint) -> Handler:
        """Give the request handler of one endpoint."""

        async def handle(request: web.Request) -> web.StreamResponse:
            world = self._world
            statuses, trace_id = world.statuses, self._trace_id()
            key = world.keys.get(request.headers.get("xi-api-key", ""))
            workspace = None if key is None else key.workspace
            world.requests["" if workspace is None else workspace.name, endpoint.path] += 1
            if workspace is not None:
                workspace.in_flight += 1
                workspace.most_in_flight = max(workspace.most_in_flight, workspace.in_flight)
            try:
                if world.latency_s:
                    await asyncio.sleep(world.latency_s)
                try:
                    answer = await self._answer(request, endpoint, key)
                except Problem as found:
                    answer = found.answer(trace_id)
                statuses[answer.status] += 1
                return await self._send(request, answer, trace_id, workspace)
            finally:
                if workspace is not None:
                    workspace.in_flight -= 1

        return handle

    async def _answer(self, request: web.Request, endpoint: Endpoint, key: AccessKey | None) -> Answer:
        """Check in the provider's order: method, validation, (faults,) key, scope (seen in the wild)."""
        if request.method != endpoint.method:
            raise Problem(405, "Method Not Allowed", {"Allow": endpoint.method})
        body = await request.read() if endpoint.method == "POST" else b""
        asked = Asked(request.query, body, request.match_info.get("id", ""))
        arguments = endpoint.read(self._world, asked)
        live = key if key is not None and key.state == "live" else None
        later: list[Fault] = []
        for fault in chain(self._world.faults, () if live is None else live.workspace.faults):
            if not fault.strikes(request.method, request.path, self._world.random):
                continue
            if fault.kind in ANSWERS:
                made = ANSWERS[fault.kind][1](fault.params)
                if isinstance(made, Problem):
                    raise made
                return made
            if fault.kind == "slow":
                await asyncio.sleep(fault.params["seconds"])
            elif fault.kind in {"hang", "reset"}:
                await _leave_unanswered(request, hang=fault.kind == "hang")
                return Answer(NO_ANSWER, b"")
            else:
                later.append(fault)
        workspace = self._admit(request, endpoint, live)
        answer = Answer(200, self._body(endpoint, workspace, arguments))
        for fault in later:
            if fault.kind == "truncated":
                answer = replace(answer, cut=True)
            else:
                answer = replace(answer, body=DAMAGES[fault.kind][1](answer.body, fault.params))
        return answer

    def _admit(self, request: web.Request, endpoint: Endpoint, key: AccessKey | None) -> Workspace:
        if "xi-api-key" not in request.headers:
            bearer = request.headers.get("Authorization", "").lower().startswith("bearer ")
            raise bearer_refused() if bearer else missing_key()
        if key is None:
            raise invalid_key()
        if key.scopes is not None and endpoint.scope not in key.scopes:
            raise missing_scope(endpoint.scope, key.workspace.quirks.scope_form)
        if endpoint.admit is not None:
            endpoint.admit(key.workspace)
        return key.workspace

    def _body(self, endpoint: Endpoint, workspace: Workspace, arguments: Any) -> bytes:
        world = self._world
        place = (workspace.serial, workspace.generation, world.today(), endpoint.path, arguments)
        body = world.cache.get(place)
        if body is None:
            # Copied, since what orjson gives back holds on to a buffer up to twice its size.
            body = bytes(memoryview(orjson.dumps(endpoint.answer(world, workspace, arguments))))
            world.cache.put(place, body)
        return body

    def _zipped(self, request: web.Request, body: bytes, workspace: Workspace | None) -> bytes | None:
        asked = "gzip" in request.headers.get("Accept-Encoding", "")
        wish = None if workspace is None else workspace.quirks.gzip
        if not asked or not (len(body) >= GZIP_FROM_BYTES if wish is None else wish):
            return None
        zipped = self._world.cache.get(body)
        if zipped is None:
            zipped = gzip.compress(body, 1, mtime=0)
            self._world.cache.put(body, zipped)
        return zipped

    async def _send(
        self, request: web.Request, answer: Answer, trace_id: str, workspace: Workspace | None
    ) -> web.StreamResponse:
        headers = {**HEADERS, "x-trace-id": trace_id, "content-type": answer.media_type}
        if answer.headers is not None:
            headers.update(answer.headers)
        body = answer.body
        zipped = self._zipped(request, body, workspace)
        if zipped is not None:
            body = zipped
            headers["content-encoding"] = "gzip"
        if not answer.cut:
            return web.Response(body=body, status=answer.status, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        if request.transport is not None:
            request.transport.close()
        return response


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


async def _leave_unanswered(request: web.Request, *, hang: bool) -> None:
    """Wait until the client goes away, or send it a reset at once."""
    while hang and not _gone(request):  # noqa: ASYNC110 - a transport tells its end to nobody who waits
        await asyncio.sleep(LOOK_S)
    if not hang and request.transport is not None:
        request.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, RESET)
        request.transport.abort()
