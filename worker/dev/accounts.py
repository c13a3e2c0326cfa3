"""Who runs the embedded servers, and where they live.

An ordinary user runs them as itself, in its data folder, from the installed wheels. Root cannot: Postgres
refuses to run as root, and any other account can enter neither the data folder (0700) nor, often, the folder
of the wheels. So root makes a *home* outside (in `HOMES`), owned by root and passable by all, with a private
folder per server that belongs to an unprivileged account, and a copy of the programs. Root never writes into
a folder of the account, so nothing planted there can lead it astray, and no permission of a folder that it
did not make is changed.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from worker.dev.folder import StackError, read_json, write_private

HOMES = Path("/var/db/rollcall-embedded" if sys.platform == "darwin" else "/var/lib/rollcall-embedded")
"""Root's homes. Not in /tmp or /var/tmp: their cleaners remove what has not changed for long."""
ACCOUNT_NAMES = ("rollcall", "postgres", "_postgres", "daemon", "nobody")
"""Accounts to run as, best first: one made for it, one made for Postgres, then those every system has."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All that a server sees: a PGPORT or PGOPTIONS of the user's shell must not steer it."""


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged account that root's servers run as."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the servers of one data folder live: `folder` holds one for each; `account` None is ourselves."""

    folder: Path
    account: Account | None

    def private_folder(self, name: str) -> Path:
        """Make the folder `name` here, 0700 and the account's, unless it is there already."""
        path = self.folder / name
        path.mkdir(mode=0o700, exist_ok=True)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        """Hand `path` to the account."""
        if self.account:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)

    def programs(self, package: str, parts: Iterable[str]) -> Path:
        """Give a folder laid out like site-packages with those `parts` of an installed package.

        For root's account that is a copy, made anew each time: an upgraded or half-written one needs no care.

        Raises:
            StackError: the package is not installed.

        """
        found = find_spec(package)
        if found is None or found.origin is None:
            raise StackError(
                "no_embedded_servers",
                "No servers are installed with Rollcall: set DATABASE_URL and REDIS_URL, or install the extra"
                " rollcall[embedded].",
            )
        site = Path(found.origin).resolve().parent.parent
        if self.account is None:
            return site
        copy = self.folder / f"programs-{package}"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for part in parts:
            if (site / part).is_dir():
                shutil.copytree(site / part, copy / part, ignore=shutil.ignore_patterns("include", "*.a"))
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        return copy

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path,
        stdin: int = subprocess.DEVNULL,
        output: IO[bytes] | int,
    ) -> subprocess.Popen[bytes]:
        """Start `argv` as the account, out of reach of the terminal's Ctrl-C: the owner decides its end."""
        account = self.account
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=ENVIRONMENT,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )


def user_place(data_dir: Path) -> Place:
    """Give the place of an ordinary user: the data folder itself.

    Raises:
        StackError: this user has no name, which initdb insists on.

    """
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise StackError(
            "account_without_name",
            f"User id {os.geteuid()} is not among the system's accounts, as Postgres insists: add it, or"
            " set DATABASE_URL and REDIS_URL.",
        ) from None
    return Place(data_dir, None)


def root_place(data_dir: Path, home: Path | None, *, throw_away: bool) -> Place:
    """Give the place of a data folder of root: its home, made now if `home` is None.

    Args:
        data_dir: the data folder, resolved.
        home: the home on record in the data folder.
        throw_away: the home may be swept away once its data folder is gone.

    Raises:
        StackError: the home is gone, belongs to another data folder, or cannot be made safely.

    """
    homes = _make_homes()
    if home is None:
        _sweep(homes)
        home = homes / secrets.token_hex(8)
        home.mkdir(mode=0o700)
        home.chmod(0o711)
    else:
        _check_home(home, data_dir)
    write_private(home / "owner.json", {"data_dir": str(data_dir), "throw_away": throw_away})
    return Place(home, _account(home))


def _make_homes() -> Path:
    HOMES.mkdir(mode=0o700, parents=True, exist_ok=True)
    homes = HOMES.resolve()
    status = homes.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StackError("unsafe_home", f"{homes} must be a folder only root can write to: remove it.")
    homes.chmod(0o711)
    return homes


def _check_home(home: Path, data_dir: Path) -> None:
    mark = read_json(home / "owner.json")
    if not mark:
        raise StackError(
            "home_gone",
            f"The databases of {data_dir} lay in {home}, which is gone: put it back, or begin anew by"
            f" deleting {data_dir / 'state.json'}.",
        )
    owner = Path(mark["data_dir"])
    if owner != data_dir and read_json(owner / "state.json").get("home") == str(home):
        raise StackError(
            "data_folder_copied",
            f"{data_dir} is a copy of {owner} and would share its databases: set ROLLCALL_DATA_DIR to a new folder.",
        )


def _sweep(homes: Path) -> None:
    """Remove the homes of throw-away stacks whose data folder is gone.

    Others stay even then: a data folder that is not there may be on a disk that is not mounted.
    """
    for mark in homes.glob("*/owner.json"):
        owner = read_json(mark)
        if owner.get("throw_away") and not Path(owner["data_dir"]).exists():
            shutil.rmtree(mark.parent, ignore_errors=True)


def _account(home: Path) -> Account:
    """Give the account that owns the databases in `home`, or the best one for new ones."""
    if (home / "postgres").exists():
        status = (home / "postgres").lstat()
        return Account(status.st_uid, status.st_gid)
    for name in ACCOUNT_NAMES:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(entry.pw_uid, entry.pw_gid)
    raise StackError(
        "no_account",
        "Postgres does not run as root, and no unprivileged account was found: add a user 'rollcall', run"
        " as an ordinary user, or set DATABASE_URL and REDIS_URL.",
    )
