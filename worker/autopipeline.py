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
        self._makers: list[asyncio.Future[None]] = []
        self._closed = False

    async def room(self) -> None:
        """Wait while so much waits to be sent that more would only lie in memory.

        Who makes something large asks first, and then sends it without waiting for anything else: so those who wait
        go on one by one.

        Raises:
            TryLater: what waits has failed, since the server is away or this was closed.

        """
        while self._full:
            room = asyncio.get_running_loop().create_future()
            self._makers.append(room)
            await room

    @property
    def _full(self) -> bool:
        return sum(asked.size for asked in self._waiting) >= WAITING_BYTES

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
        self._fail_waiting(_closed())
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
                    _fail((asked.answers for asked in some), away)
                    self._fail_waiting(away)
                except Exception as error:  # noqa: BLE001 - whoever asked says it, and others go on
                    _fail((asked.answers for asked in some), error)
                else:
                    answers.reverse()
                    for asked in some:
                        asked.answer([answers.pop() for _ in asked.commands])
        finally:
            # At once: whoever asks from now on is not taken along.
            self._idle.append(line)
            self._sending -= {asyncio.current_task()}
            _fail((asked.answers for asked in some), _closed())

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
        if self._makers and not self._full:
            makers, self._makers = self._makers, []
            for room in makers:
                if not room.done():
                    room.set_result(None)
        return some

    def _fail_waiting(self, error: TryLater) -> None:
        """Tell all who wait, those who would make something too."""
        waiting, self._waiting = self._waiting, []
        makers, self._makers = self._makers, []
        _fail((*(asked.answers for asked in waiting), *makers), error)


def _closed() -> TryLater:
    return TryLater("redis_unreachable", "The connection to Redis was closed.")


def _fail(some: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    for future in some:
        if not future.done():
            future.set_exception(TryLater(error.reason, error.message) if isinstance(error, TryLater) else error)


class _Asked:
    """What one task asks for."""

    __slots__ = ("answers", "commands", "size")

    def __init__(self, commands: Sequence[Command], answers: asyncio.Future[list[Any]]) -> None:
        self.commands, self.answers = commands, answers
        self.size = sum(len(part) for command in commands for part in command if isinstance(part, bytes))

    def answer(self, answers: list[Any]) -> None:
        if not self.answers.done():
            self.answers.set_result(answers)
