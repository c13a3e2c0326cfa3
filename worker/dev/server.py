"""How a server's processes begin, end, and are found again."""

from __future__ import annotations

import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from pydantic import SecretStr

from worker.dev.accounts import Place
from worker.dev.folder import StackError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
DEATH_TIMEOUT_S = 10.0
POLL_S = 0.02
LOG_LIMIT_BYTES = 10_000_000
LOG_TAIL_LINES = 15


class Server(ABC):
    """One server of the stack: a child process that is shut down when this one dies, however it dies.

    A process is ours when its working directory is our folder, where both servers go at their start. No
    number in a file is trusted, since the system gives process ids anew. One owner starts and stops it, from
    one thread at a time.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, place: Place, *, port: int, password: SecretStr, log: Path) -> None:
        self.place = place
        self.port = port
        self.password = password
        self.log = log
        self.folder = place.folder / self.name.lower()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> SecretStr:
        """The address clients use, with the password."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make the folder ready for a start; nothing of ours runs in it."""

    @abstractmethod
    def _command(self) -> tuple[list[str | Path], str]:
        """Give the arguments, which all on the machine can read, and what stdin says, which nobody can."""

    @abstractmethod
    def _answers(self) -> bool:
        """Tell whether the server serves requests."""

    @property
    def pid(self) -> int | None:
        """The id of the server's first process, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start and wait until it answers; what an earlier life left running is shut down first.

        Raises:
            StackError: it ended, or did not answer in time; the message ends with the tail of its log.

        """
        if self.pid is not None:
            return
        give_up = time.monotonic() + timeout_s
        log_start = self._rotate_log()
        try:
            self.stop()
            self._prepare()
            self._launch()
            self._await_answer(give_up, log_start)
        except (OSError, subprocess.SubprocessError) as error:
            self.kill()
            raise self._failure(f"cannot be started ({error})", log_start) from error
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut down in order, without waiting for clients; SIGKILL to what is left after `timeout_s`."""
        self._dismiss_guard()
        self.resume()
        found = self._processes()
        _send(_heads(found), self.stop_signal)
        _await_end(found, timeout_s)
        self.kill()

    def kill(self) -> None:
        """End every process of the server by SIGKILL, as a crash would.

        Raises:
            StackError: the system does not let go of one.

        """
        self._dismiss_guard()
        self.pause()
        found = self._processes()
        _send(found, signal.SIGKILL)
        if left := _await_end(found, DEATH_TIMEOUT_S):
            raise StackError("server_stuck", f"{self.name} does not end: end process {left[0].pid} by hand.")
        if self._process is not None:
            self._process.wait(DEATH_TIMEOUT_S)
            self._process = None

    def pause(self) -> None:
        """Freeze every process of the server: connections stay open, nothing answers."""
        for _ in range(2):  # the second round finds what the first process forked before it froze
            _send(self._processes(), signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        _send(self._processes(), signal.SIGCONT)

    def _processes(self) -> list[Any]:
        """Find every process of the server; our own child even when its folder was deleted under it."""
        psutil, own = _psutil(), self.pid
        found = []
        for number in psutil.pids():
            with suppress(psutil.Error, OSError):  # it ended meanwhile, or is none of this account's
                process = psutil.Process(number)
                if number == own or (process.name() == self.program and self.folder.samefile(process.cwd())):
                    found.append(process)
        return found

    def _launch(self) -> None:
        command, said = self._command()
        with self.log.open("ab") as log:
            self._process = self.place.spawn(command, cwd=self.folder, stdin=subprocess.PIPE, output=log)
        with suppress(BrokenPipeError):  # it ended at once, as the caller will see
            _say(self._process, said)
        signal_name = self.stop_signal.name.removeprefix("SIG")
        self._guard = self.place.spawn(
            ["/bin/sh", "-c", f"read -r _ || kill -s {signal_name} {self._process.pid}"],
            cwd=Path("/"),
            stdin=subprocess.PIPE,
            output=subprocess.DEVNULL,
        )

    def _await_answer(self, give_up: float, log_start: int) -> None:
        while not self._answers():
            if self.pid is None:
                raise self._failure("ended at once", log_start)
            if time.monotonic() > give_up:
                raise self._failure("did not answer in time", log_start)
            time.sleep(POLL_S)

    def _dismiss_guard(self) -> None:
        """Release the shell that waits on a pipe only we hold open, to signal the server if we die."""
        if self._guard is not None:
            with suppress(BrokenPipeError):  # it was ended by somebody else
                _say(self._guard, "\n")
            self._guard.wait(DEATH_TIMEOUT_S)
            self._guard = None

    def _rotate_log(self) -> int:
        size = self.log.stat().st_size if self.log.exists() else 0
        if size <= LOG_LIMIT_BYTES:
            return size
        self.log.replace(self.log.with_suffix(".log.1"))
        return 0

    def _failure(self, what: str, log_start: int) -> StackError:
        said = self.log.read_bytes()[log_start:].decode(errors="replace") if self.log.exists() else ""
        tail = "\n".join(said.splitlines()[-LOG_TAIL_LINES:])
        return StackError("server_failed", f"{self.name} {what}; its log ({self.log}) ends with:\n{tail}")


def _say(process: subprocess.Popen[bytes], words: str) -> None:
    with cast(IO[bytes], process.stdin) as stdin:
        stdin.write(words.encode())


def _psutil() -> Any:
    """Load psutil late: it comes with the extra, and without that there is a better message."""
    return import_module("psutil")


def _send(processes: Iterable[Any], number: signal.Signals) -> None:
    for process in processes:
        with suppress(_psutil().NoSuchProcess):
            process.send_signal(number)


def _heads(processes: Sequence[Any]) -> list[Any]:
    """Give those that no other one is the parent of: they end their children themselves."""
    numbers = {process.pid for process in processes}
    heads = []
    for process in processes:
        with suppress(_psutil().NoSuchProcess):
            if process.ppid() not in numbers:
                heads.append(process)
    return heads


def _await_end(processes: Sequence[Any], timeout_s: float) -> list[Any]:
    """Wait until all have ended (a zombie has); give those that have not after `timeout_s`."""
    give_up = time.monotonic() + timeout_s
    while left := [process for process in processes if _lives(process)]:
        if time.monotonic() > give_up:
            break
        time.sleep(POLL_S)
    return left


def _lives(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != _psutil().STATUS_ZOMBIE)
    except _psutil().NoSuchProcess:
        return False
