"""The state of the simulator: workspaces, their access keys, the clock, and what was asked."""

import random
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from time import time
from typing import Any, Final

from worker.dev.simulator.faults import Fault
from worker.dev.simulator.generate import Atom, Directory, Spec, digest, directory, personal_key_hash, user_id
from worker.dev.simulator.payload import day_text
from worker.dev.simulator.quirks import Quirks
from worker.dev.simulator.usage import DAY_S, Usage

CACHE_BYTES: Final = 512 * 1024 * 1024
# What an entry takes beside its body: key, arguments, and the table's own cells.
ENTRY_BYTES: Final = 700


@dataclass(slots=True)
class Totals:
    """Usage of the current billing period, in hundredths of a credit."""

    total: int = 0
    by_user: Counter[str | None] = field(default_factory=Counter)
    by_key: Counter[str | None] = field(default_factory=Counter)


@dataclass(slots=True)
class State:
    """What a change of a workspace changes.

    `changed` is None while the lists are as generated; `made` counts what was added since, for ids.
    """

    usage: Usage
    mode: str
    cost_since: int | None
    tier: str
    changed: Directory | None = None
    ticks: int = 0
    made: int = 0

    @property
    def lists(self) -> Directory:
        """Give the lists to read."""
        return directory(self.usage.tag, self.usage.spec) if self.changed is None else self.changed

    def writable(self) -> Directory:
        """Give lists that may be changed."""
        if self.changed is None:
            self.changed = self.lists.copy()
        return self.changed

    @property
    def switch_day(self) -> int | None:
        """Tell the first day billed by cost; None when billed in credits."""
        if self.mode == "credits":
            return None
        return 0 if self.cost_since is None else self.cost_since

    def draft(self) -> "State":
        """Copy far enough that changing the copy leaves this one alone."""
        return replace(
            self,
            usage=replace(self.usage, edits=dict(self.usage.edits)),
            changed=None if self.changed is None else self.changed.copy(),
        )


@dataclass(slots=True, eq=False)
class AccessKey:
    """A personal API key of the workspace's owner; `scopes` None means all of them."""

    secret: str
    key_id: str
    workspace: "Workspace"
    scopes: frozenset[str] | None
    state: str = "live"


@dataclass(slots=True, eq=False)
class Workspace:
    """One simulated workspace. `generation` rises with every change, so cached bodies are found by it."""

    name: str
    serial: int
    workspace_id: str
    state: State
    quirks: Quirks = field(default_factory=Quirks)
    faults: list[Fault] = field(default_factory=list)
    keys: dict[str, AccessKey] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    generation: int = 0
    minted: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    audit_calls: list[float] = field(default_factory=list)
    _totals: tuple[int, int, Totals] | None = None

    @property
    def tag(self) -> str:
        """Give the digest all ids of this workspace contain."""
        return self.state.usage.tag

    @property
    def owner_id(self) -> str:
        """Give the user id of the owner, who also owns the access keys."""
        return user_id(self.tag, 0)

    def totals(self, today: int) -> Totals:
        """Sum the usage of the calendar month so far."""
        if self._totals is None or self._totals[:2] != (self.generation, today):
            by_atom: dict[Atom, int] = {}
            first_of_month = today - int(day_text(today)[-2:]) + 1
            for day in self.state.usage.days(first_of_month, today, today):
                for atom, amount in self.state.usage.of_day(day, today):
                    by_atom[atom] = by_atom.get(atom, 0) + amount
            totals = Totals(sum(by_atom.values()))
            for (_, user, key), amount in by_atom.items():
                totals.by_user[user] += amount
                totals.by_key[key] += amount
            self._totals = (self.generation, today, totals)
        return self._totals[2]


