"""Fetch tasks: observe parts, then send what may be sent next, of their connectors or into the room they leave."""

from __future__ import annotations

from schemas.connectors import RunKind
from schemas.messages import Fetch
from tasks import bridge
from tasks.app import app
from tasks.sending import advance, refill
from worker.observe import observe
from worker.ports import Failure, Quiet, Returned
from worker.wiring import Runtime

DEADLINE_S = 600.0
"""Four parts in a lane, one after the other, each as long as its deadline allows, and what settles them."""


def _fetch(name: str, message: dict[str, object]) -> None:
    fetch = Fetch.model_validate(message)

    async def work(runtime: Runtime) -> None:
        results = await observe(fetch.part_ids, runtime.ports)
        settled = [r.claim for r in results if isinstance(r, Quiet | Failure | Returned)]
        if any(c.kind is not RunKind.POLL for c in settled) or len(results) < len(fetch.part_ids):
            await advance(runtime, {c.target.connector_id for c in settled})
        if any(r.claim.kind is not RunKind.POLL for r in results):
            await refill(runtime)

    bridge.run(name, work, deadline_s=DEADLINE_S, parts=fetch.part_ids)


@app.task(name="rollcall.fetch_members")
def fetch_members(**message: object) -> None:
    """Observe connectors' directories, and in a poll what goes with them."""
    _fetch("fetch_members", message)


@app.task(name="rollcall.fetch_usage")
def fetch_usage(**message: object) -> None:
    """Observe windows of usage."""
    _fetch("fetch_usage", message)


@app.task(name="rollcall.fetch_service_accounts")
def fetch_service_accounts(**message: object) -> None:
    """Observe service accounts and their keys."""
    _fetch("fetch_service_accounts", message)
