"""What happens when something dies: a test for every row of the failure table, with real processes and servers."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import redis

from tests.fixtures.history import check
from tests.fixtures.processes import Role
from tests.fixtures.witness import Connection
from tests.system.deployment import Deployment, copy_of, deployed, put_back, wait_for

pytestmark = pytest.mark.slow

WORKS_AGAIN_S = 15.0
"""From the return of a server until everybody works again, restarted by nobody."""
FOUND_AGAIN_S = 60.0
"""Until what was in hand when something died is found by its lease, or by the silence of who held it."""
SOON_S = 20.0
DOWN_S = 2.0
MANY = 40
SHAPE = {"members": MANY, "groups": 2, "service_accounts": 2, "keys_per_account": 2, "history_days": 3}
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One worker, one writer and one beat on servers of their own."""
    roles: tuple[Role, ...] = ("worker", "writer", "beat")
    with deployed(tmp_path_factory.mktemp("failures"), roles) as made:
        yield made


@pytest.fixture
def tenant(installation: Deployment) -> Iterator[str]:
    """A tenant whose first sync is done; everything runs, and afterwards it is polled no more."""
    yield add(installation)
    revive(installation)
    installation.rows("UPDATE rollcall.connectors SET next_sync_at = NULL")


def revive(installation: Deployment) -> None:
    """Bring back whatever a test broke and left so."""
    for proxy in (installation.redis, installation.postgres):
        proxy.heal()
    for server in (installation.stack.valkey, installation.stack.postgres):
        server.resume()
        server.start()
    installation.simulator.faults(None)
    for process in installation.processes:
        process.resume()
        process.start()


def add(installation: Deployment, *, within_s: float = SOON_S) -> str:
    """Add a tenant that is polled every second, and await its first sync."""
    name = f"tenant-{next(NUMBERS)}"
    installation.add([name], poll_interval_s=1, **SHAPE)
    wait_for("the first sync", lambda: installation.agrees(name), timeout_s=within_s)
    return name


def rename(installation: Deployment, tenant: str, name: str) -> str:
    """Rename a member at the provider; give the member's id."""
    subjects = installation.truths[installation.connectors[tenant]].now
    user = sorted(subject for subject in subjects if subject.startswith("member/"))[1].partition("/")[2]
    installation.change(tenant, {"op": "member_update", "user_id": user, "first_name": name})
    return user


def arrives(installation: Deployment, *tenants: str, within_s: float = FOUND_AGAIN_S) -> float:
    """Await that the tables equal the provider."""
    return wait_for("the change", lambda: installation.agrees(*tenants), timeout_s=within_s)


def works_again(installation: Deployment, tenant: str, pids: list[int | None]) -> None:
    """Check that the very same processes sync a new tenant within seconds, and that the old one is not forgotten."""
    add(installation, within_s=WORKS_AGAIN_S)
    assert [process.pid for process in installation.processes] == pids
    arrives(installation, tenant)
    keeps_promises(installation)


def keeps_promises(installation: Deployment) -> None:
    """Check the whole history so far; no tenant is polled any more."""
    installation.rest(timeout_s=FOUND_AGAIN_S)
    assert check(installation.evidence()) == []


def pids(installation: Deployment) -> list[int | None]:
    """Give the ids of all processes, which must run."""
    found = [process.pid for process in installation.processes]
    assert None not in found
    return found


def client(installation: Deployment) -> redis.Redis:
    return redis.Redis.from_url(installation.stack.valkey.url.get_secret_value(), socket_timeout=10)


def one(installation: Deployment, query: str, *values: object) -> Any:
    """Read a single value."""
    (row,) = installation.rows(query, values)
    return next(iter(row.values()))


def stream_of(installation: Deployment, tenant: str) -> str:
    connector = installation.connectors[tenant]
    partition = one(installation, "SELECT partition FROM rollcall.connectors WHERE id = %s::uuid", connector)
    return f"rollcall:events:{{{partition}}}"


