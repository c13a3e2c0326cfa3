"""The writer's recipe: applied first, acknowledged after; what cannot be applied is found and set aside."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import Dataset
from schemas.events import MAX_BATCH, Op
from tests.fixtures.model import HandLoop
from worker import writer
from worker.changes import Change
from worker.entries import Entry, Observation, Report, batches
from worker.errors import ContractBroken, TryLater
from worker.writer import Turn, fold

T = TypeVar("T")


@dataclass
class Desk:
    """A journal and books that note what is done, in order; `poison` are sequences that cannot be written."""

    entries: list[Entry] = field(default_factory=list)
    poison: frozenset[int] = frozenset()
    away: bool = False
    log: list[tuple[str, Any]] = field(default_factory=list)
    transactions: int = 0

    async def read(self, count: int) -> list[Entry]:
        found, self.entries = self.entries[:count], self.entries[count:]
        return found

    async def acknowledge(self, ids: Sequence[str]) -> None:
        self.log += [("acknowledged", entry_id) for entry_id in ids]

    async def apply(self, observations: Sequence[Observation]) -> None:
        self.transactions += 1
        if self.away:
            raise TryLater("database_unreachable")
        if any(one.sequence in self.poison for one in observations):
            raise ContractBroken("unwritable")
        self.log += [("applied", one.sequence) for one in observations]

    async def set_aside(self, what: Sequence[Entry] | Observation, reason: str) -> None:
        """Take both ports' calls: the journal's with entries, the books' with the observation."""
        if isinstance(what, Observation):
            self.log.append(("failed", what.sequence))
        else:
            self.log += [(f"dead {reason}", entry.id) for entry in what]

    def done(self, what: str) -> list[Any]:
        return [value for name, value in self.log if name == what]


def written(sequence: int, events: int = 1) -> list[Entry]:
    changes = [Change(f"member/u{n}", Op.DELETED, {}, None, ()) for n in range(events)]
    entries = batches(
        changes,
        tenant_id="acme",
        connector_id=UUID(int=1),
        dataset=Dataset.MEMBERS,
        base=0,
        sequence=sequence,
        part_id=UUID(int=2),
        began=datetime(2026, 4, 10, tzinfo=UTC),
        report=Report(run_id=UUID(int=3), records=0, changes=events),
    )
    return [Entry(entry.fields, f"{sequence}-{n}") for n, entry in enumerate(entries)]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run what never waits for anybody else."""
    with closing(HandLoop()) as loop:
        task = loop.create_task(work)
        loop.run_ready()
        return task.result()


def turn_of(desk: Desk, count: int = 100) -> Turn:
    """Fold until there is nothing more."""
    turn = Turn(desk, most=count)
    while run(fold([turn], desk, count=count)):
        pass
    return turn


def test_an_empty_stream_is_nothing_to_do() -> None:
    """No transaction is opened."""
    desk = Desk()
    assert (turn_of(desk), desk.transactions, desk.log) == (Turn(desk, most=100), 0, [])


def test_many_observations_are_one_transaction_and_then_acknowledged() -> None:
    """What was read together is applied together; every piece of it is acknowledged after the commit."""
    desk = Desk([*written(1), *written(2, MAX_BATCH + 1), *written(3, 0)])
    assert turn_of(desk).applied == 3
    assert desk.transactions == 1
    assert [name for name, _ in desk.log] == ["applied"] * 3 + ["acknowledged"] * 4
    assert desk.done("acknowledged") == ["1-0", "2-0", "2-1", "3-0"]


@pytest.mark.parametrize("count", [1, 100])
def test_what_is_not_committed_is_not_acknowledged(count: int) -> None:
    """Postgres is away: the error goes up, and everything stays pending, what was read ahead too."""
    desk = Desk([*written(1), *written(2)], away=True)
    with pytest.raises(TryLater):
        turn_of(desk, count)
    assert desk.log == []


@given(st.integers(1, 12), st.frozensets(st.integers(1, 12), max_size=3))
def test_poison_is_isolated(count: int, poison: frozenset[int]) -> None:
    """Its neighbours are applied once, in order; it alone is set aside, with its part; all is acknowledged."""
    desk = Desk([entry for n in range(1, count + 1) for entry in written(n)], poison)
    turn = turn_of(desk)
    sick = sorted(n for n in poison if n <= count)
    assert desk.done("applied") == [n for n in range(1, count + 1) if n not in poison]
    assert desk.done("failed") == sick
    assert desk.done("dead unwritable") == [f"{n}-0" for n in sick]
    assert desk.done("acknowledged") == [f"{n}-0" for n in range(1, count + 1)]
    assert turn.dead == len(sick)


def test_the_part_fails_before_its_entries_are_gone() -> None:
    """A crash in between repeats the setting aside; the other way round the part would hang."""
    desk = Desk(written(1), frozenset({1}))
    turn_of(desk)
    assert [name for name, _ in desk.log] == ["failed", "dead unwritable", "acknowledged"]


def test_one_poison_among_many_costs_few_transactions() -> None:
    """Halving finds it."""
    desk = Desk([entry for n in range(1, 65) for entry in written(n)], frozenset({40}))
    turn_of(desk)
    assert desk.transactions == 13


def test_unreadable_entries_are_set_aside_and_the_rest_applied() -> None:
    """They name no part that could be trusted, so only the journal is told."""
    (entry,) = written(2)
    broken = Entry({**entry.fields, b"ce": b"no json"}, entry.id)
    desk = Desk([*written(1), broken, *written(3)])
    assert turn_of(desk).dead == 1
    assert desk.done("dead unreadable:DecodeError") == ["2-0"]
    assert desk.done("applied") == [1, 3]
    assert desk.done("failed") == []


def test_announcements_are_acknowledged() -> None:
    """They are for others."""
    desk = Desk([Entry({b"ce": b"[]"}, "1-0")])
    turn_of(desk)
    assert (desk.log, desk.transactions) == ([("acknowledged", "1-0")], 0)


@given(st.integers(1, 4))
def test_an_observation_may_come_in_several_reads(count: int) -> None:
    """Its pieces wait for its end unacknowledged; then they are applied as one."""
    desk = Desk([*written(1, 2 * MAX_BATCH + 1), *written(2)])
    assert turn_of(desk, count).applied == 2
    assert desk.done("applied") == [1, 2]
    assert desk.done("acknowledged") == ["1-0", "1-1", "1-2", "2-0"]
    assert desk.log.index(("applied", 1)) < desk.log.index(("acknowledged", "1-0"))


def test_pieces_whose_end_never_comes_are_given_up() -> None:
    """Publishing is one step: at the end of the stream the rest is lost. Their part is fetched again."""
    first, _ = written(1, MAX_BATCH + 1)
    desk = Desk([first])
    turn = turn_of(desk)
    assert (desk.log, list(turn.tail)) == ([("acknowledged", "1-0")], [])


def test_the_end_of_an_observation_alone_is_not_applied() -> None:
    """Its first piece went to somebody else: half an observation would be wrong for good."""
    _, last = written(1, MAX_BATCH + 1)
    desk = Desk([last, *written(2)])
    turn_of(desk)
    assert desk.done("applied") == [2]
    assert sorted(desk.done("acknowledged")) == ["1-1", "2-0"]


class Counting(Desk):
    """It notes how much was asked for at once."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(list(entries))
        self.asked: list[int] = []

    async def read(self, count: int) -> list[Entry]:
        self.asked.append(count)
        return await super().read(count)


