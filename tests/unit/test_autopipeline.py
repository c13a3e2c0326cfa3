"""Auto-pipelining: who goes along with whom, and what each of them hears. The server is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.exceptions import ConnectionError, ResponseError  # noqa: A004 - the driver's name

from worker.autopipeline import PIPELINE_BYTES, WAITING_BYTES, AutoPipeline
from worker.errors import TryLater
from worker.redis import Command

AT_ONCE = 2
LARGE = b"x" * WAITING_BYTES


@dataclass(slots=True)
class Server:
    """Answers each command with its second word when `open` is set; `sent` are the pipelines that came."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[list[Command]] = field(default_factory=list)
    came: asyncio.Queue[None] = field(default_factory=asyncio.Queue)
    away: bool = False
    bug: bool = False

    async def answer(self, commands: Sequence[Command]) -> list[Any]:
        self.sent.append(list(commands))
        self.came.put_nowait(None)
        await self.open.wait()
        if self.away:
            raise ConnectionError
        if self.bug and ("GET", "first") in commands:
            raise ZeroDivisionError
        return [ResponseError("wrong") if name == "BAD" else word for name, word, *_ in commands]


@dataclass(slots=True)
class OneLine:
    """Takes one pipeline at a time, as a connection does: who breaks in would get others' answers."""

    server: Server
    busy: bool = False
    closed: bool = False

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        assert not self.busy
        self.busy = True
        try:
            return await self.server.answer(commands)
        finally:
            self.busy = False

    async def close(self) -> None:
        assert not self.busy
        self.closed = True


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def lines(server: Server) -> list[OneLine]:
    return [OneLine(server) for _ in range(AT_ONCE)]


@pytest.fixture
def pipeline(lines: list[OneLine]) -> AutoPipeline:
    return AutoPipeline(lines)  # type: ignore[arg-type] # they do what is asked of lines


Sending = asyncio.Task[list[Any]]


async def asking(pipeline: AutoPipeline, *commands: Command) -> Sending:
    """Ask for commands, without waiting for the answers."""
    task = asyncio.create_task(pipeline.send(*commands))
    await asyncio.wait([task], timeout=0)
    return task


async def under_way(pipeline: AutoPipeline, server: Server, *later: Command) -> list[Sending]:
    """Ask until as much is under way as may be, and then for others; give the first and these."""
    first = [await asking(pipeline, ("GET", "first")) for _ in range(AT_ONCE)]
    async with asyncio.timeout(5):
        for _ in first:
            await server.came.get()
    return [first[0], *[await asking(pipeline, command) for command in later]]


async def test_what_is_asked_for_meanwhile_goes_along_in_order(pipeline: AutoPipeline, server: Server) -> None:
    """While pipelines are under way the rest waits; then it is one pipeline, and everybody gets their answers."""
    tasks = await under_way(pipeline, server, ("GET", "a"), ("GET", "b"))
    several = await asking(pipeline, ("GET", "c"), ("GET", "d"))
    server.open.set()
    assert await asyncio.gather(*tasks, several) == [["first"], ["a"], ["b"], ["c", "d"]]
    assert server.sent[AT_ONCE:] == [[("GET", name) for name in "abcd"]]


async def test_an_error_is_of_who_asked_for_it(pipeline: AutoPipeline, server: Server) -> None:
    """A command that the server refuses costs nobody else's answer."""
    tasks = await under_way(pipeline, server, ("GET", "a"), ("BAD", "b"), ("GET", "c"))
    server.open.set()
    _, a, b, c = await asyncio.gather(*tasks, return_exceptions=True)
    assert (a, c) == (["a"], ["c"])
    assert isinstance(b, ResponseError)


async def test_a_server_that_is_away_fails_what_was_sent_and_no_more(pipeline: AutoPipeline, server: Server) -> None:
    """Who was sent hears to try later; who asks afterwards is sent anew."""
    tasks = await under_way(pipeline, server)
    server.away = True
    server.open.set()
    with pytest.raises(TryLater, match="does not answer"):
        await tasks[0]
    server.away = False
    assert await pipeline.send(("GET", "again")) == ["again"]


async def test_what_nobody_waits_for_is_not_sent(pipeline: AutoPipeline, server: Server) -> None:
    """Who is cancelled before their turn leaves nothing behind."""
    tasks = await under_way(pipeline, server, ("SET", "a"), ("GET", "b"))
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    server.open.set()
    assert await tasks[2] == ["b"]
    assert server.sent[AT_ONCE:] == [[("GET", "b")]]


