"""What the recipes need of the world, as protocols. Shells implement them; tests replace them with models."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import Enum
from typing import Protocol
from uuid import UUID

from schemas.connectors import Dataset, RunKind
from schemas.records import Listing, Record
from worker.changes import GuardLimits, Missing
from worker.elevenlabs.asking import Asked, Window
from worker.elevenlabs.protocol import Answer, Request, Verdict
from worker.entries import Entry, Observation
from worker.plan import Calendar


@dataclass(frozen=True, slots=True)
class Target:
    """The connector that is asked. `sealed_key` is opened only for the length of the conversation."""

    connector_id: UUID
    tenant_id: str
    base_url: str
    sealed_key: str
    partition: int
    cost_since: date | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A part that was claimed: its dataset's one open observation.

    `number` is what it drew, `version` what Postgres held then. `as_of` is the run's time, the base of its
    plan; `began` the time of the claim.
    """

    part_id: UUID
    run_id: UUID
    kind: RunKind
    dataset: Dataset
    target: Target
    number: int
    version: int
    as_of: datetime
    began: datetime
    window: Window | None = None
    attempts: int = 1
    lane: int = 1
    held: Missing = field(default_factory=dict)
    released: frozenset[str] = frozenset()


Fingerprints = Mapping[str, tuple[str, int]]
"""Usage days by subject: (digest, number of rows)."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A base as it is kept in a snapshot: a fraction of the size of its records."""

    version: int
    blob: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """A snapshot's head: the version and the digest of the last answer (empty: none); None: no snapshot.

    The snapshot itself comes along when it is small: most polls need some of them, and to ask again costs more.
    """

    version: int | None = None
    digest: str = ""
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """What a listing is compared with: the version and the records (usage: fingerprints of its days)."""

    version: int
    records: Mapping[str, Record] = field(default_factory=dict)
    days: Fingerprints = field(default_factory=dict)


class Publication(Enum):
    """How publishing ended. `REFUSED`: the snapshot is not the one read before asking. `FULL`: no room."""

    DONE = "done"
    REFUSED = "refused"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Quiet:
    """A part whose dataset did not change since `base`; `records` None: not even counted."""

    claim: Claim
    base: int
    records: int | None
    incomplete: str | None = None
    digest: str = ""
    """What its snapshot is to be known by from now on, if that is something else."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A part that got no listing, and what was answered (confirmed by a second probe where it matters)."""

    claim: Claim
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Returned:
    """A part that was given back, to be fetched again."""

    claim: Claim
    reason: str
    wait_s: float


class Ledger(Protocol):
    """Runs and parts in Postgres."""

    async def claim(self, part_ids: Sequence[UUID]) -> list[Claim]:
        """Claim what of these may be asked now; the rest is somebody else's, done, or must wait."""

    async def close_quiet(self, quiet: Sequence[Quiet]) -> None:
        """Close parts, each only if its version and number still stand; else the part goes back."""

    async def failed(self, failure: Failure) -> None:
        """Settle a failure: the part waits or ends, access and status follow."""

    async def give_back(self, claim: Claim, reason: str, wait_s: float) -> None:
        """Return a part unasked or refused, to be fetched again after `wait_s`."""

    async def published(self, claims: Sequence[Claim]) -> None:
        """Note that these observations went to the stream, and free their lanes."""

    async def narrow(self, claim: Claim, window: Window, because: Verdict | None) -> Claim | None:
        """Leave the part its latest days, make the days before a part of their own; None: it is not ours any more.

        `because` is what was answered for the days before, None when they would only be too much at once.
        """

    async def remember_cost_since(self, claim: Claim, day: date) -> None:
        """Note the first cost-billed day of the workspace."""


class Facts(Protocol):
    """Facts as Postgres holds them."""

    async def base(self, connector_id: UUID, dataset: Dataset, *, since: date | None) -> Base:
        """Read the dataset and its version in one REPEATABLE READ transaction."""

    async def usage_days(self, connector_id: UUID, dataset: Dataset, days: Sequence[date]) -> tuple[int, Listing]:
        """Read whole usage days with the dataset's version, likewise in one snapshot."""


class Snapshots(Protocol):
    """What was last published, in Redis, beside the stream."""

    async def heads(self, claims: Sequence[Claim]) -> dict[UUID, Head]:
        """Read the heads of the snapshots of these parts' datasets, by part."""

    async def load(self, target: Target, dataset: Dataset, version: int) -> Base | None:
        """Read the snapshot of that version that did not come with its head; None when it is not there any more."""

    async def note_digests(self, quiet: Sequence[Quiet]) -> None:
        """Renew the digests of unchanged snapshots that are still of their bases."""

    async def room(self) -> None:
        """Wait until there is room for what is to be published; make it then, and publish it at once.

        Raises:
            TryLater: Redis is away.

        """

    async def publish(
        self,
        target: Target,
        dataset: Dataset,
        expected: int | None,
        new: Packed,
        digest: str,
        entries: Sequence[Entry],
    ) -> Publication:
        """Write snapshot and entries in one step, unless the snapshot is not `expected` any more."""


class Provider(Protocol):
    """The provider, asked with the connector's key."""

    async def converse(self, target: Target, asking: Generator[Request, Answer, Asked]) -> Asked:
        """Carry a conversation to its end within the deadline."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What observing needs of the world."""

    ledger: Ledger
    facts: Facts
    snapshots: Snapshots
    provider: Provider
    calendar: Calendar
    limits: GuardLimits


class Journal(Protocol):
    """A partition's stream as its writer reads it."""

    async def read(self, count: int) -> list[Entry]:
        """Read the next entries: first what is pending, then what is new."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge entries whose effect is committed."""

    async def set_aside(self, entries: Sequence[Entry], reason: str) -> None:
        """Move entries that cannot be applied to the dead letters, with reason and origin."""


class Books(Protocol):
    """The writer's side of Postgres, on the connection that holds the partition's lock."""

    async def apply(self, observations: Sequence[Observation]) -> None:
        """Apply, skip or return each observation, all in one transaction.

        Raises:
            ContractBroken: some observation cannot be written (SQLSTATE 22 or 23, or a broken schema).
            TryLater: Postgres is not there.

        """

    async def set_aside(self, observation: Observation, reason: str) -> None:
        """Fail the part of an observation that was dead-lettered."""
