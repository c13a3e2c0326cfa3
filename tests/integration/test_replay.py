"""Replay: a subscriber that lost entries takes whole datasets anew, and goes on with the live stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import orjson
import pytest

from schemas.connectors import Dataset, RunKind
from schemas.events import MAX_BATCH
from schemas.publish import event_models
from tests.fixtures.harness import Harness, Row, Watched
from tests.fixtures.json_schema import faults
from tests.fixtures.states import Folder, State
from tests.fixtures.terminal import rollcall
from worker.errors import Refused
from worker.replay import Replayed, replay
from worker.store.facts import PgFacts
from worker.stream import RedisOutlet

MINE: Final = "billing:replay"
KEEP_S: Final = 3600
NOW: Final = datetime(2026, 4, 1, tzinfo=UTC)


async def replayed(harness: Harness, watched: Watched, *datasets: Dataset, to: str = MINE) -> list[Replayed]:
    connector = await harness.runtime.registry.find(str(watched.id))
    outlet = RedisOutlet(harness.runtime.redis, keep_s=KEEP_S)
    return await replay(connector, datasets or list(Dataset), to, PgFacts(harness.runtime.db), outlet, now=NOW)


async def entries(harness: Harness, key: str = MINE) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await harness.runtime.redis.xrange(key)]


@dataclass
class Subscriber:
    """Somebody downstream who knows streams only: what does not fit is replayed to a stream of its own."""

    harness: Harness
    watched: Watched
    folder: Folder = field(default_factory=Folder)
    after: bytes = b"-"
    breaks: list[str] = field(default_factory=list)

    async def read(self) -> State:
        """Read the live stream on from where it stands."""
        for at, fields in await self.harness.entries(self.watched, self.after):
            self.after = b"(" + at
            observation = self.folder.read(fields)
            if observation is not None and not self.folder.fits(observation):
                self.breaks.append(observation[0])
                await self.catch_up(observation[0])
                self.folder.fits(observation)
        return self.folder.state()

    async def catch_up(self, dataset: str) -> None:
        """Empty the copy of a dataset and fold its replay, by the same rule as ever."""
        key = f"{MINE}:{dataset}"
        await self.harness.runtime.redis.delete(key)
        await replayed(self.harness, self.watched, Dataset(dataset), to=key)
        self.folder.versions.pop(dataset, None)
        self.folder.held.pop(dataset, None)
        for fields in await entries(self.harness, key):
            observation = self.folder.read(fields)
            assert observation is None or self.folder.fits(observation)


@pytest.fixture
async def acme(harness: Harness) -> Watched:
    """A connector with members beyond one entry."""
    return await harness.synced(members=MAX_BATCH + 20)


async def change(harness: Harness, seed: int) -> None:
    kinds = ["member_join", "member_leave", "member_update", "group_update", "key_update", "key_remove", "usage_add"]
    harness.simulator.mutate("acme", {"op": "random", "n": 15, "seed": seed, "kinds": kinds})


@pytest.mark.parametrize("loss", ["trimmed", "flushed"])
async def test_a_subscriber_that_lost_entries_ends_where_postgres_is(
    harness: Harness, acme: Watched, loss: str
) -> None:
    """It replays what does not fit, folds it by the rule, and goes on: in the end it holds what Postgres holds."""
    subscriber = Subscriber(harness, acme)
    assert await subscriber.read() == await harness.true(acme)
    await change(harness, 1)
    await harness.poll(acme)
    if loss == "trimmed":
        await harness.runtime.redis.xtrim(acme.stream, maxlen=0, approximate=False)
    else:
        await harness.runtime.redis.flushall()
    for seed in (2, 3):
        await change(harness, seed)
        await harness.poll(acme)
        state = await subscriber.read()
    missed = set(subscriber.breaks)
    assert "members" in missed
    for dataset in set(Dataset) - missed:  # nothing was missed of these, or nothing followed that would tell
        await subscriber.catch_up(dataset)
    state = await subscriber.read()
    assert state == await harness.true(acme)
    assert len(subscriber.breaks) == len(missed), "one replay for each dataset"
    await change(harness, 4)
    await harness.poll(acme, kind=RunKind.RECONCILE)
    assert await subscriber.read() == await harness.true(acme)
    assert len(subscriber.breaks) == len(missed), "the live stream goes on where the replay ended"


async def test_somebody_new_begins_with_a_replay(harness: Harness, acme: Watched) -> None:
    """A replay alone is the whole of what Postgres holds, and live entries it covers already are skipped."""
    await change(harness, 1)
    await harness.poll(acme)
    newcomer = Subscriber(harness, acme)
    for dataset in Dataset:
        await newcomer.catch_up(dataset)
    assert newcomer.folder.state() == await harness.true(acme)
    assert await newcomer.read() == await harness.true(acme)
    assert newcomer.breaks == []


async def test_a_replay_is_an_observation_like_any_other(harness: Harness, acme: Watched) -> None:
    """Entries have the fields of live ones, at most 500 events each by their schema, and end by `replay.completed`."""
    done = await replayed(harness, acme, Dataset.MEMBERS, Dataset.USAGE_PRODUCT)
    access = await harness.access(acme)
    assert [(one.dataset, one.version) for one in done] == [
        (dataset, access[dataset]["version"]) for dataset in (Dataset.MEMBERS, Dataset.USAGE_PRODUCT)
    ]
    *pieces, last = found = (await entries(harness))[:3]
    live = next(fields for _, fields in await harness.entries(acme) if fields.get(b"dataset") == b"members")
    assert live.keys() | {b"part", b"report"} == pieces[-1].keys()
    assert [b"part" in piece for piece in pieces] == [False, True]
    for piece in pieces:
        assert (piece[b"connector"], piece[b"dataset"]) == (str(acme.id).encode(), b"members")
        assert (int(piece[b"base"]), int(piece[b"sequence"])) == (0, done[0].version)
    events: list[Row] = [event for fields in found for event in orjson.loads(fields[b"ce"])]
    assert [len(orjson.loads(fields[b"ce"])) for fields in found] == [MAX_BATCH, done[0].records - MAX_BATCH, 1]
    models = event_models()
    for event in events:
        what = event["type"].removeprefix("io.rollcall.elevenlabs.").removesuffix(".v1")
        schema = models[what].model_json_schema()
        assert list(faults(event, schema, schema)) == []
        assert (event["tenantid"], event["sequence"]) == (acme.tenant, f"{done[0].version:020d}")
    assert {event["data"].get("op") for event in events[:-1]} == {"r"}
    assert last.keys() == {b"ce", b"connector"}
    assert events[-1]["type"] == "io.rollcall.elevenlabs.replay.completed.v1"
    told = {"dataset": "members", "version": done[0].version, "records": done[0].records}
    assert events[-1]["data"] == told
    days = [event for fields in (await entries(harness))[3:] for event in orjson.loads(fields[b"ce"])]
    assert {event["data"]["op"] for event in days[:-1]} == {"r"}
    assert len(days) - 1 == done[1].records == 90
    assert 0 < await harness.runtime.redis.ttl(MINE) <= KEEP_S


async def test_a_dataset_never_observed_is_replayed_as_empty(harness: Harness) -> None:
    """Version 0 and no event: who folds it knows that Postgres holds nothing yet."""
    watched = await harness.add_connector()
    (done,) = await replayed(harness, watched, Dataset.WORKSPACE)
    assert (done.version, done.records) == (0, 0)
    observation, completed = await entries(harness)
    assert (observation[b"ce"], observation[b"sequence"]) == (b"[]", b"0")
    assert orjson.loads(completed[b"ce"])[0]["data"]["version"] == 0


async def test_our_own_keys_are_refused(harness: Harness, acme: Watched) -> None:
    """A replay writes to no stream of ours, nor over anything that is no stream."""
    await harness.runtime.redis.set("theirs", "7")
    for key in (acme.stream, "rollcall:deadletter", "rollcall.sync", "unacked", "", " ", "theirs"):
        length = await harness.runtime.redis.xlen(acme.stream)
        with pytest.raises(Refused) as refused:
            await replayed(harness, acme, to=key)
        assert refused.value.reason == "argument_invalid"
        assert await harness.runtime.redis.xlen(acme.stream) == length
    assert await harness.runtime.redis.get("theirs") == b"7"


async def test_the_command_replays_what_is_named(harness: Harness, acme: Watched) -> None:
    """`events replay` writes the named datasets, by default all, and tells their versions; a wrong key is usage."""
    settings, versions = harness.runtime.settings, await harness.access(acme)
    names = ("groups", "usage.member", "groups")
    options = [word for name in names for word in ("--dataset", name)]
    (rows, _) = await rollcall(settings, "events", "replay", "acme", *options, "--to", MINE)
    assert [(row["dataset"], row["version"]) for row in rows] == [
        (name, versions[name]["version"]) for name in names[:2]
    ]
    (rows, _) = await rollcall(settings, "events", "replay", str(acme.id), "--to", "other")
    assert [row["dataset"] for row in rows] == list(Dataset)
    (rows, error) = await rollcall(settings, "events", "replay", "acme", "--to", acme.stream, code=2)
    assert (rows, error) == ([], "argument_invalid")
