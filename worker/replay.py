"""Replay: datasets as Postgres holds them now, for a subscriber that has missed something.

Each comes as one observation of base 0, all events of op `r`, with the version that Postgres holds as its
sequence: the subscriber empties its copy of the dataset, folds the observation as any other, and goes on with the
live stream where it stood. A `replay.completed` follows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID, uuid4

import orjson

from schemas.connectors import Dataset
from schemas.events import Op, ReplayAnnouncement, event_type
from schemas.records import Listing
from worker.changes import Change
from worker.connectors import Connector
from worker.entries import Entry, Report, batches, envelope
from worker.errors import Refused

OURS: Final = ("rollcall:", "rollcall.", "unacked", "_kombu")
"""Keys that begin so are ours alone: streams and what goes with them, and the broker's queues."""


class Source(Protocol):
    """Facts as Postgres holds them."""

    async def whole(self, connector_id: UUID, dataset: Dataset) -> tuple[int, Listing]:
        """Read the dataset and its version in one REPEATABLE READ transaction; version 0: never observed."""


class Outlet(Protocol):
    """Where a replay goes."""

    async def append(self, key: str, entries: Sequence[Entry]) -> None:
        """Append entries to the stream, side by side. Raises Refused when the key holds something else."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A dataset that was written out."""

    dataset: Dataset
    version: int
    records: int


async def replay(
    connector: Connector, datasets: Sequence[Dataset], key: str, source: Source, outlet: Outlet, *, now: datetime
) -> list[Replayed]:
    """Write these datasets of a connector to the stream `key`, one after the other.

    Raises:
        Refused: the key is one of ours, or holds no stream.
        TryLater: Postgres or Redis cannot be reached; what was completed before stays written.

    """
    if not key.strip() or key.startswith(OURS):
        raise Refused(
            "argument_invalid", f"A replay goes to a stream of your own: choose a key unlike {', '.join(OURS)}"
        )
    done = []
    for dataset in datasets:
        version, records = await source.whole(connector.id, dataset)
        await outlet.append(key, _entries(connector, dataset, version, records, now))
        done.append(Replayed(dataset, version, len(records)))
    return done


def _entries(connector: Connector, dataset: Dataset, version: int, records: Listing, now: datetime) -> list[Entry]:
    replay_id, cid = uuid4(), str(connector.id)
    observation = batches(
        [Change(subject, Op.REPLAYED, None, record, ()) for subject, record in records.items()],
        tenant_id=connector.tenant_id,
        connector_id=connector.id,
        dataset=dataset,
        base=0,
        sequence=version,
        part_id=replay_id,
        began=now,
        report=Report(run_id=replay_id, records=len(records), changes=len(records)),
    )
    completed = {
        **envelope(connector.tenant_id, cid, sequence=version, at=now, run_id=replay_id),
        "id": str(replay_id),
        "type": event_type("replay.completed"),
        "subject": f"replay/{dataset}",
        "data": ReplayAnnouncement(dataset=dataset, version=version, records=len(records)).model_dump(),
    }
    return [*observation, Entry({b"ce": orjson.dumps([completed]), b"connector": cid.encode()})]