def test_large_entries_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer of large entries are in memory at once; of small ones as many are read as allowed, more step by step."""
    entries = [entry for n in range(1, 9) for entry in written(n)]
    size = sum(map(len, entries[0].fields.values()))
    large = Counting(entries)
    monkeypatch.setattr(writer, "READ_BYTES", int(2.5 * size))
    turn = Turn(large, most=3)
    while run(fold([turn], large, count=100)):
        pass
    assert large.asked == [3, 2, 2, 2, 2]
    assert large.done("applied") == list(range(1, 9))
    small = Counting(entries * 4)
    monkeypatch.setattr(writer, "READ_BYTES", 1000 * size)
    turn = Turn(small, most=3)
    while run(fold([turn], small, count=15)):
        pass
    assert small.asked[:4] == [3, 6, 12, 15]


def test_an_observation_larger_than_a_read_is_not_left_in_the_middle() -> None:
    """A turn goes on for it: the next one would begin at its beginning again, and never come to its end."""
    desk = Desk(written(1, 3 * MAX_BATCH))
    turn = Turn(desk, most=2)
    assert run(fold([turn], desk, count=2)) == 2
    assert turn.large
    assert run(fold([turn], desk, count=2)) == 1
    assert (turn.large, desk.done("applied")) == (False, [1])
    assert not Turn(desk, applied=1, tail=written(2)).large


def test_partitions_are_applied_together() -> None:
    """One transaction for all partitions in hand; each journal acknowledges its own, poison is its own too."""
    desk, other = Desk(written(1)), Desk([*written(2), *written(3)])
    books = Desk(poison=frozenset({2}))
    turns = [Turn(desk), Turn(other)]
    assert [run(fold(turns, books, count=9)), run(fold(turns, books, count=9))] == [3, 0]
    assert books.done("applied") == [1, 3]
    assert (desk.log, turns[0].dead) == ([("acknowledged", "1-0")], 0)
    assert (other.done("dead unwritable"), turns[1].dead) == (["2-0"], 1)
    assert other.done("acknowledged") == ["2-0", "3-0"]


def test_a_partition_that_cannot_be_read_leaves_the_others_pending() -> None:
    """Nothing is acknowledged that is not committed, in no partition."""

    class Broken(Desk):
        async def read(self, count: int) -> list[Entry]:  # noqa: ARG002 - the port's signature
            raise TryLater("redis_unreachable")

    desk = Desk(written(1))
    with pytest.raises(TryLater):
        run(fold([Turn(desk), Turn(Broken())], desk, count=9))
    assert desk.log == []
