"""The history of a case: all it did, witnessed from before its first event on, and checked at its end.

Looking takes time of the same cores, so figures of a checked case are comparable with no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.bench.case import HISTORY, Sample
from tests.bench.stage import Place, Stage, WrongResultError
from tests.bench.tenants import BACKFILL_DAYS, POLL_DAYS, Tenant, first_day
from tests.fixtures import witness
from tests.fixtures.evidence import Truth, Values
from tests.fixtures.history import check, read
from tests.fixtures.simulator import Simulator

NAMED = 5
"""Violations that are told one by one."""

Tell = Callable[[Sequence[Tenant]], Mapping[str, Values]]
"""Tells what is true of tenants now, by connector."""


class History:
    """What a case did. Unless the run is checked nobody looks, and nothing is found."""

    def note(self, tenants: Sequence[Tenant], *, began: float = 0.0) -> None:
        """Take note of what is true of tenants, since a change that was begun then."""

    @contextmanager
    def changing(self, tenants: Sequence[Tenant]) -> Iterator[None]:
        """Take note of what the block changes at the provider."""
        began = time.time()
        yield
        self.note(tenants, began=began)

    def verdict(self) -> Sample:
        """Check all that was witnessed so far, once the processes have stopped; tell how much it was.

        Raises:
            WrongResultError: something is wrong, or nothing was witnessed.

        """
        return {}


@dataclass(slots=True)
class Witnessed(History):
    """What a case did, by witnesses that know nothing of each other; usage before `recent`: see `Evidence`."""

    place: Place
    reader: witness.Reader
    tell: Tell
    recent: str
    truths: dict[str, Truth] = field(default_factory=dict)

    def note(self, tenants: Sequence[Tenant], *, began: float = 0.0) -> None:
        """See `History`."""
        for connector, values in self.tell(tenants).items():
            self.truths.setdefault(connector, Truth()).add(values, began=began, done=time.time())

    def verdict(self) -> Sample:
        """See `History`."""
        evidence = witness.collect(self.place.database_url, self.reader, self.truths, recent=self.recent)
        if found := check(evidence):
            few = "; ".join(f"{one.kind} {one.connector} {one.where}: {one.detail}" for one in found[:NAMED])
            raise WrongResultError(f"the history has {len(found)} violations: {few}")
        told = read(evidence.said).once()
        return looked_at(
            observations=len(told),
            events=sum(len(one.events) for one in told),
            writes=len(evidence.writes),
            closes=len(evidence.closes),
        )


@contextmanager
def witnessed(stage: Stage, place: Place, tell: Tell) -> Iterator[History]:
    """Witness what is done in a fresh place until the block ends; processes must start in it, not before."""
    if not stage.checked:
        yield History()
        return
    witness.watch_commits(place.database_url)
    with place.database() as database:
        (meta,) = database.execute("SELECT partitions FROM rollcall.meta").fetchall()
    # A poll asks for one day more, which may be over while a case runs.
    recent = first_day(POLL_DAYS - 1).isoformat()
    with witness.Reader(place.redis_url, meta["partitions"]) as reader:
        yield Witnessed(place, reader, tell, recent)


def told_by(simulator: Simulator) -> Tell:
    """Let a simulator tell, of usage the days that a first sync asks for."""
    days = [first_day(n + 1) for n in range(BACKFILL_DAYS)]

    def tell(tenants: Sequence[Tenant]) -> dict[str, Values]:
        return {
            str(tenant.connector_id): witness.true_values(
                simulator.truth(tenant.workspace, min(days).isoformat()), days
            )
            for tenant in tenants
        }

    return tell


def looked_at(**counts: int) -> Sample:
    """Name figures of what was checked.

    Raises:
        WrongResultError: there was none of it, so that nothing wrong could have been found.

    """
    if none := [what for what, count in counts.items() if not count]:
        raise WrongResultError(f"the history has no {', no '.join(none)}")
    return {HISTORY + what: count for what, count in counts.items()}
