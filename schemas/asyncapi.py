"""The AsyncAPI 3 document: the event streams, and the door for asking for a sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from schemas.connectors import Dataset
from schemas.events import MAX_BATCH, event_type
from schemas.messages import RequestSync

_NUMBER: Final = {"type": "string", "pattern": r"^\d+$"}
FACT_FIELDS: Final[Mapping[str, Any]] = {
    "dataset": {"type": "string", "enum": [str(dataset) for dataset in Dataset]},
    "base": {**_NUMBER, "description": "the version that the observation was compared with"},
    "sequence": {**_NUMBER, "description": "the observation's number: the version after it"},
    "part": {"type": "string", "format": "uuid", "description": "on the last entry of an observation"},
    "report": {"type": "string", "description": "on the last entry; Rollcall's own, may change"},
}
CELERY_HEADERS: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "lang": {"type": "string", "description": "the sender's language, for information"},
        "task": {"const": "rollcall.request_sync"},
        "id": {"type": "string", "description": "the message's own id, a UUID; `run_id` serves well"},
    },
    "required": ["task", "id"],
}


class PlainSchema(GenerateJsonSchema):
    """JSON Schema without titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
        """Leave them out."""
        return False


def asyncapi(events: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Make the document from the models of the events, by their short types."""
    models: list[tuple[type[BaseModel], Literal["validation"]]] = [(m, "validation") for m in events.values()]
    refs, shared = models_json_schema(
        [*models, (RequestSync, "validation")],
        ref_template="#/components/schemas/{model}",
        schema_generator=PlainSchema,
    )
    messages = {
        what: {
            "name": event_type(what),
            "contentType": "application/cloudevents+json",
            "headers": {"$ref": f"#/components/schemas/{'FactEntry' if what.endswith('.changed') else 'Entry'}"},
            "payload": refs[model, "validation"],
        }
        for what, model in events.items()
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Rollcall",
            "version": "1",
            "description": "Change events of ElevenLabs workspaces on Redis Streams, and the door for asking for a"
            " sync. The version is the contract's, not the program's.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {"events": _events_channel(list(messages)), "requests": _requests_channel()},
        "operations": {
            "publishEvents": {"action": "send", "channel": {"$ref": "#/channels/events"}},
            "receiveRequestSync": {"action": "receive", "channel": {"$ref": "#/channels/requests"}},
        },
        "components": {
            "messages": {**messages, "request_sync": _request_message()},
            "schemas": {
                **shared["$defs"],
                "Entry": _entry({}, []),
                "FactEntry": _entry(FACT_FIELDS, ["connector", "dataset", "base", "sequence"]),
                "CeleryHeaders": CELERY_HEADERS,
            },
        },
    }


def _events_channel(messages: Sequence[str]) -> dict[str, Any]:
    return {
        "address": "rollcall:events:{n}",
        "title": "Event streams",
        "description": f"Redis Streams. The field `ce` of an entry is a JSON array of up to {MAX_BATCH} of these"
        " messages, all of one connector; the headers are the entry's fields. The entries of an observation are"
        " adjacent, and the last one carries `part`: apply it whole if `base` is the version you hold for"
        " (connector, dataset), skip it if `sequence` is not above yours, else replay that dataset.",
        "parameters": {
            "n": {
                "description": "The partition's number in braces; the braces are part of the key.",
                "default": "{0}",
                "examples": ["{0}", "{1}", "{2}", "{3}"],
            }
        },
        "messages": {what: {"$ref": f"#/components/messages/{what}"} for what in messages},
    }


def _requests_channel() -> dict[str, Any]:
    return {
        "address": "rollcall.sync",
        "title": "The door for backends",
        "description": "A Celery queue, protocol 2: on AMQP the queue of this name, on Redis the list"
        " `rollcall.sync`. The outcome is the row `run_id` of the table `sync_runs`.",
        "messages": {"request_sync": {"$ref": "#/components/messages/request_sync"}},
    }


def _request_message() -> dict[str, Any]:
    return {
        "name": "rollcall.request_sync",
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/CeleryHeaders"},
        "payload": {
            "type": "array",
            "description": "Positional arguments (none), keyword arguments, and what else a task may be told.",
            "items": [
                {"type": "array", "maxItems": 0},
                {"$ref": "#/components/schemas/RequestSync"},
                {"type": "object"},
            ],
            "minItems": 3,
            "maxItems": 3,
        },
    }


def _entry(fields: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    text = "Fields of a stream entry; all values are text."
    about = {
        "ce": {
            "type": "string",
            "contentMediaType": "application/cloudevents-batch+json",
            "description": f"the events, up to {MAX_BATCH}; may be an empty array",
        },
        "connector": {"type": "string", "format": "uuid", "description": "on all but `stream.reset`"},
        **fields,
    }
    return {"type": "object", "description": text, "properties": about, "required": ["ce", *required]}
