"""Sync tasks: the backend's door, and the planning of asked-for runs."""

from __future__ import annotations

import asyncio

import structlog
from pydantic import ValidationError

from schemas.connectors import RunStatus
from schemas.messages import RequestSync, SyncConnector
from tasks import bridge
from tasks.app import app, send_sync
from tasks.sending import deliver
from worker.connectors import request_sync as request
from worker.errors import Refused
from worker.wiring import Runtime

log = structlog.get_logger()
DEADLINE_S = 60.0


@app.task(name="rollcall.request_sync")
def request_sync(**message: object) -> None:
    """Ask for a run; the outcome, a refusal too, is the row `run_id` of `sync_runs`."""
    try:
        asked = RequestSync.model_validate(message)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) or "message" for e in error.errors())
        log.error("request_sync_malformed", fields=fields)  # noqa: TRY400 - the values are not ours to log
        return

    async def work(runtime: Runtime) -> None:
        run = await request(
            runtime.registry,
            tenant_id=asked.tenant_id,
            connector_id=asked.connector_id,
            kind=asked.kind,
            run_id=asked.run_id,
            actor=asked.actor,
        )
        if run["status"] == RunStatus.QUEUED:
            await asyncio.to_thread(send_sync, run["id"])

    try:
        bridge.run("request_sync", work, deadline_s=DEADLINE_S)
    except Refused as error:
        log.error("request_sync_refused", reason=error.reason, detail=error.message)  # noqa: TRY400 - no bug of ours


@app.task(name="rollcall.sync_connector")
def sync_connector(**message: object) -> None:
    """Plan a run and send its first parts."""
    asked = SyncConnector.model_validate(message)

    async def work(runtime: Runtime) -> None:
        await deliver(runtime.dispatch, await runtime.dispatch.plan_run(asked.run_id))

    bridge.run("sync_connector", work, deadline_s=DEADLINE_S)