def pending(installation: Deployment, stream: str) -> int:
    """Count what the writer has read of a stream and not acknowledged."""
    with client(installation) as connected:
        found: Any = connected.xpending(stream, "writer")
        return int(found["pending"])


def unapplied(installation: Deployment, stream: str) -> bool:
    """Tell whether the stream holds what the writer has not acknowledged."""
    with client(installation) as connected:
        groups: Any = connected.xinfo_groups(stream)
        info: Any = connected.xinfo_stream(stream)
    (writer,) = (group for group in groups if group["name"] == b"writer")
    return bool(writer["pending"] or writer["last-delivered-id"] != info["last-generated-id"])


def forget_snapshots(installation: Deployment, tenant: str) -> None:
    """Delete a tenant's snapshots: its next poll says, of every dataset, that nothing has changed."""
    with client(installation) as connected:
        keys: Any = connected.keys(f"rollcall:snapshot:*:{installation.connectors[tenant]}:*")
        connected.delete(*keys)


def count(installation: Deployment, tenant: str, table: str, condition: str) -> int:
    """Count rows of a tenant."""
    query = f"SELECT count(*) FROM rollcall.{table} WHERE connector_id = %s::uuid AND {condition}"  # noqa: S608 - constants
    return int(one(installation, query, installation.connectors[tenant]))


def claimed(installation: Deployment, tenant: str) -> int:
    """Count the parts that a worker has in hand."""
    return count(installation, tenant, "sync_parts", "status = 'running' AND published_at IS NULL")


def status(installation: Deployment, tenant: str) -> tuple[str, str | None]:
    (row,) = installation.rows(
        "SELECT status, status_reason FROM rollcall.connectors WHERE id = %s::uuid", [installation.connectors[tenant]]
    )
    return row["status"], row["status_reason"]


def test_fetch_worker_killed(installation: Deployment, tenant: str) -> None:
    """Fetch worker killed: its parts are sent again from the ledger; the repeat publishes nothing twice."""
    worker = installation.process("worker")
    installation.simulator.faults(tenant, {"kind": "slow", "seconds": 0.8})
    rename(installation, tenant, "While it dies")
    wait_for("parts in hand", lambda: claimed(installation, tenant), timeout_s=SOON_S)
    worker.kill()
    assert claimed(installation, tenant)
    installation.simulator.faults(tenant)
    worker.start()
    arrives(installation, tenant)
    keeps_promises(installation)


def test_writer_killed(installation: Deployment, tenant: str) -> None:
    """Writer killed: the next one finds its entries pending; what was applied is skipped."""
    writer = installation.process("writer")
    stream = stream_of(installation, tenant)
    with installation.look() as holder, holder.transaction():
        lock_member(holder, installation.connectors[tenant], rename(installation, tenant, "In the dead hand"))
        wait_for("an entry in hand", lambda: pending(installation, stream), timeout_s=SOON_S)
        writer.kill()
        assert pending(installation, stream)
    writer.start()
    arrives(installation, tenant)
    with client(installation) as connected:
        connected.xgroup_setid(stream, "writer", "0")
    rename(installation, tenant, "After all was read again")
    arrives(installation, tenant)
    keeps_promises(installation)


def lock_member(connection: Connection, connector: str, user: str) -> None:
    """Hold a row that a writer wants to write."""
    connection.execute(
        "SELECT 1 FROM rollcall.members WHERE connector_id = %s::uuid AND user_id = %s FOR UPDATE", [connector, user]
    )


def kill_valkey(installation: Deployment) -> None:
    installation.stack.valkey.kill()
    time.sleep(DOWN_S)
    installation.stack.valkey.start()


def restart_valkey(installation: Deployment) -> None:
    installation.stack.valkey.stop()
    time.sleep(DOWN_S)
    installation.stack.valkey.start()


def freeze_valkey(installation: Deployment) -> None:
    installation.stack.valkey.pause()
    time.sleep(DOWN_S * 4)
    installation.stack.valkey.resume()


def reset_connections(installation: Deployment) -> None:
    for _ in range(10):
        installation.redis.reset()
        time.sleep(DOWN_S / 10)


