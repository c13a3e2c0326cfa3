"""What the README shows works: its programs run, its statements are accepted, its names exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
import redis
from psycopg import sql

from schemas.connectors import PERMISSIONS, REGIONS, Action, Dataset, Status
from schemas.events import Op
from schemas.publish import event_models
from worker.changes import Change
from worker.entries import Entry, Report, batches
from worker.settings import catalogue
from worker.snapshots import stream_key

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STATEMENTS = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
CONNECTOR = UUID(int=1)
STREAM = stream_key(0)
STOP = Entry({b"ce": b'[{"type": "stop", "source": "s", "subject": "stop", "sequence": "1"}]'})


class Stopped(Exception):  # noqa: N818 - it is no error
    """Ends a program that runs for ever."""


class Crashed(Exception):  # noqa: N818 - it is the test's own
    """Ends a program in the middle of its work."""


def function(name: str) -> Callable[..., None]:
    """Take a function out of the README's programs."""
    (program,) = (text for text in PROGRAMS if f"def {name}(" in text)
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), scope)  # noqa: S102 - our own text
    found: Callable[..., None] = scope[name]
    return found


def observation(base: int, sequence: int, members: Sequence[int]) -> list[Entry]:
    changes = [Change(f"member/{n}", Op.CREATED, None, {"user_id": str(n)}, ()) for n in members]
    return batches(
        changes,
        tenant_id="acme",
        connector_id=CONNECTOR,
        dataset=Dataset.MEMBERS,
        base=base,
        sequence=sequence,
        part_id=UUID(int=2),
        began=datetime(2026, 4, 1, tzinfo=UTC),
        report=Report(run_id=UUID(int=3), records=len(members), changes=len(members)),
    )


@dataclass
class Store:
    """A subscriber's copy: how far it is, what it applied, and when it had to read anew."""

    versions: dict[tuple[str, str], int] = field(default_factory=dict)
    applied: list[tuple[int, int]] = field(default_factory=list)
    anew: list[int] = field(default_factory=list)
    truth: int = 0
    crash_at: int = 0

    def version(self, connector: str, dataset: str) -> int:
        return self.versions.get((connector, dataset), 0)

    def apply(self, connector: str, dataset: str, events: list[Any], sequence: int) -> None:
        if sequence == self.crash_at:
            self.crash_at = 0
            raise Crashed
        self.versions[connector, dataset] = sequence
        self.applied.append((sequence, len(events)))

    def read_anew(self, connector: str, dataset: str, sequence: int) -> None:
        self.anew.append(sequence)
        self.versions[connector, dataset] = self.truth

    def announced(self, events: list[Any]) -> None:
        if events and events[0]["type"] == "stop":
            raise Stopped


@pytest.fixture
def client(redis_url: str) -> Any:
    """A client as the README makes it."""
    with redis.Redis.from_url(redis_url, protocol=2, socket_timeout=10) as opened:
        yield opened


def publish(client: redis.Redis, *entries: Entry) -> None:
    for entry in entries:
        client.xadd(STREAM, {**entry.fields})


def follow(client: redis.Redis, store: Store) -> None:
    with pytest.raises(Stopped):
        function("follow")(client, STREAM, "billing", store)


def test_the_follower_applies_each_observation_once(client: redis.Redis) -> None:
    """Observations in several entries are applied whole, repeats are skipped, and everything is acknowledged."""
    large = observation(1, 2, range(1200))
    assert len(large) == 3
    publish(client, *observation(0, 1, [1]), *large, *observation(0, 1, [1]), *large, *observation(2, 3, []), STOP)
    store = Store()
    follow(client, store)
    assert store.applied == [(1, 1), (2, 1200), (3, 0)]
    assert store.anew == []
    assert client.xpending(STREAM, "billing")["pending"] == 1  # the one that stopped it


def test_the_follower_takes_up_where_it_crashed(client: redis.Redis) -> None:
    """What was read and not acknowledged is read again, even a part of an observation."""
    publish(client, *observation(0, 1, [1]), *observation(1, 2, range(600)), *observation(2, 3, [2]), STOP)
    store = Store(crash_at=2)
    with pytest.raises(Crashed):
        function("follow")(client, STREAM, "billing", store)
    follow(client, store)
    assert store.applied == [(1, 1), (2, 600), (3, 1)]


@pytest.mark.parametrize(
    ("truth", "applied"), [(5, [(1, 1), (6, 1), (7, 1)]), (6, [(1, 1), (7, 1)]), (4, [(1, 1)])], ids=str
)
def test_the_follower_reads_anew_what_it_missed(
    client: redis.Redis, truth: int, applied: list[tuple[int, int]]
) -> None:
    """After a gap it goes on from what it read anew, whether that is before, at or behind the entry."""
    publish(client, *observation(0, 1, [1]), *observation(5, 6, [2]), *observation(6, 7, [3]), STOP)
    store = Store(truth=truth)
    follow(client, store)
    assert store.applied == applied
    assert store.anew[0] == 6


