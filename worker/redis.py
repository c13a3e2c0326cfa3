"""The one Redis client of a process, its connections for pipelines, and what failures mean."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import SecretStr
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - the driver's name
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004 - the driver's name
    TryAgainError,
)

from worker.errors import TryLater

SOCKET_TIMEOUT_S = 5.0
"""A server that accepts but does not answer is given up after this; blocking reads stay well below."""
MAX_CONNECTIONS = 24
"""Who finds all of them in use waits for one."""
POOL_WAIT_S = 10.0
RETRIES = 2
"""How often what a connection broke in is asked anew, on another one."""
_ANSWERS = 10
"""So many answers of a pipeline have one timeout: to set it costs a good part of reading a small one."""

_NOT_NOW = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError)
_NOT_NOW_CODES = ("NOREPLICAS", "MISCONF", "BUSY ")
"""Refusals that the driver has no class for: of a class it drops the code from the text."""

Command = tuple[Any, ...]
"""A command's name and arguments, as the driver takes them."""


class _Mended:
    """Mends how redis-py sends.

    A lost connection is named as one, so that it makes another and tries again: on uvloop, writing to what the
    server has reset is a RuntimeError (seen in the wild: MagicStack/uvloop#506). And a cancellation is not lost:
    before Python 3.12 `asyncio.wait_for`, by which it sends, may swallow one (bpo-37658).
    """

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc] # of the class it is mixed into
        except RuntimeError as error:
            raise ConnectionError("The connection was closed.") from error
        if task and task.cancelling() > cancellations:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined] # of the class it is mixed into
            raise asyncio.CancelledError


class _Pool(BlockingConnectionPool):
    """Gets every connection back: redis-py loses one whose user is cancelled while waiting to return it."""

    async def release(self, connection: AbstractConnection) -> None:
        await asyncio.shield(super().release(connection))


def client(url: SecretStr) -> Redis:
    """Make a client; it connects when first used. Whoever makes it closes it (`aclose`)."""
    pool = _Pool.from_url(
        url.get_secret_value(),
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=10,
        max_connections=MAX_CONNECTIONS,
        timeout=POOL_WAIT_S,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=RETRIES),
    )
    pool.connection_class = type("Connection", (_Mended, pool.connection_class), {})
    return Redis.from_pool(pool)


class Line:
    """A connection for whole pipelines, as a client makes them; opened when first used, closed by whoever made it.

    `Redis.pipeline` takes one from the pool for each pipeline, and times every write and every answer by itself: more
    than half of what a pipeline costs. Here several answers have one.
    """

    def __init__(self, redis: Redis, *, timeout_s: float = SOCKET_TIMEOUT_S) -> None:
        pool = redis.connection_pool
        self._timeout_s = timeout_s
        self._connection = pool.connection_class(**{**pool.connection_kwargs, "socket_timeout": None})

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, one pipeline at a time; return the answers, `ResponseError` for what the server refused.

        When the connection breaks all are sent anew: some of them may be done twice.

        Raises:
            redis.exceptions.RedisError: the server is away.

        """

        async def once() -> list[Any]:
            answers: list[Any] = []
            try:
                async with asyncio.timeout(self._timeout_s) as silence:
                    await self._connection.send_packed_command(self._connection.pack_commands(commands))
                    for n in range(len(commands)):
                        if n % _ANSWERS == 0:
                            silence.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
                        answers.append(await self._answer())
            except builtins.TimeoutError:
                raise TimeoutError("No answer in time.") from None
            return answers

        answered: list[Any] = await self._connection.retry.call_with_retry(once, self._broke)
        return answered

    async def _answer(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as refused:
            return refused

    async def _broke(self, _error: Exception) -> None:
        await self._connection.disconnect()

    async def close(self) -> None:
        """Close the connection, without waiting for the server's side of it."""
        await self._connection.disconnect(nowait=True)


@contextmanager
def answering() -> Iterator[None]:
    """Turn an absent or starting server into `TryLater`, without its URL.

    Raises:
        TryLater: Redis cannot be reached, does not answer in time, is loading, or takes no writes for now.

    """
    try:
        yield
    except (ConnectionError, TimeoutError, BusyLoadingError) as error:
        raise TryLater(
            "redis_unreachable",
            f"Redis does not answer ({type(error).__name__}). Check REDIS_URL and that it is running.",
        ) from error
    except ResponseError as error:
        if isinstance(error, _NOT_NOW) or str(error).startswith(_NOT_NOW_CODES):
            raise TryLater("redis_refuses", f"Redis refuses to write: {str(error)[:80]}") from error
        raise
    except RedisError as error:
        raise TryLater("redis_unreachable", f"Redis failed: {type(error).__name__}") from error
