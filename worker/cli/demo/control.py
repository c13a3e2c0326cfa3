"""The simulator's control door, as the demo uses it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import aiohttp

from worker.errors import Refused, TryLater

TIMEOUT_S = 30.0


class Control:
    """Shapes workspaces at a simulator; owns one HTTP session."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def create(self, workspace: str, **shape: object) -> dict[str, Any]:
        """Create a workspace; its `api_key` reads it."""
        found: dict[str, Any] = await self._ask("PUT", f"workspaces/{workspace}", shape)
        return found

    async def mutate(self, workspace: str, *operations: dict[str, Any]) -> list[dict[str, Any]]:
        """Change a workspace at once; return what was done."""
        done: list[dict[str, Any]] = await self._ask("POST", f"workspaces/{workspace}/mutate", list(operations))
        return done

    async def mint(self, workspace: str) -> str:
        """Make another access key for the workspace."""
        return str((await self._ask("POST", f"workspaces/{workspace}/keys", {}))["api_key"])

    async def kill(self, workspace: str, key_id: str) -> None:
        """Delete an access key: the provider answers it as one it never saw."""
        await self._ask("POST", f"workspaces/{workspace}/keys/{key_id}/kill", {"how": "deleted"})

    async def latency(self, milliseconds: int) -> None:
        """Delay every answer of the provider."""
        await self._ask("POST", "latency", {"ms": milliseconds})

    async def truth(self, workspace: str, first_day: str, last_day: str) -> dict[str, Any]:
        """Read what the workspace really holds."""
        found: dict[str, Any] = await self._ask("GET", f"workspaces/{workspace}/truth?from={first_day}&to={last_day}")
        return found

    async def requests(self, workspace: str) -> int:
        """Count the requests a workspace was asked so far."""
        stats = await self._ask("GET", "stats")
        return int(sum(stats["requests"].get(workspace, {}).values()))

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        if self._session is None:
            raise RuntimeError("use the control inside `async with`")
        try:
            async with self._session.request(method, f"{self.url}/_control/{path}", json=body) as answer:
                found = await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TryLater("simulator_unreachable", f"The simulator does not answer: {type(error).__name__}") from None
        if answer.status >= 400:  # noqa: PLR2004 - HTTP
            raise Refused("simulator_refused", f"The simulator refused {path}: {found}")
        return found
