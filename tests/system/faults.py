"""What can break, and how it heals: processes, servers, the network between them, and the provider."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from tests.fixtures.processes import Process
from tests.fixtures.proxy import Proxy
from tests.system.deployment import Deployment, copy_of, put_back, wait_for
from worker.dev.server import Server

Heal = Callable[[], None]

DOWN_S: Final = (0.1, 2.0)
STUCK_S: Final = (0.5, 6.0)
FROZEN_S: Final = (1.0, 15.0)
"""Longer than leases last: whoever wakes up finds that others have taken over."""
GRACE_S: Final = (2.5, 5.0)
"""What an orchestrator allows for an end in order."""
STORM_S: Final = (1.0, 5.0)
BAIT_S: Final = (1.0, 3.0)
AT_ONCE_S: Final = (0.0, 0.0)
GONE_S: Final = 10.0
BAITS: Final = 2
"""Most baits of one kind for a workspace: three in a row would be believed, and rightly so."""
BAITED: Final = 4
"""Workspaces at once: if more keys seem dead together, no verdict is believed anyway."""

_DIRECTORY: Final = {"match": {"method": "GET"}}
_MEMBERS: Final = {"match": {"path_prefix": "/v1/workspace/members"}}
RULES: Final[tuple[dict[str, Any], ...]] = (
    {"kind": "rate429", "retry_after": 1},
    {"kind": "rate429"},
    {"kind": "concurrency429"},
    {"kind": "busy429", "retry_after": 0},
    {"kind": "s500_text"},
    {"kind": "s500_json"},
    {"kind": "s502_html"},
    {"kind": "s503", "retry_after": 2},
    {"kind": "s504_empty"},
    {"kind": "timeout408"},
    {"kind": "html403"},
    {"kind": "empty"},
    {"kind": "truncated"},
    {"kind": "truncated_json"},
    {"kind": "reset"},
    {"kind": "hang"},
    {"kind": "slow", "seconds": 0.5},
    {"kind": "slow", "seconds": 4},
    {"kind": "schema_broken"},
    {"kind": "missing_scope", "permission": "workspace_read"},
    {"kind": "quota"},
    {"kind": "ownerless", **_MEMBERS},
    {"kind": "duplicated_list", **_DIRECTORY},
    {"kind": "conflict409", **_DIRECTORY},
    {"kind": "forbidden", **_DIRECTORY},
    {"kind": "ip", **_DIRECTORY},
)
"""What the provider may answer now and then without anything being wrong with a key or a record."""
BAIT: Final[tuple[dict[str, Any], ...]] = (
    {"kind": "invalid_api_key"},
    {"kind": "unusual_activity"},
    {"kind": "other401"},
    {"kind": "truncated_list", **_MEMBERS},
)
"""What would end a connection or delete records, were it believed at once."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` breaks `target` and gives what heals it, to be called after a time within `seconds`."""

    name: str
    weight: int
    target: str
    seconds: tuple[float, float]
    strike: Callable[[], Heal]


@dataclass(frozen=True, slots=True)
class Lane:
    """Faults of which at most `at_once` last together, with `pause_s` between two of them.

    What is always down proves nothing: the pauses leave time to come back, and to work in between.
    """

    faults: list[Fault]
    at_once: int
    pause_s: tuple[float, float]


def lanes_of(deployment: Deployment, rng: random.Random, *, known: Sequence[str]) -> list[Lane]:
    """List what may break at any time; `known` are workspaces that were synced before.

    Of others a listing that is cut looks like a whole one: there is nothing yet that could be missing.
    """
    processes = [fault for number, process in enumerate(deployment.processes) for fault in _of_process(number, process)]
    machines = [*_of_server(deployment.stack.valkey), *_of_server(deployment.stack.postgres)]
    machines += [*_of_link("redis", deployment.redis, rng), *_of_link("postgres", deployment.postgres, rng)]
    provider = ProviderFaults(deployment, rng, known)
    answers = [
        Fault("provider storm", 1, "provider", STORM_S, provider.storm),
        Fault("provider bait", 1, "provider", BAIT_S, provider.bait),
    ]
    return [Lane(processes, 3, (0.5, 2.5)), Lane(machines, 2, (1.0, 5.0)), Lane(answers, 1, (0.0, 0.5))]


def planned_of(deployment: Deployment) -> list[tuple[float, Fault]]:
    """List what breaks once, each with its place in the run (0 to 1)."""
    back = ValkeyBack(deployment)
    return [
        (0.2, Fault("valkey flushed", 1, "valkey", AT_ONCE_S, lambda: _flush(deployment))),
        (0.4, Fault("valkey copied and restarted", 1, "valkey", AT_ONCE_S, back.copy)),
        (0.7, Fault("valkey rolled back", 1, "valkey", AT_ONCE_S, back.roll_back)),
    ]