class BodyCache:
    """Encoded bodies, the least recently used dropped when all take more than a size in bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._entries: OrderedDict[Hashable, bytes] = OrderedDict()
        self._most_bytes = most_bytes
        self._bytes = 0

    def get(self, key: Hashable) -> bytes | None:
        """Give a body, or None."""
        body = self._entries.get(key)
        if body is not None:
            self._entries.move_to_end(key)
        return body

    def put(self, key: Hashable, body: bytes) -> None:
        """Keep a body under a key that has none yet."""
        self._entries[key] = body
        self._bytes += len(body) + ENTRY_BYTES
        while self._bytes > self._most_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= len(dropped) + ENTRY_BYTES


class World:
    """All workspaces of one server."""

    def __init__(self, *, seed: int = 0, latency_ms: float = 0, cache_bytes: int = CACHE_BYTES) -> None:
        self.seed = seed
        self.latency_s = latency_ms / 1000
        self.workspaces: dict[str, Workspace] = {}
        self.keys: dict[str, AccessKey] = {}
        self.faults: list[Fault] = []
        self.cache = BodyCache(cache_bytes)
        self.random = random.Random(seed)  # noqa: S311 - repeatable faults, no secret
        self.requests: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[int] = Counter()
        self.pinned: datetime | None = None
        self._serials = count(1)

    def now(self) -> datetime:
        """Tell the time: the pinned one, else the clock's."""
        return self.pinned or datetime.now(UTC)

    def today(self) -> int:
        """Tell the UTC day, in days since 1970-01-01."""
        seconds = time() if self.pinned is None else self.pinned.timestamp()
        return int(seconds // DAY_S)

    def put_workspace(
        self, name: str, spec: Spec, *, api_key: str | None = None, scopes: list[str] | None = None
    ) -> AccessKey:
        """Create a workspace, or replace it with all its keys; returns its access key.

        Raises:
            ValueError: the given secret belongs to another workspace.
        """
        holder = self.keys.get(api_key) if api_key is not None else None
        if holder is not None and holder.workspace.name != name:
            raise ValueError(f"api_key belongs to workspace {holder.workspace.name!r}")
        self.drop_workspace(name)
        tag = digest(self.seed, name, size=6)
        usage = Usage(tag, spec, self.today())
        state = State(usage, spec.mode, spec.cost_since, spec.tier)
        workspace = Workspace(name, next(self._serials), f"ws_{tag}", state)
        self.workspaces[name] = workspace
        return self.mint(workspace, secret=api_key, scopes=scopes)

    def drop_workspace(self, name: str) -> bool:
        """Forget a workspace and its keys; tells whether there was one."""
        gone = self.workspaces.pop(name, None)
        for key in gone.keys.values() if gone is not None else ():
            del self.keys[key.secret]
        return gone is not None

    def mint(self, workspace: Workspace, *, secret: str | None = None, scopes: list[str] | None = None) -> AccessKey:
        """Add an access key to a workspace.

        Raises:
            ValueError: the given secret is in use.
        """
        number = workspace.minted
        made = secret or "sk_" + digest(self.seed, workspace.tag, "access", number, size=24)
        if made in self.keys:
            raise ValueError("api_key is in use")
        workspace.minted += 1
        key_id = f"access_{workspace.tag}{number:02x}"
        key = AccessKey(made, key_id, workspace, None if scopes is None else frozenset(scopes))
        workspace.keys[key_id] = self.keys[made] = key
        return key

    def describe(self, key: AccessKey) -> dict[str, Any]:
        """Tell a test what it needs to know of a workspace and one of its access keys."""
        return {
            "name": key.workspace.name,
            "workspace_id": key.workspace.workspace_id,
            "api_key": key.secret,
            "key_id": key.key_id,
            "hash": personal_key_hash(key.workspace.tag),
            "owner_id": key.workspace.owner_id,
        }

    def reset_stats(self) -> None:
        """Count from zero; what is being answered just now counts no more."""
        self.requests, self.statuses = Counter(), Counter()
        for workspace in self.workspaces.values():
            workspace.most_in_flight = workspace.in_flight