@pytest.mark.parametrize("how", [kill_valkey, restart_valkey, freeze_valkey, reset_connections])
def test_redis_restarted(installation: Deployment, tenant: str, how: Callable[[Deployment], None]) -> None:
    """Redis restarted: everyone reconnects by themselves within seconds, however it went and came."""
    before = pids(installation)
    how(installation)
    rename(installation, tenant, "After the restart")
    works_again(installation, tenant, before)


def test_redis_lost(installation: Deployment, tenant: str) -> None:
    """Redis lost: datasets are compared with Postgres, which loses nothing and hears nothing twice."""
    before = pids(installation)
    valkey = installation.stack.valkey
    valkey.stop()
    shutil.rmtree(valkey.folder)
    valkey.start()
    rename(installation, tenant, "After the loss")
    works_again(installation, tenant, before)


def test_redis_rolled_back(installation: Deployment, tenant: str) -> None:
    """Redis rolled back: old snapshots and old entries are not believed; no record goes back."""
    before = pids(installation)
    valkey, copy = installation.stack.valkey, installation.folder / "valkey.older"
    valkey.stop()
    copy_of(valkey, copy)
    valkey.start()
    for name in ("First", "Second"):
        rename(installation, tenant, name)
        arrives(installation, tenant)
    valkey.stop()
    put_back(valkey, copy)
    valkey.start()
    rename(installation, tenant, "Third")
    works_again(installation, tenant, before)


def test_slow_is_not_lost(installation: Deployment, tenant: str) -> None:
    """Snapshots lost while the writer stands still: what is said meanwhile is applied when it goes on."""
    writer = installation.process("writer")
    writer.pause()
    forget_snapshots(installation, tenant)
    wait_for("it is published", lambda: in_stream(installation, tenant), timeout_s=SOON_S)
    assert installation.agrees(tenant), "nothing has changed: the tables do not tell that something waits"
    going_on = threading.Timer(DOWN_S, writer.resume)
    going_on.start()
    try:
        keeps_promises(installation)
    finally:
        going_on.join()


def test_postgres_restored_from_a_backup(installation: Deployment, tenant: str) -> None:
    """Postgres restored from a backup: what it forgot is fetched again, under numbers above all earlier ones."""
    before = pids(installation)
    postgres, copy = installation.stack.postgres, installation.folder / "postgres.backup"
    postgres.stop()
    copy_of(postgres, copy)
    postgres.start()
    rename(installation, tenant, "Forgotten")
    arrives(installation, tenant)
    rename(installation, tenant, "Forgotten, too")
    arrives(installation, tenant)
    postgres.stop()
    put_back(postgres, copy)
    postgres.start()
    assert not installation.agrees(tenant)
    arrives(installation, tenant)
    assert [process.pid for process in installation.processes] == before
    keeps_promises(installation)


def test_postgres_down(installation: Deployment, tenant: str) -> None:
    """Postgres down: nothing is acknowledged that is not committed, and all goes on when it is back."""
    before, stream = pids(installation), stream_of(installation, tenant)
    writer, postgres = installation.process("writer"), installation.stack.postgres
    writer.pause()
    rename(installation, tenant, "Published, not applied")
    wait_for("it is published", lambda: in_stream(installation, tenant), timeout_s=SOON_S)
    postgres.kill()
    writer.resume()
    time.sleep(DOWN_S)
    assert unapplied(installation, stream)
    postgres.start()
    works_again(installation, tenant, before)


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "rate429", "retry_after": 1},
        {"kind": "rate429"},
        {"kind": "concurrency429"},
        {"kind": "s500_text"},
        {"kind": "s503", "retry_after": 1},
        {"kind": "s502_html"},
    ],
    ids=lambda rule: "-".join(map(str, rule.values())),
)
def test_provider_429_and_5xx(installation: Deployment, tenant: str, rule: dict[str, Any]) -> None:
    """Provider 429/5xx: the connector's state is untouched, the provider is not hammered, nothing is lost."""
    installation.simulator.faults(tenant, rule)
    rename(installation, tenant, "Through the storm")
    installation.simulator.reset_stats()
    storm_s = 3.0
    time.sleep(storm_s)
    asked = sum(installation.simulator.stats()["requests"].get(tenant, {}).values())
    assert asked <= 8 * storm_s * 2, "seven datasets, each asked about once a second at the very most"
    assert status(installation, tenant) == ("connected", None)
    installation.simulator.faults(tenant)
    arrives(installation, tenant)
    assert status(installation, tenant) == ("connected", None)
    keeps_promises(installation)


