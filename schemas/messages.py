"""Celery messages: keyword arguments, JSON, ids only (never a key or a payload)."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from schemas.connectors import RunKind

MESSAGE_VERSION = 1


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    v: Literal[1] = 1


class RequestSync(_Message):
    """`rollcall.request_sync` on queue `rollcall.sync`: a backend asks for a run.

    `run_id` is chosen by the sender and is the idempotency key; the outcome is the row of that id in
    `sync_runs`.
    """

    tenant_id: Annotated[str, Field(min_length=1, max_length=200)]
    connector_id: UUID
    kind: RunKind = RunKind.POLL
    run_id: UUID
    actor: Annotated[str, Field(min_length=1, max_length=200)] = "backend"


class SyncConnector(_Message):
    """`rollcall.sync_connector`: plan the run and send its first parts."""

    run_id: UUID


class Fetch(_Message):
    """`rollcall.fetch_*`: observe these parts, those of a connector next to each other."""

    part_ids: Annotated[list[UUID], Field(min_length=1, max_length=200)]
