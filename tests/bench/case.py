"""What a case is: sides that are measured in turn, and which of them is whose floor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tests.bench.stage import Stage

Sample = dict[str, float]
"""Figures by name, `<step>.<what>_<unit>[.<process>]`."""

Side = Callable[[], Sample]
"""Measures once, checks what came of it, and returns the figures.

Raises:
    WrongResultError: what came of it is not what the provider holds.
"""


HISTORY = "history."
"""How figures of what was checked begin."""
FLOORS = frozenset({"floor", "floor_least", "stream", "fetch"})
"""Sides that measure the machine: they have no history."""


def joined(samples: Iterable[Sample]) -> Sample:
    """Join the figures of several samples; what was checked adds up."""
    found: Sample = {}
    for sample in samples:
        found |= {n: v + found.get(n, 0) if n.startswith(HISTORY) else v for n, v in sample.items()}
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """One case: `prepare` sets up what its sides share; `against` names each side's floor (or smaller size)."""

    name: str
    about: str
    prepare: Callable[[Stage], AbstractContextManager[Mapping[str, Side]]]
    against: Mapping[str, str] = field(default_factory=dict)