def test_provider_slow(installation: Deployment, tenant: str) -> None:
    """Provider slow: a deadline ends the wait, another tenant is not held up, and the status says nothing of it."""
    other = add(installation)
    installation.simulator.faults(tenant, {"kind": "hang"})
    rename(installation, tenant, "Behind a wall")
    timed_out = "error_reason = 'timeout'"
    wait_for("a deadline", lambda: count(installation, tenant, "sync_parts", timed_out), timeout_s=SOON_S)
    rename(installation, other, "Meanwhile")
    arrives(installation, other, within_s=SOON_S)
    assert status(installation, tenant) == ("connected", None)
    installation.simulator.faults(tenant)
    arrives(installation, tenant)
    keeps_promises(installation)


@pytest.mark.parametrize("kind", ["truncated", "truncated_json", "truncated_list", "ownerless", "empty"])
def test_provider_truncated(installation: Deployment, tenant: str, kind: str) -> None:
    """Provider truncated: a listing that is not whole removes nobody, whatever shape it has."""
    rule: dict[str, Any] = {"kind": kind, "match": {"path_prefix": "/v1/workspace/members"}, "times": 2}
    installation.simulator.faults(tenant, rule)
    rename(installation, tenant, "Among the missing")
    arrives(installation, tenant)
    wait_for("no removal is held", lambda: status(installation, tenant) == ("connected", None), timeout_s=SOON_S)
    assert count(installation, tenant, "members", "removed_at IS NOT NULL") == 0
    keeps_promises(installation)


def test_poison_event(installation: Deployment, tenant: str) -> None:
    """Poison event: set aside alone; its neighbours are committed, its run ends partial, a reconcile mends it."""
    neighbours = [add(installation) for _ in range(2)]
    writer = installation.process("writer")
    installation.rows("ALTER TABLE rollcall.members ADD CONSTRAINT no_poison CHECK (first_name <> 'Poison')")
    writer.pause()
    rename(installation, tenant, "Poison")
    for neighbour in neighbours:
        rename(installation, neighbour, "Neighbour")
    for name in (tenant, *neighbours):
        wait_for("it is published", partial(in_stream, installation, name), timeout_s=SOON_S)
    writer.resume()
    arrives(installation, *neighbours, within_s=SOON_S)
    wait_for("a dead letter", lambda: dead_letters(installation), timeout_s=SOON_S)
    ended = "status = 'partial'"
    wait_for("a partial run", lambda: count(installation, tenant, "sync_runs", ended), timeout_s=SOON_S)
    installation.rows("ALTER TABLE rollcall.members DROP CONSTRAINT no_poison")
    connector = installation.connectors[tenant]
    installation.rows("UPDATE rollcall.connectors SET reconciled_at = NULL WHERE id = %s::uuid", [connector])
    mended = "kind = 'reconcile' AND status = 'succeeded'"
    wait_for("the reconcile", lambda: count(installation, tenant, "sync_runs", mended), timeout_s=FOUND_AGAIN_S)
    arrives(installation, tenant)
    keeps_promises(installation)


def in_stream(installation: Deployment, tenant: str) -> int:
    """Count the members' parts that wait for the writer."""
    waiting = "dataset = 'members' AND status = 'running' AND published_at IS NOT NULL"
    return count(installation, tenant, "sync_parts", waiting)


def dead_letters(installation: Deployment) -> int:
    with client(installation) as connected:
        found: Any = connected.xlen("rollcall:deadletter")
        return int(found)
