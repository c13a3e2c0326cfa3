"""Migrations: applied once, by one at a time; and what is told to whoever may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.fixtures.servers import revive
from worker.dev.stack import EmbeddedStack
from worker.errors import Misconfigured, Refused, TryLater
from worker.store import migrate as migrating
from worker.store.migrate import LOCK_KEY, Migration, migrate, migrations


@pytest.fixture
def empty_url(stack: EmbeddedStack) -> Iterator[str]:
    """The URL of a database without anything in it."""
    revive(stack.postgres)
    name = f"empty_{uuid4().hex[:12]}"
    admin = stack.postgres.url_of("postgres").get_secret_value()
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield stack.postgres.url_of(name).get_secret_value()
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def test_migrating_again_does_nothing(empty_url: str) -> None:
    """The first call applies every migration, the next none; the number of streams stays what it was first."""
    names = [f"{m.number:04d}_{m.name}" for m in migrations()]
    assert migrate(empty_url, partitions=3) == names
    assert migrate(empty_url, partitions=8) == []
    assert ask(empty_url, "SELECT partitions FROM rollcall.meta") == [(3,)]


def test_two_places_may_migrate_at_once(empty_url: str) -> None:
    """Of several migrators at once each waits for the other, and every migration is applied by one of them."""
    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(migrate, [empty_url] * 4))
    assert sorted(map(len, applied)) == [0, 0, 0, len(migrations())]


def test_parts_in_hand_outlive_a_migration(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that was in use before a migration tells afterwards which of its parts are open."""
    known = migrations()
    monkeypatch.setattr(migrating, "migrations", lambda: known[:1])
    migrate(empty_url)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO rollcall.sync_runs (id, connector_id, tenant_id, kind, requested_by, status)"
            " SELECT gen_random_uuid(), gen_random_uuid(), 't1', 'poll', 'schedule', 'running'"
        )
        connection.execute(
            "INSERT INTO rollcall.sync_parts (id, run_id, connector_id, kind, dataset, status)"
            " SELECT gen_random_uuid(), id, connector_id, kind, status, status FROM (SELECT id, connector_id, kind FROM"
            " rollcall.sync_runs) r, unnest('{queued,running,waiting,succeeded,failed,skipped}'::text[]) AS status"
        )
        monkeypatch.setattr(migrating, "migrations", lambda: known)
        assert len(migrate(empty_url)) == len(known) - 1
    found = dict(ask(empty_url, "SELECT status, open FROM rollcall.sync_parts"))
    assert {status for status, is_open in found.items() if is_open} == {"queued", "running", "waiting"}
    assert len(found) == 6


def test_steps_of_a_part_move_no_index(empty_url: str) -> None:
    """The indexes of parts hold nothing that a step moves but whether it is open: else each would write all of them."""
    migrate(empty_url)
    held = ask(
        empty_url,
        """
        SELECT DISTINCT a.attname FROM pg_index i
        JOIN pg_depend d ON d.objid = i.indexrelid AND d.refobjid = i.indrelid
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE i.indrelid = 'rollcall.sync_parts'::regclass
        """,
    )
    assert {name for (name,) in held} <= {"id", "run_id", "connector_id", "open"}
    assert ("open",) in held


def test_a_database_from_the_future_is_refused(empty_url: str) -> None:
    """A schema that a newer version made is left alone, and the message says what to do."""
    migrate(empty_url)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("INSERT INTO rollcall.schema_migrations (number, name) VALUES (9999, 'later')")
    with pytest.raises(Refused, match=r"migration 9999.*newer version") as refused:
        migrate(empty_url)
    assert refused.value.reason == "database_from_the_future"


