"""Watching: events as they leave the stream, and waiting for the one that must come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson
from redis.asyncio import Redis
from rich.console import Console
from rich.text import Text

from schemas.events import PREFIX
from worker.errors import TryLater
from worker.redis import answering
from worker.snapshots import stream_key

Event = dict[str, Any]


class Watcher:
    """Reads every partition as any subscriber would, prints what it is told to show, and remembers all."""

    def __init__(self, redis: Redis, partitions: int, console: Console, names: dict[str, str]) -> None:
        self._redis, self._console, self.names = redis, console, names
        self._at: dict[Any, Any] = {stream_key(n): b"0-0" for n in range(partitions)}
        self.events: list[Event] = []
        self.show = False
        self._news = asyncio.Condition()

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            with answering():
                found: Any = await self._redis.xread(self._at, count=100, block=500)
            async with self._news:
                for key, entries in found.items() if isinstance(found, dict) else found or []:
                    for entry_id, fields in entries:
                        self._at[key.decode()] = entry_id
                        self._take(orjson.loads(fields[b"ce"]))
                self._news.notify_all()

    def _take(self, batch: list[Event]) -> None:
        self.events += batch
        if self.show:
            for event in batch:
                self._console.print(self._line(event), soft_wrap=True)

    def _line(self, event: Event) -> Text:
        what = event["type"].removeprefix(PREFIX).removesuffix(".v1")
        name = self.names.get(event.get("connectorid", ""), "")
        return Text.assemble(
            ("  event ", "dim"),
            (f"{name:<9}", "cyan"),
            (f"{what:<24}", "bold"),
            f"{event['subject']:<34}  ",
            (_summary(event["data"]), "dim"),
        )

    async def wait_for(self, wanted: Callable[[Event], bool], *, since: int, within_s: float, what: str) -> Event:
        """Wait for an event among those after the first `since`.

        Raises:
            TryLater: it did not come in time.

        """
        until = time.monotonic() + within_s
        async with self._news:
            while True:
                for event in self.events[since:]:
                    if wanted(event):
                        return event
                left = until - time.monotonic()
                if left <= 0:
                    raise TryLater("demo_late", f"This did not come within {within_s:.0f} s: {what}")
                try:
                    async with asyncio.timeout(left):
                        await self._news.wait()
                except TimeoutError:
                    continue


def _summary(data: dict[str, Any]) -> str:
    if data.get("changed"):
        return ", ".join(f"{n}: {_short(data['before'][n])} -> {_short(data['after'][n])}" for n in data["changed"])
    if "rows" in data:
        return ", ".join(f"{amount} {unit}" for unit, amount in data["totals"].items()) or "no usage"
    if "op" in data:
        return {"c": "new", "d": "gone"}.get(data["op"], "")
    if "access" in data:
        missing = sorted({a["missing_permission"] for a in data["access"] if a.get("missing_permission")})
        words = [data["reason"] or "", f"add {', '.join(missing)}" if missing else "", f"action: {data['action']}"]
        return "; ".join(w for w in words if w and w != "action: none")
    return str(data.get("status", ""))


def _short(value: object) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else str(value)