def test_the_follower_drops_what_lost_its_rest(client: redis.Redis) -> None:
    """An observation whose last entry is missing is not applied, nor does it stay pending."""
    publish(client, observation(0, 1, range(600))[0], *observation(0, 2, [1]), STOP)
    store = Store()
    follow(client, store)
    assert store.applied == [(2, 1)]
    assert client.xpending(STREAM, "billing")["pending"] == 1


def test_the_follower_survives_trimming(client: redis.Redis) -> None:
    """An entry that was trimmed after it was read, and before it was acknowledged, stops nothing."""
    publish(client, *observation(0, 1, [1]), *observation(1, 2, [2]))
    client.xgroup_create(STREAM, "billing", id="0")
    client.xreadgroup("billing", "one", {STREAM: ">"}, count=1)
    client.xtrim(STREAM, maxlen=1, approximate=False)
    publish(client, STOP)
    store = Store(truth=1)
    follow(client, store)
    assert store.anew == [2]
    assert store.applied == [(2, 1)]


def test_the_simple_reader_takes_each_value_once(client: redis.Redis) -> None:
    """Repeats and older values are passed over, record by record."""
    publish(client, *observation(1, 2, [1, 2]), *observation(0, 1, [1]), *observation(1, 2, [1, 2]), STOP)
    used: list[str] = []

    def use(event: dict[str, Any]) -> None:
        if event["subject"] == "stop":
            raise Stopped
        used.append(event["id"])

    with pytest.raises(Stopped):
        function("latest")(client, [STREAM], use)
    assert used == [f"member/{n}@{2:020d}" for n in (1, 2)]


def test_readers_see_one_tenant_and_no_key(database_url: str) -> None:
    """The statements work as shown: the role sees its tenant only, nothing without one, and never a sealed key."""
    granting, reading = STATEMENTS
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        for tenant in ("acme", "globex"):
            connection.execute(
                "INSERT INTO rollcall.connectors (tenant_id, name, base_url, partition, sealed_key, action)"
                " VALUES (%s, 'main', 'https://x', 0, 'v1.sealed', 'reconnect')",
                [tenant],
            )
        connection.execute(sql.SQL(granting))  # type: ignore[arg-type] # the README is no literal
        connection.execute("SET LOCAL ROLE charts")
        assert connection.execute("SELECT count(*) FROM rollcall.connectors").fetchone() == (0,)
        *queries, last = [text for text in reading.split(";") if text.strip()]
        for query in queries:
            connection.execute(sql.SQL(query))  # type: ignore[arg-type] # the README is no literal
        assert connection.execute(sql.SQL(last)).fetchall() == [("main", "pending", None, "reconnect")]  # type: ignore[arg-type] # the README is no literal
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT sealed_key FROM rollcall.connectors")
        connection.rollback()


def test_every_program_compiles() -> None:
    """No program of the README has a slip."""
    assert len(PROGRAMS) == 3
    for program in PROGRAMS:
        compile(program, "README.md", "exec")


def test_names_exist() -> None:
    """Settings, event types, permissions, regions, states and files that the README names are ours."""
    settings = {setting.name for setting in catalogue()}
    named = set(re.findall(r"`(ROLLCALL_[A-Z_]+|[A-Z]+_URL)`", README)) - {"ROLLCALL_", "ROLLCALL_PORT"}
    assert {name.removesuffix("_FILE") for name in named} <= settings
    defaults = {setting.name: setting.default for setting in catalogue()}
    for name, default in re.findall(r"^\| `(ROLLCALL_\w+)` \| (\S+) \|", README, re.MULTILINE):
        assert float(default) == float(defaults[name])
    events = README[README.index("| type `io.rollcall") : README.index("Every type has a JSON Schema")]
    words: list[str] = []
    for word in re.findall(r"`([a-z_]*\.[a-z]+)`", events):
        words.append(words[-1].partition(".")[0] + word if word.startswith(".") else word)
    assert set(words) == event_models().keys() - {"replay.completed"}
    for name, label in PERMISSIONS.values():
        assert f"| {label} | `{name}` |" in README
    assert all(f"`{word}`" in README for word in [*REGIONS, *Status, *Action])
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_json_is_json() -> None:
    """What is shown as JSON can be read as JSON."""
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert [type(orjson.loads(block)) for block in blocks] == [dict, dict]
