"""Auto-pipelining: what tasks ask of Redis while others are under way shares the next pipeline.

A round trip of its own costs a command several times what it costs in a pipeline, here and at the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import Context
from typing import Any, Final

from redis.asyncio import Redis

from worker.errors import TryLater
from worker.redis import answering

Command = tuple[Any, ...]
"""A command's name and arguments, as the driver takes them."""

AT_ONCE: Final = 2
"""Pipelines under way: the server works on one while the next is written."""
PIPELINE_BYTES: Final = 100_000
"""What would make a pipeline larger begins the next one, so that nobody waits long behind what is large."""


class AutoPipeline:
    """Sends the commands of a task next to each other; each succeeds or fails by itself.

    Those of two tasks may overtake each other. When the server is away, all fail that wait by then. Whoever makes it
    closes it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: list[_Asked] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def send(self, *commands: Command) -> list[Any]:
        """Send commands in one pipeline, others' perhaps before and behind them; return the answers.

        Raises:
            TryLater: the server is away, or refuses to write; who asked does not know whether it was done.
            redis.exceptions.ResponseError: the first error that the server answered with.

        """
        if self._closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        asked = _Asked(commands, loop.create_future())
        self._waiting.append(asked)
        if len(self._sending) < AT_ONCE:
            # It works for all: what it logs is nobody's.
            self._sending.add(loop.create_task(self._send(), name="redis pipeline", context=Context()))
        answers = await asked.answers
        for answer in answers:
            if isinstance(answer, Exception):
                with answering():
                    raise answer
        return answers

    async def close(self) -> None:
        """Fail what is under way and what waits, and whoever asks from now on."""
        self._closed = True
        sending, self._sending = self._sending, set()
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        self._fail_waiting(_closed())

    async def _send(self) -> None:
        some: Sequence[_Asked] = ()
        try:
            while some := self._take():
                try:
                    with answering():
                        answers = await self._pipeline([command for asked in some for command in asked.commands])
                except TryLater as away:
                    # Who waits would hear the same, one timeout after the other.
                    self._fail_waiting(away)
                    _fail(some, away)
                except Exception as error:  # noqa: BLE001 - whoever asked says it, and others go on
                    _fail(some, error)
                else:
                    for asked in some:
                        asked.answer([answers.pop() for _ in asked.commands])
        finally:
            self._sending -= {asyncio.current_task()}  # at once: whoever asks from now on is not taken along
            _fail(some, _closed())

    def _fail_waiting(self, error: TryLater) -> None:
        waiting, self._waiting = self._waiting, []
        _fail(waiting, error)

    def _take(self) -> Sequence[_Asked]:
        """Take from the front what goes along now; what nobody waits for any more is not sent."""
        some: list[_Asked] = []
        size = taken = 0
        for asked in self._waiting:
            if some and size + asked.size >= PIPELINE_BYTES:
                break
            taken += 1
            if not asked.answers.done():
                some.append(asked)
                size += asked.size
        del self._waiting[:taken]
        return some

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send a pipeline; return the answers, the last one first."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        answers.reverse()
        return answers


def _closed() -> TryLater:
    return TryLater("redis_unreachable", "The connection to Redis was closed.")


def _fail(some: Sequence[_Asked], error: Exception) -> None:
    for asked in some:
        if not asked.answers.done():
            asked.answers.set_exception(TryLater(error.reason, error.message) if isinstance(error, TryLater) else error)


class _Asked:
    """What one task asks for."""

    __slots__ = ("answers", "commands", "size")

    def __init__(self, commands: Sequence[Command], answers: asyncio.Future[list[Any]]) -> None:
        self.commands, self.answers = commands, answers
        self.size = sum(len(part) for command in commands for part in command if isinstance(part, bytes))

    def answer(self, answers: list[Any]) -> None:
        if not self.answers.done():
            self.answers.set_result(answers)
