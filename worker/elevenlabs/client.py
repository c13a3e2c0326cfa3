"""The one client that speaks to the provider: a thin shell around `protocol` and `asking`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

import aiohttp
import structlog
from pydantic import SecretStr

from worker.elevenlabs.asking import Asked, Asking, unanswered
from worker.elevenlabs.protocol import Answer, Finding, Request, backoff_s, classify, headers
from worker.errors import ContractBroken, TryLater

_MAX_BODY_BYTES: Final = 64 * 1024 * 1024
_FIRST_ERROR: Final = 300
_SHORTEST_KEY: Final = 8

_log = structlog.get_logger()


class Client:
    """Sends read-only requests, one after another within a call; safe to share by many connectors.

    Owns one HTTP session, made by `open` inside the running loop and ended by `close`. It keeps no cookies:
    they would tie one tenant's requests to another's.

    Args:
        timeout_s: the longest wait for one attempt, seconds.
        attempts: how often a request is sent at most.
        max_body_bytes: the largest decompressed body that is read.
        connector_limit: connections open at once, all hosts together.
        sleep: waits between attempts.
        rng: source of jitter.
        clock: returns the aware present time, to read retry dates.

    """

    def __init__(
        self,
        *,
        timeout_s: float = 30.0,
        attempts: int = 3,
        max_body_bytes: int = _MAX_BODY_BYTES,
        connector_limit: int = 200,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        rng: random.Random | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._max_body_bytes = max_body_bytes
        self._connector_limit = connector_limit
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311 - jitter, no secret
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the session; a second call changes nothing."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connector_limit),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # `_attempt` sets the one that counts
            )

    async def close(self) -> None:
        """End the session and its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def send(self, base_url: str, api_key: SecretStr, request: Request, *, deadline_s: float) -> Answer:
        """Send a read-only request, again when it may help, and return the last answer whatever it says.

        Args:
            base_url: as `hosts.base_url_for` returned it.
            api_key: the key of that base URL.
            request: GET, or a POST that only queries.
            deadline_s: seconds for everything, waits included.

        Raises:
            TryLater: the last attempt brought no answer; reason `network` or `timeout`.
            ContractBroken: the body is larger than the limit.
            Refused: the key cannot be sent.

        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_s
        attempt = 0
        while True:
            budget_s = max(0.0, min(self._timeout_s, ends - loop.time()))
            outcome = await self._attempt(base_url, api_key, request, budget_s)
            least_s = 0.0
            if isinstance(outcome, Answer):
                verdict = classify(outcome, self._clock())
                if verdict.finding is not Finding.TRANSIENT:
                    return outcome
                least_s = verdict.retry_after_s or 0.0
            wait_s = least_s + backoff_s(attempt, self._rng)
            attempt += 1
            if attempt >= self._attempts or loop.time() + wait_s >= ends:
                break
            await self._sleep(wait_s)
        if isinstance(outcome, TryLater):
            raise outcome
        return outcome

    async def converse(self, base_url: str, api_key: SecretStr, asking: Asking, *, deadline_s: float) -> Asked:
        """Put a question to the provider; network trouble and oversized bodies become its verdict.

        Args:
            base_url: as `hosts.base_url_for` returned it.
            api_key: the key of that base URL.
            asking: a question of `asking`; it is closed in any case.
            deadline_s: seconds for all its requests together.

        Raises:
            Refused: the key cannot be sent.

        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_s
        try:
            request = next(asking)
            while True:
                try:
                    answer = await self.send(base_url, api_key, request, deadline_s=ends - loop.time())
                except (TryLater, ContractBroken) as trouble:
                    request = asking.throw(trouble)  # what it has learned by now may be enough
                else:
                    request = asking.send(answer)
                    del answer  # not to be held while the next one comes
        except StopIteration as stop:
            asked: Asked = stop.value
            return asked
        except (TryLater, ContractBroken) as trouble:
            return Asked(unanswered(trouble))
        finally:
            asking.close()

    async def _attempt(self, base_url: str, api_key: SecretStr, request: Request, budget_s: float) -> Answer | TryLater:
        """Send once; trouble is returned.

        Raised from here it would drag along aiohttp's own error, whose request info shows the key.
        """
        if self._session is None:
            raise RuntimeError("open() the client first")
        loop = asyncio.get_running_loop()
        began, status = loop.time(), None
        typed = {"content-type": "application/json"} if request.body is not None else {}
        try:
            async with (
                asyncio.timeout(budget_s),
                self._session.request(
                    request.method,
                    base_url + request.path,
                    params=request.params,
                    data=request.body,
                    headers=headers(api_key) | typed,
                    allow_redirects=False,
                ) as response,
            ):
                status = response.status
                body = await self._body(response)
        except TimeoutError:
            return TryLater("timeout", f"ElevenLabs gave no answer within {budget_s:.1f} s")
        except (aiohttp.ClientError, OSError) as error:
            return TryLater("network", f"ElevenLabs could not be reached: {type(error).__name__}")
        finally:
            took_ms = round((loop.time() - began) * 1000)
            _log.debug("provider_request", path=request.path, status=status, duration_ms=took_ms)
        return Answer(status, response.headers, _without_key(body, api_key) if status >= _FIRST_ERROR else body)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        chunks, size = [], 0
        while chunk := await response.content.readany():
            chunks.append(chunk)
            size += len(chunk)
            if size > self._max_body_bytes:
                raise ContractBroken("body_too_large", f"The answer exceeds {self._max_body_bytes} bytes")
        return b"".join(chunks)


def _without_key(body: bytes, api_key: SecretStr) -> bytes:
    """Strike the very key from an error body, whatever its form: provider messages travel far."""
    key = api_key.get_secret_value().encode()
    return body.replace(key, b"[redacted]") if len(key) >= _SHORTEST_KEY else body
