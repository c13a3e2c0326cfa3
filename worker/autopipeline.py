"""Auto-pipelining: what tasks ask of Redis while others are under way shares the next pipeline.

A round trip of its own costs a command several times what it costs in a pipeline, here and at the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextvars import Context
from typing import Any, Final

from worker.errors import TryLater
from worker.redis import Command, Line, answering

PIPELINE_BYTES: Final = 100_000
"""What would make a pipeline larger begins the next one, so that nobody waits long behind what is large."""

WAITING_BYTES: Final = 1_000_000
"""While so much waits to be sent, `AutoPipeline.room` waits."""


class AutoPipeline:
    """Sends the commands of a task next to each other; each succeeds or fails by itself.

    Those of two tasks may overtake each other. When the server is away, all fail that wait by then. Whoever makes it
    closes it.

    Args:
        lines: closed with it; as many pipelines are under way at a time.

    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = tuple(lines)
        self._idle = list(self._lines)
        self._waiting: list[_Asked] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    async def room(self) -> None:
        """Wait while so much waits to be sent that more would only lie in memory.

        Who makes something large asks first, and then sends it without waiting for anything else: so those who wait
        go on one by one, in turn.
        """
        while not self._room.is_set():
            await self._room.wait()

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
        self._make_room()
        if self._idle:
            # It works for all: what it logs is nobody's.
            sending = loop.create_task(self._send(self._idle.pop()), name="redis pipeline", context=Context())
            self._sending.add(sending)
        answers = await asked.answers
        for answer in answers:
            if isinstance(answer, Exception):
                with answering():
                    raise answer
        return answers

    async def close(self) -> None:
        """Fail what is under way and what waits, and whoever asks from now on."""
        self._closed = True
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        _fail(self._waiting, _closed())
        self._waiting.clear()
        self._make_room()
        for line in self._lines:
            await line.close()

    async def _send(self, line: Line) -> None:
        some: Sequence[_Asked] = ()
        try:
            while some := self._take():
                try:
                    with answering():
                        answers = await line.exchange([command for asked in some for command in asked.commands])
                except TryLater as away:
                    # Who waits would hear the same, one timeout after the other.
                    waiting, self._waiting = self._waiting, []
                    _fail((*some, *waiting), away)
                except Exception as error:  # noqa: BLE001 - whoever asked says it, and others go on
                    _fail(some, error)
                else:
                    answers.reverse()
                    for asked in some:
                        asked.answer([answers.pop() for _ in asked.commands])
        finally:
            # At once: whoever asks from now on is not taken along.
            self._idle.append(line)
            self._sending -= {asyncio.current_task()}
            _fail(some, _closed())

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
        self._make_room()
        return some

    def _make_room(self) -> None:
        if sum(asked.size for asked in self._waiting) < WAITING_BYTES:
            self._room.set()
        else:
            self._room.clear()


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
