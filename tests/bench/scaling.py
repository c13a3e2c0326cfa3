"""Scaling: what a record costs in a first sync, from few tenants to many and from small ones to large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from tests.bench.case import Case, Sample, Side
from tests.bench.stage import Stage
from tests.bench.sync import FIRST, world
from tests.bench.tenants import Shape

TICK_S = 1.0
"""Short, so that the wait for it does not hide what a small sync costs."""
TENANTS_OF = (10, 100, 1_000)
MEMBERS_OF = (100, 1_000, 10_000, 50_000)
QUICK_TENANTS_OF = (2, 10)
QUICK_MEMBERS_OF = (100, 1_000)


def _first(stage: Stage, shape: Shape) -> Sample:
    with world(stage, shape) as made:
        found = made.product([FIRST], TICK_S)
    return {**found, "us_per_record": found["first.seconds"] / found["first.records"] * 1e6}


@contextmanager
def _tenants(stage: Stage) -> Iterator[Mapping[str, Side]]:
    counts = QUICK_TENANTS_OF if stage.quick else TENANTS_OF
    yield {_many(count, "tenants"): partial(_first, stage, Shape(count)) for count in counts}


@contextmanager
def _members(stage: Stage) -> Iterator[Mapping[str, Side]]:
    counts = QUICK_MEMBERS_OF if stage.quick else MEMBERS_OF
    yield {_many(count, "members"): partial(_first, stage, Shape(1, count)) for count in counts}


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}"


def _against_smallest(*sizes: Sequence[int], what: str) -> dict[str, str]:
    return {_many(n, what): _many(found[0], what) for found in sizes for n in found[1:]}


TENANTS = Case(
    "scaling_tenants",
    "first sync of 10 to 1,000 tenants of 200 members: what does a record cost?",
    _tenants,
    _against_smallest(TENANTS_OF, QUICK_TENANTS_OF, what="tenants"),
)
MEMBERS = Case(
    "scaling_members",
    "first sync of one tenant of 100 to 50,000 members: what does a record cost?",
    _members,
    _against_smallest(MEMBERS_OF, QUICK_MEMBERS_OF, what="members"),
)