async def test_who_is_cancelled_under_way_costs_nobodys_answer(pipeline: AutoPipeline, server: Server) -> None:
    """Answers stay in step when one of those who asked is gone by then."""
    _, gone, left = await under_way(pipeline, server, ("GET", "gone"), ("GET", "left"))
    server.open.set()
    server.open.clear()
    await server.came.get()
    gone.cancel()
    server.open.set()
    assert await left == ["left"]


async def test_large_ones_end_a_pipeline(pipeline: AutoPipeline, server: Server) -> None:
    """Behind what is large the next pipeline begins, so that others wait for little of it."""
    large = ("SET", "large", b"x" * PIPELINE_BYTES)
    tasks = await under_way(pipeline, server, large, ("GET", "small"))
    server.open.set()
    await asyncio.gather(*tasks)
    assert [len(sent) for sent in server.sent[AT_ONCE:]] == [1, 1]


async def test_what_is_large_begins_a_pipeline(pipeline: AutoPipeline, server: Server) -> None:
    """What waits ahead of it does not go along."""
    large = ("SET", "large", b"x" * PIPELINE_BYTES)
    tasks = await under_way(pipeline, server, ("GET", "small", b"y"), large)
    server.open.set()
    await asyncio.gather(*tasks)
    assert [len(sent) for sent in server.sent[AT_ONCE:]] == [1, 1]


async def test_no_more_is_made_than_there_is_room_for(pipeline: AutoPipeline, server: Server) -> None:
    """Of those who make something large one waits to be sent at a time, the next goes on when it is."""
    await under_way(pipeline, server)
    made, unsent = list[int](), list[int]()

    async def make(number: int) -> list[Any]:
        await pipeline.room()
        made.append(number)
        unsent.append(len(made) + AT_ONCE - len(server.sent))
        return await pipeline.send(("SET", number, LARGE))

    makers = [asyncio.create_task(make(number)) for number in range(5)]
    await asyncio.wait(makers, timeout=0)
    assert made == [0]
    server.open.set()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*makers) == [[number] for number in range(5)]
    assert unsent == [1] * 5


@pytest.mark.parametrize("what", ["closed", "does not answer"])
async def test_nobody_waits_for_room_that_never_comes(pipeline: AutoPipeline, server: Server, what: str) -> None:
    """They hear that it is over, or that the server is away, at once, as those who have sent do."""
    await under_way(pipeline, server)
    large = await asking(pipeline, ("SET", "large", LARGE))
    makers = [asyncio.create_task(pipeline.room()) for _ in range(3)]
    await asyncio.wait(makers, timeout=0)
    server.away = True
    if what == "closed":
        await pipeline.close()
    else:
        server.open.set()
    for waiting in (large, *makers):
        with pytest.raises(TryLater, match=what):
            await asyncio.wait_for(waiting, 5)


async def test_a_bug_is_told_as_it_is_and_holds_up_nobody(pipeline: AutoPipeline, server: Server) -> None:
    """Who was sent hears of it, and who waits is sent all the same."""
    tasks = await under_way(pipeline, server, ("GET", "a"))
    server.bug = True
    server.open.set()
    with pytest.raises(ZeroDivisionError):
        await tasks[0]
    assert await tasks[1] == ["a"]


async def test_who_waits_for_a_server_that_is_away_hears_it_at_once(pipeline: AutoPipeline, server: Server) -> None:
    """They would hear the same, one timeout after the other."""
    tasks = await under_way(pipeline, server, ("GET", "a"), ("GET", "b"))
    server.away = True
    server.open.set()
    for task in tasks:
        with pytest.raises(TryLater, match="does not answer"):
            await task
    assert len(server.sent) == AT_ONCE


@pytest.mark.parametrize("what", ["answered", "away", "bug"])
async def test_every_line_works_again(pipeline: AutoPipeline, server: Server, lines: list[OneLine], what: str) -> None:
    """However a pipeline ended, as many are under way as before, each on a line of its own."""
    server.away, server.bug = what == "away", what == "bug"
    await under_way(pipeline, server)
    server.open.set()
    while pipeline._sending:
        await asyncio.wait(pipeline._sending)
    server.open.clear()
    server.away = server.bug = False
    tasks = await under_way(pipeline, server, ("GET", "a"))
    assert [line.busy for line in lines] == [True] * AT_ONCE
    server.open.set()
    assert await asyncio.gather(*tasks) == [["first"], ["a"]]


async def test_closing_fails_what_waits(pipeline: AutoPipeline, server: Server, lines: list[OneLine]) -> None:
    """Nobody waits for ever: what was sent and what was not hear that it is over; and no line stays open."""
    tasks = await under_way(pipeline, server, ("GET", "a"))
    await pipeline.close()
    assert all(line.closed for line in lines)
    tasks.append(await asking(pipeline, ("GET", "late")))
    for task in tasks:
        with pytest.raises(TryLater, match="closed"):
            await task