def test_a_server_too_old_is_refused(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server below the least version is refused before anything is written."""
    monkeypatch.setattr(migrating, "MIN_SERVER_VERSION", 990_000)
    with pytest.raises(Refused) as refused:
        migrate(empty_url)
    assert refused.value.reason == "server_too_old"
    assert ask(empty_url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'rollcall'") == [(0,)]


def test_a_database_that_is_away_is_told_without_its_password() -> None:
    """No server: TryLater, and neither the message nor anything it hangs on shows the password."""
    with pytest.raises(TryLater) as later:
        migrate("postgresql://rollcall:sesame@127.0.0.1:9/rollcall?sslmode=disable")
    assert later.value.reason == "database_unreachable"
    assert "sesame" not in f"{later.value!r} {later.value.__cause__!r}"


def test_a_lock_that_is_held_for_too_long_is_told(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another session holds is waited for, for a while; the message says what to do then."""
    with psycopg.connect(empty_url, autocommit=True) as other, monkeypatch.context() as patch:
        patch.setattr(migrating, "LOCK_TIMEOUT_MS", 50)
        other.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
        with pytest.raises(TryLater, match="migrate again") as later:
            migrate(empty_url)
    assert later.value.reason == "database_locked"
    assert len(migrate(empty_url)) == len(migrations())


@pytest.fixture
def guest(empty_url: str) -> Iterator[Callable[[str], None]]:
    """Make every new session that of a role without rights; statements may name `{role}` and `{database}`."""
    with psycopg.connect(empty_url, autocommit=True) as admin:
        names = {"role": sql.Identifier(f"guest_{uuid4().hex[:12]}"), "database": sql.Identifier(admin.info.dbname)}

        def run(statement: LiteralString) -> None:
            admin.execute(sql.SQL(statement).format(**names))

        run("CREATE ROLE {role}")
        try:
            # So the role needs no password of its own.
            run("ALTER DATABASE {database} SET role = {role}")
            yield run
        finally:
            run("ALTER DATABASE {database} RESET role")
            run("DROP OWNED BY {role}")
            run("DROP ROLE {role}")


def test_a_role_that_may_not_begin_is_told_so(empty_url: str, guest: Callable[[str], None]) -> None:
    """Whoever connects as a role that may not create the schema learns which role is needed."""
    with pytest.raises(Misconfigured, match=r"permission denied.*may create schemas") as wrong:
        migrate(empty_url)
    assert wrong.value.reason == "database_forbids"
    guest("GRANT CREATE ON DATABASE {database} TO {role}")
    assert len(migrate(empty_url)) == len(migrations())


@pytest.mark.parametrize("right", ["CREATE ON DATABASE {database}", "USAGE ON SCHEMA rollcall"])
def test_a_role_that_does_not_own_the_schema_is_told_so(
    empty_url: str, request: pytest.FixtureRequest, right: str
) -> None:
    """What another role has made is its own: whoever else migrates learns that the owner must."""
    migrate(empty_url)
    request.getfixturevalue("guest")(f"GRANT {right} TO {{role}}")
    with pytest.raises(Misconfigured, match="as the owner of the schema rollcall") as wrong:
        migrate(empty_url)
    assert wrong.value.reason == "database_forbids"


def test_the_owner_needs_no_right_to_create_schemas(empty_url: str, guest: Callable[[str], None]) -> None:
    """Once there is the schema, its owner may migrate without the right that it took to create it."""
    guest("GRANT CREATE ON DATABASE {database} TO {role}")
    migrate(empty_url)
    guest("REVOKE CREATE ON DATABASE {database} FROM {role}")
    assert migrate(empty_url) == []


def test_a_standby_is_told(empty_url: str, guest: Callable[[str], None]) -> None:
    """On a server that only reads, whoever migrates learns where DATABASE_URL must lead."""
    guest("ALTER DATABASE {database} SET default_transaction_read_only = on")
    with pytest.raises(TryLater, match="primary") as later:
        migrate(empty_url)
    assert later.value.reason == "database_unreachable"


def test_what_nobody_can_mend_is_told_as_it_is(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that is wrong fails as such, and its transaction leaves nothing."""
    monkeypatch.setattr(migrating, "migrations", lambda: [Migration(1, "wrong", "CREATE TABLE a (); SELECT nothing")])
    with pytest.raises(psycopg.errors.UndefinedColumn):
        migrate(empty_url)
    assert ask(empty_url, "SELECT to_regclass('rollcall.a')") == [(None,)]