def _nothing() -> None:
    """Heal what heals by itself."""


def _of_process(number: int, process: Process) -> list[Fault]:
    target = f"process-{number}"

    def kill() -> Heal:
        process.kill()
        return process.start

    def pause() -> Heal:
        process.pause()
        return process.resume

    def restart() -> Heal:
        process.terminate()

        def heal() -> None:
            process.kill()
            process.start()

        return heal

    return [
        Fault(f"{process.role} killed", 3, target, DOWN_S, kill),
        Fault(f"{process.role} frozen", 1, target, FROZEN_S, pause),
        Fault(f"{process.role} restarted", 1, target, GRACE_S, restart),
    ]


def _of_server(server: Server) -> list[Fault]:
    target = server.name.lower()

    def kill() -> Heal:
        server.kill()
        return server.start

    def stop() -> Heal:
        server.stop()
        return server.start

    def pause() -> Heal:
        server.pause()
        return server.resume

    return [
        Fault(f"{target} killed", 2, target, DOWN_S, kill),
        Fault(f"{target} restarted", 2, target, DOWN_S, stop),
        Fault(f"{target} frozen", 1, target, STUCK_S, pause),
    ]


def _of_link(name: str, proxy: Proxy, rng: random.Random) -> list[Fault]:
    target = f"{name}-link"

    def strike(break_it: Callable[[], object]) -> Callable[[], Heal]:
        def struck() -> Heal:
            break_it()
            return proxy.heal

        return struck

    return [
        Fault(f"{name} link hangs", 2, target, STUCK_S, strike(proxy.hang)),
        Fault(f"{name} link slow", 1, target, STUCK_S, strike(lambda: proxy.slow(rng.uniform(0.005, 0.05)))),
        Fault(f"{name} link refused", 1, target, DOWN_S, strike(proxy.refuse)),
        Fault(f"{name} link reset", 3, target, AT_ONCE_S, strike(proxy.reset)),
        Fault(f"{name} link cut", 2, target, AT_ONCE_S, strike(proxy.cut)),
        Fault(f"{name} answer cut", 3, target, DOWN_S, strike(lambda: proxy.truncate(rng.randrange(1, 4_000)))),
    ]


class ProviderFaults:
    """Storms that strike everybody, and baits for some workspaces."""

    def __init__(self, deployment: Deployment, rng: random.Random, known: Sequence[str]) -> None:
        self._deployment = deployment
        self._rng = rng
        self._known = known
        self._baited: Counter[tuple[str, str]] = Counter()

    def storm(self) -> Heal:
        """Let some of all requests fail in one or two ways."""
        rules = self._rng.sample(RULES, self._rng.randint(1, 2))
        chance = self._rng.choice([0.1, 0.3, 0.6])
        self._deployment.simulator.faults(None, *({**rule, "probability": chance} for rule in rules))
        return lambda: self._deployment.simulator.faults(None)

    def bait(self) -> Heal:
        """Let one request of some workspaces get an answer that must not be believed at once."""
        names = self._rng.sample(self._known, BAITED)
        for name in names:
            rule = self._rng.choice(BAIT)
            if self._baited[name, rule["kind"]] < BAITS:
                self._baited[name, rule["kind"]] += 1
                self._deployment.simulator.faults(name, {**rule, "times": 1})

        def heal() -> None:
            for name in names:
                self._deployment.simulator.faults(name)

        return heal


def _flush(deployment: Deployment) -> Heal:
    wait_for("Valkey answers", lambda: _answers(deployment), timeout_s=GONE_S)
    deployment.reader.flush_all()
    return _nothing


def _answers(deployment: Deployment) -> bool:
    try:
        deployment.reader.drain()
    except redis.RedisError:
        return False
    return True


class ValkeyBack:
    """An older copy of Valkey, and the return to it."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._server = deployment.stack.valkey
        self._copy = deployment.folder / "valkey.copy"

    def copy(self) -> Heal:
        """Restart it, and take a copy while it is down."""
        self._server.stop()
        copy_of(self._server, self._copy)
        return self._server.start

    def roll_back(self) -> Heal:
        """Put the copy in place, once the reader has met all that will be gone."""
        proxy = self._deployment.redis
        proxy.refuse()
        wait_for("Valkey is left alone", lambda: _answers(self._deployment) and self._alone(), timeout_s=GONE_S)
        self._deployment.reader.drain()
        self._server.stop()
        put_back(self._server, self._copy)

        def heal() -> None:
            self._server.start()
            proxy.heal()

        return heal

    def _alone(self) -> bool:
        """Tell whether none of our processes is connected; two clients are witnesses."""
        with redis.Redis.from_url(self._server.url.get_secret_value(), socket_timeout=GONE_S) as client:
            return len(client.client_list()) <= 2
