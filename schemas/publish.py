"""Publish the models as JSON Schemas and an AsyncAPI document: `python -m schemas.publish [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, create_model

from schemas import records
from schemas.asyncapi import PlainSchema, asyncapi
from schemas.events import (
    CloudEvent,
    ConnectorAnnouncement,
    Op,
    RecordChange,
    RemovalsAnnouncement,
    ReplayAnnouncement,
    SyncAnnouncement,
    UsageDayChange,
    event_type,
)
from schemas.messages import Fetch, RequestSync, SyncConnector

FOLDER: Final = Path(__file__).with_name("published")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class ResetAnnouncement(BaseModel):
    """`data` of `stream.reset`: groups that lost unread entries of a partition; their subscribers must replay."""

    partition: int
    groups: list[str]


RECORDS: Final[Mapping[str, type[BaseModel]]] = {
    "workspace": records.Workspace,
    "member": records.Member,
    "group": records.Group,
    "service_account": records.ServiceAccount,
    "api_key": records.ApiKey,
    "usage_day": records.UsageDay,
}
MESSAGES: Final[Mapping[str, type[BaseModel]]] = {
    "request_sync": RequestSync,
    "sync_connector": SyncConnector,
    "fetch": Fetch,
}
ANNOUNCEMENTS: Final[Mapping[str, type[BaseModel]]] = {
    **dict.fromkeys(
        (
            f"connector.{what}"
            for what in ("created", "connected", "degraded", "disconnected", "paused", "resumed", "deleted")
        ),
        ConnectorAnnouncement,
    ),
    **dict.fromkeys((f"sync.{what}" for what in ("started", "completed", "failed")), SyncAnnouncement),
    **dict.fromkeys((f"removals.{what}" for what in ("held", "released", "rejected")), RemovalsAnnouncement),
    "replay.completed": ReplayAnnouncement,
    "stream.reset": ResetAnnouncement,
}
"""The `data` of each announcement by its short type."""
OF_CONNECTORS: Final = frozenset({"tenantid", "connectorid", "partitionkey", "sequence", "correlationid"})
"""Attributes that the event of a whole stream, `stream.reset`, has not."""


def event_models() -> dict[str, type[BaseModel]]:
    """Make a model of each event type, by its short type (`member.changed`): the envelope with its data."""
    facts = [_fact(kind) for kind in RECORDS]
    return dict([*facts, *((what, _event(what, data)) for what, data in ANNOUNCEMENTS.items())])


def _fact(kind: str) -> tuple[str, type[BaseModel]]:
    what, record = f"{kind}.changed", RECORDS[kind]
    if record is records.UsageDay:
        # Readers of old events do without `op`; it is always written.
        return what, _event(what, create_model("UsageDayChange", __base__=UsageDayChange, op=(Op, ...)))
    fields: dict[str, Any] = {"before": (record | None, ...), "after": (record | None, ...)}
    return what, _event(what, create_model(f"{record.__name__}Change", __base__=RecordChange, **fields))


def _event(what: str, data: type[BaseModel]) -> type[BaseModel]:
    # The two constants, which a reader may do without, are always written: here they are required.
    fields: dict[str, Any] = {
        "specversion": (Literal["1.0"], ...),
        "datacontenttype": (Literal["application/json"], ...),
        "type": (Literal.__getitem__(event_type(what)), ...),
        "data": (data, ...),
    }
    base: type[BaseModel] = CloudEvent
    if data is ResetAnnouncement:
        kept = {n: (f.annotation, f) for n, f in CloudEvent.model_fields.items() if n not in OF_CONNECTORS}
        source = Annotated[str, Field(description="/streams/<partition>")]
        base, fields = BaseModel, {**kept, **fields, "source": (source, ...)}
    name = "".join(word.capitalize() for word in what.replace("_", ".").split("."))
    return create_model(name, __base__=base, __doc__=f"The event `{event_type(what)}`.", **fields)


def documents() -> dict[str, dict[str, Any]]:
    """Make every published document, by its path below `schemas/published`."""
    events = event_models()
    files = {
        **{f"events/{what}.v1.json": model for what, model in events.items()},
        **{f"records/{name}.json": model for name, model in RECORDS.items()},
        **{f"messages/{name}.json": model for name, model in MESSAGES.items()},
    }
    schemas = {
        path: {"$schema": DIALECT, **model.model_json_schema(schema_generator=PlainSchema)}
        for path, model in files.items()
    }
    return {**schemas, "asyncapi.json": asyncapi(events)}


def write(folder: Path) -> None:
    """Write every document below `folder` and delete what is published no more."""
    made = rendered()
    for path in drifted(folder):
        file = folder / path
        if path not in made:
            file.unlink()
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made[path], encoding="utf-8")


def drifted(folder: Path) -> list[str]:
    """List the documents below `folder` that differ from the models, are missing, or are published no more."""
    made = rendered()
    found = {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in folder.rglob("*.json")}
    return sorted(path for path in made.keys() | found.keys() if made.get(path) != found.get(path))


def rendered() -> dict[str, str]:
    """Give the text of every document; the same models give the same text."""
    return {path: json.dumps(document, indent=2, ensure_ascii=False) + "\n" for path, document in documents().items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents, or with `--check` only name those that drifted; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m schemas.publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document has drifted")
    check = parser.parse_args(arguments).check
    changed = drifted(FOLDER)
    if check:
        sys.stderr.writelines(f"{path} has drifted: run python -m schemas.publish\n" for path in changed)
        return 1 if changed else 0
    write(FOLDER)
    sys.stdout.writelines(f"{path}\n" for path in changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
