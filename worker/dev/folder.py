"""The data folder: private files written whole, secrets, the lock, and word of the running stack."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import orjson
from pydantic import SecretStr

from worker.errors import RollcallError

LOCK_WAIT_S = 1.0
"""`find_running` holds the lock for an instant."""
SECRETS_WAIT_S = 10.0
POLL_S = 0.02
ADVICE = "set ROLLCALL_DATA_DIR to a folder of your own"


class StackError(RollcallError):
    """The embedded stack cannot run; the message says what to do."""


def load_or_create_secret(data_dir: Path, name: str, make: Callable[[], str]) -> SecretStr:
    """Give the secret `name` of the data folder; the first caller's `make` decides what it is, for good.

    Raises:
        StackError: the folder is not fit, or its `secrets.json` damaged or locked for too long.

    """
    make_private(data_dir)
    folder = os.open(data_dir, os.O_RDONLY)
    try:
        if not _lock_file(folder, fcntl.LOCK_EX, SECRETS_WAIT_S):
            raise StackError("secrets_locked", f"Another program holds {data_dir}: try again.")
        known = read_json(data_dir / "secrets.json")
        if name not in known:
            known[name] = make()
            write_private(data_dir / "secrets.json", known)
        return SecretStr(known[name])
    finally:
        os.close(folder)


def write_running(data_dir: Path, info: dict[str, Any]) -> None:
    """Tell other terminals about the stack that this process runs; adds to what it told before."""
    path = data_dir / "stack.json"
    write_private(path, read_json(path) | info | {"pid": os.getpid()})


def find_running(data_dir: Path) -> dict[str, Any] | None:
    """Give what the stack that runs on the folder told of itself: pid, addresses; None when none runs.

    What a killed one left behind does not count: the system let its lock go.
    """
    try:
        lock = os.open(data_dir / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if _lock_file(lock, fcntl.LOCK_SH, 0):
            return None
        holder = _holder(lock)
    finally:
        os.close(lock)
    info = read_json(data_dir / "stack.json")
    return info if str(info.get("pid")) == holder else None


def take_lock(data_dir: Path) -> int:
    """Take the folder's lock for this process until the returned file is closed, or the process dies.

    Raises:
        StackError: another process has it.

    """
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if not _lock_file(lock, fcntl.LOCK_EX, LOCK_WAIT_S):
        holder = _holder(lock)
        os.close(lock)
        raise StackError(
            "stack_running",
            f"A stack on {data_dir} is already running (pid {holder}); use it, stop it, or set"
            " ROLLCALL_DATA_DIR to another folder.",
        )
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    (data_dir / "stack.json").unlink(missing_ok=True)
    return lock


def _holder(lock: int) -> str:
    return os.pread(lock, 20, 0).decode(errors="replace")


def _lock_file(opened: int, kind: int, wait_s: float) -> bool:
    give_up = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(opened, kind | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= give_up:
            return False
        time.sleep(POLL_S)


def make_private(folder: Path) -> None:
    """Make the data folder, or see that the existing one is the user's and closed to others.

    An empty one is closed here; one with something in it may be meant to be open: that is for the user to do.

    Raises:
        StackError: it cannot be used as it is.

    """
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        status = folder.stat()
        if status.st_uid == os.geteuid() and _is_open(status) and not any(folder.iterdir()):
            folder.chmod(0o700)
            status = folder.stat()
    except OSError as error:
        message = f"{folder} cannot be used ({error.strerror}): {ADVICE}."
        raise StackError("data_folder_unfit", message) from error
    if status.st_uid != os.geteuid():
        raise StackError("data_folder_foreign", f"{folder} belongs to user id {status.st_uid}: {ADVICE}.")
    if _is_open(status):
        raise StackError("data_folder_open", f"{folder} is open to others: chmod it to 700, or {ADVICE}.")


def _is_open(status: os.stat_result) -> bool:
    return bool(stat.S_IMODE(status.st_mode) & 0o077)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; `{}` when there is no file.

    Raises:
        StackError: the file is damaged.

    """
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except orjson.JSONDecodeError:
        raise StackError("data_folder_damaged", f"{path} is damaged: put back a copy of it.") from None
    return content


def write_private(path: Path, content: dict[str, Any]) -> None:
    """Write a file of mode 0600, whole or not at all, even if the machine crashes."""
    draft = path.with_name(f".{path.name}.{token_hex(4)}")
    opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(opened, "wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(opened)
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in `folder` outlive a crash of the machine."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
