"""Watching processes: CPU seconds and peak memory of each, its children included."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped] # it publishes no types

LOOK_S = 0.5
MIB = 1 << 20


def cpu_s(pid: int) -> float:
    """Give the CPU seconds of a process and all its descendants, those that ended included."""
    first = psutil.Process(pid)
    spent = 0.0
    for process in (*first.children(recursive=True), first):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        # What a process has waited for counts as its own: nothing is lost or doubled when a child ends.
        spent += times.user + times.system + times.children_user + times.children_system
    return spent


def machine_cpu_s() -> float:
    """Give the CPU seconds that the whole machine has spent on anything."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def rss_mib(pid: int) -> float:
    """Give the resident memory of a process's largest member (Postgres backends share most of theirs)."""
    sizes = [0]
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            sizes.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return max(sizes) / MIB


class Watch:
    """Measures a `with` block: `seconds`, `cpu` seconds and `peak_mib` by process name.

    `foreign_cores` is how many cores were busy with what does not belong to the bench: above a few tenths, speeds
    say little, while CPU per record still does.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.seconds = 0.0
        self.foreign_cores = 0.0
        self.cpu: dict[str, float] = {}
        self.peak_mib = dict.fromkeys(self._pids, 0.0)

    def __enter__(self) -> Self:
        self._before = {name: cpu_s(pid) for name, pid in self._pids.items()}
        self._others_before = machine_cpu_s() - cpu_s(os.getpid())
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        if kind is None:
            self.cpu = {name: cpu_s(pid) - self._before[name] for name, pid in self._pids.items()}
            others = machine_cpu_s() - cpu_s(os.getpid()) - self._others_before
            self.foreign_cores = max(0.0, others / self.seconds)

    def _look(self) -> None:
        while True:
            for name, pid in self._pids.items():
                try:
                    self.peak_mib[name] = max(self.peak_mib[name], rss_mib(pid))
                except psutil.NoSuchProcess:
                    continue
            if self._stop.wait(LOOK_S):
                return

    def cpu_per(self, count: float, *, scale: float, prefix: str) -> dict[str, float]:
        """Give CPU per counted thing by process name and in `total`, times `scale` (1e6: microseconds)."""
        found = {f"{prefix}.{name}": spent / count * scale for name, spent in self.cpu.items()}
        return {**found, f"{prefix}.total": sum(self.cpu.values()) / count * scale}

    def peaks(self) -> dict[str, float]:
        """Give the peak memory by process name."""
        return {f"peak_mib.{name}": size for name, size in self.peak_mib.items()}
